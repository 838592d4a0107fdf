"""What a shim does next: the states of one attempt, the stop ladder, the lease and the deadlines. Pure.

Theory of operation. The guard feeds inputs with the time (CLOCK_BOOTTIME, ms) and performs the actions that come
back, feeding their results as further inputs. The machine holds no descriptor and reads no clock.

    ready ──GO──> released ──SPAWNED──> running ──cause──> stopping ──> draining ──> exited
      └─ LOST, 30 s, STOP, lease ─┴─ SPAWN_FAILED, FENCED ──────────────────────────────^

`running` is frozen and thawed as its lease asks (`runner/shim/lease.py`); the run time limit goes on meanwhile.

Rule 1. The first cause of an end wins and is kept; later ones can only make the ladder faster.
Rule 2. Nothing but GO leads to SPAWN, and only from `ready`.
Rule 3. A grace can only be shortened: by another stop, by the lease's deadline, by the timeout.
Rule 4. After the child's own end the rest of its tree takes the same ladder, without a cause.
Rule 5. The ladder ends: when two scans in a row find nobody, or `kill_wait_ms` after the first KILL.
Rule 6. A frozen tree is thawed before it is sent a TERM.
Rule 7. Every time counts suspend, but waits that end in a verdict begin anew after a wake (WOKE): what they wait for slept too.
Rule 8. Silence (`idle_ms`) counts from the last output, thaw or wake, whichever was last; what is frozen is not silent.
Rule 9. What has a terminal is hung up first; TERM follows when that did not end it.
"""

from __future__ import annotations

from runner.shim import lease as leases
from runner.shim.cause import Cause as Cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from runner.shim.lease import Lease

# States.
READY, RELEASED, RUNNING = "ready", "released", "running"
STOPPING, DRAINING, EXITED = "stopping", "draining", "exited"
# Inputs.
GO, LOST, STOP, LEASE, FAULT, TICK, WOKE = "go", "lost", "stop", "lease", "fault", "tick", "woke"
SPAWNED, SPAWN_FAILED, FENCED = "spawned", "spawn_failed", "fenced"
ENDED, FOUND, CLOSED = "ended", "found", "closed"
# Actions.
SPAWN, TERM, KILL, SCAN, FINISH = "spawn", "term", "kill", "scan", "finish"
HANGUP = "hangup"
FREEZE, THAW = leases.FREEZE, leases.THAW
# Causes.
CAUSE_NONE, CAUSE_STOP, CAUSE_TIMEOUT, CAUSE_LEASE = "none", "stop", "timeout", "lease"
CAUSE_UNRELEASED, CAUSE_EXEC_FAILED, CAUSE_SHIM_FAILED = "unreleased", "exec_failed", "shim_failed"
CAUSE_FENCED, CAUSE_IDLE = "fenced", "idle"

# A daemon that has not released within half a minute has forgotten the attempt.
RELEASE_WAIT_MS: Final = 30_000
# Output after the end: silence that counts as the end of it, and the most that is waited for it.
QUIET_MS: Final = 250
DRAIN_MS: Final = 5_000
# Between hanging up and TERM: a shell says goodbye to its jobs and writes its history meanwhile.
HANGUP_MS: Final = 2_500
# Scans of a dying tree start close together and spread out: most trees die at once, the others take seconds.
SCAN_MS_MIN: Final = 20
SCAN_MS_MAX: Final = 500
_NEVER: Final = leases.NEVER


class Machine:
    """One attempt's state. `step` takes an input and the time and returns the actions to perform, in order."""

    def __init__(
        self,
        *,
        now_ms: int,
        grace_ms: int,
        kill_wait_ms: int,
        timeout_ms: int | None,
        lease: Lease | None,
        idle_ms: int | None = None,
        hangup: bool = False,
    ) -> None:
        self.state = READY
        self.cause = Cause(CAUSE_NONE)
        self.tenure = leases.Tenure(lease, grace_ms=grace_ms, kill_wait_ms=kill_wait_ms, exempt=hangup)
        self.drain = "eof"
        self.survivors = 0
        self.spawned = False
        self.forced = False
        self.output_ms = now_ms  # when the last output was read; the guard keeps it
        self._grace_ms = grace_ms
        self._kill_wait_ms = kill_wait_ms
        self._timeout_ms = timeout_ms
        self._idle_ms = _NEVER if idle_ms is None else idle_ms
        self._ready_end_ms = now_ms + RELEASE_WAIT_MS
        self._timeout_at = _NEVER
        self._hangup = hangup
        self._term_at = _NEVER
        self._kill_at = _NEVER
        self._kill_end = _NEVER
        self._scan_at = _NEVER
        self._scan_step = SCAN_MS_MIN
        self._drain_from = 0
        self._killing = False
        self._ended = False
        self._closed = False
        self._empty_scans = 0

    def step(
        self,
        kind: str,
        now_ms: int,
        *,
        number: int | None = None,
        text: str = "",
        detail: str = "",
        lease: Lease | None = None,
    ) -> list[str]:
        """Take one input and return the actions it asks for.

        `number` is the grace of STOP (None: the spec's) or the count of FOUND; `text` is who asked for a STOP or the
        reason of SPAWN_FAILED; `detail` explains SPAWN_FAILED, FENCED and FAULT; `lease` is the new one of LEASE.
        """
        if kind == LEASE and not self.tenure.take(lease, now_ms):
            return []
        if kind == WOKE:
            self.tenure.woke(now_ms)
        leaf = TRANSITIONS[self.state, kind]
        if leaf == IGNORE:
            return []
        actions: list[str] = getattr(self, leaf)(now_ms, number, text, detail)
        return actions

    def deadline_ms(self) -> int | None:
        """When TICK is due next, None when only an input can change anything."""
        if self.state == READY:
            due = min(self._ready_end_ms, self.tenure.give_up_ms())
        elif self.state == RUNNING:
            due = min(self._timeout_at, self._idle_at(), self.tenure.due_ms())
        elif self.state == STOPPING:
            due = min(self._scan_at, self._kill_end if self._killing else min(self._term_at, self._kill_limit()))
        elif self.state == DRAINING:
            due = min(self._quiet_at(), self._drain_from + DRAIN_MS)
        else:
            due = _NEVER
        return None if due >= _NEVER else due

    def verdict(self, signal: int | None) -> str:
        """The verdict, given the signal that ended the child (None: it exited)."""
        if not self.spawned:
            return "never_started"
        if self.forced:
            return "timed_out" if self.cause.kind in (CAUSE_TIMEOUT, CAUSE_IDLE) else "stopped"
        return "exited" if signal is None else "signalled"

    def blame(self, detail: str) -> None:
        """Keep the shim's own failure as the cause when there is none yet."""
        if self.cause.kind == CAUSE_NONE:
            self.cause = Cause(CAUSE_SHIM_FAILED, detail=detail)

    # The leaves: each takes (now_ms, number, text, detail) and is named by the table below.

    def _go(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if now_ms >= self.tenure.lost_ms():
            # Nothing has run yet: starting it only to freeze or stop it would be running without the right to.
            return self._never(Cause(CAUSE_LEASE, detail="the lease ran out before the release"))
        self.state = RELEASED
        return [SPAWN]

    def _lost(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        return self._never(Cause(CAUSE_UNRELEASED, reason="NOT_RELEASED", detail="the controller went away"))

    def _stop_early(self, _now_ms: int, _number: int | None, text: str, _detail: str) -> list[str]:
        return self._never(Cause(CAUSE_STOP, by=text))

    def _fail_early(self, _now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        return self._never(Cause(CAUSE_SHIM_FAILED, detail=detail))

    def _tick_ready(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if now_ms >= self.tenure.give_up_ms():
            return self._never(Cause(CAUSE_LEASE, detail="the lease ran out before the release"))
        if now_ms >= self._ready_end_ms:
            return self._never(Cause(CAUSE_UNRELEASED, reason="NOT_RELEASED", detail="no release in time"))
        return []

    def _woke_ready(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self._ready_end_ms = now_ms + RELEASE_WAIT_MS
        return []

    def _spawned(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self.state = RUNNING
        self.spawned = True
        self.output_ms = now_ms
        if self._timeout_ms is not None:
            self._timeout_at = now_ms + self._timeout_ms
        return self._tick_running(now_ms, None, "", "")

    def _spawn_failed(self, _now_ms: int, _number: int | None, text: str, detail: str) -> list[str]:
        return self._never(Cause(CAUSE_EXEC_FAILED, reason=text, detail=detail))

    def _fenced(self, _now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        return self._never(Cause(CAUSE_FENCED, reason="FENCED", detail=detail))

    def _stop(self, now_ms: int, number: int | None, text: str, _detail: str) -> list[str]:
        return self._force(now_ms, Cause(CAUSE_STOP, by=text), self._grace_ms if number is None else number)

    def _fail(self, now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        return self._force(now_ms, Cause(CAUSE_SHIM_FAILED, detail=detail), self._grace_ms)

    def _tick_running(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if self._ended:
            return []  # Rule 4: what is left of the tree is being looked for, and has no cause
        asked = self.tenure.asks(now_ms)
        if asked == leases.GIVE_UP:
            detail = "" if self.tenure.frozen_ms is None else "frozen, and the lease did not come back in time"
            return self._force(now_ms, Cause(CAUSE_LEASE, detail=detail), self.tenure.grace_ms)
        if now_ms >= self._timeout_at:
            return self._force(now_ms, Cause(CAUSE_TIMEOUT), self._grace_ms)
        if now_ms >= self._idle_at():
            return self._force(now_ms, Cause(CAUSE_IDLE, detail=f"no output for {self._idle_ms} ms"), self._grace_ms)
        if asked == leases.FREEZE:
            self.tenure.frozen_ms = now_ms
            return [FREEZE]
        if asked != leases.THAW:
            return []
        self.output_ms = now_ms
        return self._thaw()

    def _woke_running(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self.output_ms = now_ms
        return self._tick_running(now_ms, None, "", "")

    def _ended_alone(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self._ended = True
        return [SCAN]

    def _found_alone(self, now_ms: int, number: int | None, _text: str, _detail: str) -> list[str]:
        if not self._ended:
            return []
        if not number:
            return self._drained_from(now_ms)
        return self._climb(now_ms, self._grace_ms)

    def _closed_early(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self._closed = True
        return []

    def _hasten(self, now_ms: int, number: int | None, _text: str, _detail: str) -> list[str]:
        grace_ms = self._grace_ms if number is None else number
        self._kill_at = min(self._kill_at, now_ms + grace_ms)
        if self._term_at < _NEVER:
            self._term_at = min(self._term_at, now_ms + grace_ms // 2)
        return []

    def _ended_stopping(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self._ended = True
        self._scan_step = SCAN_MS_MIN
        self._scan_at = now_ms + self._scan_step
        return [SCAN]

    def _found_stopping(self, now_ms: int, number: int | None, _text: str, _detail: str) -> list[str]:
        self.survivors = number or 0
        if self.survivors == 0 and self._ended:
            self._empty_scans += 1
            return self._drained_from(now_ms) if self._empty_scans >= 2 else [SCAN]
        self._empty_scans = 0
        self._scan_at = now_ms + self._scan_step
        self._scan_step = min(2 * self._scan_step, SCAN_MS_MAX)
        return []

    def _tick_stopping(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if self._killing and now_ms >= self._kill_end:
            return self._drained_from(now_ms)
        if not self._killing and now_ms >= self._kill_limit():
            self._killing = True
            self._kill_end = now_ms + self._kill_wait_ms
            self._scan_step = SCAN_MS_MIN
            self._scan_at = now_ms + self._scan_step
            return [KILL]
        if not self._killing and now_ms >= self._term_at:
            self._term_at = _NEVER
            return [TERM]
        if now_ms >= self._scan_at:
            self._scan_at = now_ms + self._scan_step
            return [KILL if self._killing else SCAN]
        return []

    def _woke_stopping(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if self._killing:
            self._kill_end = now_ms + self._kill_wait_ms
        return []

    def _woke_draining(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self._drain_from = now_ms
        return []

    def _closed_draining(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        return self._finish("eof")

    def _tick_draining(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if now_ms >= self._drain_from + DRAIN_MS:
            return self._finish("timeout")
        return self._finish("quiet") if now_ms >= self._quiet_at() else []

    def _fail_draining(self, _now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        self.blame(detail)
        return self._finish("timeout")

    # What the leaves share.

    def _kill_limit(self) -> int:
        return min(self._kill_at, self._timeout_at + self._grace_ms, self.tenure.kill_ms())

    def _idle_at(self) -> int:
        # What is frozen can say nothing, and what has ended owes nothing.
        return _NEVER if self._ended or self.tenure.frozen_ms is not None else self.output_ms + self._idle_ms

    def _quiet_at(self) -> int:
        return max(self._drain_from, self.output_ms) + QUIET_MS

    def _never(self, cause: Cause) -> list[str]:
        self.cause = cause
        return self._finish("eof")

    def _force(self, now_ms: int, cause: Cause, grace_ms: int) -> list[str]:
        self.cause = cause
        self.forced = True
        return self._climb(now_ms, grace_ms)

    def _climb(self, now_ms: int, grace_ms: int) -> list[str]:
        self.state = STOPPING
        self._kill_at = now_ms + grace_ms
        self._scan_at = now_ms + self._scan_step
        if not self._hangup or self._ended:
            return [*self._thaw(), TERM]
        self._term_at = now_ms + min(HANGUP_MS, grace_ms // 2)
        return [*self._thaw(), HANGUP]

    def _thaw(self) -> list[str]:
        if self.tenure.frozen_ms is None:
            return []
        self.tenure.frozen_ms = None
        return [THAW]

    def _drained_from(self, now_ms: int) -> list[str]:
        self.state = DRAINING
        self._drain_from = now_ms
        return self._finish("eof") if self._closed else []

    def _finish(self, drain: str) -> list[str]:
        self.state = EXITED
        self.drain = drain
        return [FINISH]


STATES: Final = (READY, RELEASED, RUNNING, STOPPING, DRAINING, EXITED)
INPUTS: Final = (
    GO, LOST, STOP, LEASE, FAULT, TICK, WOKE, SPAWNED, SPAWN_FAILED, FENCED, ENDED, FOUND, CLOSED,
)  # fmt: skip
IGNORE: Final = ""
_ROWS: Final[Mapping[str, Mapping[str, str]]] = {
    READY: {
        GO: "_go",
        LOST: "_lost",
        STOP: "_stop_early",
        LEASE: "_tick_ready",
        FAULT: "_fail_early",
        TICK: "_tick_ready",
        WOKE: "_woke_ready",
    },
    # The spawn is one call: nothing but its result and the shim's own failure can come between.
    RELEASED: {FAULT: "_fail_early", SPAWNED: "_spawned", SPAWN_FAILED: "_spawn_failed", FENCED: "_fenced"},
    RUNNING: {
        STOP: "_stop",
        LEASE: "_tick_running",
        FAULT: "_fail",
        TICK: "_tick_running",
        WOKE: "_woke_running",
        ENDED: "_ended_alone",
        FOUND: "_found_alone",
        CLOSED: "_closed_early",
    },
    STOPPING: {
        STOP: "_hasten",
        TICK: "_tick_stopping",
        WOKE: "_woke_stopping",
        ENDED: "_ended_stopping",
        FOUND: "_found_stopping",
        CLOSED: "_closed_early",
    },
    DRAINING: {
        FAULT: "_fail_draining",
        TICK: "_tick_draining",
        WOKE: "_woke_draining",
        CLOSED: "_closed_draining",
    },
    EXITED: {},
}
TRANSITIONS: Final[Mapping[tuple[str, str], str]] = {
    (state, kind): _ROWS[state].get(kind, IGNORE) for state in STATES for kind in INPUTS
}
