"""A client, as the server sees it: paths that must prove themselves, ECHOs, HELLO and the addresses it is given.

Until a client has said HELLO it is a stock WireGuard peer: one endpoint, one copy. After that its paths are what its
probes have bound (see `path`), and data goes over all that are fresh or idle. If none is, one copy goes to every
endpoint that was refreshed in the last 15 s; if there is none either, packets are staged until a probe comes. The
server never starts a handshake with such a client (it would not know where to), and what an address has not proved by
a challenge gets no more than answers smaller than what it sent.

`JoinPeer` is the holder of a join token: it can enrol a key, and nothing else.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mptunnel import messages
from mptunnel.cap import review
from mptunnel.events import Notice, NoticeKind
from mptunnel.history import Told
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
    Hello,
    Probe,
    Use,
)
from mptunnel.path import (
    IDLE_SLACK,
    LAST_RESORT,
    NOTICES,
    PROBE_INTERVAL,
    UNASKED_INTERVAL,
    Allowance,
    Limits,
    PathState,
    ServerPath,
    records,
)
from mptunnel.peer import Identity, Peer
from mptunnel.scheduler import Redundant, allot
from mptunnel.timers import INF, Timer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mptunnel.events import Endpoint, Transmit
    from mptunnel.noise import Remote
    from mptunnel.records import PeerRecord
    from mptunnel.session import Session

log = logging.getLogger(__name__)

IN_USE: Final = 10.0
UNASKED_REVIEW: Final = 1.0  # unasked ECHOs begin so soon after a tunnel with a lapsed path comes into use
ROUTE_SPACING: Final = 1.0  # s: a client that changes its MTU all the time must not keep the host busy
ROUTES_AT_ONCE: Final = 4  # but at its start it does so once or twice, and what connects then keeps the MTU it finds
TIMESTAMPS: Final = 256  # of initiations by a join token, remembered
HELLO_WITHIN: Final = 3.0  # of the first data under a session: else the client is a stock peer now
MAX_TWINS: Final = 4  # runs of a client that are remembered, to know one that comes back
TWINS_SPACING: Final = 3600.0  # s between two warnings of it
UNPROVEN_SHARE: Final = 3  # times what came from an address may go there while its client may yet say HELLO (R4)


class ClientPeer(Peer):
    """One client. `news` is for the server to act on: its tunnel MTU, None for "it has confirmed its key", notices."""

    def __init__(
        self,
        identity: Identity,
        remote: Remote,
        record: PeerRecord,
        now: float,
        *,
        instance: int,
        clock_origin: int,
        address: Address,
        mtu: int,
    ) -> None:
        super().__init__(identity, remote, record.name, mtu, now)
        self.record = record
        self.paths: dict[int, ServerPath] = {}
        self._limits: dict[int, Limits] = {}  # of those that had a number last: they limit who has it next
        self.news: list[Notice | int | None] = []
        self.is_here = False  # as was told by a notice
        self.tunnel_mtu = 0  # what its HELLO said
        self._address = address
        self.allowed = frozenset((record.ipv4.packed, record.ipv6.packed))
        self._bound: dict[Endpoint, ServerPath] = {}
        self.sources = self._bound
        self._scheduler = Redundant()
        self._instance = instance
        self._clock_origin = clock_origin
        self._client_instance: int | None = None
        self._former_instances: deque[int] = deque(maxlen=MAX_TWINS)
        self._twins_told_at = -INF
        self._hello_order = (-1, -1)  # session and counter of the newest HELLO
        self._instance_from = -1  # the session in which this run of the client said HELLO first
        self._unsaid = (-1, -INF)  # the session in which data came last, and when the first of it came
        self._unbound_answers = Allowance()
        self._mtu_told_at: deque[float] = deque([-INF] * ROUTES_AT_ONCE, ROUTES_AT_ONCE)
        self._stock_from = -INF if record.stock else INF  # before that its HELLO may be under way
        self._credit = 0  # bytes that may go to `endpoint` before that

    # -- sending ---------------------------------------------------------------------------------------

    def _choose(self, count: int, size: int, now: float) -> Sequence[tuple[ServerPath | None, Any, int]]:
        if not self.is_multipath:
            return self._choose_endpoint(count, size, now)
        carriers = self._carriers(now)
        allot(carriers, count, size, now)
        chosen = []
        for path, given in self._scheduler.choose(count, size, carriers):
            fits = given
            if path.state is PathState.IDLE:  # not a byte beyond what R5 allows; the rest waits for a probe
                fits = min(given, path.idle_room // size)
                path.idle_room -= fits * size
            if fits:
                chosen.append((path, path.endpoint, fits))
        return chosen

    def _staged_for(self) -> float:
        """See `Peer._staged_for`; to a client whose probes are rare, what comes first waits for the next one."""
        return max((super()._staged_for(), *(path.interval + IDLE_SLACK for path in self.paths.values())))

    def _has_way(self, size: int, now: float) -> bool:
        if not self.is_multipath:
            return self.endpoint is not None and (now >= self._stock_from or self._credit >= size)
        return any(path.state is not PathState.IDLE or path.idle_room >= size for path in self._carriers(now))

    def _free_ways(self, now: float) -> list[tuple[ServerPath, Any]]:
        carriers = self._carriers(now) if self.is_multipath else []
        is_free = all(path.state is PathState.FRESH and not path.is_limited(now) for path in carriers)
        return [(path, path.endpoint) for path in carriers] if is_free else []

    def _choose_endpoint(self, count: int, size: int, now: float) -> Sequence[tuple[None, Any, int]]:
        """Return the one way to a stock peer; little goes there while it may be one of ours that has not said so."""
        if self.endpoint is not None and now < self._stock_from:
            count = min(count, self._credit // size)
            self._credit -= count * size
        return [(None, self.endpoint, count)] if count and self.endpoint is not None else []

    def _carriers(self, now: float) -> list[ServerPath]:
        """Return the paths that may carry data now, by R5 and by what the client wants them for."""
        data: list[ServerPath] = []
        standby: list[ServerPath] = []
        is_any_fresh = False
        for path in self.paths.values():
            state = path.update(now)
            if state is PathState.FRESH or state is PathState.IDLE:
                if path.use is Use.DATA:
                    data.append(path)
                    is_any_fresh = is_any_fresh or state is PathState.FRESH
                elif path.use is Use.STANDBY:
                    standby.append(path)
        if is_any_fresh:
            return data
        return data + standby or [path for path in self._bound.values() if now - path.refreshed_at <= LAST_RESORT]

    def _want_handshake(self, now: float, out: list[Transmit]) -> None:
        """1c: a client with several paths comes to us; a stock peer may be called where it was last."""
        if not self.is_multipath:
            super()._want_handshake(now, out)

    def _handshake_ways(self, now: float) -> list[Any]:
        return [] if self.is_multipath else super()._handshake_ways(now)

    def _send_keepalive(self, now: float, out: list[Transmit]) -> None:
        if self.current is not None:
            super()._send_keepalive(now, out)

    def _answer_ways(self, source: Any) -> list[Any]:
        """See `Peer._answer_ways`; where its path does not carry downwards, by those that may too."""
        path = self._bound.get(source)
        if path is None or path.carries_down:
            return [source]
        return [source, *(other.endpoint for other in self._bound.values() if other is not path)]

    def close(self, reason: CloseReason, now: float, out: list[Transmit]) -> None:
        """Say on every path that the session ends."""
        if self.is_multipath:
            plain = Close(WHOLE_SESSION, reason).encode()
            for path in self._bound.values():
                self._send_control(plain, path.endpoint, path, now, out)

    # -- receiving -------------------------------------------------------------------------------------

    def _learn_endpoint(self, source: Any) -> None:
        if source != self.endpoint:
            self.endpoint, self._credit = source, 0

    def _paths_in_use(self) -> int:
        if not self.is_multipath:
            return 0
        if self.told.is_known:
            return self.told.account.paths  # it knows its paths, also those that cannot be heard of
        return sum(1 << path.id for path in self._bound.values() if path.use is Use.DATA)

    def _paths_standing_by(self) -> int:
        return sum(1 << path.id for path in self._bound.values() if path.use is not Use.DATA)

    def _receipt_ways(self, now: float) -> list[tuple[ServerPath, Any]]:
        fresh = [path for path in self._bound.values() if path.update(now) is PathState.FRESH]
        data = [path for path in fresh if path.use is Use.DATA]
        return [(path, path.endpoint) for path in data or fresh]

    def _datagrams_received(self) -> dict[int, tuple[int, int]]:
        return {path.id: (path.loss_up.sent, max(0, path.loss_up.lost)) for path in self.paths.values()}

    def _confirmed(self, now: float, out: list[Transmit]) -> None:
        self.news.append(None)
        if not self.is_multipath:
            self._has_come(now)
            self._stock_from = min(self._stock_from, now + HELLO_WITHIN)
        if self.current is not None and self.current.is_initiator:  # we called a stock peer: it waits for a datagram
            if self._staged:
                self._flush(now, out)
            else:
                self._send_keepalive(now, out)

    def _has_taken(
        self, session: Session, source: Any, size: int, now: float, out: list[Transmit], *, was_quiet_for: float | None
    ) -> None:
        """See `Peer._has_taken`; a client that sends data but has stopped saying HELLO is a stock peer from now on."""
        if not self.is_multipath:
            self._credit += UNPROVEN_SHARE * size
            if self._staged:
                self._flush(now, out)  # only now: had it said HELLO, nothing would go where no challenge was answered
        if self.is_multipath and was_quiet_for is not None and session is self.current:
            if session.serial != self._unsaid[0]:
                self._unsaid = (session.serial, now)
            silent_sessions = session.serial - self._hello_order[0]
            if silent_sessions > 1 and now - self._unsaid[1] > HELLO_WITHIN:
                log.info("%s says HELLO no more: taking it for a stock WireGuard peer", self.name)
                self._has_come(now)
                self.is_multipath = self.takes_partial = False
                self._forget_paths()
                self.look_again()

    def _control(
        self, session: Session, counter: int, plain: bytes, source: Any, now: float, out: list[Transmit]
    ) -> None:
        body = memoryview(plain)
        if plain[0] == Control.HELLO:
            self._hello_received(session, counter, messages.decode_hello_untrusted(body), source, now, out)
            return
        if not self.is_multipath:
            self.identity.drops["control message before HELLO"] += 1
            return
        match plain[0]:
            case Control.PROBE:
                probe = messages.decode_probe_untrusted(body)
                self._probe_received(session, counter, probe, source, len(plain), now, out)
            case Control.RESPONSE:
                self._response_to_challenge(messages.decode_challenge_untrusted(body), source, now, out)
            case Control.CLOSE:
                self._closed(session, messages.decode_close_untrusted(body), now)
            case Control.RECEIPT:
                if self._receipt_received(session, counter, plain, now):
                    for each in self.told.account.records:
                        if each.path in self.paths:
                            self.paths[each.path].receipt_received(each.given, each.lost, now)
            case _:
                self.identity.drops["unknown control message"] += 1

    def _hello_received(
        self, session: Session, counter: int, hello: Hello, source: Any, now: float, out: list[Transmit]
    ) -> None:
        path, order = self._bound.get(source), (session.serial, counter)
        if session.serial < self._hello_order[0]:
            self.identity.drops["HELLO not newer"] += 1  # of a run that has ended meanwhile
            return
        is_newest, self._hello_order = order > self._hello_order, max(order, self._hello_order)
        is_compatible = hello.oldest <= PROTOCOL_VERSION <= hello.version
        if hello.instance != self._client_instance:
            self._has_changed_hands(hello.instance, source, now)
            self._client_instance, self._instance_from = hello.instance, session.serial
            self.is_multipath = self.takes_partial = False  # until this HELLO offers it too
            self._forget_paths()
            self.receipts = self.receipts.successor()
            self.told = Told((session.serial, -1))  # what the old one said last may still come
            if not is_compatible:
                log.error(
                    "%s speaks version %d to %d of our control messages, we speak %d: one path only; "
                    "update the older one", self.name, hello.oldest, hello.version, PROTOCOL_VERSION,
                )  # fmt: skip
        if is_compatible and not self.is_multipath and Capability.MULTIPATH in hello.capabilities:
            self.is_multipath = True
            self._widen()
        if is_newest:
            self.takes_partial = Capability.PARTIAL_CHECKSUMS in hello.capabilities & self.identity.capabilities
        if is_newest and hello.mtu != self.tunnel_mtu:
            self.tunnel_mtu = hello.mtu
            self.timers.at(Timer.ROUTE, max(now, self._mtu_told_at[0] + ROUTES_AT_ONCE * ROUTE_SPACING))
        if not (self._unbound_answers.take(now) if path is None else path.may_answer(now)):
            return
        answer = Hello(
            is_answer=True, version=PROTOCOL_VERSION, oldest=PROTOCOL_VERSION, capabilities=self.identity.capabilities,
            instance=self._instance, mtu=self.mtu, mode=0, paths=len(self._bound), serial=hello.serial,
        )  # fmt: skip
        for way in self._answer_ways(source):
            self._send_control(answer.encode(), way, self._bound.get(way), now, out)
            self._send_control(self._address.encode(), way, self._bound.get(way), now, out)

    def address_is(self, address: Address, now: float, out: list[Transmit]) -> None:
        """What the client is told of addresses and resolvers has changed; with each HELLO it is told again."""
        self._address = address
        if self.is_multipath:
            for source, path in self._bound.items():
                self._send_control(address.encode(), source, path, now, out)

    def _has_changed_hands(self, instance: int, source: Endpoint, now: float) -> None:
        """Another run of the client has taken over; warn where one comes back that another had taken over from."""
        if instance in self._former_instances and now - self._twins_told_at > TWINS_SPACING:
            self._twins_told_at = now
            log.warning(
                "%s is two machines with one key, which take the tunnel from each other; the last one came from %s: "
                "delete client/key in the state directory of one of them, and let it join by a token of its own",
                self.name, source.plain_host,
            )  # fmt: skip
        if self._client_instance is not None:
            self._former_instances.append(self._client_instance)

    # -- paths -----------------------------------------------------------------------------------------

    def _probe_received(
        self, session: Session, counter: int, probe: Probe, source: Endpoint, size: int, now: float, out: list[Transmit]
    ) -> None:
        if session.serial < self._instance_from:
            self.identity.drops["probe not newer"] += 1  # of a run that has ended meanwhile
            return
        path = self.paths.get(probe.path)
        if path is None:
            path = self._new_path(probe.path, now)
        if not path.is_newer(session.serial, counter):
            self.identity.drops["probe not newer"] += 1
            return
        for record in probe.records:
            other = self.paths.get(record.path)
            if other is not None and other is not path:
                arrival = other.reported_by_another(record, probe.sent_us, now)
                if arrival is not None:
                    self._review(other, arrival[0], arrival[1], None, now)
                self._tell_up(other, now)
        is_bound, interval = path.endpoint == source, probe.interval_ms / 1e3
        self.receipts.gaps.heard(path.id, probe.incarnation, probe.seq, probe.sent_us, INF, interval, now)
        settle_at = self.receipts.mark(
            session,
            counter,
            probe.packets,
            now,
            path.id if is_bound else None,
            interval,
            self._paths_in_use(),
        )
        self.timers.at_the_latest(Timer.SETTLE, settle_at)
        if not is_bound:
            self._challenge(path, probe, source, now, out)
            self._flush(now, out)  # its records may have brought another path back
            return
        path.adopt(probe, now)
        if path.fed_back is not None:
            self._review(path, probe.sent_us, path.fed_back, probe.rx, now)
        self._tell_up(path, now)
        self._tell_slow(path, now)
        if path.may_answer(now):
            self._send_echo(path, probe, now, now, size if probe.is_sized else 0, out)
        if not path.carries_down:  # then it shall hear by the others that this one carries upwards
            for other in self._bound.values():
                if other is not path and now - other.shown_at >= UNASKED_INTERVAL:
                    self._send_echo(other, None, now, now, 0, out)
        self._flush(now, out)

    def _review(self, path: ServerPath, at_us: int, given: tuple[int, int], delivered: int | None, now: float) -> None:
        """Judge how much the path may be given, by new feedback (see `cap`)."""
        others = [other for other in self._bound.values() if other is not path and other.state is PathState.FRESH]
        if why := review(path, others, at_us / 1e6, given, delivered, now):
            log.debug("%s path %d held: %s", self.name, path.id, why)

    def _challenge(self, path: ServerPath, probe: Probe, source: Endpoint, now: float, out: list[Transmit]) -> None:
        token = path.challenge(source, probe, now, self.identity.entropy)
        if token is not None:
            plain = Challenge(path.id, probe.incarnation, token).encode(Control.CHALLENGE)
            self._send_control(plain, source, None, now, out)

    def _response_to_challenge(self, answer: Challenge, source: Endpoint, now: float, out: list[Transmit]) -> None:
        path = self.paths.get(answer.path)
        candidate = None if path is None else path.candidate
        if (
            path is None
            or candidate is None
            or candidate.endpoint != source
            or not candidate.is_answered_by(answer.token, now)
            or candidate.probe.incarnation != answer.incarnation
        ):
            self.identity.drops["response to no challenge"] += 1
            return
        if path.endpoint is not None:
            self._bound.pop(path.endpoint, None)
        holder = self._bound.get(source)
        if holder is not None:  # one endpoint is one path: a client that numbers its paths anew
            holder.unbind(now)
            self.look_again()
        path.bind(candidate, now)
        self._bound[source] = path
        path.is_told_up = path.is_told_slow = False  # its address is news, also if it was up at another
        self._tell_up(path, now)
        if holder is not None:
            self._tell_down(holder, "is at no address any more", now)
        self._send_echo(path, candidate.probe, candidate.arrived_at, now, 0, out)
        path.received(1, 0, 0)  # the RESPONSE: it came by this path, after the probe that the ECHO answers
        self._flush(now, out)

    def _send_echo(
        self, path: ServerPath, probe: Probe | None, arrived_at: float, now: float, size: int, out: list[Transmit]
    ) -> None:
        """Answer a probe on its path, or (None) show that the way down is there."""
        if probe is None:
            path.shown_at = now
        others = records(path, self._bound.values(), now, is_idle=path.interval > 1.0)
        sent_us = self._now_us(now)
        plain = Echo(
            path.id, path.incarnation, probe.seq if probe else 0, path.next_number(now, sent_us),
            probe.sent_us if probe else 0, sent_us, round((now - arrived_at) * 1e6) if probe else 0, path.tx + 1,
            path.rx, self.packets_sent, min(path.rx_size, 0xFFFF), path.endpoint.port,
            messages.packed_host(path.endpoint.host), probe is None, others,
        ).encode(size)  # fmt: skip
        self._send_control(plain, path.endpoint, path, now, out)

    def _closed(self, session: Session, close: Close, now: float) -> None:
        if close.path == WHOLE_SESSION:
            if session.serial < self._hello_order[0]:
                return  # of a run that has ended meanwhile
            self.gone("it has left", now)
            self._forget_paths()
        else:
            path = self.paths.get(close.path)
            if path is not None and path.incarnation != close.incarnation:
                return  # of an earlier socket
            if close.reason == CloseReason.TAKEN_OFF:
                self._forget_receipts(close.path)
            if path is not None:
                self._tell_down(path, "closed by the client", now)
                self._forget_path(path)

    def _new_path(self, number: int, now: float) -> ServerPath:
        path = self.paths[number] = ServerPath(number, now, self.identity.overruns)
        if number in self._limits:
            path.limits = self._limits[number]
        return path

    def _forget_path(self, path: ServerPath) -> None:
        del self.paths[path.id]
        self._limits[path.id] = path.limits
        if path.endpoint is not None:
            self._bound.pop(path.endpoint, None)

    def _forget_paths(self) -> None:
        self._limits |= {path.id: path.limits for path in self.paths.values()}
        self.paths.clear()
        self._bound.clear()

    def _now_us(self, now: float) -> int:
        return (round(now * 1e6) + self._clock_origin) % (1 << 64)

    # -- time ------------------------------------------------------------------------------------------

    def _expired(self, timer: Timer, now: float, out: list[Transmit]) -> None:
        if timer is Timer.ROUTE:
            self._mtu_told_at.append(now)
            self.news.append(self.tunnel_mtu)
            return
        super()._expired(timer, now, out)
        if timer is Timer.ZERO_KEYS:
            self.gone("its last session is over", now)

    def next_deadline(self) -> float:
        """When `handle_timeout` is due."""
        due = super().next_deadline()
        for path in self.paths.values():
            due = min(due, path.next_deadline())
        return due

    def handle_timeout(self, now: float, out: list[Transmit]) -> None:
        """Do what is due."""
        super().handle_timeout(now, out)
        for path in list(self.paths.values()):
            state = path.update(now)
            if state is PathState.LAPSED:
                self._tell_down(path, "silent: no data there until it is heard again", now)
            if path.forgotten_at() <= now:
                log.info("%s path %d forgotten: silent for %.0f s", self.name, path.id, now - path.since)
                self._forget_path(path)
                continue
            if state in {PathState.FRESH, PathState.LAPSED}:
                self._show_life(path, now, out)

    def _show_life(self, path: ServerPath, now: float, out: list[Transmit]) -> None:
        if path.unasked_at > now:
            return
        in_use = now - self.data_at < IN_USE or path.interval < PROBE_INTERVAL  # it has a gap alarm
        if in_use and self.current is not None and self.current.is_alive(now):
            self._send_echo(path, None, now, now, 0, out)
            path.unasked_at = now + UNASKED_INTERVAL
        else:
            path.unasked_at = now + UNASKED_REVIEW

    # -- notices ---------------------------------------------------------------------------------------

    def _tell_up(self, path: ServerPath, now: float) -> None:
        """`path` has just been refreshed or bound: it is news if it was not up, or elsewhere."""
        if path.is_told_up or path.state is not PathState.FRESH:
            return
        path.is_told_up = True
        self._has_come(now)
        log.info("%s path %d at %s", self.name, path.id, path.endpoint)
        self.news.append(self.notice(NOTICES[path.state], now, str(path.id), endpoint=str(path.endpoint)))

    def _tell_slow(self, path: ServerPath, now: float) -> None:
        """Whether copies to `path` yield has perhaps changed."""
        if not path.is_told_up or path.yields(now) == path.is_told_slow:
            return
        path.is_told_slow = not path.is_told_slow
        kind, word = (NoticeKind.PATH_SLOW, "slow") if path.is_told_slow else (NoticeKind.PATH_UP, "slow no more")
        log.info("%s path %d %s", self.name, path.id, word)
        self.news.append(self.notice(kind, now, str(path.id), endpoint=str(path.endpoint)))

    def _tell_down(self, path: ServerPath, why: str, now: float) -> None:
        if path.is_told_up:
            path.is_told_up = path.is_told_slow = False
            log.info("%s path %d %s", self.name, path.id, why)
            self.news.append(self.notice(NoticeKind.PATH_DOWN, now, str(path.id), why=why))
            if not any(other.is_told_up for other in self.paths.values()):
                self.gone("it is silent on every path", now)

    def _has_come(self, now: float) -> None:
        if not self.is_here:
            self.is_here = True
            log.info("%s is here", self.name)
            self.news.append(self.notice(NoticeKind.CLIENT_UP, now))

    def gone(self, why: str, now: float) -> None:
        """Whoever listens hears that the client is not here any more, if it was."""
        if self.is_here:
            self.is_here = False
            log.info("%s is gone: %s", self.name, why)
            self.news.append(self.notice(NoticeKind.CLIENT_GONE, now, why=why))

    # -- status ----------------------------------------------------------------------------------------

    def status(self, now: float) -> dict[str, Any]:
        """What `status` shows of this client."""
        is_alive = self.current is not None and self.current.is_alive(now)
        is_heard = bool(self._carriers(now)) if self.is_multipath else is_alive  # idle, keys may end before a path does
        return {
            "state": "never" if self.heard_at == -INF else "up" if is_heard else "silent",
            "multipath": self.is_multipath,
            "session_age": round(now - self.current.created_at, 1) if self.current is not None else None,
            "endpoint": None if self.endpoint is None else str(self.endpoint),
            "mtu": self.tunnel_mtu or None,
            "traffic": {"up": self.received(), "down": self.sent()},
            "receipts": {"up": self.receipts.status(now), "down": self.told.status(now)},
            "paths": [self._path_status(path, now) for path in self.paths.values()],
        }

    def _path_status(self, path: ServerPath, now: float) -> dict[str, Any]:
        alone = self.receipts.path_status(path.id, now)
        return {
            **path.status(),
            "state": PathState.SLOW.value if path.is_told_slow else path.state.value,
            "mtu": path.mtu,
            "endpoint": None if path.endpoint is None else str(path.endpoint),
            "since": round(now - path.since, 1),
            **{name: alone[name] for name in ("first", "first_share", "missed")},
            "alone": {"up": alone, "down": self.told.path_status(path.id, now)},
        }


class JoinPeer(Peer):
    """Whoever holds a join token. Its only message is ENROL; `news` has what it asks and from where."""

    def __init__(self, identity: Identity, remote: Remote, name: str, now: float) -> None:
        super().__init__(identity, remote, name, 0, now)
        self.news: list[tuple[Enrol, Any]] = []
        self._answers = Allowance()
        self._timestamps: deque[bytes] = deque(maxlen=TIMESTAMPS)

    def answer(self, enrolled: Enrolled, source: Any, now: float, out: list[Transmit]) -> None:
        """Send the answer to an ENROL to where that came from."""
        self._send_control(enrolled.encode(), source, None, now, out)

    def _allows(self, source: bytes) -> bool:
        return False

    def _is_replayed(self, timestamp: bytes) -> bool:
        """See `Peer._is_replayed`; holders of one token have clocks of their own, and a thief may set his far ahead.

        That must not keep the owner from hearing that the token is used. What repeats an older one than these costs us
        a response, and a join session that is under way a repetition.
        """
        return timestamp in self._timestamps

    def _remember(self, timestamp: bytes) -> None:
        self._timestamps.append(timestamp)

    def _confirmed(self, now: float, out: list[Transmit]) -> None:
        """A join session carries nothing but ENROL."""

    def _want_handshake(self, now: float, out: list[Transmit]) -> None:
        """The holder of a token comes to us, never we to it."""

    def _send_keepalive(self, now: float, out: list[Transmit]) -> None:
        """A join session is not kept alive."""

    def _control(
        self,
        session: Session,
        counter: int,
        plain: bytes,
        source: Any,
        now: float,
        out: list[Transmit],
    ) -> None:
        is_current = session is self.current  # the answer goes under it, and must not reach another holder of the token
        if plain[0] == Control.ENROL and is_current and self._answers.take(now):
            self.news.append((messages.decode_enrol_untrusted(memoryview(plain)), source))
