"""The TUN device: made by python-pytun, or by the two ioctls behind it where that has no wheel.

The device is not persistent: it, its addresses and every route by it go when the process goes. Packets are read and
written on its descriptor directly, without the four bytes of packet information and without a copy into a new object
(python-pytun's own `read` and `write` allocate and take only bytes). Source: Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from mptunnel.errors import ConfigError, HostError, NotPermittedError

if TYPE_CHECKING:
    from mptunnel.packet import Buffer

CLONE_DEVICE: Final = "/dev/net/tun"
MAX_FD: Final = 1024  # select() takes none above
BATCH: Final = 64  # packets read in one turn
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_TUNSETIFF = 0x400454CA
_IFREQ = struct.Struct("16sH22x")
_SLACK = 512  # an administrator may raise the MTU behind our back


class Tun:
    """The open device. `read` returns views into buffers that the next `read` uses again."""

    def __init__(self, name: str, mtu: int) -> None:
        """Make the device `name`. Raises NotPermittedError, ConfigError where it is in use, or HostError."""
        self.name = name
        self._device, self._fd = _open(name)
        if self._fd >= MAX_FD:
            self.close()
            raise HostError(f"cannot use {name}: {MAX_FD} files are open already, and select() takes no more")
        os.set_inheritable(self._fd, False)
        os.set_blocking(self._fd, False)
        size = max(2048, mtu + _SLACK)
        self._buffers = [[memoryview(bytearray(size))] for _ in range(BATCH)]

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._fd

    def read(self) -> list[memoryview]:
        """Return the IP packets that wait, 64 at most. Raises OSError if the device has gone."""
        packets: list[memoryview] = []
        fd, readv = self._fd, os.readv
        try:
            for buffers in self._buffers:
                length = readv(fd, buffers)
                packets.append(buffers[0][:length])
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the device is down
                raise
        return packets

    def write(self, packets: list[Buffer]) -> int:
        """Hand IP packets to the kernel; return how many it did not take."""
        fd, write, refused = self._fd, os.write, 0
        for packet in packets:
            try:
                write(fd, packet)
            except OSError:  # down, out of memory, or not a packet that it likes: it alone is lost
                refused += 1
        return refused

    def close(self) -> None:
        """Give the device back; the kernel removes it."""
        with contextlib.suppress(OSError):
            if self._device is not None:
                self._device.close()
            else:
                os.close(self._fd)


def _open(name: str) -> tuple[Any, int]:
    """Return the object that owns the device (None: nobody) and its descriptor."""
    try:
        pytun = _pytun()
        if pytun is None:
            return None, _open_by_ioctl(name)
        device = pytun.TunTapDevice(name=name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
        return device, device.fileno()
    except OSError as error:
        raise _refusal(name, error) from None


def _pytun() -> Any:
    try:
        import pytun  # noqa: PLC0415  # has no wheel on every machine
    except ImportError:
        return None
    return pytun


def _open_by_ioctl(name: str) -> int:
    fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode("ascii"), _IFF_TUN | _IFF_NO_PI))
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
