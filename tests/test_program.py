"""What is decided before a role runs: the tunnel network, and whether it would cut off its own host."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address, ip_interface
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.config import DEFAULT_NETWORK, FALLBACK_DNS, Link, ServerSettings, free_network
from mptunnel.errors import ConfigError
from mptunnel.program import _network_of, offered_dns
from mptunnel.state import StateDir

if TYPE_CHECKING:
    from pathlib import Path

OTHER = IPv4Network("10.77.0.0/24")


def link(*addresses: str, name: str = "eth0") -> Link:
    return Link(name, 2, "", True, tuple(map(ip_interface, addresses)), None, None, 1500)


def of(tmp_path: Path, *addresses: str, wished: IPv4Network | None = None) -> IPv4Network:
    network: IPv4Network = _network_of(StateDir(tmp_path), ServerSettings(network4=wished), (link(*addresses),)).ipv4
    return network


def test_a_new_servers_network_is_none_of_its_host() -> None:
    assert free_network([link("192.0.2.7/24", "2001:db8::1/64")]) == DEFAULT_NETWORK
    for address in ("10.0.1.37/24", "10.0.1.37/32", "10.200.0.1/8", "10.0.0.1/16"):
        assert not free_network([link(address)]).overlaps(ip_interface(address).network)
    both = [link("10.0.1.37/24"), link("10.91.1.1/16", name="eth1")]
    assert free_network(both) == IPv4Network("172.27.91.0/24")


def test_it_stays_what_it_was(tmp_path: Path) -> None:
    first = of(tmp_path, "10.0.1.37/24")
    assert first != DEFAULT_NETWORK
    assert of(tmp_path, "192.0.2.7/24") == first
    assert of(tmp_path, "192.0.2.7/24", wished=OTHER) == OTHER
    assert of(tmp_path, "192.0.2.7/24") == OTHER


@pytest.mark.parametrize("wished", [None, OTHER])
def test_a_host_that_would_be_cut_off_is_spared(tmp_path: Path, wished: IPv4Network | None) -> None:
    assert of(tmp_path, "192.0.2.7/24") == DEFAULT_NETWORK
    address = "10.77.0.9/24" if wished else "10.0.1.9/24"
    with pytest.raises(ConfigError, match=r"in use at eth0 .*cut off.*--network") as refused:
        of(tmp_path, address, wished=wished)
    assert ("all the same" in str(refused.value)) is (wished is None), "what helps only where it is stored already"
    assert of(tmp_path, "192.0.2.7/24") == DEFAULT_NETWORK, "and nothing was written"
    if wished is None:
        assert of(tmp_path, address, wished=DEFAULT_NETWORK) == DEFAULT_NETWORK, "who insists has it"


def test_a_larger_network_around_it_is_warned_of_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert of(tmp_path, "192.0.2.7/24") == DEFAULT_NETWORK
    assert of(tmp_path, "10.5.5.5/8") == DEFAULT_NETWORK
    assert "is also in use at eth0 (10.5.5.5/8)" in caplog.text


QUAD9, OWN4 = ip_address("9.9.9.9"), ip_address("192.0.2.53")
OWN6, MORE6 = ip_address("2001:db8::53"), ip_address("2001:db8::54")


@pytest.mark.parametrize(
    ("found", "has_ipv6", "offered"),
    [
        ((), True, FALLBACK_DNS),
        ((OWN6, MORE6), True, (OWN6, QUAD9)),
        ((OWN6, MORE6), False, FALLBACK_DNS),
        ((OWN6, MORE6, OWN4), True, (OWN6, OWN4)),
        ((OWN6, OWN4), False, (OWN4,)),
        ((OWN4, OWN6, MORE6), True, (OWN4, OWN6)),
        ((OWN4,), True, (OWN4,)),
        ((OWN6,), True, (OWN6, QUAD9)),
    ],
)
def test_one_resolver_at_least_is_asked_by_ipv4_and_none_by_what_does_not_go_on(
    found: tuple[Any, ...], offered: tuple[Any, ...], *, has_ipv6: bool
) -> None:
    assert offered_dns(found, has_ipv6=has_ipv6) == offered
