"""The TUN device: made by python-pytun, or by the ioctl behind it where that has no wheel.

The device is not persistent: it, its addresses and every route by it go when the process goes. Packets are read and
written on its descriptor directly, without the four bytes of packet information: what is written is gathered from
several objects, which python-pytun's own `write` does not do.

With IFF_VNET_HDR and TUNSETOFFLOAD one call carries a super-packet of up to 64 KB (see `packet`). Where the kernel
refuses, in whole or for UDP, it is done without; frames look the same then, their header all zeros.
Sources: Documentation/networking/tuntap.rst; linux/if_tun.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.packet import PLAIN, VNET_SIZE, coalesce, single

if TYPE_CHECKING:
    from mptunnel.packet import Frame

CLONE_DEVICE: Final = "/dev/net/tun"
MAX_FD: Final = 1024  # select() takes none above
BATCH: Final = 64  # frames read in one turn
BATCH_BYTES: Final = 256 << 10  # no more are read after so many bytes
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_F_TCP: Final = 0x01 | 0x02 | 0x04 | 0x08  # TUN_F_CSUM, TSO4, TSO6, TSO_ECN
_F_UDP: Final = 0x20 | 0x40  # TUN_F_USO4, USO6 (Linux 6.2)
_IFREQ: Final = struct.Struct("16sH22x")
_NONE_WAITS: Final = frozenset({errno.EAGAIN, errno.EIO})  # EIO: the device is down
_read: Final = os.read
_writev: Final = os.writev
_SLACK: Final = 512  # an administrator may raise the MTU behind our back
_LARGEST: Final = 65535 + VNET_SIZE


class Tun:
    """The open device.

    `takes_tcp`, `takes_udp`: super-packets of that kind pass both ways; with `takes_tcp` partial checksums do too.
    """

    def __init__(self, name: str, mtu: int, *, offload: bool = True) -> None:
        """Make the device `name`. Raises NotPermittedError, ConfigError where it is in use, or HostError."""
        self.name = name
        self._device, self._fd, has_header = _open(name, offload=offload)
        self.takes_tcp, self.takes_udp = _set_offload(self._fd) if has_header else (False, False)
        if self._fd >= MAX_FD:
            self.close()
            raise HostError(f"cannot use {name}: {MAX_FD} files are open already, and select() takes no more")
        os.set_inheritable(self._fd, False)
        os.set_blocking(self._fd, False)
        size = _LARGEST if self.takes_tcp else max(2048, mtu + _SLACK) + VNET_SIZE
        self._has_header = has_header
        self._size = size

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._fd

    def read(self) -> list[bytes]:
        """Return the frames that wait, 64 at most. Raises OSError if the device has gone."""
        frames: list[bytes] = []
        total = 0
        while len(frames) < BATCH and total <= BATCH_BYTES and (frame := self.read_one()) is not None:
            frames.append(frame)
            total += len(frame)
        return frames

    def read_one(self) -> bytes | None:
        """Return the frame that has waited longest, None if none waits. Raises OSError if the device has gone."""
        try:
            frame = _read(self._fd, self._size)
        except OSError as error:
            if error.errno in _NONE_WAITS:
                return None
            raise
        return frame if self._has_header else PLAIN + frame  # zeros stand for the header that the kernel left out

    def write(self, packets: list[bytes]) -> int:
        """Hand IP packets to the kernel, together where it takes them so; return how many it did not take."""
        if len(packets) == 1:
            try:
                _writev(self._fd, single(packets[0]) if self._has_header else [packets[0]])
            except OSError:
                return 1
            return 0
        if not self._has_header:
            return sum(not self._takes([packet]) for packet in packets)
        if not self.takes_tcp:
            return sum(not self._takes(single(packet)) for packet in packets)
        at = refused = 0
        for frame, count in coalesce(packets, takes_udp=self.takes_udp):
            if not self._takes(frame):
                again = packets[at : at + count] if count > 1 else ()
                refused += sum(not self._takes(single(packet)) for packet in again) if again else 1
            at += count
        return refused

    def _takes(self, frame: Frame) -> bool:
        """Whether the kernel takes a frame: not while the device is down, nor what it does not like the look of."""
        try:
            _writev(self._fd, frame)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the device back; the kernel removes it."""
        with contextlib.suppress(OSError):
            if self._device is not None:
                self._device.close()
            else:
                os.close(self._fd)


def _open(name: str, *, offload: bool) -> tuple[Any, int, bool]:
    """Return the object that owns the device (None: nobody), its descriptor, and whether frames have a header."""
    flags = _IFF_TUN | _IFF_NO_PI
    if offload:
        try:
            return *_open_with(name, flags | _IFF_VNET_HDR), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _refusal(name, error) from None
    try:
        return *_open_with(name, flags), False
    except OSError as error:
        raise _refusal(name, error) from None


def _open_with(name: str, flags: int) -> tuple[Any, int]:
    pytun = _pytun()
    if pytun is None:
        return None, _open_by_ioctl(name, flags)
    device = pytun.TunTapDevice(name=name, flags=flags)
    return device, device.fileno()


def _set_offload(fd: int) -> tuple[bool, bool]:
    """Ask for super-packets; return whether TCP and UDP ones are granted."""
    for wish, granted in ((_F_TCP | _F_UDP, (True, True)), (_F_TCP, (True, False))):
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _TUNSETOFFLOAD, wish)
            return granted
    return False, False


def _pytun() -> Any:
    try:
        import pytun  # noqa: PLC0415  # has no wheel on every machine
    except ImportError:
        return None
    return pytun


def _open_by_ioctl(name: str, flags: int) -> int:
    fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode("ascii"), flags))
    except OSError:
        os.close(fd)
        raise
    return fd


def _refusal(name: str, error: OSError) -> HostError | ConfigError:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return NotPermittedError(f"cannot make the device {name}: not permitted; run it as root, with sudo")
    if error.errno == errno.EBUSY:
        return ConfigError(f"cannot make the device {name}: it is there already; choose another one with -t")
    if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        return HostError(
            f"cannot make the device {name}: no {CLONE_DEVICE} here; run 'modprobe tun' "
            "(in a container: --device /dev/net/tun)"
        )
    return HostError(f"cannot make the device {name}: {os.strerror(error.errno or 0).lower()}")
