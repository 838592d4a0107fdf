"""The shim's main loop: joins the machine with the child, the tree, the log and the connections of one attempt.

Every failure of its own becomes an input of the machine first, so that the child's tree is ended by the ladder;
only a failure that repeats ends in `last_resort`. It never leaves a child behind knowingly.
"""

from __future__ import annotations

import posix as os
import select

from runner.shim import (
    cgroup,
    child,
    farewell,
    fence,
    files,
    hearing,
    links,
    machine,
    output,
    pipes,
    report,
    spec,
    system,
    tree,
    wire,
)
from runner.shim.system import signals

# ruff: noqa: SIM105 - contextlib is more than a shim may import
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.lease import Lease

# `poll` counts a clock that stands still in suspend: with a deadline pending the clock is looked at this often.
LOOK_DEADLINE_MS: Final = 2_000
# Without one, only to see whether the directory still exists.
LOOK_IDLE_MS: Final = 30_000
FAULTS_MAX: Final = 3
# No sleep that is shorter costs a lease its renewal.
WAKE_GAP_MS: Final = 5_000
_READABLE: Final = select.POLLIN
# In these a writer can be made to wait: behind them all that comes is what the dead left in their pipes.
_HOLDS: Final = (machine.RUNNING, machine.STOPPING)


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
        self.pipes = pipes.Pipes(self.poll)
        self.signalled: dict[bytes, int] = {}
        self.exit_frame = b""
        self.exit_json = b""
        self.slept_ms = system.boottime_ms() - system.awake_ms()
        self.durable = False
        self.durable_tried = False
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
            leaf = None if wanted.cgroup is None else cgroup.Leaf(wanted.cgroup)
            self.tree = tree.Tree(spec.COOKIE_NAME + b"=" + wanted.cookie, leaf, wanted.outlive)
            self.machine = machine.Machine(
                now_ms=now_ms,
                grace_ms=wanted.grace_ms,
                kill_wait_ms=wanted.kill_wait_ms,
                timeout_ms=wanted.timeout_ms,
                lease=wanted.lease,
                idle_ms=wanted.idle_ms,
                hangup=wanted.tty is not None,
            )
        self.point("ready")
        # Before the files are made: the daemon's commit, which the release waits for, runs beside them.
        self.links.tell(hearing.welcome(self))
        self.poll.register(self.links.listen(self.dirfd), _READABLE)
        log_fd = report.make_log_directory(self.dirfd)
        self.log = output.Log(log_fd, attempt, segment_bytes=segment, spool_bytes=spool, warm=self.warm)
        if self.spec is not None:
            self.log.heed(self.spec)
        self.story.write_meta("ready")
        files.reserve(self.dirfd, report.EXIT_NAME)
        self.step(machine.FAULT, detail=failure) if failure else self.step(machine.TICK)

    def run(self) -> None:
        """Work until the shim may leave."""
        while not self.done:
            try:
                self.turn()
            except Exception as exc:
                self._fault(exc)

    def turn(self) -> None:
        """Wait for the next event or deadline and answer it. Raises whatever goes wrong."""
        events = self.poll.poll(self._wait_ms())
        if not events:
            self._appear()
        for fd, event in events:
            if fd in self.pipes.open:
                if self.pipes.terminal is not None:
                    hearing.tell_taken(self, self.pipes.typed(event))
                if event != select.POLLOUT:
                    self._copy(fd)
            elif fd == self.pipes.stdin.fd:
                if self.pipes.feed():
                    self.links.tell(hearing.fed(self))
            elif fd == self.wake_fd:
                self._reap()
            elif fd in self.links.by_fd:
                self._hear(self.links.by_fd[fd])
            elif self.links.listener is not None and fd == self.links.listener.fileno():
                for accepted in self.links.accept():
                    self.poll.register(accepted, _READABLE)
            else:
                self._forget(fd)  # closed by an earlier event of this round
        if self.log is not None:
            self.links.ring(self.log.end)
        if self.machine.state == machine.EXITED:
            farewell.linger(self)
            return
        self._pace()
        if os.fstat(self.dirfd).st_nlink == 0 or (self.log is not None and self.log.gone):
            self.step(machine.FAULT, detail="the attempt's directory was deleted")
        self.step(machine.TICK)

    def _wait_ms(self) -> int:
        now_ms = system.boottime_ms()
        if self.machine.state == machine.EXITED:
            limit = LOOK_IDLE_MS
            due = self.leave_ms
            if not self.durable:
                limit = farewell.DURABLE_RETRY_MS
                settle_ms = self.story.ended_ms + farewell.SETTLE_WAIT_MS
                if now_ms < settle_ms and due is None:
                    due = settle_ms
        else:
            due = self.machine.deadline_ms()
            limit = LOOK_IDLE_MS if due is None else LOOK_DEADLINE_MS
            if self.pipes.terminal is not None:
                limit = min(limit, self.pipes.terminal.due_ms(now_ms))
        return limit if due is None else max(0, min(due - now_ms, limit))

    def _forget(self, fd: int) -> None:
        try:
            self.poll.unregister(fd)
        except KeyError:
            pass  # who closed it said so already

    def _appear(self) -> None:
        """Listen anew when somebody deleted the socket: the next daemon looks for it."""
        listener = self.links.listener
        if listener is None or os.access(links.SOCKET_NAME, os.F_OK, dir_fd=self.dirfd, follow_symlinks=False):
            return
        self.poll.unregister(listener.fileno())
        listener.close()
        self.poll.register(self.links.listen(self.dirfd), _READABLE)

    def _copy(self, fd: int) -> None:
        assert self.log is not None
        if self.pipes.held:
            return  # since an earlier event of this round
        now_ms = system.boottime_ms()
        if self.machine.state in _HOLDS and self.log.full():
            self.pipes.hold(True)
            return
        count = self.pipes.copy(self.log, fd, system.wall_ns(), now_ms)
        if count > 0:
            self.machine.output_ms = now_ms
        elif count == 0 and not self.pipes.open:
            self.step(machine.CLOSED)

    def _pace(self) -> None:
        """Read on when there is room again, when viewers have followed, or when nobody is left to wait."""
        assert self.log is not None
        terminal = self.pipes.terminal
        if terminal is not None:
            terminal.tick(system.boottime_ms())
            self.pipes.pace(self.log.end, self.links.seen() if self.machine.state in _HOLDS else [])
        elif self.pipes.held and self.machine.state not in _HOLDS:
            self.log.lift()
            self.pipes.hold(False)
        elif self.pipes.held and not self.log.full():
            self.pipes.hold(False)
        if self.pipes.held:
            # Who waits for us is not idle.
            self.machine.output_ms = system.boottime_ms()

    def _hear(self, link: links.Link) -> None:
        fd = link.sock.fileno()
        was_controller = link is self.links.controller
        for kind, body in self.links.receive(link):
            try:
                hearing.obey(self, link, kind, body)
            except wire.WireError:
                self.links.close(link)
        if fd not in self.links.by_fd:
            self.poll.unregister(fd)
        if was_controller and self.links.controller is None:
            self.step(machine.LOST)

    def step(
        self,
        kind: str,
        *,
        number: int | None = None,
        text: str = "",
        detail: str = "",
        lease: Lease | None = None,
    ) -> None:
        """Feed the machine one input and perform what it asks for; that the machine woke comes before anything else."""
        # This order: a shim that is held up between the two readings must not look like one that slept.
        now_ms = system.boottime_ms()
        slept_ms = now_ms - system.awake_ms()
        if slept_ms > self.slept_ms + WAKE_GAP_MS:
            self.slept_ms = slept_ms
            self.step(machine.WOKE)
        for action in self.machine.step(kind, now_ms, number=number, text=text, detail=detail, lease=lease):
            if action == machine.SPAWN:
                self._spawn()
            elif action == machine.FINISH:
                self._finish()
            elif self.tree is not None:
                self._act(self.tree, action)

    def _act(self, living: tree.Tree, action: str) -> None:
        if action == machine.SCAN:
            self.step(machine.FOUND, number=living.count())
        elif action == machine.TERM:
            self.step(machine.FOUND, number=self._signal(living, signals.SIGTERM, tree.PASSES_TERM))
        elif action == machine.HANGUP:
            reached, count = living.hang_up()
            self.story.sweep(reached, signals.SIGHUP, self.child.pid if self.child else 0)
            self.step(machine.FOUND, number=count)
        elif action == machine.KILL:
            self.step(machine.FOUND, number=self._signal(living, signals.SIGKILL, tree.PASSES_KILL))
        else:
            number = signals.SIGSTOP if action == machine.FREEZE else signals.SIGCONT
            living.signal(number, passes=tree.PASSES_KILL)

    def _signal(self, living: tree.Tree, number: int, passes: int) -> int:
        reached, count = living.signal(number, passes=passes)
        self.story.sweep(reached, number, self.child.pid if self.child else 0)
        return count

    def _spawn(self) -> None:
        assert self.spec is not None
        assert self.tree is not None
        env, self.env = self.env, {}
        self.story.write_meta("released")
        self.point("released")
        refused = reason = detail = ""
        started = None
        held = self.machine.tenure.lease
        # Before the fence is read: behind it nothing is waited for.
        self.tree.enter()
        try:
            refused = fence.refusal(self.dirfd, self.spec.execution, max(self.spec.token, held.token if held else 0))
            if not refused:
                started = child.spawn(self.spec, env)
        except child.SpawnError as exc:
            reason, detail = exc.reason, exc.detail
        finally:
            self.tree.leave()
        if refused:
            self.step(machine.FENCED, detail=refused)
        elif started is None:
            self.step(machine.SPAWN_FAILED, text=reason, detail=detail)
        else:
            self._spawned(self.tree, started)

    def _spawned(self, living: tree.Tree, started: child.Child) -> None:
        self.point("spawned")
        self.child = self.story.child = started
        living.begin(started.pid)
        self.story.asks(living)
        self.pipes.begin(started, self.spec.tty if self.spec else None)
        if self.pipes.terminal is not None and self.log is not None:
            self.log.begin_with(self.pipes.preface)
        self.step(machine.SPAWNED)
        try:
            self.story.write_meta("running")
        except OSError as exc:
            # What runs is not ended for want of a page: `released` says as much to a daemon that recovers.
            files.note_failure(self.dirfd, exc)
        if living.leaf is not None and living.leaf.failure is not None:
            files.note_failure(self.dirfd, living.leaf.failure)
        self.links.tell(hearing.started(started))
        if self.spec is not None and self.spec.stdin:
            self.links.tell(hearing.fed(self))

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
                self.pipes.close_stdin()
                if self.tree is not None and self.spec is not None and self.spec.tty is not None:
                    self.tree.parted = self.spec.tty.leave
                self.point("child_ended")
                self.step(machine.ENDED)

    def _finish(self) -> None:
        assert self.log is not None
        self.pipes.close_all()
        if self.tree is not None:
            self.machine.survivors = self.story.part(self.tree, self.machine.survivors)
        body = self.story.exit_object(self.machine, self.log)
        try:
            self.log.finish(files.encode(body).encode("ascii"), self.story.ended_ns)
        except OSError as exc:
            files.note_failure(self.dirfd, exc)
            self.machine.blame(f"the log could not be ended: {exc}")
            body = self.story.exit_object(self.machine, self.log)
        self._tell_exit(body, self.log)
        self.point("exit_told")
        self.links.ring(self.log.end)
        if not self.links.greeted():
            farewell.make_durable(self)

    def _tell_exit(self, body: dict[str, files.Json], log: output.Log) -> None:
        body["log"] = report.log_end(log)
        self.exit_json = files.encode(body).encode("ascii")
        self.exit_frame = wire.pack(wire.EXIT, self.exit_json)
        self.links.tell(self.exit_frame)

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
        self.step(machine.FAULT, detail=f"{type(exc).__name__}: {exc}")

    def point(self, name: str) -> None:
        """Where a test may end or hold this shim."""
        action = self.spec.fail.get(name) if self.spec is not None else None
        if action is not None:
            os.kill(os.getpid(), signals.SIGKILL if action == "kill" else signals.SIGSTOP)

    def last_resort(self) -> None:
        """End the tree without the loop, and leave what record can still be left."""
        if self.tree is not None and self.child is not None:
            left = tree.end(self.tree, self.spec.kill_wait_ms if self.spec else 0)
            self.machine.survivors = self.story.part(self.tree, left)
        if not self.exit_frame and self.log is not None:
            self.machine.blame("the shim failed")
            self._tell_exit(self.story.exit_object(self.machine, self.log), self.log)
            files.replace_durably(self.dirfd, report.EXIT_NAME, self.exit_json)
