"""Leases in the engine: asked for again with every beat, lost at their deadline, given up on a signed word.

Theory of operation. The shim enforces the deadline it was told, also while no daemon lives. Here a lease is what the beats ask
for and what a start is judged by. A deadline that moved is journaled, since an adopted shim is told the journal's.

Rule 1: an unsigned word moves a deadline forward or does nothing. Rule 2: what is past its deadline is lost, whatever is said later.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from protocol.commands import Command, LeaseAcquire, LeaseRelease, OnLoss
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.lease import Lease, LeaseInput, LeaseState, granted
from protocol.limits import WAKE_WAIT_MS
from protocol.messages import HeldLease
from protocol.receipt import Outcome
from protocol.session import BeatAnswered
from runner.core.admission import Refusal
from runner.core.effects import Effect, Note, Persist, PushLease, ReportAgain
from runner.core.inputs import Now
from runner.core.journaling import AppendLeaf, AttemptRow, PutAttempt
from runner.core.plans import LeaseAction

if TYPE_CHECKING:
    from runner.core.engine import Engine

GRACE_OF_TTL: Final = 3
"""At the loss of a lease a stop gives at most this part of the ttl, whatever the command allows elsewhere."""
LOST_END_MS: Final = 15 * 1000
"""A shim has stopped its attempt before the lease's deadline; one that has not by so long after it is hung."""


class Leases:
    """The leases of living attempts; each is a part of its attempt's row."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    # --- questions ----------------------------------------------------------------------------------------------

    def held(self) -> tuple[HeldLease, ...]:
        """Leases to be renewed with the next beat."""
        return tuple(HeldLease(res=lease.res, token=lease.token) for _, lease in self._held())

    def lost(self) -> tuple[HeldLease, ...]:
        """Leases that are over while their attempts live: the plane may grant them anew, under a higher token."""
        rows = self._engine.attempts.living_rows()
        leases = [row.lease for row in rows if row.lease is not None]
        return tuple(HeldLease(res=each.res, token=each.token) for each in leases if each.state is LeaseState.LOST)

    def next_moment_ms(self, *, renewing: bool) -> int | None:
        """When the next held lease runs out (BOOTTIME), or is to be renewed, if that is possible now."""
        rhythm = self._engine.rhythm
        moments: list[int] = []
        for _, lease in self._held():
            moments.append(max(lease.deadline_ms, rhythm.waking_until_ms))
            if renewing:
                moments.append(max(lease.renew_at_ms, rhythm.renew_after_ms))
        return min(moments, default=None)

    def due(self, now: Now) -> bool:
        """Whether a lease is to be renewed now."""
        return any(lease.renew_at_ms <= now.boot_ms for _, lease in self._held())

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
        """The lease that came with a start, counted from when it was signed.

        One that an earlier daemon knew stays what it was: a restart never extends it. Of another boot's clock nothing is known,
        so such a lease is over.
        """
        if command.lease is None:
            return None
        boot_id = self._engine.statements.boot_id
        if known is None or known.lease is None:
            return granted(command.lease, now.boot_ms, self._engine.rhythm.plane_latest_ms(now) - command.iat, boot_id)
        if known.lease.boot_id in (boot_id, ""):
            return known.lease
        return replace(known.lease, deadline_ms=now.boot_ms, boot_id=boot_id)

    def push(self, row: AttemptRow, now: Now, *, lifted: bool = False) -> list[Effect]:
        """Tell the shim of an attempt what it must enforce; `lifted`: also that it must enforce nothing any more."""
        lease = row.lease
        if lease is None or (lease.on_loss is OnLoss.CONTINUE and not lifted):
            return []
        held = lease.state is LeaseState.HELD
        deadline_ms = now.boot_ms if lease.state is LeaseState.RELEASED else lease.deadline_ms
        action = LeaseAction.of(lease.on_loss)
        grace_ms = lease.ttl_ms // GRACE_OF_TTL
        return [PushLease(row.attempt, lease.token, deadline_ms, action, grace_ms, lease if held else None)]

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
        return effects

    def _renew(self, row: AttemptRow, lease: Lease, sent_ms: int, ttl_ms: int, now: Now) -> list[Effect]:
        renewed = lease.renewed(lease.token, sent_ms, ttl_ms)
        if renewed.deadline_ms == lease.deadline_ms:
            return []
        row = replace(row, lease=renewed)
        return [*self._keep(row, now), *(self.push(row, now) if _has_shim(row) else [])]

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

    def acquire(self, command: Verified[Command], args: LeaseAcquire, now: Now) -> list[Effect]:
        """A signed grant under a higher token: what was frozen is thawed, what was lost is held again."""
        row, grant = self._engine.attempts.rows.get(args.attempt), command.value.lease
        assert grant is not None, "admission wants a lease"
        if row is None:
            return self._engine.refuse(command.digest, Refusal(Reason.UNKNOWN_TARGET, "no such attempt"), now)
        if row.state is AttemptState.SETTLED:
            again: list[Effect] = [] if row.settled_seq is None else [ReportAgain((row.settled_seq,))]
            return [
                *again,
                *self._engine.receipt(command.digest, Outcome.DONE, now, result={"state": "settled"}),
            ]
        boot_id = self._engine.statements.boot_id
        fresh = granted(grant, now.boot_ms, self._engine.rhythm.plane_latest_ms(now) - command.value.iat, boot_id)
        before = row.lease
        if before is not None and grant.token <= before.token:
            return self._engine.refuse(command.digest, Refusal(Reason.FENCED, "its token is not higher"), now)
        lease = fresh
        if before is not None:
            lease = replace(before, boot_id=boot_id).acquired(
                fresh.token, fresh.ttl_ms, fresh.on_loss, fresh.deadline_ms
            )
        row = replace(row, lease=lease)
        detail = f"token {lease.token}, ttl {lease.ttl_ms} ms, on_loss {lease.on_loss}"
        if row.stop_by is None:
            self._engine.orphans.forgive(row.attempt)
        return [
            *self._keep(row, now),
            Persist((self._leaf("lease.acquired", row, detail, now),)),
            *(self.push(row, now, lifted=True) if _has_shim(row) else []),
            Note("lease.acquired", {"attempt": row.attempt.name, "token": lease.token}),
            *self._engine.receipt(command.digest, Outcome.DONE, now, result={"state": row.state.value}),
        ]

    def tick(self, now: Now) -> list[Effect]:
        """Leases whose deadline passed: the shim has acted by itself; here it is kept in mind, and told once."""
        if self._engine.rhythm.waking(now):
            # After a sleep leases are renewed first; the shim holds what cannot be taken back for as long.
            return []
        effects: list[Effect] = []
        for row, lease in list(self._held()):
            if now.boot_ms < lease.deadline_ms:
                continue
            row = replace(row, lease=lease.step(LeaseInput.DEADLINE))
            effects += self._keep(row, now)
            effects.append(Persist((self._leaf("lease.lost", row, f"on_loss {lease.on_loss}", now),)))
            effects.append(Note("lease.lost", {"attempt": row.attempt.name, "on_loss": lease.on_loss}))
            self.expect_loss(row, now)
        return effects

    def expect_loss(self, row: AttemptRow, now: Now) -> None:
        """Where the loss of its lease has stopped an attempt, its shim must tell of the end, or it is hung."""
        lost = row.lease is not None and row.lease.state is LeaseState.LOST and row.lease.on_loss is OnLoss.STOP
        if lost and _has_shim(row):
            patience_ms = WAKE_WAIT_MS if now.boot_ms < self._engine.rhythm.unsure_until_ms else 0
            self._engine.orphans.expect_end(row.attempt, LOST_END_MS + patience_ms, now)

    def _leaf(self, kind: str, row: AttemptRow, detail: str, now: Now) -> AppendLeaf:
        return AppendLeaf(kind, row.attempt.name, detail, self._engine.policy.digest, now.wall_ms)

    def _keep(self, row: AttemptRow, now: Now) -> list[Effect]:
        self._engine.attempts.put(row)
        return [Persist((PutAttempt(row, now.wall_ms),))]


def _has_shim(row: AttemptRow) -> bool:
    """Whether there is somebody to tell: before that, the start is judged by the lease as it is then."""
    return row.state is not AttemptState.INTENT
