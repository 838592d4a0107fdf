"""A shim, small: the shipped machine and leases (`runner/shim/machine.py`) with a modelled guard around them, as docs/shim.md says.

It holds its attempt's lock for life, hears a daemon over a `Hold`, ends its tree, leaves an exit record, and needs nobody. What it
does, it does as an owner of its own: it can be killed, hang (its owner is held), and sleep with its machine.
"""

from typing import TYPE_CHECKING, Any

from protocol.ids import Attempt
from protocol.limits import KILL_WAIT_MS
from runner.core.plans import AttemptPlan, ExitRecord, Phase, ProcessIdentity
from runner.shim import machine
from runner.shim.lease import Lease
from tests.sim.host import KILL, TERM, Directory, Host, Proc
from tests.sim.story import short
from tests.sim.timeline import HELD, MS_US, Handle

if TYPE_CHECKING:
    from tests.sim.hands import Hold

WIRE_US = 300
"""One message over the socket between shim and daemon."""
LOOK_US = 2_000 * MS_US
SETTLE_US = 20 * MS_US
LINGER_US = 10_000 * MS_US
DURABLE_RETRY_US = 1_000 * MS_US
DURABLE_WAIT_US = 60_000 * MS_US
WAKE_GAP_MS = 5_000
RELEASE, LEASE, STOP, COLLECTED = "release", "lease", "stop", "collected"
ACTIONS = {"continue": 0, "freeze": 1, "stop": 2}
HEX = "cd" * 32


class Shim:
    """One guard of one attempt."""

    def __init__(self, host: Host, directory: Directory, controller: "Hold") -> None:
        self.host = host
        self.directory = directory
        self.plan: AttemptPlan = directory.plan
        self.attempt: Attempt = self.plan.attempt
        self.owner = host.owner(f"shim {self.attempt.name}")
        self.pid = host.next_pid()
        self.start = host.timeline.now_us // MS_US
        self.core = machine.Machine(
            now_ms=host.boot_ms,
            grace_ms=self.plan.grace_ms,
            kill_wait_ms=KILL_WAIT_MS,
            timeout_ms=self.plan.timeout_ms,
            lease=None,
        )
        self.controller: Hold | None = controller
        self.holds: list[Hold] = [controller]
        self.child: Proc | None = None
        self.record: ExitRecord | None = None
        self.was_hung = False
        self._slept_ms = host.slept_ms
        self._timer: Handle | None = None
        self._durable = False
        self._collected = False
        self._ended_us = 0
        self._started_ms = 0
        directory.shim = self
        directory.phase = Phase.READY
        self._arm()

    @property
    def identity(self) -> ProcessIdentity:
        """As the journal keeps it."""
        return ProcessIdentity(boot_id=self.host.boot_id, pid=self.pid, start=self.start)

    @property
    def hung(self) -> bool:
        """Whether it does nothing although its machine is awake."""
        return self.owner.state == HELD and self.host.awake

    def hang(self) -> None:
        """It does nothing from here on."""
        self.was_hung = True
        self.host.witness.unguarded.add(self.attempt)
        self.host.timeline.hold(self.owner)

    # --- what a daemon says -------------------------------------------------------------------------------------

    def hear(self, hold: "Hold", word: str, *args: Any) -> None:
        """A message is on its way."""
        self.host.timeline.after(self.owner, WIRE_US, self._obey, hold, word, *args)

    def lose(self, hold: "Hold") -> None:
        """A daemon's end of a connection is closed."""
        self.host.timeline.after(self.owner, WIRE_US, self._closed, hold)

    def greet_controller(self) -> None:
        """WELCOME to the daemon that had it forked."""
        self.host.timeline.after(self.owner, WIRE_US, self._greet_controller)

    def _greet_controller(self) -> None:
        if self.controller is not None:
            self.controller.welcomed(self)

    def greet(self, hold: "Hold") -> None:
        """Another daemon says hello."""
        self.host.timeline.after(self.owner, WIRE_US, self._greet, hold)

    def _greet(self, hold: "Hold") -> None:
        for other in self.holds:
            if other is not self.controller or self.core.state != machine.READY:
                other.displaced()
        self.holds = [other for other in self.holds if other is self.controller and self.core.state == machine.READY]
        self.holds.append(hold)
        hold.welcomed(self)
        if self.record is not None:
            hold.told(self.record)
            self._linger()

    def _obey(self, hold: "Hold", word: str, *args: Any) -> None:
        if word == RELEASE:
            if hold is self.controller and self.core.state == machine.READY:
                self.step(machine.GO)
        elif word == LEASE:
            self.step(machine.LEASE, lease=Lease(*args))
        elif word == STOP:
            grace_ms, by = args
            self.step(machine.STOP, number=grace_ms, text=by)
        elif self.core.state == machine.EXITED:
            self._collected = True
            self._linger()

    def _closed(self, hold: "Hold") -> None:
        if hold in self.holds:
            self.holds.remove(hold)
        if hold is self.controller:
            self.controller = None
            self.step(machine.LOST)
        if self.core.state == machine.EXITED:
            self._linger()

    # --- the machine --------------------------------------------------------------------------------------------

    def step(self, kind: str, **about: Any) -> None:
        """As the guard: a wake comes first, then what happened, then what the machine asks for."""
        now_ms, slept_ms = self.host.boot_ms, self.host.slept_ms
        if slept_ms > self._slept_ms + WAKE_GAP_MS:
            self._slept_ms = slept_ms
            self.step(machine.WOKE)
        for action in self.core.step(kind, now_ms, **about):
            self._act(action)
        self._arm()

    def look_soon(self) -> None:
        """The machine woke up."""
        self.host.timeline.after(self.owner, self.host.rng.randrange(LOOK_US), self._look)

    def _look(self) -> None:
        if self.core.state == machine.EXITED:
            self._linger()
        else:
            self.step(machine.TICK)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ms = None if self.core.state == machine.EXITED else self.core.deadline_ms()
        if due_ms is not None:
            delay_us = max((due_ms - self.host.boot_ms) * MS_US, 0)
            self._timer = self.host.timeline.after(self.owner, delay_us, self._look)

    def _act(self, action: str) -> None:
        if action == machine.SPAWN:
            self._spawn()
        elif action == machine.FINISH:
            self._finish()
        elif action == machine.SCAN:
            self.step(machine.FOUND, number=len(self._tree()))
        elif action in (machine.TERM, machine.KILL):
            for proc in self._tree():
                proc.signal(TERM if action == machine.TERM else KILL)
            self.step(machine.FOUND, number=len(self._tree()))
        else:
            for proc in self._tree():
                proc.freeze() if action == machine.FREEZE else proc.thaw()
            self.host.story.say(self.host.name, "%s: its shim does: %s", short(self.attempt), action)

    def _tree(self) -> list[Proc]:
        """Everything of the attempt: what escaped is a descendant of its subreaper."""
        return self.host.living(self.attempt)

    def _spawn(self) -> None:
        self.directory.phase = Phase.RELEASED
        held = self.core.tenure.lease
        token, fence = (
            max(self.plan.token, held.token if held else 0),
            self.host.fences.get(self.attempt.execution_id, 0),
        )
        if fence > token:
            self.step(machine.FENCED, detail=f"token {token} is fenced by token {fence}")
            return
        program = self.host.programs[self.plan.argv[1]]
        if program.fails is not None:
            self.step(machine.SPAWN_FAILED, text=program.fails)
            return
        self.host.witness.spawned(self.host, self.attempt, self.plan)
        self._started_ms = self.host.now().wall_ms
        self.child = Proc(
            self.host,
            self.attempt,
            program.run_ms,
            stubborn=program.stubborn,
            polite=program.polite,
            code=program.code,
            ended=self._child_ended,
        )
        for run_ms, cookie in program.escapees:
            Proc(self.host, self.attempt, run_ms, cookie=cookie, stubborn=True, ended=self._other_ended)
        self.host.witness.changed(self.host, self.attempt)
        self.step(machine.SPAWNED)
        self.directory.phase = Phase.RUNNING

    def _child_ended(self, proc: Proc) -> None:
        self.host.witness.child_ended(self.host, self.attempt, proc.status)
        self.host.timeline.after(self.owner, WIRE_US, self._reap)

    def _other_ended(self, _proc: Proc) -> None:
        if self.child is not None and not self.child.alive and not self._tree():
            self.host.timeline.after(self.owner, WIRE_US, self.step, machine.CLOSED)

    def _reap(self) -> None:
        self.step(machine.ENDED)
        if not self._tree():
            self.step(machine.CLOSED)

    # --- the end ------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        code, signal = (None, None) if self.child is None or self.child.alive else self.child.status
        left = len(self._tree())
        verdict, cause = self.core.verdict(signal), self.core.cause
        self.record = ExitRecord(
            verdict=verdict,
            code=code,
            signal=signal,
            core=False,
            cause_kind=cause.kind,
            cause_by=cause.by,
            cause_reason=cause.reason,
            cause_detail=cause.detail,
            started_ms=self._started_ms or None,
            ended_ms=max(self.host.now().wall_ms, 0),
            duration_ms=0,
            utime_us=0,
            stime_us=0,
            maxrss_kib=0,
            streams={"stdout": (0, HEX)},
            log_end=0,
            log_segments=0,
            log_chain=HEX,
            drain=self.core.drain,
            swept=(),
            survivors=left,
            boot_id=self.host.boot_id,
            unreleased=cause.kind == machine.CAUSE_UNRELEASED,
        )
        self._ended_us = self.host.timeline.now_us
        self.host.story.say(self.host.name, "%s: its shim says %s %s", short(self.attempt), verdict, cause.kind)
        for hold in self.holds:
            hold.told(self.record)
        self._linger()

    def _linger(self) -> None:
        """Make the record durable, and leave when nobody needs us."""
        now_us, timeline = self.host.timeline.now_us, self.host.timeline
        if not self._durable:
            told = self.holds and not self._collected and now_us < self._ended_us + SETTLE_US
            if told:
                timeline.after(self.owner, SETTLE_US, self._linger)
                return
            if self.host.broken and now_us < self._ended_us + DURABLE_WAIT_US:
                timeline.after(self.owner, DURABLE_RETRY_US, self._linger)
                return
            if not self.host.broken:
                self._durable = True
                self.directory.exit = self.record
        if self._collected:
            self._leave()
        elif not self.holds:
            timeline.after(self.owner, LINGER_US, self._leave_if_alone)

    def _leave_if_alone(self) -> None:
        if not self.holds:
            self._leave()

    def _leave(self) -> None:
        if self.owner.alive:
            self.end()

    def end(self) -> None:
        """Its process is gone: by its own will, or killed."""
        self.owner.die()
        self.host.owners.discard(self.owner)
        if self.directory.shim is self:
            self.directory.shim = None
        for hold in self.holds:
            hold.gone()
        self.holds = []
