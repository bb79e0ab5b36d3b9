"""The control socket RUN/mptN.sock: one JSON object a line asks, one answers.

    {"verb": "status"}                        -> {"ok": true, "result": {...}}
    {"verb": "token-revoke", "ident": "..."}  -> {"ok": false, "error": "...", "exit": 2}

A connection carries one question and its answer. Only root may connect (0600). The server side never blocks: it lives
in the program's one select loop, holds at most 8 connections and drops who says nothing for 5 s. The client side,
`ask`, `listen` and `find`, is for the command line.

    {"verb": "events"}                        -> {"ok": true, "result": {...}}, then a line for each event

A listener stays connected until it hangs up. What it has not read yet is kept up to 256 KiB; then it is cut off.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, Final

from mptunnel.errors import (
    ConfigError,
    HostError,
    MptunnelError,
    NotPermittedError,
    NotRunningError,
    RefusedError,
    UnreachableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    Handler: TypeAlias = Callable[[str, dict[str, Any]], object]

MAX_CONNECTIONS: Final = 8
MAX_LISTENERS: Final = 4  # of them: somebody must still be able to ask
MAX_REQUEST: Final = 64 << 10
MAX_UNREAD: Final = 256 << 10  # bytes that a listener may lag behind; the kernel keeps some more for it
IDLE_TIMEOUT: Final = 5.0
ANSWER_TIMEOUT: Final = 10.0
MAX_FD: Final = 1024  # select() takes none above

_BY_EXIT_CODE = {
    kind.exit_code: kind for kind in (ConfigError, NotRunningError, NotPermittedError, UnreachableError, RefusedError)
}


class Pending:
    """An answer that comes later: a handler returns it, and calls `finish` or `fail` once."""

    __slots__ = ("_connection", "_line")

    def __init__(self) -> None:
        self._connection: _Connection | None = None
        self._line = b""

    def finish(self, result: object) -> None:
        """Answer with this result."""
        self._settle(_success(result))

    def fail(self, error: MptunnelError) -> None:
        """Answer that it went wrong."""
        self._settle(_failure(error))

    def _settle(self, line: bytes) -> None:
        self._line = line
        if self._connection is not None:
            self._connection.answer(line)

    def attach(self, connection: _Connection) -> None:
        """Send the answer there, at once if it is known already."""
        self._connection = connection
        if self._line:
            connection.answer(self._line)


class Listening:
    """What a handler returns to let the connection hear all that is told from now on; `result` is its answer."""

    __slots__ = ("result",)

    def __init__(self, result: object) -> None:
        self.result = result


class ControlServer:
    """The listening side. Wait for `readers()` and `writers()`, call `ready` for each, and `expire` at the deadline."""

    __slots__ = ("_handler", "_listener", "_path", "connections")

    def __init__(self, path: Path, handler: Handler) -> None:
        """Listen at `path`, whose lock the caller holds: a socket that lies there is a dead one's and is removed.

        `handler(verb, arguments)` returns what json can write, a `Pending`, or `Listening`, or raises MptunnelError.
        """
        self._path = path
        self._handler = handler
        self.connections: dict[int, _Connection] = {}  # by descriptor
        self._listener = _listen(path)

    def fileno(self) -> int:
        """Return the descriptor to wait for while nobody is connected."""
        return self._listener.fileno()

    def readers(self) -> list[int]:
        """Return the descriptors to wait for reading."""
        fds = [fd for fd, connection in self.connections.items() if connection.stage in _READING]
        if len(self.connections) < MAX_CONNECTIONS:
            fds.append(self._listener.fileno())
        return fds

    def writers(self) -> list[int]:
        """Return the descriptors to wait for writing: what is still on its way there."""
        return [fd for fd, connection in self.connections.items() if connection.unsent]

    def tell(self, document: dict[str, Any]) -> None:
        """Let everybody who listens know; who lags too far behind is cut off."""
        listeners = self._listeners()
        line = json.dumps(document).encode() + b"\n" if listeners else b""
        for connection in listeners:
            if len(connection.unsent) + len(line) > MAX_UNREAD:
                connection.finish()
            else:
                connection.send(line)
            if connection.stage is _Stage.DONE:
                self._drop(connection)

    def ready(self, fd: int, now: float) -> None:
        """Accept, read or write, whichever `fd` was waited for."""
        if fd == self._listener.fileno():
            self._accept(now)
            return
        connection = self.connections.get(fd)
        if connection is None:
            return  # gone in this same turn
        connection.drop_at = now + IDLE_TIMEOUT
        if connection.stage is _Stage.LISTENING:
            connection.listen_on()
        elif connection.stage is _Stage.TAKING:
            connection.send()
        elif connection.stage is _Stage.ASKING and (question := connection.read()) is not None:
            self._answer(question, connection)
        if connection.stage is _Stage.DONE:
            self._drop(connection)

    def next_deadline(self) -> float:
        """Return when `expire` has something to do; inf: never."""
        return min((c.drop_at for c in self.connections.values() if c.stage not in _PATIENT), default=math.inf)

    def expire(self, now: float) -> None:
        """Drop the connections that are done, or have been silent for too long."""
        for connection in list(self.connections.values()):
            if connection.drop_at <= now and connection.stage not in _PATIENT:
                self._drop(connection)

    def close(self) -> None:
        """Close everything and remove the socket."""
        for connection in list(self.connections.values()):
            self._drop(connection)
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self, now: float) -> None:
        while len(self.connections) < MAX_CONNECTIONS:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # none left, or it went away again
            if client.fileno() >= MAX_FD:
                client.close()
                return
            client.setblocking(False)
            self.connections[client.fileno()] = _Connection(client, now + IDLE_TIMEOUT)

    def _answer(self, question: bytes, connection: _Connection) -> None:
        """Answer the question, now or when the handler's promise comes true."""
        connection.stage = _Stage.WAITING
        try:
            verb, arguments = _parse_request(question)
            result = self._handler(verb, arguments)
        except MptunnelError as error:
            connection.answer(_failure(error))
            return
        if isinstance(result, Pending):
            result.attach(connection)
        elif isinstance(result, Listening) and len(self._listeners()) >= MAX_LISTENERS:
            connection.answer(_failure(MptunnelError(f"{MAX_LISTENERS} listen already; end one of them")))
        elif isinstance(result, Listening):
            connection.stage = _Stage.LISTENING
            connection.send(_success(result.result))
        else:
            connection.answer(_success(result))

    def _listeners(self) -> list[_Connection]:
        return [each for each in self.connections.values() if each.stage is _Stage.LISTENING]

    def _drop(self, connection: _Connection) -> None:
        del self.connections[connection.fileno()]
        connection.close()


class _Stage(enum.Enum):
    """Where a connection stands: its question is on its way in, being worked on, its answer on its way out.

    Or it listens: it has its answer, and hears of each event.
    """

    ASKING = enum.auto()
    WAITING = enum.auto()
    TAKING = enum.auto()
    LISTENING = enum.auto()
    DONE = enum.auto()


_READING: Final = frozenset({_Stage.ASKING, _Stage.LISTENING})
_PATIENT: Final = frozenset({_Stage.WAITING, _Stage.LISTENING})  # nothing is expected from there


class _Connection:
    """One client with one question."""

    __slots__ = ("_heard", "_socket", "drop_at", "stage", "unsent")

    def __init__(self, client: socket.socket, drop_at: float) -> None:
        self._socket = client
        self._heard = b""
        self.unsent = b""
        self.drop_at = drop_at
        self.stage = _Stage.ASKING

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bytes | None:
        """Take what there is; return the question once it is whole."""
        try:
            data = self._socket.recv(MAX_REQUEST)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self._heard += data
        question, newline, _ = self._heard.partition(b"\n")
        if newline:
            return question
        if not data:
            self.finish()
        elif len(self._heard) > MAX_REQUEST:
            self.answer(_failure(ConfigError(f"a request has at most {MAX_REQUEST} bytes")))
        return None

    def answer(self, line: bytes) -> None:
        """Send the answer, as far as the socket takes it now."""
        self.stage = _Stage.TAKING
        self.send(line)

    def send(self, more: bytes = b"") -> None:
        """Send on, and `more`; a client that has gone needs no answer."""
        self.unsent += more
        try:
            self.unsent = self.unsent[self._socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.finish()
        if not self.unsent and self.stage is _Stage.TAKING:
            self.finish()

    def listen_on(self) -> None:
        """Send on what has not gone yet; what a listener says is not heard, but that it hangs up is."""
        try:
            if not self._socket.recv(MAX_REQUEST):
                self.finish()
        except BlockingIOError:
            pass
        except OSError:
            self.finish()
        if self.unsent:
            self.send()

    def close(self) -> None:
        self._socket.close()

    def finish(self) -> None:
        """It is over: by the next `expire`, if nobody drops it before."""
        self.unsent = b""
        self.stage = _Stage.DONE
        self.drop_at = -math.inf


def ask(path: Path, verb: str, /, **arguments: object) -> Any:
    """Return the result of a verb from the program that listens at `path`.

    Raises NotRunningError where none does, and the program's own error, with its exit code, where it says no.
    """
    request = json.dumps({"verb": verb, **arguments}).encode() + b"\n"
    with _connect(path, ANSWER_TIMEOUT) as connection:
        try:
            connection.sendall(request)
            line = _receive_line(connection)
        except TimeoutError:
            raise HostError(f"{path.stem} did not answer '{verb}' within {ANSWER_TIMEOUT:g} s; see its log") from None
        except OSError as error:
            raise HostError(f"{path.stem} stopped while it was asked '{verb}': {_why(error)}") from None
    return _result(path, verb, line)


def listen(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what the program that listens at `path` tells of, as it comes, until it stops.

    Raises NotRunningError where none does, and when it has stopped, or has cut us off.
    """
    with _connect(path, ANSWER_TIMEOUT) as connection, connection.makefile("rb") as lines:
        try:
            connection.sendall(b'{"verb": "events"}\n')
            _result(path, "events", lines.readline())
            connection.settimeout(None)
            for line in lines:
                yield json.loads(line)
        except (OSError, ValueError) as error:
            raise HostError(f"{path.stem} stopped while it was listened to: {error}") from None
    raise NotRunningError(f"{path.stem} has stopped, or what it told was not read")


def _result(path: Path, verb: str, line: bytes) -> Any:
    """Return the result in an answer, or raise the error in it."""
    try:
        answer = json.loads(line)
        if answer["ok"]:
            return answer["result"]
        message, code = str(answer["error"]), int(answer["exit"])
    except (ValueError, KeyError, TypeError):
        raise HostError(
            f"{path.stem} gave no whole answer to '{verb}'; it was stopped, or is another version"
        ) from None
    raise _BY_EXIT_CODE.get(code, MptunnelError)(message)


def ask_client(run_dir: Path, device: str | None, verb: str, /, **arguments: object) -> Any:
    """Return the result of a verb from the client that runs here as `device`, or as the only one.

    Raises NotRunningError where none does, ConfigError where several do.
    """
    clients = [path for path in find(run_dir, device) if ask(path, "status").get("role") == "client"]
    if not clients:
        raise NotRunningError(f"no client of mptunnel runs {f'as {device}' if device else 'here'}; start it with -c")
    if len(clients) > 1:
        raise ConfigError(f"{' and '.join(path.stem for path in clients)} run here: say which with -t")
    return ask(clients[0], verb, **arguments)


def find(run_dir: Path, device: str | None = None) -> list[Path]:
    """Return the sockets somebody listens at, by instance: that of `device`, or all."""
    paths = [run_dir / f"{device}.sock"] if device else list(run_dir.glob("mpt*.sock"))
    return sorted(filter(_is_live, paths), key=lambda path: (len(path.name), path.name))


def _is_live(path: Path) -> bool:
    try:
        _connect(path, 1.0).close()
    except NotRunningError:
        return False
    except MptunnelError:
        return True  # it is there; whoever asks it will hear why not
    return True


def _connect(path: Path, timeout: float) -> socket.socket:
    """Return a connection, or raise what there is to say about it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        raise _connect_error(path, error) from None
    return connection


def _connect_error(path: Path, error: OSError) -> MptunnelError:
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return NotRunningError(f"mptunnel does not run as {path.stem}: nobody listens at {path}")
    if isinstance(error, PermissionError):
        return NotPermittedError(f"cannot ask {path.stem} at {path}: permission denied; run it as root, with sudo")
    if error.errno is None:
        return ConfigError(f"{path}: too long for a socket's name; choose a shorter --run-dir")
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return HostError(f"{path.stem} does not accept connections at {path}; see its log")
    return HostError(f"cannot ask {path.stem} at {path}: {_why(error)}")


def _why(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _receive_line(connection: socket.socket) -> bytes:
    """Return what comes up to the first newline, or up to the end."""
    parts = []
    while data := connection.recv(1 << 16):
        parts.append(data)
        if data.endswith(b"\n"):
            break
    return b"".join(parts)


def _listen(path: Path) -> socket.socket:
    """Return the listening socket; only its owner may connect from its first moment."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise NotPermittedError(f"cannot make {path}: permission denied; run it as root, with sudo") from None
        if error.errno is None:
            raise ConfigError(f"{path}: too long for a socket's name; choose a shorter --run-dir") from None
        raise HostError(f"cannot make {path}: {_why(error)}; check --run-dir") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot make {path}: something else is there; move it away, or choose another --run-dir")
    path.unlink()


def _parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return verb and arguments. Raises ConfigError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict) or not isinstance(verb := request.pop("verb", None), str):
        raise ConfigError('a request is one line, a JSON object with "verb"')
    return verb, request


def _success(result: object) -> bytes:
    return json.dumps({"ok": True, "result": result}).encode() + b"\n"


def _failure(error: MptunnelError) -> bytes:
    return json.dumps({"ok": False, "error": str(error), "exit": error.exit_code}).encode() + b"\n"
