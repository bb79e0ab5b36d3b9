"""What can be asked of a running client about its paths: list, add, remove, name, priority, metered.

Each verb changes the book and the uplinks; the client then arranges its paths anew and saves the book. A path goes by
its label, its uplink's name, its interface or its number. The desk also counts what metered paths carry, and lets them
stand by once their month's limit is reached.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from mptunnel.config import MAX_PATHS, parse_interfaces
from mptunnel.errors import ConfigError
from mptunnel.events import SaveState
from mptunnel.messages import Use
from mptunnel.pathbook import PRIORITIES, check_label, check_reset_day, parse_limit, parse_priority
from mptunnel.records import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mptunnel.config import Fields
    from mptunnel.path import ClientPath
    from mptunnel.pathbook import PathBook
    from mptunnel.uplinks import Uplinks

log = logging.getLogger(__name__)

HEADERS: Final = {4: 28, 6: 48}  # bytes of IP and UDP around a datagram
VERBS: Final = frozenset({"paths-list", "paths-add", "paths-remove", "paths-name", "paths-priority", "paths-metered"})


class PathDesk:
    """The book and the uplinks of one client; `paths` is the client's. `file` is the book's place, "" for none."""

    __slots__ = ("_book", "_file", "_paths", "_uplinks", "is_metering")

    def __init__(self, book: PathBook, file: str, uplinks: Uplinks, paths: Mapping[int, ClientPath]) -> None:
        self._book, self._file, self._uplinks, self._paths = book, file, uplinks, paths
        self.is_metering = book.is_metering  # whether anything is to be counted
        if uplinks.is_open:
            uplinks.unwanted |= book.taken_off
        for name in book.added():
            if all(name != uplink.name for uplink in uplinks.by_id.values()) and uplinks.add(name) is None:
                log.warning("path %s was added once, but there are %d without it", name, MAX_PATHS)

    def perform(self, verb: str, arguments: Fields) -> Any:
        """Write down what a verb says; return its result. It holds with the next `apply`. Raises ConfigError."""
        return perform(verb, arguments, self._paths, self._uplinks, self._book)

    def apply(self, now: float) -> None:
        """Let every path be as the book says, and let the server know."""
        self.is_metering = self._book.is_metering
        for path in self._paths.values():
            if apply(path, self._book):
                if path.is_open:
                    path.probe_at = min(path.probe_at, now)
                is_spent = self._book.is_spent(path.name, path.interface)
                why = ": it has carried its limit of this month" if is_spent else ""
                log.info("path %s is for %s now%s", path.title, path.use.name.lower(), why)

    def label_of(self, uplink: str) -> str:
        """Return what an uplink's path is to be called; nothing: as the uplink."""
        return self._book.of(uplink).label

    def carried(self, number: int, datagrams: int, size: int) -> None:
        """So many datagrams of `size` bytes together have passed a path."""
        path = self._paths.get(number)
        if path is not None and path.address is not None:
            whole = size + datagrams * HEADERS[path.address.version]
            self._book.carried(path.name, path.interface, whole)

    def today_is(self, year: int, month: int, day: int, now: float) -> SaveState | None:
        """The clock on the wall shows this local date; return what is to be saved by now."""
        self._book.today_is(year, month, day, now)
        if not self.is_metering:
            return None
        self.apply(now)
        return self.save(now) if self._book.wants_saving(now) else None

    def save(self, now: float) -> SaveState:
        """Return the job that writes the book down."""
        self._book.saved(now)
        return SaveState(self._file, self._book.to_document())


def perform(verb: str, arguments: Fields, paths: Mapping[int, ClientPath], uplinks: Uplinks, book: PathBook) -> Any:
    """Write down what a verb says, and return what it shows. Raises ConfigError, and has changed nothing then."""
    if verb == "paths-list":
        return [view(path, book) for path in paths.values()]
    if verb == "paths-add":
        return _add(arguments.text("uplink"), uplinks, book)
    path = find(arguments.text("path"), paths)
    match verb:
        case "paths-remove":
            return _remove(path, uplinks, book)
        case "paths-name":
            label = check_label(arguments.text("label"))
            if label and any(label in _names(other) for other in paths.values() if other is not path):
                raise ConfigError(f"label {label!a}: another path goes by it already; choose another one")
            book.change(path.name).label = label
        case "paths-priority":
            book.change(path.name).use = parse_priority(arguments.text("priority"))
        case _:
            limit, day = parse_limit(arguments.text("limit")), check_reset_day(arguments.whole("reset_day"))
            book.meter(path.name, path.interface, limit, day)
    return view(path, book)


def find(name: str, paths: Mapping[int, ClientPath]) -> ClientPath:
    """Return the path that goes by this name. Raises ConfigError."""
    for path in paths.values():
        if name in _names(path):
            return path
    known = [known for path in paths.values() for known in _names(path)]
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else "see 'mptunnel paths list'"
    raise ConfigError(f"path {name!a}: there is no such path; {hint}")


def apply(path: ClientPath, book: PathBook) -> bool:
    """Let a path be as the book says; return whether that is another use than before."""
    said, before = book.of(path.name), path.use
    path.label = said.label
    path.use = Use.STANDBY if book.is_spent(path.name, path.interface) else said.use
    return path.use is not before


def view(path: ClientPath, book: PathBook) -> dict[str, Any]:
    """What `paths list` shows of a path."""
    said = book.of(path.name)
    metered = None
    if said.limit is not None:
        metered = {
            "limit": said.limit,
            "used": book.used(path.interface),
            "reset_day": said.reset_day,
            "spent": book.is_spent(path.name, path.interface),
        }
    return {
        "id": path.id,
        "uplink": path.name,
        "label": said.label,
        "interface": path.interface or None,
        "address": None if path.address is None else str(path.address),
        "state": path.state.value,
        "priority": next(name for name, use in PRIORITIES.items() if use is said.use),
        "metered": metered,
        "added": said.is_added,
    }


def _names(path: ClientPath) -> set[str]:
    return {name for name in (path.label, path.name, path.interface, str(path.id)) if name}


def _add(text: str, uplinks: Uplinks, book: PathBook) -> dict[str, Any]:
    (uplink,) = parse_interfaces([text])
    if any(known.name == uplink for known in uplinks.by_id.values()):
        raise ConfigError(f"{uplink} is a path already; see 'mptunnel paths list'")
    number = uplinks.add(uplink)
    if number is None:
        raise ConfigError(f"a tunnel has at most {MAX_PATHS} paths; first remove one")
    book.taken_off.discard(uplink)
    book.change(uplink).is_added = True
    return {"id": number, "uplink": uplink}


def _remove(path: ClientPath, uplinks: Uplinks, book: PathBook) -> dict[str, Any]:
    if len(uplinks.by_id) == 1:
        raise ConfigError(f"{path.name} is the only path; add another one first")
    uplinks.remove(path.id)
    if uplinks.is_open:
        book.taken_off.add(path.name)
    book.change(path.name).is_added = False
    return {"id": path.id, "uplink": path.name}
