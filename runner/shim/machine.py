"""What a shim does next: the states of one attempt, the stop ladder, the lease and the deadlines. Pure.

Theory of operation. The guard feeds inputs with the time (CLOCK_BOOTTIME, ms) and performs the actions that come
back, feeding their results as further inputs. The machine holds no descriptor and reads no clock.

    ready ──GO──> released ──SPAWNED──> running ──cause──> stopping ──> draining ──> exited
      └─ LOST, 30 s, STOP, lease ─┴─ SPAWN_FAILED ──────────────────────────────────────^

Rule 1. The first cause of an end wins and is kept; later ones can only make the ladder faster.
Rule 2. Nothing but GO leads to SPAWN, and only from `ready`.
Rule 3. A grace can only be shortened: by another stop, by the lease's deadline, by the timeout.
Rule 4. After the child's own end the rest of its tree takes the same ladder, without a cause.
Rule 5. The ladder ends: when two scans in a row find nobody, or `kill_wait_ms` after the first KILL.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

# States.
READY, RELEASED, RUNNING = "ready", "released", "running"
STOPPING, DRAINING, EXITED = "stopping", "draining", "exited"
# Inputs.
GO, LOST, STOP, LEASE, FAULT, TICK = "go", "lost", "stop", "lease", "fault", "tick"
SPAWNED, SPAWN_FAILED, ENDED, FOUND, CLOSED = "spawned", "spawn_failed", "ended", "found", "closed"
# Actions.
SPAWN, TERM, KILL, SCAN, FREEZE, THAW, FINISH = "spawn", "term", "kill", "scan", "freeze", "thaw", "finish"
# Lease actions, as on the wire.
CONTINUE, ON_LOSS_FREEZE, ON_LOSS_STOP = 0, 1, 2
# Causes.
CAUSE_NONE, CAUSE_STOP, CAUSE_TIMEOUT, CAUSE_LEASE = "none", "stop", "timeout", "lease"
CAUSE_UNRELEASED, CAUSE_EXEC_FAILED, CAUSE_SHIM_FAILED = "unreleased", "exec_failed", "shim_failed"

# A daemon that has not released within half a minute has forgotten the attempt.
RELEASE_WAIT_MS: Final = 30_000
# Room between the end of the ladder and the lease's deadline: clock error and the report's way up.
LEASE_MARGIN_MS: Final = 5_000
# Output after the end: silence that counts as the end of it, and the most that is waited for it.
QUIET_MS: Final = 250
DRAIN_MS: Final = 5_000
# Scans of a dying tree start close together and spread out: most trees die at once, the others take seconds.
SCAN_MS_MIN: Final = 20
SCAN_MS_MAX: Final = 500
DETAIL_MAX: Final = 512
_NEVER: Final = 1 << 62


class Cause:
    """Why an attempt ended, as in `exit.json`."""

    __slots__ = ("by", "detail", "kind", "reason")

    def __init__(self, kind: str, by: str = "", reason: str | None = None, detail: str = "") -> None:
        self.kind = kind
        self.by = by[:DETAIL_MAX]
        self.reason = reason
        self.detail = detail[:DETAIL_MAX]


class Lease:
    """The right to run: fencing token, deadline (BOOTTIME ms) and what to do when it is lost."""

    __slots__ = ("action", "deadline_ms", "token")

    def __init__(self, token: int, deadline_ms: int, action: int) -> None:
        self.token = token
        self.deadline_ms = deadline_ms
        self.action = action


class Machine:
    """One attempt's state. `step` takes an input and the time and returns the actions to perform, in order."""

    def __init__(
        self, *, now_ms: int, grace_ms: int, kill_wait_ms: int, timeout_ms: int | None, lease: Lease | None
    ) -> None:
        self.state = READY
        self.cause = Cause(CAUSE_NONE)
        self.lease = lease
        self.drain = "eof"
        self.survivors = 0
        self.frozen = False
        self.spawned = False
        self.forced = False
        self.output_ms = now_ms  # when the last output was read; the guard keeps it
        self._grace_ms = grace_ms
        self._kill_wait_ms = kill_wait_ms
        self._timeout_ms = timeout_ms
        self._ready_end_ms = now_ms + RELEASE_WAIT_MS
        self._timeout_at = _NEVER
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

        `number` is the grace of STOP (None: the spec's) or the count of FOUND; `text` is who asked for a STOP or
        the reason of SPAWN_FAILED; `detail` explains SPAWN_FAILED and FAULT; `lease` is the new one of LEASE.
        """
        if kind == LEASE and not self._take_lease(lease):
            return []
        leaf = TRANSITIONS[self.state, kind]
        if leaf == IGNORE:
            return []
        actions: list[str] = getattr(self, leaf)(now_ms, number, text, detail)
        return actions

    def deadline_ms(self) -> int | None:
        """When TICK is due next, None when only an input can change anything."""
        if self.state == READY:
            due = min(self._ready_end_ms, self._lease_due(stop_only=True))
        elif self.state == RUNNING:
            due = min(self._timeout_at, self._lease_due())
        elif self.state == STOPPING:
            due = min(self._scan_at, self._kill_end if self._killing else self._kill_limit())
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
            return "timed_out" if self.cause.kind == CAUSE_TIMEOUT else "stopped"
        return "exited" if signal is None else "signalled"

    def blame(self, detail: str) -> None:
        """Keep the shim's own failure as the cause when there is none yet."""
        if self.cause.kind == CAUSE_NONE:
            self.cause = Cause(CAUSE_SHIM_FAILED, detail=detail)

    # The leaves: each takes (now_ms, number, text, detail) and is named by the table below.

    def _go(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self.state = RELEASED
        return [SPAWN]

    def _lost(self, _now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        return self._never(Cause(CAUSE_UNRELEASED, reason="NOT_RELEASED", detail="the controller went away"))

    def _stop_early(self, _now_ms: int, _number: int | None, text: str, _detail: str) -> list[str]:
        return self._never(Cause(CAUSE_STOP, by=text))

    def _fail_early(self, _now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        return self._never(Cause(CAUSE_SHIM_FAILED, detail=detail))

    def _tick_ready(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        if now_ms >= self._lease_due(stop_only=True):
            return self._never(Cause(CAUSE_LEASE, detail="the lease ran out before the release"))
        if now_ms >= self._ready_end_ms:
            return self._never(Cause(CAUSE_UNRELEASED, reason="NOT_RELEASED", detail="no release in time"))
        return []

    def _spawned(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        self.state = RUNNING
        self.spawned = True
        if self._timeout_ms is not None:
            self._timeout_at = now_ms + self._timeout_ms
        return self._tick_running(now_ms, None, "", "")

    def _spawn_failed(self, _now_ms: int, _number: int | None, text: str, detail: str) -> list[str]:
        return self._never(Cause(CAUSE_EXEC_FAILED, reason=text, detail=detail))

    def _stop(self, now_ms: int, number: int | None, text: str, _detail: str) -> list[str]:
        return self._force(now_ms, Cause(CAUSE_STOP, by=text), self._grace_ms if number is None else number)

    def _fail(self, now_ms: int, _number: int | None, _text: str, detail: str) -> list[str]:
        return self._force(now_ms, Cause(CAUSE_SHIM_FAILED, detail=detail), self._grace_ms)

    def _tick_running(self, now_ms: int, _number: int | None, _text: str, _detail: str) -> list[str]:
        lease_due = now_ms >= self._lease_due()
        if lease_due and self.lease is not None and self.lease.action == ON_LOSS_STOP:
            return self._force(now_ms, Cause(CAUSE_LEASE), self._grace_ms)
        if now_ms >= self._timeout_at:
            return self._force(now_ms, Cause(CAUSE_TIMEOUT), self._grace_ms)
        if lease_due:
            self.frozen = True
            return [FREEZE]
        return []

    def _lease_running(self, now_ms: int, number: int | None, text: str, detail: str) -> list[str]:
        actions = []
        if self.frozen:
            self.frozen = False
            if now_ms < self._lease_due():
                actions.append(THAW)
            else:
                self.frozen = self.lease is not None and self.lease.action == ON_LOSS_FREEZE
        return actions + self._tick_running(now_ms, number, text, detail)

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
        if now_ms >= self._scan_at:
            self._scan_at = now_ms + self._scan_step
            return [KILL if self._killing else SCAN]
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

    def _take_lease(self, lease: Lease | None) -> bool:
        if lease is None or (self.lease is not None and lease.token < self.lease.token):
            return False
        self.lease = lease
        return True

    def _lease_due(self, *, stop_only: bool = False) -> int:
        if self.lease is None or self.lease.action == CONTINUE or self.frozen:
            return _NEVER
        if self.lease.action == ON_LOSS_STOP:
            return self.lease.deadline_ms - self._grace_ms - self._kill_wait_ms - LEASE_MARGIN_MS
        return _NEVER if stop_only else self.lease.deadline_ms - LEASE_MARGIN_MS

    def _kill_limit(self) -> int:
        limit = min(self._kill_at, self._timeout_at + self._grace_ms)
        if self.lease is not None and self.lease.action != CONTINUE:
            limit = min(limit, self.lease.deadline_ms - self._kill_wait_ms - LEASE_MARGIN_MS)
        return limit

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
        self.frozen = False
        self._kill_at = now_ms + grace_ms
        self._scan_at = now_ms + self._scan_step
        return [TERM]

    def _drained_from(self, now_ms: int) -> list[str]:
        self.state = DRAINING
        self._drain_from = now_ms
        return self._finish("eof") if self._closed else []

    def _finish(self, drain: str) -> list[str]:
        self.state = EXITED
        self.drain = drain
        return [FINISH]


STATES: Final = (READY, RELEASED, RUNNING, STOPPING, DRAINING, EXITED)
INPUTS: Final = (GO, LOST, STOP, LEASE, FAULT, TICK, SPAWNED, SPAWN_FAILED, ENDED, FOUND, CLOSED)
IGNORE: Final = ""
_ROWS: Final[Mapping[str, Mapping[str, str]]] = {
    READY: {
        GO: "_go",
        LOST: "_lost",
        STOP: "_stop_early",
        LEASE: "_tick_ready",
        FAULT: "_fail_early",
        TICK: "_tick_ready",
    },
    # The spawn is one call: nothing but its result and the shim's own failure can come between.
    RELEASED: {FAULT: "_fail_early", SPAWNED: "_spawned", SPAWN_FAILED: "_spawn_failed"},
    RUNNING: {
        STOP: "_stop",
        LEASE: "_lease_running",
        FAULT: "_fail",
        TICK: "_tick_running",
        ENDED: "_ended_alone",
        FOUND: "_found_alone",
        CLOSED: "_closed_early",
    },
    STOPPING: {
        STOP: "_hasten",
        TICK: "_tick_stopping",
        ENDED: "_ended_stopping",
        FOUND: "_found_stopping",
        CLOSED: "_closed_early",
    },
    DRAINING: {FAULT: "_fail_draining", TICK: "_tick_draining", CLOSED: "_closed_draining"},
    EXITED: {},
}
TRANSITIONS: Final[Mapping[tuple[str, str], str]] = {
    (state, kind): _ROWS[state].get(kind, IGNORE) for state in STATES for kind in INPUTS
}
