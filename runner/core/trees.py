"""Worktrees in the engine: which there are, which are being made or removed, and the receipts of both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, assert_never

from protocol.commands import Args, Command, WorktreeCreate, WorktreeRemove
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.ids import WorktreeId
from protocol.receipt import Outcome
from protocol.wire import JsonObject
from runner.core.admission import Refusal, removal_plan, worktree_plan
from runner.core.effects import CreateWorktree, Effect, Note, Persist, RemoveWorktree
from runner.core.inputs import Now, WorktreeCreated, WorktreeFailed, WorktreeRemoved
from runner.core.journaling import DropWorktree, PutWorktree, WorktreeRow

if TYPE_CHECKING:
    from runner.core.engine import Engine


class Trees:
    """Managed worktrees by id. A row without `made` belongs to a creation under way."""

    def __init__(self, engine: "Engine", rows: Sequence[WorktreeRow]) -> None:
        self._engine = engine
        self.rows: Final[dict[str, WorktreeRow]] = {row.worktree_id: row for row in rows}
        self._removing: dict[str, str] = {}
        """Worktree id by the digest of its removal."""

    def resources(self, args: WorktreeCreate | WorktreeRemove) -> dict[str, bool]:
        """What the command must hold alone: the worktree, and the repository it belongs to."""
        row = self.rows.get(args.worktree_id)
        repo = args.repo if isinstance(args, WorktreeCreate) else (row.repo if row else None)
        return {resource(args.worktree_id): True, **({} if repo is None else {f"repo:{repo}": True})}

    def ready(self, worktree_id: str) -> bool:
        """Whether it is there."""
        row = self.rows.get(worktree_id)
        return row is not None and row.made is not None

    def refusal(self, header: Command, args: Args) -> Refusal | None:
        """Why what is known of its worktree does not let a command be done; the owner marker is asked again at the edge."""
        if isinstance(args, WorktreeCreate | WorktreeRemove) and header.lease is not None:
            row = self.rows.get(args.worktree_id)
            if row is not None and header.lease.token < row.token:
                return Refusal(Reason.FENCED, "a later command about this worktree is known")
        return self._busy(args)

    def _busy(self, args: Args) -> Refusal | None:
        """A removal waits for no attempt: it may live for days, and every other command of the repository would wait too."""
        if isinstance(args, WorktreeRemove) and self._engine.attempts.uses(args.worktree_id):
            return Refusal(Reason.WORKTREE_BUSY, "an attempt lives in it")
        return None

    def begin(self, command: Verified[Command], args: WorktreeCreate | WorktreeRemove, now: Now) -> list[Effect]:
        """The claims are held."""
        distrusted = self._engine.inbox.distrusted(command.digest)
        if distrusted is not None:
            return [*self._engine.refuse(command.digest, distrusted, now), *self._engine.free(command.digest, now)]
        if isinstance(args, WorktreeCreate):
            taken = self.rows.get(args.worktree_id)
            # A row of this very command is its own, half made by an earlier daemon.
            if taken is not None and taken.digest != command.digest:
                refusal = Refusal(Reason.WORKTREE_EXISTS, "the id is taken")
                return [*self._engine.refuse(command.digest, refusal, now), *self._engine.free(command.digest, now)]
            plan = worktree_plan(command.value, args, self._engine.policy)
            row = WorktreeRow(
                worktree_id=WorktreeId(args.worktree_id),
                digest=command.digest,
                repo=args.repo,
                made=None,
                token=plan.token,
            )
            self.rows[args.worktree_id] = row
            return [Persist((PutWorktree(row),)), CreateWorktree(plan, command.digest)]
        self._removing[command.digest] = args.worktree_id
        return [RemoveWorktree(removal_plan(command.value, args), command.digest)]

    def heard(self, happened: WorktreeCreated | WorktreeRemoved | WorktreeFailed, now: Now) -> list[Effect]:
        """What became of the effect of a command."""
        match happened:
            case WorktreeCreated():
                return self._created(happened, now)
            case WorktreeRemoved():
                return self._removed(happened, now)
            case WorktreeFailed():
                return self._failed(happened, now)
            case _:
                assert_never(happened)

    def _created(self, created: WorktreeCreated, now: Now) -> list[Effect]:
        """The effect is there, and verified."""
        row = self._row_of(created.digest)
        made = replace(row, made=created.made)
        self.rows[row.worktree_id] = made
        result: JsonObject = {
            "worktree_id": row.worktree_id,
            "path": created.made.path,
            "head": created.made.head,
            "branch": created.made.branch,
        }
        return [
            Persist((PutWorktree(made),)),
            *self._engine.receipt(created.digest, Outcome.DONE, now, result=result),
            Note("worktree.created", {"worktree_id": row.worktree_id, "head": created.made.head}),
            *self._engine.free(created.digest, now),
        ]

    def _removed(self, removed: WorktreeRemoved, now: Now) -> list[Effect]:
        """It is gone."""
        worktree_id = self._removing.pop(removed.digest)
        self.rows.pop(worktree_id, None)
        result: JsonObject = {
            "worktree_id": worktree_id,
            "head": removed.gone.head,
            "branch": removed.gone.branch,
            "was_dirty": removed.gone.was_dirty,
        }
        return [
            Persist((DropWorktree(WorktreeId(worktree_id)),)),
            *self._engine.receipt(removed.digest, Outcome.DONE, now, result=result),
            Note("worktree.removed", {"worktree_id": worktree_id}),
            *self._engine.free(removed.digest, now),
        ]

    def _failed(self, failed: WorktreeFailed, now: Now) -> list[Effect]:
        """It was refused at the edge, or could not be done; nothing of it is left."""
        forget: list[Effect] = []
        if self._removing.pop(failed.digest, None) is None:
            row = self._row_of(failed.digest)
            del self.rows[row.worktree_id]
            forget = [Persist((DropWorktree(row.worktree_id),))]
        outcome = Outcome.REFUSED if failed.refused else Outcome.FAILED
        return [
            *forget,
            *self._engine.receipt(failed.digest, outcome, now, reason=failed.reason, detail=failed.detail),
            Note("worktree.failed", {"reason": failed.reason}),
            *self._engine.free(failed.digest, now),
        ]

    def _row_of(self, digest: str) -> WorktreeRow:
        return next(row for row in self.rows.values() if row.digest == digest)


def resource(worktree_id: str) -> str:
    """The name under which a worktree is claimed."""
    return f"worktree:{worktree_id}"
