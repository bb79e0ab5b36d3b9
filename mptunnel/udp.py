"""UDP sockets: one per path on a client, one for everybody on a server. No decisions here.

A path's socket is bound to its interface and its address and connected to the server: it leaves by that interface
whatever the routing table says, and the kernel drops what comes from elsewhere. The server's socket serves both IP
versions and answers from the address it was asked on. None ever blocks; none fragments, nor believes an ICMP message
about the path's MTU (IP_PMTUDISC_PROBE).

A run of datagrams of one size goes to the kernel in one call (UDP_SEGMENT) and comes from it in one (UDP_GRO). If the
kernel or the interface refuses that form, a run is sent singly; only a failing single send says something about a path.
Sources: ip(7), ipv6(7), udp(7), socket(7), linux/udp.h.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import termios
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.events import Endpoint
from mptunnel.messages import parse_address

if TYPE_CHECKING:
    from mptunnel.events import OpenPath

    IPAddress = IPv4Address | IPv6Address

log = logging.getLogger(__name__)

MAX_FD: Final = 1024  # select() takes none above
BUFFER: Final = 8 << 20
LARGEST: Final = 65535
MAX_KNOWN: Final = 4096  # sources remembered
_IP_MTU_DISCOVER: Final = 10  # linux/in.h
_IPV6_MTU_DISCOVER: Final = 23  # linux/in6.h
_PMTUDISC_PROBE: Final = 3
_IP_PKTINFO: Final = 8
_SO_RXQ_OVFL: Final = 40
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_SOL_UDP: Final = 17
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_SIZE: Final = struct.Struct("=H")
_GRO_SIZE: Final = struct.Struct("=i")
_NOT_SO: Final = frozenset({errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT})  # not to be had in this form
_PKTINFO4: Final = struct.Struct("=I4s4s")  # interface, local address to answer from, destination of the header
_PKTINFO6: Final = struct.Struct("=16sI")  # destination, interface
_PKTINFO: Final = frozenset({socket.IPV6_PKTINFO, _IP_PKTINFO})  # no two kinds that our sockets may bring are alike
_DROPS: Final = struct.Struct("=I")
_ANCILLARY: Final = 256
_MOD32: Final = 1 << 32


class PathError(Exception):
    """A socket that could not be opened; the text is for the path's log line."""


class Receiver:
    """What both kinds of socket do: send runs if the kernel can, and note for what their own queue had no room."""

    def __init__(self, sock: socket.socket, *, offload: bool) -> None:
        if sock.fileno() >= MAX_FD:
            sock.close()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._socket = sock
        self._recvmsg, self._send, self._sendmsg = sock.recvmsg, sock.send, sock.sendmsg  # looked up once
        self._overrun = 0  # what our own receive queue had no room for: the kernel's count, and the news of it
        self.overrun = 0
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
        self.has_large_buffer = _enlarge(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF)
        self.sends_runs = offload and _probe_segmentation(sock)
        self._has_sent_run, self._refused_runs = False, 0
        self._most_refused = 1  # before any was taken: then it is off
        self.receives_runs = False
        if offload:
            with contextlib.suppress(OSError):
                sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
                self.receives_runs = True

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def take_overrun(self) -> int:
        """Return for how many buffers our own receive queue had no room before what came last, each told once."""
        new, self.overrun = self.overrun, 0
        return new

    def _note_overrun(self, data: bytes) -> None:
        (count,) = _DROPS.unpack_from(data)
        self.overrun += (count - self._overrun) % _MOD32
        self._overrun = count

    def _send_run(self, data: bytes | memoryview, size: int, ancillary: list[Any], *to: Any) -> bool:
        """Whether a run went out in one call; if not, it is to be sent singly. Raises OSError if that is no use."""
        try:
            self._sendmsg([data], [*ancillary, (_SOL_UDP, _UDP_SEGMENT, _SIZE.pack(size))], 0, *to)
        except OSError as error:
            if error.errno in _NOT_SO:
                self._refused_runs += 1
                if not self._has_sent_run and self._refused_runs >= self._most_refused:
                    self.sends_runs = False  # else it is these runs that are not to be sent so
                    log.info("no UDP segmentation offload here: %s", os.strerror(error.errno or 0).lower())
                return False
            if error.errno in _PENDING:
                return False
            raise
        self._has_sent_run = True
        return True


class PathSocket(Receiver):
    """A client's way to the server over one interface."""

    def __init__(self, wish: OpenPath, *, offload: bool = True) -> None:
        """Open it. Raises PathError."""
        try:
            sock = _open_path(wish)
        except OSError as error:
            raise PathError(_why_not(wish, error)) from None
        try:
            super().__init__(sock, offload=offload)
        except OSError as error:
            sock.close()
            raise PathError(_why_not(wish, error)) from None
        self.port: int = sock.getsockname()[1]
        self._path = wish.path
        self.unseen = 0  # bytes sent since its queue was looked at
        self.is_watched = False  # its queue is looked at before every sending
        self._outq = array.array("i", [0])

    def receive(self) -> tuple[bytes, int, int]:
        """Return the next run of datagrams, their size and path. Raises OSError."""
        run, ancillary, _, _ = self._recvmsg(LARGEST, _ANCILLARY)
        size = len(run)
        for _, kind, data in ancillary:
            if kind == _UDP_GRO:
                (size,) = _GRO_SIZE.unpack_from(data)
            elif kind == _SO_RXQ_OVFL:
                self._note_overrun(data)
        return run, size, self._path

    def queued(self) -> int:
        """Return how much kernel memory is taken by what has not left yet (TIOCOUTQ, udp(7))."""
        fcntl.ioctl(self._socket, termios.TIOCOUTQ, self._outq)
        self.unseen = 0
        return self._outq[0]

    def send(self, data: bytes | memoryview, size: int) -> tuple[int, str]:
        """Send a run of datagrams of `size` bytes each; return how many were refused, and why."""
        length = len(data)
        refused, why = 0, ""
        if size < length and self.sends_runs:
            try:
                if self._send_run(data, size, []):
                    self.unseen += length
                    return 0, ""
            except OSError as error:
                return -(-length // size), _name(error)
        for at in range(0, length, size):
            if failure := self.send_one(data[at : at + size] if size < length else data):
                refused += 1
                why = failure
        return refused, why

    def send_one(self, datagram: bytes | memoryview) -> str:
        """Send a datagram of its own; return why it was refused, nothing if it was not."""
        self.unseen += len(datagram)
        try:
            self._send(datagram)
        except OSError as error:
            if error.errno not in _PENDING or not self._sends_now(datagram):
                return _name(error)
        return ""

    def _sends_now(self, datagram: bytes | memoryview) -> bool:
        """Whether it goes at the second try: an ICMP message about an earlier datagram fails one call unsent.

        Also one that says what is too long (EMSGSIZE), which we did not ask: IP_PMTUDISC_PROBE believes none.
        """
        try:
            self._send(datagram)
        except OSError:
            return False
        return True


class ServerSocket(Receiver):
    """The server's one socket."""

    def __init__(self, port: int, *, offload: bool = True) -> None:
        """Listen on every address. Raises ConfigError for a port in use, NotPermittedError or HostError."""
        try:
            sock, self.has_ipv6 = _listen(port)
        except OSError as error:
            raise _port_refusal(port, error) from None
        super().__init__(sock, offload=offload)
        self._most_refused = 64  # one address that is not to be had must not spoil it for all
        self._known: dict[tuple[tuple[Any, ...], bytes], Endpoint] = {}
        self._ways: dict[Endpoint, tuple[tuple[Any, ...], list[Any]]] = {}
        _enlarge(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF)

    def receive(self) -> tuple[bytes, int, Endpoint]:
        """Return the next run of datagrams, their size and source. Raises OSError."""
        run, ancillary, _, address = self._recvmsg(LARGEST, _ANCILLARY)
        local, size = b"", len(run)
        for _, kind, data in ancillary:
            if kind in _PKTINFO:
                local = data
            elif kind == _UDP_GRO:
                (size,) = _GRO_SIZE.unpack_from(data)
            elif kind == _SO_RXQ_OVFL:
                self._note_overrun(data)
        source = self._known.get((address, local))
        return run, size, source or self._meet(address, local)

    def _meet(self, address: tuple[Any, ...], info: bytes) -> Endpoint:
        """Return the endpoint of an address not seen lately; from now on it is found without making it anew."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        local = _local6(info) if self.has_ipv6 else _PKTINFO4.unpack_from(info)[1]
        scope = address[3] if len(address) > 3 else 0
        endpoint = self._known[address, info] = Endpoint(address[0], address[1], scope, local)
        return endpoint

    def _way(self, to: Endpoint) -> tuple[tuple[Any, ...], list[Any]]:
        """Return the address of an endpoint and what makes the kernel answer from ours; kept for the next time."""
        if len(self._ways) >= MAX_KNOWN:
            self._ways.clear()
        kept: tuple[tuple[Any, ...], list[Any]]
        if self.has_ipv6:
            kept = (to.host, to.port, 0, to.scope), [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, to.local)]
        else:
            local = _PKTINFO4.pack(0, to.local, bytes(4))
            kept = (to.host, to.port), [(socket.IPPROTO_IP, _IP_PKTINFO, local)]
        self._ways[to] = kept
        return kept

    def send(self, to: Endpoint, data: bytes | memoryview, size: int) -> tuple[int, str]:
        """Send a run of datagrams of `size` bytes each; return how many were refused, and why."""
        refused, why, length = 0, "", len(data)
        if size < length and self.sends_runs:
            address, ancillary = self._ways.get(to) or self._way(to)
            try:
                if self._send_run(data, size, ancillary, address):
                    return 0, ""
            except OSError as error:
                return -(-length // size), _name(error)
        for at in range(0, length, size):
            if failure := self.send_one(to, data[at : at + size] if size < length else data):
                refused += 1
                why = failure
        return refused, why

    def send_one(self, to: Endpoint, datagram: bytes | memoryview) -> str:
        """Send a datagram of its own; return why it was refused, nothing if it was not."""
        address, ancillary = self._ways.get(to) or self._way(to)
        try:
            self._sendmsg([datagram], ancillary, 0, address)
        except OSError as error:
            return _name(error)
        return ""


_PENDING: Final = frozenset({  # may be what an ICMP message has left behind, about an earlier datagram
    errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPROTO, errno.EACCES, errno.EMSGSIZE,
})  # fmt: skip


def resolve(host: str, port: int) -> tuple[IPAddress, ...]:
    """Return the addresses of a name, in the resolver's order; may take long. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    addresses = [parse_address(str(address[0])) for family, _, _, _, address in found if family in _FAMILIES]
    return tuple(dict.fromkeys(addresses))


_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})


def _open_path(wish: OpenPath) -> socket.socket:
    address, port = wish.server
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wish.interface.encode())
        _never_fragment(sock, family)
        try:
            sock.bind((str(wish.address), wish.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not wish.port:
                raise
            sock.bind((str(wish.address), 0))
        sock.connect((str(address), port))
    except OSError:
        sock.close()
        raise
    return sock


def _listen(port: int) -> tuple[socket.socket, bool]:
    """Return a socket bound to `port` on every address, and whether it serves IPv6 too."""
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        sock = socket.socket(socket.AF_INET6, kind)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
    else:
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            _never_fragment(sock, socket.AF_INET6)
            sock.bind(("::", port))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is there, but switched off
                raise
        else:
            return sock, True
    sock = socket.socket(socket.AF_INET, kind)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        _never_fragment(sock, socket.AF_INET)
        sock.bind(("", port))
    except OSError:
        sock.close()
        raise
    return sock, False


def _probe_segmentation(sock: socket.socket) -> bool:
    """Whether the kernel knows UDP_SEGMENT; 0 leaves it off but for the calls that ask for it."""
    try:
        sock.setsockopt(_SOL_UDP, _UDP_SEGMENT, 0)
    except OSError:
        return False
    return True


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _never_fragment(sock: socket.socket, family: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)


def _enlarge(sock: socket.socket, forced: int, plain: int) -> bool:
    """Ask for a large kernel buffer; return whether it was granted whole."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
    except OSError:  # no CAP_NET_ADMIN in the first user namespace: what the administrator allows has to do
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER)
        return sock.getsockopt(socket.SOL_SOCKET, plain) >= BUFFER
    return True


def _local6(data: bytes) -> bytes:
    """Return the control message that answers from where a datagram came to; the interface only where it matters."""
    address, index = _PKTINFO6.unpack_from(data)
    return _PKTINFO6.pack(address, index if IPv6Address(address).is_link_local else 0)


def _why_not(wish: OpenPath, error: OSError) -> str:
    what = f"cannot use {wish.interface} with {wish.address}"
    if error.errno in {errno.EPERM, errno.EACCES}:
        return f"{what}: not permitted; run it as root, with sudo"
    if error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        return f"{what}: no route to {wish.server[0]}; has it a gateway?"
    return f"{what}: {os.strerror(error.errno or 0).lower()}"


def _port_refusal(port: int, error: OSError) -> HostError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"cannot listen on UDP port {port}: it is in use; see 'ss -ulpn sport = {port}', or choose -p"
        )
    if error.errno in {errno.EPERM, errno.EACCES}:
        return NotPermittedError(f"cannot listen on UDP port {port}: not permitted; run it as root, with sudo")
    return HostError(f"cannot listen on UDP port {port}: {os.strerror(error.errno or 0).lower()}")
