"""What the hot modules run as, and in: whether their compiled form belongs to these sources, and malloc's memory.

An installation compiles them with mypyc, from the sources as they are, if there is a C compiler (`scripts/compile.py`).
Without one, and where `MPTUNNEL_COMPILED=0` is set, the sources run interpreted and do the same. What was compiled lies
in a directory of its own with a stamp beside it: sources that were changed afterwards run as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import zlib
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

import mptunnel

# All or none: compiled modules know the classes of each other as structures.
MODULES: Final = (
    "aead", "burst", "cap", "client", "clientpeer", "gaps", "history", "loop", "messages", "mtu", "packet", "path",
    "peer", "receipts", "role", "scheduler", "server", "serverpeer", "session", "standby", "timers", "tun", "udp",
)  # fmt: skip
LIBRARY: Final = "hot__mypyc"  # all of their code; what bears their names only leads there
DIRECTORY: Final = "compiled"
STAMP: Final = "sources"
KEPT_MEMORY: Final = 4 << 20  # bytes: what is in a turn's super-packets and datagrams, several times
SUFFIX: Final = EXTENSION_SUFFIXES[0]  # of this interpreter
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def fingerprint(package: Path) -> str:
    """Return what changes with any source of the package: constants of all modules are in the code of the hot ones."""
    crc = 0
    for source in sorted(package.glob("*.py")):
        crc = zlib.crc32(source.read_bytes(), crc)
    return f"{crc:08x}"


def is_compiled(package: Path) -> bool:
    """Say whether the compiled modules are there for this interpreter, and of these sources."""
    directory = package / DIRECTORY
    try:
        return (directory / f"{LIBRARY}{SUFFIX}").exists() and (directory / STAMP).read_text() == fingerprint(package)
    except OSError:  # no stamp
        return False


def use() -> None:
    """Have the hot modules do as fast as they can from now on; not if one of them is there already.

    That is in their compiled form, and with `burst`. `MPTUNNEL_COMPILED=0` and `MPTUNNEL_BURST=0` speak against it.
    """
    if any(f"mptunnel.{name}" in sys.modules for name in MODULES):
        return
    _use_compiled()
    if os.environ.get("MPTUNNEL_BURST") == "0":
        import_module("mptunnel.burst").switch_off()


def _use_compiled() -> None:
    package = Path(mptunnel.__path__[0])
    directory = str(package / DIRECTORY)
    if os.environ.get("MPTUNNEL_COMPILED") == "0":
        return
    if is_compiled(package):
        mptunnel.__path__.insert(0, directory)
        try:
            import_module(f"mptunnel.{LIBRARY}")
            import_module("mptunnel.packet")  # which tells whether this librt is the one that they were compiled for
        except (ImportError, AttributeError, ValueError):  # another C library than this system's, or another librt
            mptunnel.__path__.remove(directory)
            for name in (*MODULES, LIBRARY):
                sys.modules.pop(f"mptunnel.{name}", None)


def keep_memory() -> None:
    """Have malloc keep what packets were in for the next ones (mallopt(3)).

    Left to itself it gives the end of the heap back after a turn and fetches it again in the next one, page by page:
    40,000 page faults a second in bulk.
    """
    with contextlib.suppress(OSError, AttributeError):  # the latter: a C library that has no such choice
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT_MEMORY)
        mallopt(_M_MMAP_THRESHOLD, KEPT_MEMORY)


def core() -> str:
    """Say how the hot modules run in this process: "compiled" or "interpreted"."""
    return "compiled" if f"mptunnel.{LIBRARY}" in sys.modules else "interpreted"
