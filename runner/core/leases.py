"""Leases in the engine: asked for again with every beat, lost at their deadline, given up on a signed word.

Theory of operation. The shim enforces the deadline it was told, also while no daemon lives. Here a lease is what the beats ask
for and what a start is judged by. A deadline that moved is journaled, since an adopted shim is told the journal's.

Rule 1: an unsigned word moves a deadline forward or does nothing. Rule 2: what is past its deadline is lost, whatever is said later.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from protocol.commands import Command, LeaseRelease, OnLoss
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt
from protocol.lease import Lease, LeaseInput, LeaseState, granted
from protocol.messages import HeldLease
from protocol.receipt import Outcome
from protocol.session import BeatAnswered
from runner.core.admission import Refusal
from runner.core.effects import Effect, Note, Persist, PushLease, ReportAgain
from runner.core.inputs import Now
from runner.core.journaling import AttemptRow, PutAttempt
from runner.core.plans import LeaseAction

if TYPE_CHECKING:
    from runner.core.engine import Engine


class Leases:
    """The leases of living attempts; each is a part of its attempt's row."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    # --- questions ----------------------------------------------------------------------------------------------

    def held(self) -> tuple[HeldLease, ...]:
        """Leases to be renewed with the next beat."""
        return tuple(HeldLease(res=lease.res, token=lease.token) for _, lease in self._held())

    def next_deadline_ms(self) -> int | None:
        """When the next held lease runs out (BOOTTIME)."""
        return min((lease.deadline_ms for _, lease in self._held()), default=None)

    def refusal(self, row: AttemptRow, now: Now) -> Refusal | None:
        """Why the lease of an attempt that is about to begin does not let it, or None."""
        lease = row.lease
        if lease is None or lease.on_loss is OnLoss.CONTINUE:
            return None
        if lease.state is LeaseState.HELD and now.boot_ms < lease.deadline_ms:
            return None
        return Refusal(Reason.EXPIRED, "its lease was over before it could begin")

    def _held(self) -> Iterator[tuple[AttemptRow, Lease]]:
        for row in self._engine.attempts.living_rows():
            if row.lease is not None and row.lease.state is LeaseState.HELD:
                yield row, row.lease

    # --- what happens to them -----------------------------------------------------------------------------------

    def granted(self, command: Command, known: AttemptRow | None, now: Now) -> Lease | None:
        """The lease that came with a start, counted from when it was signed; one that an earlier daemon saw the end of stays ended."""
        if command.lease is None:
            return None
        if known is not None and known.lease is not None and known.lease.state is not LeaseState.HELD:
            return known.lease
        return granted(command.lease, now.boot_ms, self._engine.plane_ms(now) - command.iat)

    def push(self, row: AttemptRow, now: Now) -> list[Effect]:
        """Tell the shim of an attempt what it must enforce."""
        lease = row.lease
        if lease is None or lease.on_loss is OnLoss.CONTINUE:
            return []
        deadline_ms = now.boot_ms if lease.state is LeaseState.RELEASED else lease.deadline_ms
        return [PushLease(row.attempt, lease.token, deadline_ms, LeaseAction.of(lease.on_loss))]

    def beat_answered(self, answered: BeatAnswered, now: Now) -> list[Effect]:
        """Renewed leases get their deadline from the moment the beat was sent; a refusal is unsigned and stops nothing."""
        effects = self.tick(now)
        renewals = {(renewal.res, renewal.token): renewal for renewal in answered.leases}
        for row, lease in list(self._held()):
            renewal = renewals.get((lease.res, lease.token))
            if renewal is None:
                continue
            if renewal.ttl_ms is None:
                effects.append(Note("lease.refused", {"attempt": row.attempt.name, "reason": renewal.reason}))
            else:
                effects += self._renew(row, lease, answered.sent_ms, renewal.ttl_ms, now)
        return effects + self._hinted(answered)

    def _renew(self, row: AttemptRow, lease: Lease, sent_ms: int, ttl_ms: int, now: Now) -> list[Effect]:
        renewed = lease.renewed(lease.token, sent_ms, ttl_ms)
        if renewed.deadline_ms == lease.deadline_ms:
            return []
        row = replace(row, lease=renewed)
        return [*self._keep(row, now), *(self.push(row, now) if _has_shim(row) else [])]

    def _hinted(self, answered: BeatAnswered) -> list[Effect]:
        """A hint about an attempt that is settled: its settlement did not arrive, or not yet. Say it again."""
        rows = [self._engine.attempts.rows.get(Attempt.parse(hint.attempt)) for hint in answered.hints]
        settled = [row.settled_seq for row in rows if row is not None]
        numbers = tuple(number for number in settled if number is not None)
        return [ReportAgain(numbers)] if numbers else []

    def release(self, command: Verified[Command], args: LeaseRelease, now: Now) -> list[Effect]:
        """A signed release: the attempt is treated as at lease loss."""
        effects: list[Effect] = []
        state = "unknown"
        for row in self._engine.attempts.living_rows():
            lease = row.lease
            if lease is None or lease.res != args.res or lease.token > args.token:
                continue
            state = lease.on_loss.value
            row = replace(row, lease=lease.step(LeaseInput.RELEASE))
            effects += self._keep(row, now)
            if lease.on_loss is OnLoss.STOP:
                effects += self._engine.attempts.end(row, None, command.value.cmd_id, now)
            elif lease.on_loss is OnLoss.FREEZE and _has_shim(row):
                effects += self.push(row, now)
        return [*effects, *self._engine.receipt(command.digest, Outcome.DONE, now, result={"state": state})]

    def tick(self, now: Now) -> list[Effect]:
        """Leases whose deadline passed: the shim has acted by itself; here it is kept in mind, and told once."""
        effects: list[Effect] = []
        for row, lease in list(self._held()):
            if now.boot_ms >= lease.deadline_ms:
                effects += self._keep(replace(row, lease=lease.step(LeaseInput.DEADLINE)), now)
                effects.append(Note("lease.lost", {"attempt": row.attempt.name, "on_loss": lease.on_loss}))
        return effects

    def _keep(self, row: AttemptRow, now: Now) -> list[Effect]:
        self._engine.attempts.put(row)
        return [Persist((PutAttempt(row, now.wall_ms),))]


def _has_shim(row: AttemptRow) -> bool:
    """Whether there is somebody to tell: before that, the start is judged by the lease as it is then."""
    return row.state is not AttemptState.INTENT
