"""Attempts in the engine: from the signed start to the one settlement, with their stops.

Theory of operation. `admit` journals INTENT; `begin` asks for a shim; `prepared` journals its identity together with the
`accepted` receipt and only then lets go; the shim's own record ends it. An attempt holds its claims until it is settled, so a
successor of the same execution waits for its end.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from protocol.commands import (
    Args,
    AttemptTarget,
    Command,
    ExecutionStop,
    Start,
    WorktreeCwd,
)
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.execution import AttemptInput, AttemptState, step
from protocol.ids import Attempt, CommandId, Digest, ExecutionId, FencingToken, WorktreeId
from protocol.messages import ReportItem
from protocol.receipt import Outcome
from protocol.wire import JsonObject
from runner.core.admission import Refusal, attempt_plan
from runner.core.effects import (
    AbandonAttempt,
    CollectAttempt,
    Effect,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    ReportAgain,
    StopAttempt,
)
from runner.core.inputs import AttemptExited, AttemptLost, AttemptNotPrepared, AttemptPrepared, Now, OwnerStop
from runner.core.journaling import SUPERSEDED_BY, AppendLeaf, AttemptRow, PutAttempt, PutSettlement, PutTombstone
from runner.core.plans import CommandRow, ExitRecord
from runner.core.trees import resource

if TYPE_CHECKING:
    from runner.core.engine import Engine

SETTLED_REMEMBERED_MAX: Final = 2000
"""Settled attempts kept for stops that come late; an older attempt's directory still refuses a second start."""


class Attempts:
    """Attempts by name: all that live, and the newest that are settled."""

    def __init__(self, engine: "Engine", rows: Sequence[AttemptRow]) -> None:
        self._engine = engine
        self.rows: Final[dict[Attempt, AttemptRow]] = {}
        self._live: Final[dict[Attempt, None]] = {}
        self._of_execution: Final[dict[str, dict[Attempt, None]]] = {}
        """In order: what is done about several of them is done in the same order in every process."""
        for row in rows:
            self.put(row)
        self.strangers: Final[dict[Attempt, None]] = {}
        """Attempts that live here and that the journal does not know (it was set back): kept, told, ended by a signed word."""
        self.again: Final[set[Attempt]] = set()
        """To be prepared anew: an earlier daemon left a directory, in which provably nothing ran."""

    # --- questions ----------------------------------------------------------------------------------------------

    @property
    def living(self) -> int:
        """Attempts that are not settled."""
        return len(self._live)

    def living_beside(self, args: Args) -> int:
        """Living attempts of other executions than the one that `args` start: those of one run one after the other."""
        execution_id = args.execution_id if isinstance(args, Start) else None
        living = sum(1 for attempt in self._live if attempt.execution_id != execution_id)
        # What could not be ended keeps its place: it still uses the machine.
        return living + len(self._engine.orphans.survivors)

    def living_names(self) -> tuple[Attempt, ...]:
        """Attempts that are not settled, by name."""
        return tuple(self._live)

    def uses(self, worktree_id: str) -> bool:
        """Whether a living attempt runs in the worktree."""
        return any(self.rows[attempt].worktree_id == worktree_id for attempt in self._live)

    def living_rows(self) -> list[AttemptRow]:
        """Attempts that are not settled, oldest first."""
        return [self.rows[attempt] for attempt in self._live]

    def resources(self, start: Start) -> dict[str, bool]:
        """What a start must hold: the execution alone, its worktree beside other attempts."""
        managed = {resource(start.cwd.worktree_id): False} if isinstance(start.cwd, WorktreeCwd) else {}
        return {f"execution:{start.execution_id}": True, **managed}

    # --- start --------------------------------------------------------------------------------------------------

    def admit(self, command: Verified[Command], start: Start, now: Now) -> list[Effect] | Refusal:
        """Journal INTENT, or say why not. An older living attempt of the execution is told to end first."""
        attempt = start.attempt
        known = self.rows.get(attempt)
        if known is not None and known.digest != command.digest:
            return Refusal(Reason.DUPLICATE_ATTEMPT, "the attempt is known already")
        others = [self.rows[other] for other in self._of_execution.get(attempt.execution_id, ())]
        if any(row.attempt.start_token > attempt.start_token for row in others):
            return Refusal(Reason.FENCED, "a later attempt of this execution is known")
        if attempt.name in self._engine.ledger.tombstones:
            return Refusal(Reason.CANCELLED_BEFORE_START, "it was stopped before it came")
        row = AttemptRow(
            attempt=attempt,
            digest=command.digest,
            cmd_id=CommandId(command.value.cmd_id),
            state=AttemptState.INTENT,
            worktree_id=WorktreeId(start.cwd.worktree_id) if isinstance(start.cwd, WorktreeCwd) else None,
            lease=self._engine.leases.granted(command.value, known, now),
        )
        self.put(row)
        ends = [
            effect
            for other in others
            if other.attempt != attempt and other.attempt in self._live
            for effect in self._fence(other, row, now)
        ]
        return [Persist((PutAttempt(row, now.wall_ms), *self._grant_leaf(row, now))), *ends]

    def _fence(self, row: AttemptRow, successor: AttemptRow, now: Now) -> list[Effect]:
        """An attempt whose successor is there: it is ended, and what it says from now on counts for itself only."""
        row = replace(row, fenced_by=row.fenced_by or successor.attempt.start_token)
        self.put(row)
        if row.state is AttemptState.INTENT:
            # Never let go; `begin` and `prepared` see the fence.
            return [Persist((PutAttempt(row, now.wall_ms),))]
        return self.end(row, None, f"{SUPERSEDED_BY}{successor.cmd_id}", now)

    def _grant_leaf(self, row: AttemptRow, now: Now) -> tuple[AppendLeaf, ...]:
        lease = row.lease
        if lease is None:
            return ()
        detail = f"token {lease.token}, ttl {lease.ttl_ms} ms, on_loss {lease.on_loss}"
        return (AppendLeaf("lease.granted", row.attempt.name, detail, self._engine.policy.digest, now.wall_ms),)

    def begin(self, command: Verified[Command], start: Start, now: Now) -> list[Effect]:
        """The claims are held: a shim is wanted."""
        attempt = start.attempt
        if attempt.name in self._engine.ledger.tombstones:
            return self.never(attempt, Refusal(Reason.CANCELLED_BEFORE_START, "it was stopped while it waited"), now)
        if self.rows[attempt].fenced_by is not None:
            return self.never(attempt, _FENCED, now)
        if isinstance(start.cwd, WorktreeCwd) and not self._engine.trees.ready(start.cwd.worktree_id):
            return self.never(attempt, Refusal(Reason.WORKTREE_UNKNOWN, "there is no such worktree"), now)
        refusal = self._engine.inbox.distrusted(command.digest) or self._engine.leases.refusal(self.rows[attempt], now)
        if refusal is not None:
            return self.never(attempt, refusal, now)
        plan = attempt_plan(command.value, start, self._engine.policy, self._engine.base_env)
        lease = self.rows[attempt].lease
        if lease is not None:
            # It may have been acquired anew while it waited.
            plan = replace(plan, token=lease.token)
        again = attempt in self.again
        self.again.discard(attempt)
        return [PrepareAttempt(plan, command.digest, again)]

    def prepared(self, prepared: AttemptPrepared, now: Now) -> list[Effect]:
        """A shim waits: its identity and the receipt become durable, then it is let go."""
        row = self.rows.get(prepared.attempt)
        if row is None or row.state is not AttemptState.INTENT:
            # It was ended while its shim was on the way.
            return [AbandonAttempt(prepared.attempt)]
        refusal = self._engine.inbox.distrusted(row.digest) or self._engine.leases.refusal(row, now)
        if row.attempt.name in self._engine.ledger.tombstones:
            refusal = Refusal(Reason.CANCELLED_BEFORE_START, "it was stopped before it was let go")
        if row.fenced_by is not None:
            refusal = _FENCED
        if refusal is not None:
            return [AbandonAttempt(row.attempt), *self.never(row.attempt, refusal, now)]
        effects = self.accept(replace(row, shim=prepared.shim), now)
        effects += self._engine.leases.push(row, now)
        effects.append(ReleaseAttempt(row.attempt))
        self._move(self.rows[row.attempt], AttemptInput.RELEASE)
        return effects

    def accept(self, row: AttemptRow, now: Now) -> list[Effect]:
        """PREPARED, with the one receipt of its command, unless an earlier daemon gave it."""
        row = self._move(row, AttemptInput.PREPARE)
        effects: list[Effect] = [Persist((PutAttempt(row, now.wall_ms),))]
        if self._engine.ledger.commands[row.digest].receipt_seq is None:
            effects += self._engine.receipt(row.digest, Outcome.ACCEPTED, now, result=_named(row.attempt))
        return effects

    def not_prepared(self, failed: AttemptNotPrepared, now: Now) -> list[Effect]:
        """Nothing ran, and nothing will."""
        row = self.rows.get(failed.attempt)
        if row is None or row.state is not AttemptState.INTENT:
            return []
        refusal = Refusal(failed.reason, failed.detail)
        return self.never(failed.attempt, refusal, now, Outcome.REFUSED if failed.refused else Outcome.FAILED)

    def never(self, attempt: Attempt, refusal: Refusal, now: Now, outcome: Outcome = Outcome.REFUSED) -> list[Effect]:
        """End an attempt that did not begin: by its receipt, or, when it was accepted before a crash, by a settlement."""
        row = self.rows[attempt]
        command = self._engine.ledger.commands[row.digest]
        left: list[Effect] = [AbandonAttempt(attempt)] if attempt in self.again else []
        self.again.discard(attempt)
        if command.receipt_seq is not None:
            item = self._engine.statements.never_started(row, command, refusal.reason, refusal.detail, now)
            return [*self._settle(row, item, now), *left]
        self.put(replace(row, state=AttemptState.SETTLED))
        return [
            Persist((PutAttempt(self.rows[attempt], now.wall_ms),)),
            *self._engine.receipt(row.digest, outcome, now, reason=refusal.reason, detail=refusal.detail),
            *self._engine.free(row.digest, now),
            *left,
        ]

    # --- end ----------------------------------------------------------------------------------------------------

    def exited(self, exited: AttemptExited, now: Now) -> list[Effect]:
        """The shim's record: the one settlement, unless there is one."""
        row = self.rows.get(exited.attempt)
        self.strangers.pop(exited.attempt, None)
        if row is not None and row.state is AttemptState.INTENT:
            return self._died_behind(row, now)
        if row is None or step(row.state, AttemptInput.EXIT) is None:
            # Settled before, or abandoned behind the barrier: a late word settles nothing.
            return [CollectAttempt(exited.attempt)]
        item = self._engine.statements.settlement(row, self._command(row), exited.exit, now)
        told = self._engine.orphans.unkillable(row.attempt, exited.exit, now)
        return [*self._settle(row, item, now, exited.exit), *told]

    def lost(self, lost: AttemptLost, now: Now) -> list[Effect]:
        """No shim, no record: lost, once."""
        row = self.rows.get(lost.attempt)
        self.strangers.pop(lost.attempt, None)
        if row is not None and row.state is AttemptState.INTENT:
            return self._died_behind(row, now)
        if row is None or step(row.state, AttemptInput.LOSE) is None:
            return []
        item = self._engine.statements.lost(row, self._command(row), lost.reason, lost.evidence, now)
        if lost.evidence is not None and lost.evidence.remaining:
            self._engine.orphans.survivors[row.attempt] = lost.evidence.remaining
        return [
            Note("attempt.lost", {"attempt": row.attempt.name, "reason": lost.reason}),
            *self._settle(row, item, now),
        ]

    def _died_behind(self, row: AttemptRow, now: Now) -> list[Effect]:
        """Its shim went before it was let go, and before we heard that it was there: nothing ran."""
        return self.never(
            row.attempt, Refusal(Reason.SHIM_LOST, "its shim went before it was let go"), now, Outcome.FAILED
        )

    def _command(self, row: AttemptRow) -> CommandRow:
        return self._engine.ledger.commands[row.digest]

    def _settle(self, row: AttemptRow, item: ReportItem, now: Now, record: ExitRecord | None = None) -> list[Effect]:
        assert row.state is not AttemptState.SETTLED, "an attempt is settled once"
        self._engine.orphans.ended(row.attempt, record)
        self.put(replace(row, state=AttemptState.SETTLED, settled_seq=item.out_seq))
        return [
            Persist((PutSettlement(row.attempt, item, now.wall_ms),)),
            Offer((item,)),
            CollectAttempt(row.attempt),
            Note("attempt.settled", {"attempt": row.attempt.name}),
            *self._engine.signals.ended(row.attempt, now),
            *self._engine.viewers.ended(row.attempt, now),
            *self._engine.free(row.digest, now),
        ]

    # --- stop ---------------------------------------------------------------------------------------------------

    def stop(self, command: Verified[Command], args: ExecutionStop, now: Now) -> list[Effect]:
        """A signed stop: whatever state its target is in, the answer is `done`, and says what it met."""
        row = self._target(args)
        by = command.value.cmd_id
        if row is None or row.state is AttemptState.INTENT:
            return [*self._stop_stranger(args, by), *self._bury(command, args, row, now)]
        effects: list[Effect] = []
        if row.state is AttemptState.SETTLED:
            state = "settled"
            effects += [] if row.settled_seq is None else [ReportAgain((row.settled_seq,))]
        else:
            state = "stopping"
            effects += self.end(row, args.grace_ms, by, now)
        result: JsonObject = {"state": state, **_named(row.attempt)}
        return [*effects, *self._engine.receipt(command.digest, Outcome.DONE, now, result=result)]

    def _stop_stranger(self, args: ExecutionStop, by: str) -> list[Effect]:
        """It runs and the journal does not know it: the word is signed, so it is ended; there is nothing to settle it with."""
        attempt = _attempt(args.target) if isinstance(args.target, AttemptTarget) else None
        if attempt not in self.strangers:
            return []
        grace_ms = None if args.grace_ms is None else min(args.grace_ms, self._engine.policy.grace_ms_max)
        return [StopAttempt(attempt, grace_ms, by), Note("attempt.stopped", {"attempt": attempt.name, "by": by})]

    def _bury(self, command: Verified[Command], args: ExecutionStop, row: AttemptRow | None, now: Now) -> list[Effect]:
        """The start has not come, or waits for its turn or its shim: a tombstone makes sure it never runs."""
        target = args.target
        name = _attempt(target).name if isinstance(target, AttemptTarget) else target.cmd_id
        name = name if row is None else row.attempt.name
        cmd_id = CommandId(command.value.cmd_id)
        expires_ms = self._engine.ledger.bury(name, cmd_id, self._engine.plane_ms(now))
        if expires_ms is None:
            return self._engine.refuse(command.digest, Refusal(Reason.CAPACITY, "too many early stops"), now)
        result: JsonObject = {"state": "tombstone" if row is None else "cancelled"}
        return [
            Persist((PutTombstone(name, cmd_id, expires_ms),)),
            *self._engine.receipt(command.digest, Outcome.DONE, now, result=result),
        ]

    def owner_stop(self, wanted: OwnerStop, now: Now) -> list[Effect]:
        """The owner's own word needs no signature; it leaves a leaf."""
        effects: list[Effect] = []
        for row in self.living_rows():
            if row.attempt.execution_id != wanted.execution_id:
                continue
            leaf = AppendLeaf("owner.stop", row.attempt.name, wanted.by, self._engine.policy.digest, now.wall_ms)
            effects.append(Persist((leaf,)))
            if row.state is AttemptState.INTENT:
                expires_ms = self._engine.ledger.bury(row.attempt.name, row.cmd_id, self._engine.plane_ms(now))
                if expires_ms is not None:
                    effects.append(Persist((PutTombstone(row.attempt.name, row.cmd_id, expires_ms),)))
            else:
                effects += self.end(row, wanted.grace_ms, wanted.by, now)
        return effects

    def forget_intent(self, digest: Digest, now: Now) -> list[Effect]:
        """Its command was refused after a restart: nothing of the intended attempt is left."""
        row = next((row for row in self.living_rows() if row.digest == digest), None)
        if row is None:
            return []
        self.again.discard(row.attempt)
        self.put(replace(row, state=AttemptState.SETTLED))
        return [Persist((PutAttempt(self.rows[row.attempt], now.wall_ms),)), AbandonAttempt(row.attempt)]

    def end(self, row: AttemptRow, grace_ms: int | None, by: str, now: Now) -> list[Effect]:
        """Tell the shim, and remember it: a daemon that dies in between says it again."""
        if row.state is AttemptState.INTENT:
            expires_ms = self._engine.ledger.bury(row.attempt.name, row.cmd_id, self._engine.plane_ms(now))
            return [] if expires_ms is None else [Persist((PutTombstone(row.attempt.name, row.cmd_id, expires_ms),))]
        bounded = None if grace_ms is None else min(grace_ms, self._engine.policy.grace_ms_max)
        first = row.stop_by is None
        row = replace(row, stop_by=row.stop_by or by, stop_grace_ms=bounded if first else row.stop_grace_ms)
        row = self._move(row, AttemptInput.STOP)
        self._engine.orphans.expect_stop(row.attempt, bounded, now)
        return [
            Persist((PutAttempt(row, now.wall_ms),)),
            StopAttempt(row.attempt, bounded, by),
            Note("attempt.stopped", {"attempt": row.attempt.name, "by": by}),
        ]

    def _target(self, args: ExecutionStop) -> AttemptRow | None:
        if isinstance(args.target, AttemptTarget):
            return self.rows.get(_attempt(args.target))
        digest = self._engine.ledger.first.get(CommandId(args.target.cmd_id))
        return next((row for row in self.rows.values() if row.digest == digest), None)

    # --- rows ---------------------------------------------------------------------------------------------------

    def _move(self, row: AttemptRow, happened: AttemptInput) -> AttemptRow:
        after = step(row.state, happened)
        assert after is not None, f"{happened} means nothing to an attempt that is {row.state}"
        moved = replace(row, state=after)
        self.put(moved)
        return moved

    def put(self, row: AttemptRow) -> None:
        """The attempt as it is now, in memory; the oldest settled one is forgotten when there are too many."""
        self.rows[row.attempt] = row
        self._of_execution.setdefault(row.attempt.execution_id, {})[row.attempt] = None
        if row.state is not AttemptState.SETTLED:
            self._live[row.attempt] = None
            return
        self._live.pop(row.attempt, None)
        if len(self.rows) - len(self._live) > SETTLED_REMEMBERED_MAX:
            self._forget(next(old for old in self.rows if old not in self._live))

    def _forget(self, attempt: Attempt) -> None:
        del self.rows[attempt]
        of_execution = self._of_execution[attempt.execution_id]
        of_execution.pop(attempt, None)
        if not of_execution:
            del self._of_execution[attempt.execution_id]


_FENCED: Final = Refusal(Reason.FENCED, "a later attempt of this execution took its place")


def _attempt(target: AttemptTarget) -> Attempt:
    return Attempt(ExecutionId(target.execution_id), FencingToken(target.start_token))


def _named(attempt: Attempt) -> JsonObject:
    return {"execution_id": attempt.execution_id, "start_token": attempt.start_token}
