"""The server, as its client sees it: probes on every path, HELLO, handshakes over several paths, tunnel MTU.

**Handshake** (towards a server that has said HELLO, or that we join). The initiation goes out on all paths at once.
While packets wait, or the tunnel is in use and deaf, the same bytes are repeated every 250 ms; a fresh one is made
every 5 s, and every 25 s once 90 s have passed and nothing waits. It never gives up. Towards any other server one path
is used at a time: the next one when its socket is gone, when it was silent for 15 s although data was sent, and with
every fresh initiation that follows an unanswered one. That server learns at once by a keepalive where we are.

**HELLO** is the first datagram under every session, on every path, and again every 500 ms until it is answered; after
20 of them the server is taken for a stock WireGuard server. A session that begins in idleness confirms its keys by its
probes, and is told HELLO when it comes into use, or when no ECHO shows within a second that the server knows us still.

**Probes.** In use (an IP packet either way in the last 10 s): every 250 ms on every path that has a socket, and after
every 32 KiB on a path, at most one in 20 ms. With a gap alarm (`alarm`) the tunnel always counts as in use, and probes
are as frequent as that needs. Otherwise every `idle_probe` seconds; an unanswered one is followed up
every second until it is clear that the path is down. New keys are made by a probe's turn, when the old ones would not
last to the next one's: by one path, each in its turn, and by all of them if nothing has come back after a second.
Keys that end between two probes are not missed before. When no ECHO came on any path for max(0.75 s, 3 RTT) although
probes were sent, a handshake is started: the server may have restarted. The old session stays in use until then.
Paths that stand by (`standby`) are probed as in idleness.

**MTU.** Every other probe may be padded: see `mtu`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from mptunnel import messages, standby
from mptunnel.cap import review
from mptunnel.events import Notice, NoticeKind
from mptunnel.messages import (
    PROTOCOL_VERSION,
    WHOLE_SESSION,
    Address,
    Capability,
    Challenge,
    Close,
    CloseReason,
    Control,
    Echo,
    Enrol,
    Enrolled,
    EnrolResult,
    Hello,
    Use,
    seconds_between,
)
from mptunnel.mtu import PROVE_AGAIN, TunnelMtu, refused
from mptunnel.packet import MIN_MTU
from mptunnel.path import FOLLOW_UP, LARGE, NOTICES, PROBE_INTERVAL, ClientPath, PathState, records
from mptunnel.peer import Identity, Peer
from mptunnel.scheduler import Redundant, allot
from mptunnel.session import REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_TIMEOUT
from mptunnel.timers import (
    ENROL_INTERVAL,
    HELLO_INTERVAL,
    INF,
    PATIENT_INTERVAL,
    REKEY_ATTEMPT_TIME,
    REPEAT_INTERVAL,
    Timer,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from mptunnel.alarm import Alarm
    from mptunnel.events import Transmit
    from mptunnel.noise import Remote
    from mptunnel.session import Session

log = logging.getLogger(__name__)

IN_USE: Final = 10.0
MAX_HELLOS: Final = 20
MAX_ENROLS: Final = 3  # unanswered under one session: the server may have been restarted, and know it no longer
DEAF_AFTER: Final = 0.75
ANSWERED_SPACING: Final = 1.0
RENEW_BEFORE: Final = 10.0  # idle, new keys are made so long before the old ones end
RENEW_AFTER: Final = 60.0  # and not before they are so old: an unanswered probe is no reason

News = Hello | Address | Enrolled | Close | Notice | int  # int: the tunnel's MTU has changed to this


class ServerPeer(Peer):
    """The server at the other end of our paths. `paths` belongs to the client, which opens and closes them.

    `news` is what the client must act on; it takes them out after every call.
    """

    def __init__(
        self,
        identity: Identity,
        remote: Remote,
        name: str,
        now: float,
        *,
        paths: Mapping[int, ClientPath],
        instance: int,
        clock_origin: int,
        mtu: int,
        idle_probe: float,
        is_ours: bool = False,
        is_stock: bool = False,
        enrol: Enrol | None = None,
        allows: Container[bytes] | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        super().__init__(identity, remote, name, mtu, now)
        self.paths = paths
        self.news: list[News] = []
        self.tunnel_mtu = MIN_MTU
        self.is_ours = is_ours  # has said HELLO in an earlier run, or we join it
        self.is_stock = is_stock
        self._stays_stock = is_stock  # not because it left HELLO unanswered, which may have been the paths' fault
        self._was_taken_for_stock = is_stock
        self.server_instance: int | None = None
        self._scheduler = Redundant()
        self._instance = instance
        self._clock_origin = clock_origin
        self._idle_probe = idle_probe
        self._enrol = enrol
        self.allowed = allows
        self.sources = paths  # by number
        self._alarm = alarm
        self._probe_interval = PROBE_INTERVAL if alarm is None else alarm.interval  # in use
        self._started_at = now
        self._silent_from = now  # since when handshakes go unanswered
        self._answered_at = -INF
        self._begun_at = -INF  # when there was a session again after a time without one
        self._echoed_at = -INF  # when an ECHO came on any path
        self._mtu = TunnelMtu()
        self._hello_serial = 1
        self._hellos = 0
        self._hello_is_answered = False
        self._owes_hello = False  # this session has begun without one
        self._asks_quietly = False  # for new keys, on one path
        self._has_address = False  # came under this session
        self._enrols = 0
        self._single = -1  # the path in use towards a server that is not known to take copies
        self._has_cookie = False  # for the next initiation, on that path
        self._is_closed = False  # the server has said that it stops
        if is_ours:
            self._widen()

    # -- what the client tells -------------------------------------------------------------------------

    def path_opened(self, path: ClientPath, now: float, out: list[Transmit], *, is_down: bool = False) -> None:
        """A path has a new socket: use it at once. `is_down`: see `ClientPath.opened`."""
        path.opened(self._new_incarnation(), now, is_down=is_down)
        self.look_again()
        has_session = self.current is not None and self.current.is_alive(now)
        if has_session:
            if self.speaks:
                self._probe(path, now, out)
            if is_down:
                self._listen(now, out)  # if this is the way of all paths, the server may know us no longer
            self._flush(now, out)  # what waited while there was no path at all
            if self.takes_one_copy and path.id == self._single_path():
                self._send_keepalive(now, out)  # shows where we are now
        if self.initiation is not None:
            self._repeat([way for way in self._handshake_ways(now) if way == path.id], now, out)
        elif not has_session:
            self._want_handshake(now, out)

    def _new_incarnation(self) -> int:
        return int.from_bytes(self.identity.entropy(4), "little")

    def path_closed(self, now: float, out: list[Transmit]) -> None:
        """A path has lost its socket: a server that takes one copy is shown at once by which path we come now."""
        self.look_again()
        if self.takes_one_copy and self._single != (single := self._single_path()) and single is not None:
            self._send_keepalive(now, out)

    def path_replaced(self, path: ClientPath, now: float, out: list[Transmit]) -> None:
        """Another uplink has got the number of a path that is closed; both ends count for the new one from 0."""
        self._forget_receipts(path.id)
        self.close(CloseReason.TAKEN_OFF, now, out, path)

    def close(self, reason: CloseReason, now: float, out: list[Transmit], path: ClientPath | None = None) -> None:
        """Say on every path that the session (or one path) ends."""
        plain = Close(WHOLE_SESSION, reason, 0) if path is None else Close(path.id, reason, path.incarnation)
        if self.is_multipath:
            for way in self._open_paths():
                if way is not path:
                    self._send_control(plain.encode(), way.id, way, now, out)

    def too_big(self, path: ClientPath, now: float) -> None:
        """The kernel refused a datagram on `path` for its size."""
        refused(path, now)

    @property
    def speaks(self) -> bool:
        """Whether the server understands control messages, as far as we know: copies and probes are welcome."""
        return (self.is_multipath or self.is_ours) and self._enrol is None

    @property
    def takes_one_copy(self) -> bool:
        """Whether the server is not known to take copies, so that one path at a time is used."""
        return not (self.is_multipath or self.is_ours)

    def in_use(self, now: float) -> bool:
        """Whether an IP packet went either way in the last 10 s (or the tunnel has only just come up).

        Always with an alarm: who wants to know within milliseconds wants to know also while no data flows.
        """
        return self._alarm is not None or now - self.data_at < IN_USE or now - self._begun_at < IN_USE

    @property
    def is_missed(self) -> bool:
        """Whether handshakes or probes go unanswered, or none was ever answered; keys that have ended say nothing."""
        return not self.is_multipath or self._silent_from < INF

    def rests(self, now: float) -> bool:
        """Whether nobody would miss the keys: idle, and the server is not known to be silent."""
        return not (self.is_missed or self._staged or self.in_use(now))

    # -- sending and receiving -------------------------------------------------------------------------

    def _send_batch(self, packets: list[bytes], now: float, out: list[Transmit]) -> None:
        """See `Peer._send_batch`; the first packets after a pause also make every path known again."""
        was_idle = not self.in_use(now)
        if self._owes_hello:
            self._send_owed_hello(now, out)
        super()._send_batch(packets, now, out)
        if was_idle:
            self._probe_soon(now)
            if self._asks_quietly:
                self._ask_aloud(now, out)
            if self.initiation is not None and not self.takes_one_copy:
                self._hurry(now)

    def _has_taken(
        self, session: Session, source: Any, size: int, now: float, out: list[Transmit], *, was_quiet_for: float | None
    ) -> None:
        """See `Peer._has_taken`; the first packets after a pause also make every path known again."""
        if was_quiet_for is not None:
            if self._alarm is not None:
                self._alarm_answered(self._alarm, now)
            elif was_quiet_for >= IN_USE and now - self._begun_at >= IN_USE:
                self._probe_soon(now)
                if self._owes_hello:
                    self._send_owed_hello(now, out)
        if self.is_stock:
            self._lives(self.paths.get(source), now)

    def _choose(self, count: int, size: int, now: float) -> Sequence[tuple[ClientPath | None, Any, int]]:
        carriers = self._carriers(now)
        if size >= LARGE and any(path.works(now) and not path.is_small for path in carriers):
            carriers = [path for path in carriers if not path.is_small]
        allot(carriers, count, size, now)
        return [(path, path.id, given) for path, given in self._scheduler.choose(count, size, carriers)]

    def _has_way(self, size: int, now: float) -> bool:
        return bool(self._carriers(now))

    def _free_ways(self, now: float) -> list[tuple[ClientPath, Any]]:
        carriers = self._carriers(now)
        is_free = not any(path.is_limited(now) or path.is_small for path in carriers)
        return [(path, path.id) for path in carriers] if is_free else []

    def _carriers(self, now: float) -> list[ClientPath]:
        if self.takes_one_copy:
            single = self._single_path()
            return [path for path in self._open_paths() if path.id == single]
        return standby.carriers(self.paths.values(), now)

    def _handshake_ways(self, now: float) -> list[Any]:
        if not self.takes_one_copy:
            up = [path.id for path in self._open_paths() if path.is_up]
            if self._asks_quietly and up:
                return [up[self._serial % len(up)]]
            return [path.id for path in self._open_paths()]
        single = self._single_path()
        return [] if single is None else [single]

    def _open_paths(self) -> list[ClientPath]:
        return [path for path in self.paths.values() if path.is_open]

    def _single_path(self) -> int | None:
        """Return the path in use where only one is: the same one as long as it is open and no better one is."""
        ids = self._single_ones()
        if ids and self._single not in ids:
            self._single = ids[0]
        return self._single if ids else None

    def _single_ones(self) -> list[int]:
        """Return the paths that may be the one in use: those for data, else those that stand by, else given up ones."""
        paths = self._open_paths()
        left = [path for path in paths if path.state is not PathState.DOWN]
        return [path.id for path in [path for path in left if path.use is Use.DATA] or left or paths]

    def _turn_to_next_path(self, now: float) -> None:
        """Nothing has come by the path in use: try another one, unless only one is open."""
        if not self.takes_one_copy:
            return
        used = self.paths.get(self._single)
        is_news = used is not None and used.is_open and len(self._open_paths()) > 1 and used.given_up(now)
        ids = sorted(self._single_ones())
        self._single = next((n for n in ids if n > self._single), ids[0] if ids else -1)
        if is_news and used is not None and self.is_stock:
            log.info("path %s silent: trying %s", used.title, self.paths[self._single].title)
            self.tell_path(used, now, why="silent, another one is tried")

    def _lives(self, path: ClientPath | None, now: float) -> None:
        """Something authentic came by a path from a stock server, which answers no probe."""
        if path is not None and path.is_open and path.answered(now):
            log.info("path %s up: it alone is used, the server is a stock one", path.title)
            self.tell_path(path, now)

    def _paths_in_use(self) -> int:
        if not self.is_multipath:
            return 0
        return sum(1 << path.id for path in self.paths.values() if path.use is Use.DATA)

    def _paths_standing_by(self) -> int:
        return sum(1 << path.id for path in self.paths.values() if path.use is not Use.DATA)

    def _receipt_ways(self, now: float) -> list[tuple[ClientPath, Any]]:
        return [(path, path.id) for path in self._carriers(now)]

    def _datagrams_received(self) -> dict[int, tuple[int, int]]:
        return {path.id: (path.loss_down.sent, max(0, path.loss_down.lost)) for path in self.paths.values()}

    def _learn_endpoint(self, source: Any) -> None:
        """R8: the server's address is pinned; its packets move nothing."""

    # -- handshake -------------------------------------------------------------------------------------

    def _is_eager(self, now: float) -> bool:
        """Whether something waits for this handshake, so that repeating it is worth while."""
        if self._enrol is not None or (self._staged and now - self.data_at < IN_USE):
            return True
        if self.current is None and now - self._started_at < REKEY_ATTEMPT_TIME:
            return True
        return self.in_use(now)

    def _wants_successor(self, session: Session, now: float) -> bool:
        """See `Peer._wants_successor`; probes of an idle tunnel are no reason before they would be without keys."""
        if not self.rests(now):
            return super()._wants_successor(session, now)
        return session.counter > REKEY_AFTER_MESSAGES or self._is_last_chance(session, now)

    def _is_last_chance(self, session: Session, now: float) -> bool:
        """Whether the keys would not last until the next idle probe and a handshake after it."""
        age = now - session.created_at
        return age > RENEW_AFTER and age + self._idle_probe + RENEW_BEFORE > REJECT_AFTER_TIME

    def _initiate(self, now: float, out: list[Transmit]) -> None:
        self._asks_quietly = self._attempts == 0 and self.rests(now)
        super()._initiate(now, out)
        if self.initiation is not None and not self.takes_one_copy:
            self.timers.at(Timer.REPEAT, now + (FOLLOW_UP if self._asks_quietly else REPEAT_INTERVAL))

    def _ask_aloud(self, now: float, out: list[Transmit]) -> None:
        """Nothing has come back, or it is wanted now: the initiation that waits goes out on every path."""
        self._asks_quietly = False
        self._repeat(self._handshake_ways(now), now, out)
        self.timers.at(Timer.REPEAT, now + REPEAT_INTERVAL)

    def _hurry(self, now: float) -> None:
        """The handshake under way was not urgent, and is now: what is repeated must not be older than 5 s."""
        if not self.timers.is_armed(Timer.REPEAT):
            self.timers.at(Timer.REPEAT, now)
        self.timers.at_the_latest(Timer.RETRANSMIT, max(now, self._initiated_at + REKEY_TIMEOUT))

    def _next_handshake_at(self) -> float:
        if not self.takes_one_copy and self._answered_at >= self._initiated_at:
            return self._answered_at + ANSWERED_SPACING
        return self._initiated_at + REKEY_TIMEOUT

    def _patience(self, now: float) -> float:
        is_patient = now - self._silent_from > REKEY_ATTEMPT_TIME and not self._is_eager(now)
        return PATIENT_INTERVAL if is_patient else 0.0

    def _retransmit(self, now: float, out: list[Transmit]) -> None:
        self._silent_from = min(self._silent_from, now)
        if not self._has_cookie:
            self._turn_to_next_path(now)
        self._has_cookie = False
        self._initiate(now, out)

    def cookie_at(self, source: Any) -> None:
        """See `Peer.cookie_at`; a path that brings a cookie works, so the next initiation goes there too."""
        self._has_cookie = True

    def response_received(self, message: bytes, now: float, out: list[Transmit]) -> None:
        """See `Peer.response_received`."""
        before = self.current
        super().response_received(message, now, out)
        if self.current is not before:
            self._silent_from = INF

    def _confirmed(self, now: float, out: list[Transmit]) -> None:
        self._answered_at = self._echoed_at = now
        is_quiet = self.rests(now)
        self._asks_quietly = False
        if not is_quiet and (self.previous is None or not self.previous.is_alive(now)):
            self._begun_at = now
        self._is_closed = False
        if self._enrol is not None:
            self._enrols = 0
            self._send_enrol(now, out)
            return
        if self._hello_is_answered or self.is_stock or self.is_multipath:  # else the sessions share the 20
            self._hellos = 0
        self._owes_hello = is_quiet and self._hello_is_answered and self._has_address
        self._hello_is_answered = self._has_address = False
        self.is_stock = self._stays_stock
        if self._owes_hello:
            self.timers.at(Timer.HELLO, now + FOLLOW_UP)
        elif self.is_stock:
            self._send_keepalive(now, out)
            self._lives(self.paths.get(self._single), now)
        else:
            self._send_hello(now, out)
        if self.speaks:
            self._probe_all(now, out)
        self._flush(now, out)

    # -- HELLO and ENROL -------------------------------------------------------------------------------

    def change_hello(self, now: float, out: list[Transmit]) -> None:
        """Something that HELLO says has changed: say it again, under a new serial."""
        self._hello_serial += 1
        self._hellos = 0
        self._hello_is_answered = False
        if not self.is_stock and self._enrol is None and self.current is not None:
            self._send_hello(now, out)

    def _send_hello(self, now: float, out: list[Transmit]) -> None:
        if self._hellos >= MAX_HELLOS:
            if not self.is_multipath:
                if not self._was_taken_for_stock:
                    log.info(
                        "%s does not answer our HELLO: taking it for a stock WireGuard server, one path", self.name
                    )
                self.is_stock = self._was_taken_for_stock = True
                self.is_ours = False
            return
        self._hellos += 1
        self._owes_hello = False
        plain = Hello(
            is_answer=False, version=PROTOCOL_VERSION, oldest=PROTOCOL_VERSION, capabilities=self.identity.capabilities,
            instance=self._instance, mtu=self.tunnel_mtu, mode=0, paths=len(self._open_paths()),
            serial=self._hello_serial,
        ).encode()  # fmt: skip
        for way in self._handshake_ways(now):
            self._send_control(plain, way, self.paths[way], now, out)
        self.timers.at(Timer.HELLO, now + HELLO_INTERVAL)

    def _send_owed_hello(self, now: float, out: list[Transmit]) -> None:
        """The session comes into use: what was left out at its beginning is said now, before the first packet."""
        if self.current is not None and self.current.is_alive(now):
            self._hello_is_answered = False
            self._send_hello(now, out)

    def _hello_received(self, session: Session, hello: Hello, now: float, out: list[Transmit]) -> None:
        if not hello.is_answer or hello.serial != self._hello_serial or session is not self.current:
            self.identity.drops["HELLO not expected"] += 1
            return
        if self._hello_is_answered:
            return
        self._hello_is_answered = True
        self._stop_hello()
        if hello.oldest > PROTOCOL_VERSION or hello.version < PROTOCOL_VERSION:
            log.error(
                "%s speaks version %d to %d of our control messages, we speak %d: one path only; update the older one",
                self.name, hello.oldest, hello.version, PROTOCOL_VERSION,
            )  # fmt: skip
            self._stays_stock = self.is_stock = True
            self.is_ours = self.is_multipath = False
            return
        self.is_stock = self._was_taken_for_stock = False
        if self.server_instance != hello.instance:
            if self.server_instance is not None:
                self.receipts.sender_restarted(session.serial, now)
                self.told.teller_restarted((session.serial, -1))
                self.timers.at_the_latest(Timer.RECEIPT, now)  # so that it knows what there was before it
                for path in self._open_paths():
                    path.renew(self._new_incarnation(), now)
            self.server_instance = hello.instance
        if Capability.MULTIPATH not in hello.capabilities:
            self.is_multipath = self.is_ours = False
        elif not self.is_multipath:
            self.is_multipath = self.is_ours = True
            self._widen()
        self.takes_partial = Capability.PARTIAL_CHECKSUMS in hello.capabilities & self.identity.capabilities
        self.mtu = min(self.mtu, max(hello.mtu, MIN_MTU))
        for path in self.paths.values():  # also what a server has shown that took more
            path.carries = min(path.carries, self.mtu)
        self.news.append(hello)
        self._probe_soon(now)

    def _stop_hello(self) -> None:
        """HELLO need not be said again once it is answered; the address goes with the answer, and may be lost."""
        if self._hello_is_answered and self._has_address:
            self.timers.stop(Timer.HELLO)

    def _send_enrol(self, now: float, out: list[Transmit]) -> None:
        if self._enrol is not None:
            for way in self._handshake_ways(now):
                self._send_control(self._enrol.encode(), way, self.paths[way], now, out)
            self.timers.at(Timer.ENROL, now + ENROL_INTERVAL)
            self._enrols += 1
            if self._enrols > MAX_ENROLS:
                self._want_handshake(now, out)

    # -- control messages ------------------------------------------------------------------------------

    def _control(
        self, session: Session, counter: int, plain: bytes, source: Any, now: float, out: list[Transmit]
    ) -> None:
        kind, body = plain[0], memoryview(plain)
        if self._enrol is not None:
            if kind == Control.ENROLLED:
                enrolled = messages.decode_enrolled_untrusted(body)
                if enrolled.result != EnrolResult.TRY_AGAIN:
                    self.timers.stop(Timer.ENROL)
                self._enrols = 0
                self.news.append(enrolled)
            elif kind == Control.CLOSE:
                self.news.append(messages.decode_close_untrusted(body))
            return
        match kind:
            case Control.ECHO:
                self._echo_received(session, counter, messages.decode_echo_untrusted(body), len(plain), source, now)
            case Control.CHALLENGE:
                self._challenged(messages.decode_challenge_untrusted(body), source, now, out)
            case Control.HELLO:
                self._hello_received(session, messages.decode_hello_untrusted(body), now, out)
            case Control.ADDRESS:
                self.news.append(messages.decode_address_untrusted(body))
                self._has_address = True
                self._stop_hello()
            case Control.CLOSE:
                self._closed(session, messages.decode_close_untrusted(body), now, out)
            case Control.RECEIPT:
                self._receipt_received(session, counter, plain, now)
            case _:
                self.identity.drops["unknown control message"] += 1

    def _challenged(self, challenge: Challenge, source: Any, now: float, out: list[Transmit]) -> None:
        path = self.paths.get(source)
        if path is None or challenge.path != path.id or challenge.incarnation != path.incarnation:
            self.identity.drops["challenge for another path"] += 1
            return
        if path.may_answer(now):
            path.challenged()
            self._send_control(challenge.encode(Control.RESPONSE), path.id, path, now, out)

    def _echo_received(self, session: Session, counter: int, echo: Echo, size: int, source: Any, now: float) -> None:
        path = self.paths.get(source)
        if path is None or echo.path != path.id or echo.incarnation != path.incarnation:
            self.identity.drops["echo for another path"] += 1
            return
        interval = self._probe_interval if self.in_use(now) else self._idle_probe
        later, until_next = path.probes_after(echo.seq), interval if path.told_use is Use.DATA else self._idle_probe
        self.receipts.gaps.heard(path.id, echo.incarnation, echo.seq, echo.probe_us, later, until_next, now)
        settle_at = self.receipts.mark(session, counter, echo.packets, now, path.id, interval, self._paths_in_use())
        self.timers.at_the_latest(Timer.SETTLE, settle_at)
        path.seen_as = (messages.address_text(echo.address), echo.port)
        for record in echo.records:
            other = self.paths.get(record.path)
            if other is not None and other is not path:
                arrival = other.reported_by_another(record, echo.sent_us, now)
                if arrival is not None and other.carries_up(now):
                    self._review(other, arrival[0], arrival[1], None, now)
        if echo.is_unasked:
            path.heard_unasked(echo.number, now)
            self._echoed_at = now  # it knows us
            return
        probed, before = path.probed(echo.seq), path.state
        proven = path.echo_received(echo.seq, echo.number, echo.held_us / 1e6, echo.tx, echo.rx, now)
        if proven is None or probed is None:
            return
        arrived_us = echo.sent_us - echo.held_us
        up, down = seconds_between(echo.probe_us, arrived_us), seconds_between(echo.sent_us, self._now_us(now))
        path.measured(echo.seq, up, down, now)
        self._review(path, arrived_us, probed, echo.rx, now)
        path.told_given(echo.tx, echo.packets, now)
        if self._hellos >= MAX_HELLOS and not self._hello_is_answered and session is self.current:
            self._hellos = 0  # they went unanswered in an outage, which has just ended
            self.timers.at(Timer.HELLO, now)
        self._echoed_at = now
        if self._alarm is not None:
            self._alarm_answered(self._alarm, now)
        if self._owes_hello:  # it knows us still; what it said before holds
            self._hello_is_answered = self._has_address = True
            self._stop_hello()
        if path.answered(now) and path.state is PathState.SLOW:
            log.info("path %s slow: what it cannot carry in time goes by the others only", path.title)
            self.tell_path(path, now, rtt_ms=round((path.rtt or 0) * 1e3, 3))
        elif path.state is not before:
            log.info(
                "path %s up: rtt %.1f ms, seen by the server as %s:%d", path.title, (path.rtt or 0) * 1e3, *path.seen_as
            )
            self.tell_path(path, now, rtt_ms=round((path.rtt or 0) * 1e3, 3))
            path.probe_at = min(path.probe_at, now)  # what size does it carry?
        if path.carries <= proven <= size and proven:  # it came back as long as the probe was
            path.carries, path.proven_at, path.proof_tries, path.is_small = proven, now, 0, False
            self._consider_mtu(now)

    def _review(self, path: ClientPath, at_us: int, given: tuple[int, int], delivered: int | None, now: float) -> None:
        """Judge how much the path may be given, by new feedback (see `cap`)."""
        others = [other for other in self._open_paths() if other is not path and other.is_up]
        if why := review(path, others, at_us / 1e6, given, delivered, now):
            log.debug("path %s held: %s", path.title, why)

    def _closed(self, session: Session, close: Close, now: float, out: list[Transmit]) -> None:
        if close.path != WHOLE_SESSION or self._is_closed or session is not self.current:
            return
        self._is_closed = True
        self.news.append(close)
        self._want_handshake(now, out)

    # -- probes ----------------------------------------------------------------------------------------

    def _probe_soon(self, now: float) -> None:
        if self.speaks:
            for path in self._open_paths():
                if standby.use_now(path, self.paths.values(), now) is Use.DATA:
                    path.probe_at = min(path.probe_at, max(now, path.last_probe_at + PROBE_INTERVAL / 2))

    def _probe_all(self, now: float, out: list[Transmit]) -> None:
        for path in self._open_paths():
            self._probe(path, now, out)

    def _probe_next(self, now: float, out: list[Transmit]) -> None:
        """Probe the path that has been due for longest. The others have their turns: packets may go in between."""
        due = [path for path in self._open_paths() if path.due_at <= now]
        if due:
            path = min(due, key=lambda path: path.due_at)
            self._probe(path, now, out)
            if path.fell_silent(now):
                self._log_silence(path, now)

    def _probe(self, path: ClientPath, now: float, out: list[Transmit]) -> None:
        if path.has_counted_out:
            path.renew(self._new_incarnation(), now)
        use = standby.use_now(path, self.paths.values(), now)
        in_use = self.in_use(now) and use is Use.DATA
        interval = self._probe_interval if in_use else self._idle_probe
        is_data_recent = path.proof_tries or now - self.data_at < PROVE_AGAIN  # else nobody sends there: it would cost
        is_shown_again = in_use and bool(is_data_recent)
        padded = self._mtu.size_to_prove(path, self.mtu, now, is_shown_again=is_shown_again)
        self._adopt_mtu()
        others = records(path, self._open_paths(), now, is_idle=not in_use)
        plain = path.next_probe(now, interval, self._now_us(now), self.packets_sent, others, padded, use)
        self._send_control(plain, path.id, path, now, out)

    def _now_us(self, now: float) -> int:
        return (round(now * 1e6) + self._clock_origin) % (1 << 64)

    def next_deadline(self) -> float:
        """When `handle_timeout` is due."""
        due = super().next_deadline()
        if self._alarm is not None:
            due = min(due, self._alarm.due_at(self.heard_at))
        if self.speaks:
            for path in self.paths.values():
                if path.is_open and (due_at := path.due_at) < due:
                    due = due_at
        return due

    def handle_timeout(self, now: float, out: list[Transmit]) -> None:
        """Do what is due."""
        super().handle_timeout(now, out)
        if self._alarm is not None and self._alarm.raised(self.heard_at, now):
            silent_ms = (now - self.heard_at) * 1e3
            log.warning("gap: nothing has come from %s for %.0f ms", self.name, silent_ms)
            self.news.append(self.notice(NoticeKind.GAP, now, silent_ms=round(silent_ms, 1)))
        if not self.speaks:
            return
        if self.current is None or not self.current.is_alive(now):
            self._probe_in_vain(now, out)
            return
        if self.rests(now) and self.initiation is None and self._is_last_chance(self.current, now):
            self._renew(now, out)
        standby.call(self.paths.values(), now)
        self._probe_next(now, out)
        self._consider_mtu(now)
        self._listen(now, out)

    def _probe_in_vain(self, now: float, out: list[Transmit]) -> None:
        """A probe may be due, but there are no keys: they come first, then every path is probed."""
        is_due = any(path.is_open and path.due_at <= now for path in self.paths.values())
        if is_due or (self.current is not None and not self.rests(now)):
            for path in self.paths.values():
                path.probe_at = INF
            self._want_handshake(now, out)

    def _renew(self, now: float, out: list[Transmit]) -> None:
        """New keys instead of the probes that are due: with them every path is probed, or without after a while."""
        if any(path.due_at <= now for path in self._open_paths()):
            self._want_handshake(now, out)
            for path in self._open_paths():
                path.probe_at = now + FOLLOW_UP

    def _log_silence(self, path: ClientPath, now: float) -> None:
        heard = "never heard" if path.heard_at == -INF else f"last heard {now - path.heard_at:.1f} s ago"
        log.info("path %s down: %d probes unanswered, %s", path.title, path.unanswered - 1, heard)
        self.tell_path(path, now, why=f"{path.unanswered - 1} probes unanswered, {heard}")

    def tell_path(self, path: ClientPath, now: float, **values: str | float) -> None:
        """Let the world know the state that `path` has just entered."""
        self.news.append(self.notice(NOTICES[path.state], now, path.title, path.interface, **values))

    def _listen(self, now: float, out: list[Transmit]) -> None:
        """Start a handshake if no path has answered for a while: the server may know us no longer."""
        if now - self._echoed_at <= DEAF_AFTER:
            return
        paths = self._open_paths()
        if not standby.is_needed(self.paths.values(), now):  # those standing by are asked too rarely to say anything
            paths = [path for path in paths if path.use is Use.DATA]
        known = [path for path in paths if path.heard_at > -INF]  # one that is always new must not hide the silence
        asked = [path.silent_since for path in known or paths]
        if not asked:
            return
        rtt = min((path.min_rtt for path in paths if path.min_rtt < INF), default=0.0)
        patience = max(DEAF_AFTER, 3 * rtt)
        if not self.in_use(now):
            patience = max(patience, 3 * FOLLOW_UP)
            if any(path.carries_up(now) and not path.is_up for path in known):  # answered by another path, each time
                patience += self._idle_probe
        if now - max(self._echoed_at, *asked) > patience and max(asked) < INF:
            if self._silent_from == INF:
                self._silent_from = now
            self._want_handshake(now, out)

    def _alarm_answered(self, alarm: Alarm, now: float) -> None:
        """A probe was answered, or data came: that ends a gap."""
        lasted = alarm.answered(now)
        if lasted is not None:
            log.warning("gap over: %s is back after %.0f ms", self.name, lasted * 1e3)
            self.news.append(self.notice(NoticeKind.GAP_OVER, now, lasted_ms=round(lasted * 1e3, 1)))

    def _consider_mtu(self, now: float) -> None:
        self._mtu.consider(self._open_paths(), self._answered_at, now)
        self._adopt_mtu()

    def _adopt_mtu(self) -> None:
        if self._mtu.value != self.tunnel_mtu:
            self.tunnel_mtu = self._mtu.value
            self.news.append(self.tunnel_mtu)

    # -- time ------------------------------------------------------------------------------------------

    def _expired(self, timer: Timer, now: float, out: list[Transmit]) -> None:
        match timer:
            case Timer.REPEAT:
                if self.initiation is not None and (self._asks_quietly or self._is_eager(now)):
                    self._ask_aloud(now, out)
            case Timer.HELLO:
                if not (self._hello_is_answered and self._has_address):
                    self._send_hello(now, out)
            case Timer.ENROL:
                self._send_enrol(now, out)
            case Timer.NEW_HANDSHAKE if self.takes_one_copy:
                self._turn_to_next_path(now)
                super()._expired(timer, now, out)
            case _:
                super()._expired(timer, now, out)
