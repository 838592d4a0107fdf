"""The shim's main loop: joins the machine with the child, the tree, the log and the connections of one attempt.

Every failure of its own becomes an input of the machine first, so that the child's tree is ended by the ladder;
only a failure that repeats ends in `last_resort`. It never leaves a child behind knowingly.
"""

from __future__ import annotations

import posix as os
import select

from runner.shim import child, files, links, machine, output, records, report, spec, system, tree, wire
from runner.shim.system import signals

# ruff: noqa: SIM105 - contextlib is more than a shim may import
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# `poll` counts a clock that stands still in suspend: with a deadline pending the clock is looked at this often.
LOOK_DEADLINE_MS: Final = 2_000
# Without one, only to see whether the directory still exists.
LOOK_IDLE_MS: Final = 30_000
LINGER_MS: Final = 10_000
# A record that cannot be made durable is tried again, and given up with the shim's own life.
DURABLE_RETRY_MS: Final = 1_000
DURABLE_WAIT_MS: Final = 60_000
# A daemon that was told the end commits it at once: two syncs side by side would only delay each other.
SETTLE_WAIT_MS: Final = 20
FAULTS_MAX: Final = 3
_READABLE: Final = select.POLLIN


class Guard:
    """One shim at work. `prepare` takes the directory, `run` lives until nobody needs the shim any more."""

    def __init__(self, dirfd: int, controller_fd: int, warm: system.Warm) -> None:
        self.dirfd = dirfd
        self.warm = warm
        self.poll = select.poll()
        self.links = links.Links(controller_fd)
        self.story = report.Story(dirfd, warm.boot_id)
        self.machine = machine.Machine(
            now_ms=system.boottime_ms(), grace_ms=0, kill_wait_ms=0, timeout_ms=None, lease=None
        )
        self.log: output.Log | None = None
        self.tree: tree.Tree | None = None
        self.spec: spec.Spec | None = None
        self.env: dict[bytes, bytes] = {}
        self.child: child.Child | None = None
        self.pipes: dict[int, int] = {}
        self.small_pipes: set[int] = set()
        self.exit_frame = b""
        self.exit_json = b""
        self.durable = False
        self.leave_ms: int | None = None
        self.faults = 0
        self.done = False

    def prepare(self) -> None:
        """Take hold of the directory and say WELCOME. Raises OSError when the attempt cannot even be refused."""
        now_ms = system.boottime_ms()
        self._watch_signals()
        for fd in self.links.by_fd:
            self.poll.register(fd, _READABLE)
        attempt, segment, spool = self.story.attempt, spec.SEGMENT_BYTES_DEFAULT, spec.SPOOL_BYTES_DEFAULT
        failure = ""
        try:
            wanted = self.spec = spec.read_spec(self.dirfd)
        except spec.SpecError as exc:
            failure = str(exc)
        else:
            attempt, segment, spool = wanted.attempt, wanted.segment_bytes, wanted.spool_bytes
            self.story.attempt = attempt
            self.tree = tree.Tree(spec.COOKIE_NAME + b"=" + wanted.cookie)
            self.machine = machine.Machine(
                now_ms=now_ms,
                grace_ms=wanted.grace_ms,
                kill_wait_ms=wanted.kill_wait_ms,
                timeout_ms=wanted.timeout_ms,
                lease=wanted.lease,
            )
        # Before the files are made: the daemon's commit, which the release waits for, runs beside them.
        self.links.tell(self._welcome())
        self.poll.register(self.links.listen(self.dirfd), _READABLE)
        self.log = output.Log(
            report.make_log_directory(self.dirfd), attempt, segment_bytes=segment, spool_bytes=spool, warm=self.warm
        )
        self.story.write_meta("ready")
        files.reserve(self.dirfd, report.EXIT_NAME)
        self._step(machine.FAULT, detail=failure) if failure else self._step(machine.TICK)

    def run(self) -> None:
        """Work until the shim may leave."""
        while not self.done:
            try:
                self.turn()
            except Exception as exc:
                self._fault(exc)

    def turn(self) -> None:
        """Wait for the next event or deadline and answer it. Raises whatever goes wrong."""
        for fd, _event in self.poll.poll(self._wait_ms()):
            if fd in self.pipes:
                self._copy(fd)
            elif fd == self.wake_fd:
                self._reap()
            elif fd in self.links.by_fd:
                self._hear(self.links.by_fd[fd])
            elif self.links.listener is not None and fd == self.links.listener.fileno():
                for accepted in self.links.accept():
                    self.poll.register(accepted, _READABLE)
            else:
                self.poll.unregister(fd)  # closed by an earlier event of this round
        if self.log is not None:
            self.links.ring(self.log.end)
        if self.machine.state == machine.EXITED:
            self._linger()
            return
        if os.fstat(self.dirfd).st_nlink == 0 or (self.log is not None and self.log.gone):
            self._step(machine.FAULT, detail="the attempt's directory was deleted")
        self._step(machine.TICK)

    def _wait_ms(self) -> int:
        now_ms = system.boottime_ms()
        if self.machine.state == machine.EXITED:
            limit = LOOK_IDLE_MS
            due = self.leave_ms
            if not self.durable:
                limit = DURABLE_RETRY_MS
                settle_ms = self.story.ended_ms + SETTLE_WAIT_MS
                if now_ms < settle_ms and due is None:
                    due = settle_ms
        else:
            due = self.machine.deadline_ms()
            limit = LOOK_IDLE_MS if due is None else LOOK_DEADLINE_MS
        return limit if due is None else max(0, min(due - now_ms, limit))

    def _copy(self, fd: int) -> None:
        assert self.log is not None
        now_ms = system.boottime_ms()
        count = self.log.copy(fd, self.pipes[fd], system.wall_ns(), now_ms)
        if count > 0:
            self.machine.output_ms = now_ms
            if count >= records.PAYLOAD_MAX and fd in self.small_pipes:
                self.small_pipes.discard(fd)
                child.enlarge_pipe(fd)
        elif count == 0:
            self._close_pipe(fd)
            if not self.pipes:
                self._step(machine.CLOSED)

    def _close_pipe(self, fd: int) -> None:
        del self.pipes[fd]
        self.small_pipes.discard(fd)
        self.poll.unregister(fd)
        os.close(fd)

    def _hear(self, link: links.Link) -> None:
        fd = link.sock.fileno()
        was_controller = link is self.links.controller
        for kind, body in self.links.receive(link):
            try:
                self._obey(link, kind, body)
            except wire.WireError:
                self.links.close(link)
        if fd not in self.links.by_fd:
            self.poll.unregister(fd)
        if was_controller and self.links.controller is None:
            self._step(machine.LOST)

    def _obey(self, link: links.Link, kind: int, body: bytes) -> None:
        if kind == wire.HELLO:
            wire.unpack_hello(body)
            self._greet(link)
        elif not link.greeted:
            if kind in (wire.RELEASE, wire.LEASE, wire.STOP, wire.COLLECTED, wire.ARM, wire.TRIM):
                raise wire.WireError("a daemon speaks first")
        elif kind == wire.RELEASE:
            if link is self.links.controller and self.machine.state == machine.READY:
                self._release(body)
        elif kind == wire.LEASE:
            self._step(machine.LEASE, lease=machine.Lease(*wire.unpack_lease(body)))
        elif kind == wire.STOP:
            grace_ms, who = wire.unpack_stop(body)
            self._step(machine.STOP, number=grace_ms, text=who)
        elif kind == wire.COLLECTED:
            if self.machine.state == machine.EXITED:
                self.leave_ms = system.boottime_ms()
        elif kind == wire.ARM:
            link.armed = wire.unpack_offset(body)
        elif kind == wire.TRIM and self.log is not None:
            self.log.trim(wire.unpack_offset(body))

    def _greet(self, link: links.Link) -> None:
        link.greeted = True
        self.links.displace(link, keep_controller=self.machine.state == machine.READY)
        self.links.send(link, self._welcome())
        if self.child is not None:
            self.links.send(link, self._started(self.child))
        if self.exit_frame:
            self.links.send(link, self.exit_frame)

    def _welcome(self) -> bytes:
        phase = {
            machine.READY: wire.PHASE_READY,
            machine.RELEASED: wire.PHASE_RELEASED,
            machine.EXITED: wire.PHASE_EXITED,
        }.get(self.machine.state, wire.PHASE_RUNNING)
        lease = self.machine.lease
        return wire.pack_welcome(
            phase=phase,
            first=self.log.first if self.log else 0,
            end=self.log.end if self.log else 0,
            lease_token=lease.token if lease else 0,
            pid=self.story.pid,
            start=self.story.start,
        )

    def _started(self, started: child.Child) -> bytes:
        return wire.pack_started(started.pid, started.start, started.started_ns)

    def _release(self, body: bytes) -> None:
        assert self.spec is not None
        try:
            self.env = spec.environment(self.spec, body)
        except spec.SpecError as exc:
            self._step(machine.FAULT, detail=str(exc))
            return
        self._step(machine.GO)

    def _step(
        self,
        kind: str,
        *,
        number: int | None = None,
        text: str = "",
        detail: str = "",
        lease: machine.Lease | None = None,
    ) -> None:
        now_ms = system.boottime_ms()
        for action in self.machine.step(kind, now_ms, number=number, text=text, detail=detail, lease=lease):
            if action == machine.SPAWN:
                self._spawn()
            elif action == machine.FINISH:
                self._finish()
            elif self.tree is not None:
                self._act(self.tree, action)

    def _act(self, living: tree.Tree, action: str) -> None:
        if action == machine.SCAN:
            count = len(living.find())
        elif action == machine.TERM:
            count = self._signal(living, signals.SIGTERM, tree.PASSES_TERM)
        elif action == machine.KILL:
            count = self._signal(living, signals.SIGKILL, tree.PASSES_KILL)
        else:
            number = signals.SIGSTOP if action == machine.FREEZE else signals.SIGCONT
            living.signal(number, passes=tree.PASSES_KILL)
            return
        self._step(machine.FOUND, number=count)

    def _signal(self, living: tree.Tree, number: int, passes: int) -> int:
        reached, count = living.signal(number, passes=passes)
        self.story.sweep(reached, number, self.child.pid if self.child else 0)
        return count

    def _spawn(self) -> None:
        assert self.spec is not None
        env, self.env = self.env, {}
        self.story.write_meta("released")
        try:
            started = child.spawn(self.spec, env)
        except child.SpawnError as exc:
            self._step(machine.SPAWN_FAILED, text=exc.reason, detail=exc.detail)
            return
        self.child = self.story.child = started
        if self.tree is not None:
            self.tree.begin(started.pid)
        for fd, kind in ((started.stdout_fd, records.STDOUT), (started.stderr_fd, records.STDERR)):
            self.pipes[fd] = kind
            self.small_pipes.add(fd)
            self.poll.register(fd, _READABLE)
        self._step(machine.SPAWNED)
        self.story.write_meta("running")
        self.links.tell(self._started(started))

    def _reap(self) -> None:
        try:
            os.read(self.wake_fd, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if self.child is not None and pid == self.child.pid and self.story.status is None:
                self.story.child_ended(status, usage)
                self._step(machine.ENDED)

    def _finish(self) -> None:
        assert self.log is not None
        for fd in list(self.pipes):
            self._close_pipe(fd)
        body = self.story.exit_object(self.machine, self.log)
        try:
            self.log.finish(files.encode(body).encode("ascii"), self.story.ended_ns)
        except OSError as exc:
            files.note_failure(self.dirfd, exc)
            self.machine.blame(f"the log could not be ended: {exc}")
            body = self.story.exit_object(self.machine, self.log)
        self._tell_exit(body, self.log)
        self.links.ring(self.log.end)
        if not self.links.greeted():
            self._make_durable()

    def _tell_exit(self, body: dict[str, files.Json], log: output.Log) -> None:
        body["log"] = {"end": log.end, "segments": log.segments, "chain": log.chain.hex()}
        self.exit_json = files.encode(body).encode("ascii")
        self.exit_frame = wire.pack(wire.EXIT, self.exit_json)
        self.links.tell(self.exit_frame)

    def _make_durable(self) -> None:
        assert self.log is not None
        self.log.sync()
        try:
            files.replace_durably(self.dirfd, report.EXIT_NAME, self.exit_json)
        except FileNotFoundError as exc:
            # No directory, no record and nobody who could find us: there is nothing to stay for.
            files.note_failure(self.dirfd, exc)
            self.done = True
        except OSError as exc:
            files.note_failure(self.dirfd, exc)
        else:
            self.durable = True

    def _linger(self) -> None:
        now_ms = system.boottime_ms()
        ended_ms = self.story.ended_ms
        collected = self.leave_ms is not None and self.leave_ms <= now_ms
        told = not collected and self.links.greeted() and now_ms < ended_ms + SETTLE_WAIT_MS
        if not self.durable and not self.done and not told and now_ms < ended_ms + DURABLE_WAIT_MS:
            self._make_durable()
            return
        if collected:
            self.done = True
        elif self.links.greeted():
            self.leave_ms = None
        elif self.leave_ms is None:
            self.leave_ms = now_ms + LINGER_MS

    def _watch_signals(self) -> None:
        self.wake_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signals.set_wakeup_fd(write_fd)
        # Set by the fork server to "ignore", which would lose every exit status.
        signals.signal(signals.SIGCHLD, lambda _number, _frame: None)
        self.poll.register(self.wake_fd, _READABLE)

    def _fault(self, exc: Exception) -> None:
        files.note_failure(self.dirfd, exc)
        self.faults += 1
        if self.faults > FAULTS_MAX or (self.machine.state == machine.EXITED and not self.exit_frame):
            raise exc
        self._step(machine.FAULT, detail=f"{type(exc).__name__}: {exc}")

    def last_resort(self) -> None:
        """End the tree without the loop, and leave what record can still be left."""
        if self.tree is not None and self.child is not None:
            self.machine.survivors = tree.end(self.tree, self.spec.kill_wait_ms if self.spec else 0)
        if not self.exit_frame and self.log is not None:
            self.machine.blame("the shim failed")
            self._tell_exit(self.story.exit_object(self.machine, self.log), self.log)
            files.replace_durably(self.dirfd, report.EXIT_NAME, self.exit_json)
