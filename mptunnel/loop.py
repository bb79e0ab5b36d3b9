"""The one select(): descriptors, the clock, buffers. Everything is decided elsewhere; everything happens here.

A turn: wait, read the clock once, feed what is ready to the role, let it do what is due, send what it wants sent, take
up what it asks for. No descriptor gets more than 64 reads in a turn, and after each of them what must go out goes out:
nothing waits for a batch to fill. What may block goes to the worker. Time is CLOCK_BOOTTIME, which counts suspend.

If all that was ready went the short way (see `peer`), the turn ends there: who gets the packet may be waiting for this
very processor. What is due is done in the lull behind such packets, one thing in each, so that it is over when the
next one comes; where there is no lull, 2 ms late.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import pathlib
import select
import signal
import time
from collections import deque
from time import CLOCK_BOOTTIME, clock_gettime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from mptunnel import host, native, netlink, udp
from mptunnel.burst import ciphers
from mptunnel.config import Fields
from mptunnel.control import ControlServer, Listening, Pending
from mptunnel.errors import HostError, MptunnelError
from mptunnel.events import ClosePath, Notice, OpenPath, Resolve, RunScript, SaveState, Stop
from mptunnel.hook import Hook
from mptunnel.messages import TRANSPORT
from mptunnel.timers import INF
from mptunnel.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from mptunnel.client import Client
    from mptunnel.config import Settings
    from mptunnel.events import Endpoint, Event, Job
    from mptunnel.path import Path
    from mptunnel.server import Offer, Server
    from mptunnel.state import StateDir
    from mptunnel.tun import Tun

    IPAddress = IPv4Address | IPv6Address

log = logging.getLogger(__name__)

READS_PER_TURN: Final = 64
CALM: Final = 2  # turns without a pause that a packet, its copy and its answer may take: no reason to read on
INBOX: Final = 192  # packets that are handed to the device together at the most
LONGEST_WAIT: Final = 1.0  # select's clock stands still in suspend, ours does not
NICE: Final = -10  # a packet waits for nobody's computations; sched(7), nice is of a thread
LINKS_SETTLE: Final = 0.05  # changes come in bursts
MAX_LOOKS: Final = 10  # in so many seconds: who changes the host all the time must not keep us busy
LOOKS_SPAN: Final = 2.0
OFFER_SETTLE: Final = 2.0  # s: a network that comes up does so bit by bit
OFFER_SPACING: Final = 10.0
LINKS_REVIEW: Final = 60.0  # and one could be missed
WALL_INTERVAL: Final = 1.0
QUEUE_WORTH_A_LOOK: Final = 3000  # bytes sent on a path since the last look: two full datagrams
PEACE, ANSWERED_PEACE = 0.0004, 0.00005  # s after a packet that may be answered soon, after an answer: a lull
RHYTHM: Final = 0.0015  # s after a packet: there is no next one to be awaited
LATEST: Final = 0.002  # s that what is due may wait for a lull
PAUSE: Final = 0.00005  # s in select(): nothing was ready when we looked
STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NOTHING: Final[list[int]] = []
_clock: Final = clock_gettime
_BOOTTIME: Final = CLOCK_BOOTTIME
_select: Final = select.select

R = TypeVar("R", bound="Client | Server")


def now() -> float:
    """Return the time that everything is told, in seconds; it goes on in suspend and never back."""
    return _clock(_BOOTTIME)


class Snapshot:
    """Ask for the host as it is now; answered by a tuple of `Link` and the `Picture` of rules and routes."""


class Loop(Generic[R]):
    """What both roles need: the device, the worker, the control socket, signals."""

    _asks_outward: bool  # what comes from the device is a question rather than an answer

    def __init__(self, settings: Settings, role: R, tun: Tun, the_host: host.Host, state: StateDir) -> None:
        self._settings = settings
        self._role = role
        self._ledger = role.ledger
        self._tun = tun
        self._host = the_host
        self._state = state
        self._worker: Worker[Job | Snapshot] = Worker(self._perform)
        self._saver: Worker[Job | Snapshot] = Worker(self._perform)  # a disk that stalls holds up no script
        self._readers: dict[int, Callable[[float], bool]] = {}  # each says whether that was all, or a turn is to follow
        self._fds: list[int] = []  # the same descriptors, as select wants them
        self._watch(tun.fileno(), self._tun_ready)
        self._watch(self._worker.fileno(), self._worker_ready)
        self._watch(self._saver.fileno(), self._worker_ready)
        self._lookups: Worker[Job | Snapshot] | None = None
        self._control: ControlServer | None = None
        self._hook = Hook(settings.on_event) if settings.on_event else None
        self._pending: dict[int, tuple[Pending, Any]] = {}
        self._inbox: list[bytes] = []
        self._wall_at = 0.0
        self._due = -INF  # when the role has to do something
        self._lull_at = -INF  # packets have just gone the short way: then is the time for what is due
        self._quiet_at = -INF  # and when there will be no next one
        self._own_due = 0.0  # when we have to do something that is not the role's; at `_wall_at` at the latest
        self._streak = 0  # turns since select had to wait
        self._is_calm = True  # what comes alone in this turn goes on at once, and the next look is select's
        self._is_stopping = False
        self._error: MptunnelError | None = None
        self._tables: netlink.TableWatch | None = None
        if settings.uses_our_script:
            self._watch_tables()

    # -- the turn --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turn until the program is told to stop. Raises the error that ended the run."""
        with _signals() as wake:
            self._watch(wake, self._signalled(wake))
            control = ControlServer(self._settings.run_dir / f"{self._settings.device}.sock", self._asked)
            self._watch(control.fileno(), self._control_ready)
            self._control = control
            self._drain(now())
            self._due = self._role.next_deadline()
            gc.collect()
            gc.freeze()
            gc.disable()  # the core makes no cycles, and a collection would be a gap
            with contextlib.suppress(OSError):  # proc(5); else select() comes back 50 us late
                pathlib.Path("/proc/self/timerslack_ns").write_text("1", encoding="ascii")
            with contextlib.suppress(OSError):  # no CAP_SYS_NICE: then as everybody else
                os.setpriority(os.PRIO_PROCESS, 0, NICE)  # 0: this thread; worker and hook have begun before it
            try:
                while not self._is_stopping:
                    self.run_once()
            finally:
                gc.enable()
                self._unwatch(control.fileno())
                control.close()
        if self._error is not None:
            raise self._error

    def run_once(self) -> None:
        """Wait once, feed whatever is ready to the role, then drain the role."""
        control = self._control
        due = min(self._due, self._own_due)  # of two at a time: so it compiles to a comparison
        due = min(due, self._ledger.due)
        readers, writers = self._fds, _NOTHING
        if control is not None and control.connections:  # somebody asks
            readers, writers = readers + control.readers(), control.writers()
            readers.remove(control.fileno())
            due = min(due, control.next_deadline())
        latest = due + LATEST
        if due < self._quiet_at:
            due = min(self._lull_at if due <= self._lull_at else self._quiet_at, latest)
        before = _clock(_BOOTTIME)
        ready, writable, _ = _select(readers, writers, _NOTHING, min(max(0.0, due - before), LONGEST_WAIT))
        moment = _clock(_BOOTTIME)
        self._streak = 0 if moment - before > PAUSE else self._streak + 1
        self._is_calm = self._streak <= CALM
        is_late = moment >= latest
        is_all = bool(ready) and not writable and not is_late
        for fd in ready:
            handler = self._readers.get(fd)
            if handler is None or not handler(moment):
                is_all = False
        if is_all and self._ledger.due > -INF:
            is_question = (ready[0] == self._fds[0]) is self._asks_outward
            self._lull_at = moment + (PEACE if is_question else ANSWERED_PEACE)
            self._quiet_at = moment + RHYTHM
            return
        if control is not None and control.connections:
            for fd in {*ready, *writable} - self._readers.keys():
                control.ready(fd, moment)
            control.expire(moment)
        self._finish_turn(moment, may_wait=bool(ready) and moment < self._quiet_at and not is_late, is_late=is_late)

    def _finish_turn(self, moment: float, *, may_wait: bool, is_late: bool) -> None:
        """Do what came of more than passing on single packets, and what is due unless that `may_wait` for a lull.

        `is_late`: there was none for so long that all that is due is done now, turn by turn.
        """
        role, is_due = self._role, self._due <= moment
        role.finish_turn(moment)
        if not may_wait:
            self._lull_at = -INF  # one thing at a time
            if self._own_due <= moment:
                self._own_work(moment)
            if is_due:  # what has become due in this turn is done in another one
                role.handle_timeout(moment)
        self._drain(moment)
        due = role.next_deadline()
        if not (may_wait and is_due):
            self._due = due if is_late else max(due, moment)  # it may be older: then nobody has known of it before

    def _drain(self, moment: float) -> None:
        """Send all that is to be sent and take up all that is asked for, until there is no more of either."""
        if self._role.out:
            self._send()
        while events := self._role.events():
            for event in events:
                self._take_up(event, moment)
            self._send()

    def _own_work(self, moment: float) -> None:
        if moment >= self._wall_at:
            self._wall_at = self._own_due = moment + WALL_INTERVAL
            self._role.wall_is(moment, time.time())

    # -- descriptors -----------------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[float], bool]) -> None:
        self._readers[fd] = handler
        self._fds = [*self._readers]

    def _unwatch(self, fd: int) -> None:
        del self._readers[fd]
        self._fds = [*self._readers]

    def _tun_ready(self, moment: float) -> bool:
        """Take what waits at the device; return whether all of it went the short way."""
        frame, frames = None, []
        try:
            if self._is_calm:
                frame = self._tun.read_one()
            else:
                frames = self._tun.read()
        except OSError as error:
            self._error = HostError(f"the device {self._tun.name} has gone: {os.strerror(error.errno or 0).lower()}")
            self._is_stopping = True
            return False
        if frame is not None:
            sealed = self._role.send_one(frame, moment)
            if sealed is not None:
                return self._send_one(sealed[0], sealed[1], moment)
            frames = [frame]
        if frames:
            self._take_frames(frames, moment)
        return False

    def _take_frames(self, frames: list[bytes], moment: float) -> None:
        """Give the role what the device had, and send what comes of it."""
        raise NotImplementedError

    def _send_one(self, datagram: bytes, ways: Sequence[tuple[Path, Any]], moment: float) -> bool:
        """Send what goes the short way; return whether there is nothing to be said about it."""
        raise NotImplementedError

    def _send(self) -> None:
        """Send what the role wants sent."""
        raise NotImplementedError

    def _reader_of(self, sock: udp.Receiver, receive: Callable[[], tuple[bytes, int, Any]]) -> Callable[[float], bool]:
        """Return what takes the datagrams that wait in a socket, and says whether all of them went the short way."""
        take, inbox = self._role.receive, self._inbox

        def ready(moment: float) -> bool:
            is_all = True
            try:
                for _ in range(READS_PER_TURN):
                    datagrams, size, source = receive()
                    if sock.overrun:
                        self._role.overrun(source, sock.take_overrun())
                    is_all = take(datagrams, size, source, moment, inbox) and is_all
                    if len(datagrams) == size or len(inbox) >= INBOX:
                        if inbox:
                            self._deliver()  # a datagram that came alone does not wait for others
                        if self._is_calm:
                            break
            except BlockingIOError:
                pass
            except OSError as error:  # an ICMP message about some client, or about this path: a hint, nothing else
                self._role.drops[f"receive: {errno.errorcode.get(error.errno or 0)}"] += 1
            if inbox:
                self._deliver()
            return is_all

        return ready

    def _deliver(self) -> None:
        """Hand what came in to the kernel."""
        refused = self._tun.write(self._inbox)
        self._inbox.clear()
        if refused:
            self._role.drops["refused by the device"] += refused

    def _signalled(self, wake: int) -> Callable[[float], bool]:
        def stop(_: float) -> bool:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            self._stop()
            return False

        return stop

    def _control_ready(self, moment: float) -> bool:
        """Take up who wants to ask."""
        if self._control is not None:
            self._control.ready(self._control.fileno(), moment)
        return False

    def _watch_tables(self) -> None:
        """Hear of it when others remove our nft table."""
        try:
            self._tables = netlink.TableWatch(f"mptunnel_{self._tun.name}")
        except OSError as error:
            log.debug("nobody will tell if our nft table is removed: %s", os.strerror(error.errno or 0).lower())
        else:
            self._watch(self._tables.fileno(), self._tables_ready)

    def _tables_ready(self, moment: float) -> bool:
        is_there = None if self._tables is None else self._tables.drain()
        if is_there is not None:
            self._role.table_seen(moment, is_there=is_there)
        if self._tables is not None and self._tables.have_others_come:
            self._tables.have_others_come = False
            self._role.chains_came(moment)
        return False

    def _stop(self) -> None:
        self._is_stopping = True

    # -- jobs ------------------------------------------------------------------------------------------

    def _take_up(self, event: Event, moment: float) -> None:
        match event:
            case SaveState():
                self._saver.submit(event)
            case RunScript():
                self._worker.submit(event)
            case Resolve():
                self._look_up(event)
            case Notice():
                self._tell(event)
            case Stop():
                self._error = event.error
                self._is_stopping = True
            case _:
                raise AssertionError(event)

    def _look_up(self, name: Resolve) -> None:
        """Look a name up in a thread of its own, which begins with the first: that may take half a minute."""
        if self._lookups is None:
            self._lookups = Worker(self._perform)
            self._watch(self._lookups.fileno(), self._worker_ready)
        self._lookups.submit(name)

    def _tell(self, notice: Notice) -> None:
        """Let those know who listen, and the user's program."""
        document = {"device": self._tun.name, **notice.document()}
        if self._control is not None:
            self._control.tell(document)
        if self._hook is not None:
            self._hook.submit(document)

    def _perform(self, job: Job | Snapshot) -> object:
        """Do what may block; in the worker's thread."""
        match job:
            case SaveState():
                self._state.save(job.name, job.document)
            case RunScript():
                self._host.run(job.verb, job.values)
            case Resolve():
                return udp.resolve(job.host, job.port)
            case Snapshot():
                return netlink.look()
        return None

    def _worker_ready(self, moment: float) -> bool:
        for worker in filter(None, (self._worker, self._saver, self._lookups)):
            for job, result in worker.results():
                self._job_done(job, result, moment)
        return False

    def _job_done(self, job: Job | Snapshot, result: object, moment: float) -> None:
        if isinstance(job, Snapshot):
            return
        waiting = self._pending.pop(id(job), None)
        if waiting is not None:
            pending, answer = waiting
            if isinstance(result, Exception):
                pending.fail(HostError(f"cannot save: {result}"))
            else:
                pending.finish(answer)
        self._role.job_done(job, result, moment)

    def _sockets_in_use(self) -> Sequence[udp.Receiver]:
        raise NotImplementedError

    def _offload(self) -> dict[str, bool]:
        """Which of the kernel's offloads are in use."""
        sockets = self._sockets_in_use()
        return {
            "tcp_super_packets": self._tun.takes_tcp,
            "udp_super_packets": self._tun.takes_udp,
            "udp_segment": bool(sockets) and all(sock.sends_runs for sock in sockets),
            "udp_gro": bool(sockets) and all(sock.receives_runs for sock in sockets),
        }

    def _tell_offload(self) -> None:
        """Say once what the kernel does for us."""
        used = [name.replace("_", " ") for name, is_used in self._offload().items() if is_used]
        offload = ", ".join(used) or "none, one packet a call"
        log.info("offload: %s; core: %s; cipher: %s", offload, native.core(), ciphers())
        if not all(sock.has_large_buffer for sock in self._sockets_in_use()):
            log.info("receive buffers are smaller than wished; see sysctl net.core.rmem_max")

    def finish(self) -> None:
        """Say goodbye to the peers, and let the worker end what it has begun."""
        moment = now()
        self._role.close(moment)
        self._drain(moment)
        self._worker.close()
        self._saver.close()
        self.close_sockets()
        if self._tables is not None:
            self._tables.close()
        self._tun.close()
        if self._hook is not None:
            self._hook.close()

    def close_sockets(self) -> None:
        """Close every socket of the data path."""
        raise NotImplementedError

    # -- control ---------------------------------------------------------------------------------------

    def _asked(self, verb: str, arguments: dict[str, Any]) -> object:
        if verb == "events":
            return Listening({"device": self._tun.name})
        reply = self._role.control(verb, Fields(arguments, verb), now())
        if verb == "status":
            return self._with_what_we_know(reply.result)
        if reply.after is None:
            return reply.result
        pending = Pending()
        self._pending[id(reply.after)] = (pending, reply.result)
        return pending

    def _with_what_we_know(self, status: dict[str, Any]) -> dict[str, Any]:
        """Complete the status object: the process, offloads, and what was lost in queues of our own host."""
        queues = {
            "device queue full": netlink.device_drops(self._tun.name),
            "event not told to --on-event": self._hook.dropped if self._hook is not None else 0,
        }
        drops = status["drops"] | {name: count for name, count in queues.items() if count}
        more = {
            "device": self._tun.name,
            "pid": os.getpid(),
            "offload": self._offload(),
            "cipher": ciphers(),
            "core": native.core(),
        }
        return {**status, **more, "drops": drops}


class ServerLoop(Loop["Server"]):
    """The server's turn: one socket for everybody."""

    _asks_outward = False

    def __init__(
        self,
        settings: Settings,
        role: Server,
        tun: Tun,
        the_host: host.Host,
        state: StateDir,
        sock: udp.ServerSocket,
        look: Callable[[], Offer],
    ) -> None:
        super().__init__(settings, role, tun, the_host, state)
        self._look = look  # what clients can be offered on this host as it is now; in the worker's thread
        self._monitor = netlink.Monitor()
        self._watch(self._monitor.fileno(), self._links_ready)
        self._look_at = now()  # what changed between the first look and now has not been told
        self._looked_at = -INF
        self._socket = sock
        self._watch(sock.fileno(), self._reader_of(sock, sock.receive))
        self._tell_offload()

    def _sockets_in_use(self) -> Sequence[udp.Receiver]:
        return [self._socket]

    def _take_frames(self, frames: list[bytes], moment: float) -> None:
        self._role.send(frames, moment)
        self._send()

    def _send_one(self, datagram: bytes, ways: Sequence[tuple[Path, Endpoint]], moment: float) -> bool:
        is_all = True
        for _, to in ways:
            why = self._socket.send_one(to, datagram)
            if why:
                self._role.not_sent(to, 1, len(datagram), why)
                is_all = False
        return is_all

    def _send(self) -> None:
        for to, data, size in self._role.transmits():
            refused, why = self._socket.send(to, data, size)
            if refused:
                self._role.not_sent(to, refused, refused * size, why, is_counted=data[0] == TRANSPORT)

    def close_sockets(self) -> None:
        """Close the sockets."""
        self._socket.close()
        self._monitor.close()

    def _links_ready(self, moment: float) -> bool:
        if self._monitor.drain():
            self._look_at = min(self._look_at, max(moment + OFFER_SETTLE, self._looked_at + OFFER_SPACING))
            self._own_due = min(self._own_due, self._look_at)
        return False

    def _own_work(self, moment: float) -> None:
        super()._own_work(moment)
        if moment >= self._look_at:
            self._look_at, self._looked_at = INF, moment
            self._worker.submit(Snapshot())
        self._own_due = min(self._wall_at, self._look_at)

    def _perform(self, job: Job | Snapshot) -> object:
        return self._look() if isinstance(job, Snapshot) else super()._perform(job)

    def _job_done(self, job: Job | Snapshot, result: object, moment: float) -> None:
        if not isinstance(job, Snapshot):
            super()._job_done(job, result, moment)
        elif isinstance(result, Exception):
            log.warning("cannot see what this host can offer to clients: %s", result)
        else:
            self._role.offer_is(cast("Offer", result), moment)


class ClientLoop(Loop["Client"]):
    """The client's turn: one socket for each path, and the host's links."""

    _asks_outward = True

    def __init__(self, settings: Settings, role: Client, tun: Tun, the_host: host.Host, state: StateDir) -> None:
        super().__init__(settings, role, tun, the_host, state)
        self._sockets: dict[int, udp.PathSocket] = {}
        self._monitor = netlink.Monitor()
        self._watch(self._monitor.fileno(), self._links_ready)
        self._review_at = now()  # what changed between the first look and now has not been told
        self._looked_at = deque([-LOOKS_SPAN], MAX_LOOKS)
        self._is_looking = False
        self._has_told_offload = False

    def _sockets_in_use(self) -> Sequence[udp.Receiver]:
        return list(self._sockets.values())

    def _take_frames(self, frames: list[bytes], moment: float) -> None:
        self._look_at_queues(moment)
        self._role.send(frames, moment, self._inbox)
        self._send()
        if self._inbox:
            self._deliver()

    def _send_one(self, datagram: bytes, ways: Sequence[tuple[Path, int]], moment: float) -> bool:
        is_all, is_worth_a_look = True, False
        for _, to in ways:
            sock = self._sockets.get(to)
            if sock is None:  # closed a moment ago
                continue
            why = sock.send_one(datagram)
            if why:
                self._role.not_sent(to, 1, len(datagram), why, now())
                is_all = False
            is_worth_a_look = is_worth_a_look or sock.unseen >= QUEUE_WORTH_A_LOOK
        if is_worth_a_look:
            self._look_at_queues(moment)
        return is_all

    def _send(self) -> None:
        for to, data, size in self._role.transmits():
            sock = self._sockets.get(to)
            if sock is not None:
                refused, why = sock.send(data, size)
                if refused:
                    self._role.not_sent(to, refused, refused * size, why, now(), is_counted=data[0] == TRANSPORT)

    def _look_at_queues(self, moment: float) -> None:
        """Tell what waits in the sockets of the paths, where so much went that it matters."""
        for number, sock in self._sockets.items():
            if sock.unseen >= QUEUE_WORTH_A_LOOK or sock.is_watched:
                sock.is_watched = self._role.queue_seen(number, sock.queued(), moment)

    def _take_up(self, event: Event, moment: float) -> None:
        match event:
            case OpenPath():
                self._open(event, moment)
            case ClosePath():
                self._close(event.path)
            case _:
                super()._take_up(event, moment)

    def _open(self, event: OpenPath, moment: float) -> None:
        self._close(event.path)
        try:
            sock = udp.PathSocket(event, offload=self._settings.offload)
        except udp.PathError as error:
            self._role.path_failed(event.path, str(error), moment)
            return
        self._sockets[event.path] = sock
        self._watch(sock.fileno(), self._reader_of(sock, sock.receive))
        if not self._has_told_offload:
            self._has_told_offload = True
            self._tell_offload()
        self._role.path_opened(event.path, sock.port, moment)

    def _close(self, number: int) -> None:
        sock = self._sockets.pop(number, None)
        if sock is not None:
            self._unwatch(sock.fileno())
            sock.close()

    def close_sockets(self) -> None:
        """Close the sockets of all paths."""
        for number in list(self._sockets):
            self._close(number)
        self._monitor.close()

    # -- links -----------------------------------------------------------------------------------------

    def _links_ready(self, moment: float) -> bool:
        if self._monitor.drain():
            is_crowded = len(self._looked_at) == MAX_LOOKS
            earliest = self._looked_at[0] + LOOKS_SPAN if is_crowded else moment
            self._review_at = min(self._review_at, max(moment + LINKS_SETTLE, earliest))
            self._own_due = min(self._own_due, self._review_at)
        return False

    def _own_work(self, moment: float) -> None:
        is_new_second = moment >= self._wall_at
        super()._own_work(moment)
        if is_new_second:
            today = time.localtime()
            self._role.today_is(today.tm_year, today.tm_mon, today.tm_mday, moment)
        if moment >= self._review_at:
            if self._is_looking:  # what has changed since that look began may be missing in it
                self._review_at = moment + LINKS_SETTLE
            else:
                self._review_at = moment + LINKS_REVIEW
                self._looked_at.append(moment)
                self._is_looking = True
                self._worker.submit(Snapshot())
        self._own_due = min(self._wall_at, self._review_at)

    def _job_done(self, job: Job | Snapshot, result: object, moment: float) -> None:
        if not isinstance(job, Snapshot):
            super()._job_done(job, result, moment)
            return
        self._is_looking = False
        if isinstance(result, tuple):
            links, picture = result
            self._role.links_changed(links, moment, picture)
        else:
            log.warning("cannot see the links: %s", result)


def _noted(number: int, frame: object) -> None:
    """Do nothing about a signal: the loop finds it in the descriptor."""


@contextlib.contextmanager
def _signals() -> Any:
    """Turn SIGTERM, SIGINT and SIGHUP into a readable descriptor."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    wanted = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup(1) holds
    before = {number: signal.signal(number, _noted) for number in wanted}
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
