"""The least that can carry packets as mptunnel does: a contestant of `mptunnel bench --floor`, and no tunnel to use.

One select(), one sealing of a packet, a copy of it on every path, and the first one that comes wins. There is no
handshake (everybody knows the keys), no peer that moves, no super-packet, no account of anything. So what a lone packet
takes here is what Python, the kernel and the copies take; the rest of mptunnel's figure is mptunnel's own.

    python -m mptunnel.floor sv DEVICE PORT
    python -m mptunnel.floor cl DEVICE PORT SERVER INTERFACE=ADDRESS...
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import struct
import sys
from array import array
from typing import TYPE_CHECKING, Any, Final

from mptunnel import native

native.use()

from mptunnel.aead import CIPHER, KEY_SIZE, NO_DATA  # noqa: E402
from mptunnel.loop import NICE  # noqa: E402
from mptunnel.tun import Tun  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

MTU: Final = 1420
_KEYS: Final = {"cl": bytes(KEY_SIZE), "sv": bytes([1]) * KEY_SIZE}  # of who sends
_PEER: Final = {"cl": "sv", "sv": "cl"}
_COUNTER: Final = struct.Struct("<Q")
_WINDOW: Final = 1 << 16
_LARGEST: Final = 2048  # bytes of a packet or a datagram


class End:
    """One end: what its device has becomes datagrams, and the first copy of a datagram becomes what the device gets."""

    def __init__(self, role: str, device: str) -> None:
        self._tun = Tun(device, MTU, offload=False)  # so its descriptor has bare packets
        self.fd = self._tun.fileno()
        self._seal, self._open = CIPHER(_KEYS[role]).encrypt, CIPHER(_KEYS[_PEER[role]]).decrypt
        self._counter = 0
        self._seen = array("Q", bytes(8 * _WINDOW))  # at each counter's place: the last one that came, and 1

    def sealed(self, packet: bytes) -> bytes:
        """Return the datagram for a packet."""
        counter = self._counter
        self._counter = counter + 1
        return _COUNTER.pack(counter) + self._seal(CIPHER.nonce(counter), packet, NO_DATA)

    def depart(self) -> bytes:
        """Return the datagram for what waits at the device."""
        return self.sealed(os.read(self.fd, _LARGEST))

    def arrived(self, datagram: bytes) -> None:
        """Give the device what is in a datagram, if it is the first copy. Raises `CIPHER.Forged`."""
        (counter,) = _COUNTER.unpack_from(datagram)
        if self._seen[counter % _WINDOW] == counter + 1:
            return
        packet = self._open(CIPHER.nonce(counter), datagram[_COUNTER.size :], NO_DATA)
        self._seen[counter % _WINDOW] = counter + 1
        if packet:
            os.write(self.fd, packet)


def serve(device: str, port: int) -> None:
    """Answer wherever datagrams have come from."""
    end = End("sv", device)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", port))
    sock.setblocking(False)
    fds = [end.fd, sock.fileno()]
    sources: set[tuple[str, int]] = set()
    while True:
        ready, _, _ = select.select(fds, [], [])
        with contextlib.suppress(OSError):  # a queue is full: that is lost
            if end.fd in ready:
                datagram = end.depart()
                for source in sources:
                    sock.sendto(datagram, source)
            if sock.fileno() in ready:
                datagram, source = sock.recvfrom(_LARGEST)
                end.arrived(datagram)
                sources.add(source)


def connect(device: str, server: tuple[str, int], paths: list[str]) -> None:
    """Use each of the `paths`, INTERFACE=ADDRESS."""
    end = End("cl", device)
    receives: dict[int, Callable[[int], bytes]] = {}
    sends: list[Callable[[bytes], Any]] = []
    for path in paths:
        interface, _, address = path.partition("=")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.bind((address, 0))
        sock.connect(server)
        sock.setblocking(False)
        sock.send(end.sealed(b""))  # so that the server knows it
        receives[sock.fileno()] = sock.recv
        sends.append(sock.send)
    fds = [end.fd, *receives]
    while True:
        ready, _, _ = select.select(fds, [], [])
        with contextlib.suppress(OSError):
            for fd in ready:
                if fd == end.fd:
                    datagram = end.depart()
                    for send in sends:
                        send(datagram)
                else:
                    end.arrived(receives[fd](_LARGEST))


def main(role: str, device: str, port: str, *more: str) -> None:
    """Carry packets until the process is ended, under the conditions that `loop` makes for itself."""
    gc.freeze()
    gc.disable()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if role == "sv":
        serve(device, int(port))
    else:
        connect(device, (more[0], int(port)), list(more[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
