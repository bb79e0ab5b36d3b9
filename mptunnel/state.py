"""The state directory: small JSON documents, read with suspicion, written whole or not at all; and the locks.

    STATE/server/{key,network,peers,tokens,timestamp,join-token,lock}
    STATE/client/{key,timestamp}     STATE/client/{servers,paths}/<16 hexadecimal digits>
    RUN/mptN.lock

A file is replaced by renaming a finished one over it, so a power cut leaves the old or the new content. Secrets are
refused where others could have read them, and nothing is read through a symbolic link or from another user's file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from mptunnel.config import (
    ClientKey,
    Document,
    Network,
    PeerRecord,
    ServerKey,
    ServerRecord,
    Timestamp,
    TokenRecord,
    new_private_key,
    peers_from_document,
    tokens_from_document,
)
from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.pathbook import PathBook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

_T = TypeVar("_T")
_K = TypeVar("_K", bound=ServerKey)
_MAX_SIZE: Final = 16 << 20
_PRIVATE: Final = 0o700
_PUBLIC: Final = 0o755
_NOT_PERMITTED = frozenset({errno.EACCES, errno.EPERM})
_WRONG_PATH = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})


class LockedError(ConfigError):
    """Another process holds the lock; `pid` is 0 where it has not said who it is."""

    def __init__(self, message: str, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


def read_document(path: Path, *, secret: bool) -> Document | None:
    """Return the document in `path`, None where there is no such file.

    Raises ConfigError for a file that is not to be trusted or not a document, NotPermittedError where we may not read.
    """
    data = _read(path, secret=secret)
    if data is None:
        return None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"cannot read {path}: it is torn or no JSON object; restore it from a backup or move it away")
    return document


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by this document, 0600. Raises NotPermittedError or HostError; the old content then stays."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by this text, 0600, on disk when this returns. Directories are made as needed, 0700."""
    _write(path, text, os.replace)


def remove(path: Path) -> None:
    """Remove the file; where there is none that is fine."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal("remove", path, error) from None


class Lock:
    """A file lock held until `close` or the end of the process; scripts we start do not inherit it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor that carries the lock."""
        return self._fd

    def close(self) -> None:
        """Give the lock back. The file stays: removing it could let two processes lock two files of one name."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def hold_lock(path: Path, *, private: bool = False) -> Lock:
    """Take the lock or raise LockedError naming the process that has it; our pid is written into the file.

    `private`: missing directories are made 0700, as under the state directory, else 0755. Also a context manager.
    """
    _make_directories(path.parent, _PRIVATE if private else _PUBLIC)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refusal("open the lock", path, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = _lock_pid(fd)
        os.close(fd)
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise _refusal("lock", path, error) from None
        raise LockedError(_held(path, pid), pid) from None
    os.ftruncate(fd, 0)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, but nobody is told by whom
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return Lock(fd)


class StateDir:
    """What the state directory holds, as records. Reading raises ConfigError that names the file."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def server_key(self) -> ServerKey:
        """Return the server's key; one is made where there is none."""
        return self._key("server/key", ServerKey)

    def client_key(self) -> ClientKey:
        """Return the client's key; one is made where there is none."""
        return self._key("client/key", ClientKey)

    def network(self) -> Network | None:
        """Return the tunnel network of the server here."""
        return self._load("server/network", Network.from_document, secret=False)

    def peers(self) -> list[PeerRecord]:
        """Return the peers of the server here, removed ones included."""
        return self._load("server/peers", peers_from_document, secret=True) or []

    def tokens(self) -> list[TokenRecord]:
        """Return the tokens of the server here, tombstones included."""
        return self._load("server/tokens", tokens_from_document, secret=True) or []

    def timestamp(self, role: str) -> Timestamp | None:
        """Return the reservation of `role`, "server" or "client"."""
        return self._load(f"{role}/timestamp", Timestamp.from_document, secret=False)

    def servers(self) -> list[ServerRecord]:
        """Return all servers the client here knows."""
        directory = self.path / "client" / "servers"
        try:
            names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refusal("read", directory, error) from None
        found = (self._load(f"client/servers/{name}", ServerRecord.from_document, secret=True) for name in names)
        return [record for record in found if record is not None]

    def path_book(self, server: str) -> PathBook:
        """Return what was said of the paths to a server (by its record's file name), and what they have carried."""
        return self._load(f"client/paths/{server}", PathBook.from_document, secret=False) or PathBook()

    def text(self, name: str) -> str | None:
        """Return a file that is no document, such as `server/join-token`; None without one."""
        data = _read(self.path / name, secret=True)
        return None if data is None else data.decode(errors="replace")

    def save(self, name: str, content: Mapping[str, Any] | str | None) -> None:
        """Replace the file of this name, such as `server/peers`, by a document or a text; None removes it."""
        path = self.path / name
        if content is None:
            remove(path)
        elif isinstance(content, str):
            write_text(path, content)
        else:
            write_document(path, content)

    def lock_server(self) -> Lock:
        """Take the lock that every server holds on its state. Raises LockedError."""
        return hold_lock(self.path / "server" / "lock", private=True)

    def _load(self, name: str, parse: Callable[[Document], _T], *, secret: bool) -> _T | None:
        path = self.path / name
        document = read_document(path, secret=secret)
        if document is None:
            return None
        try:
            return parse(document)
        except ConfigError as error:
            raise ConfigError(f"cannot use {path}: {error}") from None

    def _key(self, name: str, kind: type[_K]) -> _K:
        key = self._load(name, kind.from_document, secret=True)
        if key is None:
            made = kind(new_private_key(os.urandom))
            _write(self.path / name, json.dumps(made.to_document(), indent=1) + "\n", _link)
            key = self._load(name, kind.from_document, secret=True)  # another process may have been first
        return key or made


def _read(path: Path, *, secret: bool) -> bytes | None:
    """Return what is in the file, None without one. Raises ConfigError where it cannot be trusted."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal("read", path, error) from None
    try:
        _check_trust(path, os.fstat(fd), secret=secret)
        with open(fd, "rb", closefd=False) as file:  # a descriptor, opened without following links
            return file.read()
    except OSError as error:
        raise _refusal("read", path, error) from None
    finally:
        os.close(fd)


def _check_trust(path: Path, found: os.stat_result, *, secret: bool) -> None:
    """Raise ConfigError unless only root or we could have written this, and a secret is one."""
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"cannot read {path}: it is not a plain file")
    if found.st_uid not in {0, os.geteuid()}:
        raise ConfigError(f"cannot trust {path}: it belongs to user {found.st_uid}; chown it to root, or remove it")
    if secret and found.st_mode & 0o077:
        raise ConfigError(f"cannot trust {path}: it is readable by others; chmod 600 {path}, or better a new key")
    if found.st_size > _MAX_SIZE:
        raise ConfigError(f"cannot read {path}: {found.st_size} bytes is more than any file of ours")


def _write(path: Path, text: str, place: Callable[[Path, Path], None]) -> None:
    """Write a finished file beside `path`, let `place` put it there, and see both on the disk."""
    _make_directories(path.parent, _PRIVATE)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123  # a descriptor, 0600 from its first moment
            file.write(text.encode())
            file.flush()
            os.fsync(fd)
        place(fresh, path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise _refusal("write", path, error) from None


def _link(fresh: Path, path: Path) -> None:
    """Put the file in place unless another process was first."""
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(fresh)
    fresh.unlink()


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(directory: Path, mode: int) -> None:
    """Make the directory and what is missing above it, all with this mode."""
    try:
        try:
            directory.mkdir(mode)
        except FileNotFoundError:
            _make_directories(directory.parent, mode)
            directory.mkdir(mode)
    except FileExistsError:
        return
    except OSError as error:
        raise _refusal("make", directory, error) from None


def _lock_pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _held(path: Path, pid: int) -> str:
    """Return the line for a lock that another process has."""
    who = f"process {pid}" if pid else "another process"
    if path.name == "lock":
        return f"{path.parent} is in use by {who}; stop it, or take another --state-dir"
    return f"{path.stem} is in use by {who}; stop it, or take another device with -t"


def _refusal(verb: str, path: Path, error: OSError) -> HostError | ConfigError:
    """Return our error for one of the kernel's."""
    why = os.strerror(error.errno).lower() if error.errno else str(error)
    if error.errno in _NOT_PERMITTED:
        cure = "; run it as root, with sudo" if os.geteuid() else ""
        return NotPermittedError(f"cannot {verb} {path}: {why}{cure}")
    if error.errno == errno.ELOOP:
        return ConfigError(
            f"cannot {verb} {path}: it is a symbolic link, which is not followed; put the file itself there"
        )
    if error.errno in _WRONG_PATH:
        return ConfigError(f"cannot {verb} {path}: {why}; check --state-dir and --run-dir")
    return HostError(f"cannot {verb} {path}: {why}")
