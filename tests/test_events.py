"""What the core asks of the world, and how it names a way out."""

from __future__ import annotations

from ipaddress import IPv4Address

from mptunnel.events import Endpoint, OpenPath, SaveState, Transmit


def test_an_endpoint_is_written_as_people_write_it() -> None:
    assert str(Endpoint("::ffff:192.0.2.1", 5000, 0, b"")) == "192.0.2.1:5000"
    assert str(Endpoint("192.0.2.1", 5000, 0, b"")) == "192.0.2.1:5000"
    assert str(Endpoint("2001:db8::1", 5000, 0, b"")) == "[2001:db8::1]:5000"
    assert Endpoint("::ffff:192.0.2.1", 5000, 0, b"").plain_host == "192.0.2.1"
    assert Endpoint("2001:db8::ffff:1", 5000, 0, b"").plain_host == "2001:db8::ffff:1"


def test_endpoints_differ_by_the_local_address_and_the_scope_too() -> None:
    one = Endpoint("fe80::1", 5000, 2, b"a")
    assert len({one, one._replace(scope=3), one._replace(local=b"b"), one._replace(port=1), Endpoint(*one)}) == 4


def test_what_is_saved_is_not_shown() -> None:
    assert "secret" not in repr(SaveState("server/key", {"private_key": "secret"}))


def test_events_are_values() -> None:
    ask = OpenPath(1, "wan0", IPv4Address("192.0.2.2"), (IPv4Address("198.51.100.1"), 5000), 0)
    assert ask == OpenPath(1, "wan0", IPv4Address("192.0.2.2"), (IPv4Address("198.51.100.1"), 5000), 0)
    assert Transmit(0, b"ab", 1) == Transmit(0, b"ab", 1)
