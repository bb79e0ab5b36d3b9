"""The program: what a role needs is opened in an order in which a refusal leaves nothing behind, and given back.

`run_server` and `run_client` take the locks, read the state, open what they need, run the loop until it is told to
stop, and put the host back as it was, also when something goes wrong on the way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface
from typing import TYPE_CHECKING, Any, NoReturn

from mptunnel import host, netlink, udp
from mptunnel.client import Client, Membership
from mptunnel.config import (
    FALLBACK_DNS,
    DnsMode,
    client_line,
    free_network,
    neighbours,
    new_network,
    public_address,
    server_argument,
)
from mptunnel.errors import ConfigError, MptunnelError
from mptunnel.events import RunScript, SaveState
from mptunnel.loop import STOPPING, ClientLoop, ServerLoop, now
from mptunnel.membership import find_membership
from mptunnel.messages import Capability
from mptunnel.plan import Tunnel, path_values, tunnel_values
from mptunnel.server import Offer, Server
from mptunnel.state import StateDir, hold_lock
from mptunnel.tun import Tun
from mptunnel.uplinks import Uplinks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mptunnel.config import ClientSettings, Link, ServerSettings, Settings
    from mptunnel.events import ScriptValue

    IPAddress = IPv4Address | IPv6Address

log = logging.getLogger(__name__)


def run_server(settings: ServerSettings) -> None:
    """Be the server until told to stop. Raises MptunnelError."""
    state = StateDir(settings.state_dir)
    the_host, device = _host_of("server", settings)
    if settings.dry_run:
        network = state.network() or new_network(settings.network4 or free_network(netlink.snapshot()), os.urandom)
        the_host.run("up", _server_values(settings, network, ()))
        return
    _protect_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stopped_in_order())
        stack.enter_context(hold_lock(settings.run_dir / f"{device}.lock"))
        stack.enter_context(state.lock_server())
        key = state.server_key()
        peers, tokens = state.peers(), state.tokens()
        links = netlink.snapshot()
        network = _network_of(state, settings, links)
        reserved = state.timestamp("server")
        sock = udp.ServerSocket(settings.port, offload=settings.offload)
        stack.callback(sock.close)
        tun = Tun(device, settings.mtu, offload=settings.offload)
        stack.callback(tun.close)
        host.restore(settings.run_dir, device, settings.script)
        offer = _offer(settings, links)
        setup = RunScript("up", _server_values(settings, network, offer.dns))
        moment = now()
        role = Server(
            key.private_key,
            network,
            peers,
            tokens,
            offer,
            capabilities=_capabilities(tun),
            reserved=reserved.reserved if reserved else 0,
            port=settings.port,
            entropy=os.urandom,
            rng=random.Random(),  # noqa: S311  jitter only
            now=moment,
            wall=time.time(),
            device=device,
            setup=setup if settings.uses_our_script else None,
        )
        token = role.make_first_token(moment) or role.take_token_file(state.text("server/join-token") or "")
        _save_now(role, state, moment)
        stack.callback(host.restore, settings.run_dir, device, settings.script)
        stack.callback(_ignore_signals)  # first of all, wherever it ends
        the_host.run(setup.verb, setup.values)
        loop = ServerLoop(settings, role, tun, the_host, state, sock, partial(_look_for_offer, settings))
        stack.callback(loop.finish)
        log.info("listening on UDP port %d, tunnel network %s and %s", settings.port, network.ipv4, network.ipv6)
        _tell_first_line(settings, links, token)
        stack.callback(_ignore_signals)
        loop.run()


def run_client(settings: ClientSettings) -> None:
    """Be a client until told to stop. Raises MptunnelError."""
    state = StateDir(settings.state_dir)
    the_host, device = _host_of("client", settings)
    if settings.dry_run:
        _show_client_plan(settings, the_host)
        return
    _protect_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stopped_in_order())
        stack.enter_context(hold_lock(settings.run_dir / f"{device}.lock"))
        host.restore(settings.run_dir, device, settings.script)  # names are asked past what a killed run has left
        settings, membership = find_membership(settings, state, log)
        reserved = state.timestamp("client")
        links = netlink.snapshot()
        Uplinks(settings.interfaces).check(links)
        servers = _addresses_of(settings, membership)
        tun = Tun(device, settings.mtu, offload=settings.offload)
        stack.callback(tun.close)
        moment = now()
        role = Client(
            settings,
            membership,
            servers,
            capabilities=_capabilities(tun),
            reserved=reserved.reserved if reserved else 0,
            kept=netlink.kept_connections(),
            entropy=os.urandom,
            rng=random.Random(),  # noqa: S311  jitter only
            now=moment,
            wall=time.time(),
            book=state.path_book(membership.record.file_name),
        )
        _save_now(role, state, moment)
        stack.callback(host.restore, settings.run_dir, device, settings.script)
        stack.callback(_ignore_signals)  # first of all, wherever it ends
        loop = ClientLoop(settings, role, tun, the_host, state)
        stack.callback(loop.finish)
        role.links_changed(links, now())
        stack.callback(_ignore_signals)
        loop.run()


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the start as an exception, so that what was changed by then is taken back.

    Those that were ignored when we began, as nohup(1) does, still are.
    """
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _stop:  # not where the end is near
                signal.signal(number, handler)


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _ignore_signals() -> None:
    """We are stopping already: whoever says so again must not leave the host half taken back."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _capabilities(tun: Tun) -> Capability:
    """What our HELLO offers: partial checksums only where the device can finish them."""
    return Capability.MULTIPATH | (Capability.PARTIAL_CHECKSUMS if tun.takes_tcp else Capability(0))


def _host_of(role: str, settings: Settings) -> tuple[host.Host, str]:
    script = host.find_script(role, settings)
    device = settings.device
    return host.Host(script, host.instance(settings.run_dir, device), dry_run=settings.dry_run), device


def _save_now(role: Client | Server, state: StateDir, moment: float) -> None:
    """Save what the role asks for at its birth before anything is sent: keys, tokens, the timestamp's reservation."""
    for event in role.events():
        if isinstance(event, SaveState):
            try:
                state.save(event.name, event.document)
            except MptunnelError as error:
                role.job_done(event, error, moment)
            else:
                role.job_done(event, None, moment)


def _network_of(state: StateDir, settings: ServerSettings, links: tuple[Link, ...]) -> Any:
    known = state.network()
    if known is None:
        network = new_network(settings.network4 or free_network(links), os.urandom)
    elif known.ipv4 == settings.network4:  # whoever says so again insists
        return known
    elif settings.network4 is None:
        network = known
    else:
        if any(peer.removed is None for peer in state.peers()):
            raise ConfigError(
                f"--network {settings.network4}: this server's clients live in {known.ipv4}; remove them first "
                "('mptunnel peer remove NAME'), or leave --network out"
            )
        network = replace(known, ipv4=settings.network4)
    _check_neighbours(network.ipv4, links, is_stored=network is known)
    if network is not known:
        state.save("server/network", network.to_document())
    return network


def _check_neighbours(network: IPv4Network, links: tuple[Link, ...], *, is_stored: bool) -> None:
    """Raise ConfigError where this host lives in the tunnel network itself, and would be cut off.

    Who has clients in it already (`is_stored`) can have it all the same.
    """
    for link, address in neighbours(network, links):
        what = f"the tunnel network {network} is also in use at {link.name} ({address})"
        if address.ip in network:
            insist = f", or say --network {network} to have it all the same" if is_stored else ""
            raise ConfigError(f"{what}: this host would be cut off there; choose another one with --network{insist}")
        log.warning("%s: what has an address in both cannot be reached there", what)


def _offer(settings: ServerSettings, links: tuple[Link, ...]) -> Offer:
    has4 = any(link.gateway4 is not None for link in links) or not any(link.gateway6 for link in links)
    has6 = any(link.gateway6 is not None for link in links)
    return Offer(settings.mtu, has4, has6, offered_dns(host.resolvers(), has_ipv6=has6))


def _look_for_offer(settings: ServerSettings) -> Offer:
    return _offer(settings, netlink.snapshot())


def offered_dns(found: tuple[IPAddress, ...], *, has_ipv6: bool) -> tuple[IPAddress, ...]:
    """Return the resolvers that clients are offered, two at the most, of those that this host asks itself.

    One at least is asked by IPv4, which every client has, and none by IPv6 where that does not go on from here.
    """
    usable = [address for address in found if address.version == 4 or has_ipv6]
    if not usable:
        return FALLBACK_DNS
    by_ipv4 = next((address for address in usable if address.version == 4), FALLBACK_DNS[0])
    two = usable[:2]
    return tuple(two) if any(address.version == 4 for address in two) else (two[0], by_ipv4)


def _server_values(settings: ServerSettings, network: Any, dns: tuple[IPAddress, ...]) -> dict[str, ScriptValue]:
    return {
        "mtu": settings.mtu,
        "address4": IPv4Interface((network.ipv4[1], network.ipv4.prefixlen)),
        "address6": IPv6Interface((network.ipv6[1], network.ipv6.prefixlen)),
        "network4": network.ipv4,
        "network6": network.ipv6,
        "port": settings.port,
        "lan": settings.lan,
        "dns": dns,
    }


def _tell_first_line(settings: ServerSettings, links: tuple[Link, ...], token: str | None) -> None:
    """Print the line that the first client runs; a token goes to a terminal only, never into a log."""
    if token is None:
        return
    address = public_address(links)
    server = server_argument(str(address) if address else "SERVER", settings.port)
    if sys.stdout.isatty():
        sys.stdout.write(f"\nOn the client run:\n\n    {client_line(server, token)}\n\n")
    else:
        path = settings.state_dir / "server" / "join-token"
        sys.stdout.write(f"On the client run: {client_line(server, 'TOKEN')}   TOKEN is in {path}\n")
    if address is None:
        sys.stdout.write("SERVER is this host's public address or name; it has none itself.\n")
    sys.stdout.flush()


def _addresses_of(settings: ClientSettings, membership: Membership) -> tuple[IPAddress, ...]:
    """Return the server's addresses: as its name resolves now, else as it did before, else none yet."""
    try:
        return udp.resolve(settings.server, settings.port)
    except (OSError, UnicodeError) as error:
        known = tuple(map(ipaddress.ip_address, membership.record.addresses))
        what = f"using {', '.join(map(str, known))} from before" if known else "trying again until it does"
        log.warning("%s does not resolve (%s): %s", settings.server, getattr(error, "strerror", None) or error, what)
        return known


def _show_client_plan(settings: ClientSettings, the_host: host.Host) -> None:
    """Print what the script would do; what only the server can say is shown by examples."""
    links = netlink.snapshot()
    try:
        server = next(iter(udp.resolve(settings.server, settings.port)), None) if settings.server else None
    except (OSError, UnicodeError):
        server = None
    if server is None:
        raise ConfigError(f"server {settings.server!a} does not resolve, so there is nothing to show")
    uplinks = Uplinks(settings.interfaces)
    uplinks.check(links)
    for number, way in uplinks.find(links, {server.version: server}, settings.device, {}).items():
        if way is None:
            log.warning("%s", uplinks.advice(uplinks.by_id[number], links))
        else:
            the_host.run("path-up", path_values(number, way))
    log.info("the tunnel's addresses and resolvers come from the server; these are examples")
    tunnel = Tunnel(
        IPv4Address("10.0.1.2"),
        IPv4Address("10.0.1.1"),
        None,
        None,
        ipv6_onward=False,
        dns=settings.dns or FALLBACK_DNS,
    )
    dns = () if settings.dns_mode is DnsMode.KEEP else tunnel.dns
    kept = netlink.kept_connections()
    the_host.run("up", tunnel_values(replace(tunnel, dns=dns), settings.mtu, settings.routes, (server,), kept))


def _protect_memory() -> None:
    """No core dumps: they would hold keys."""
    import ctypes  # noqa: PLC0415
    import resource  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE (linux/prctl.h)
