"""What the control plane concludes from what runners say: reconnections, receipts, settlements. Pure.

Theory of operation. A user's request is an intent under one `cmd_id`. A receipt answers an intent, a settlement ends an attempt;
both are kept as evidence whatever they say, and change a row only when it still waits for them.

Why nothing runs twice after a fork or a restored backup. An intent keeps its `cmd_id`, an execution its attempt, whenever they are
signed again. A runner that has consumed the first form refuses the second by the `cmd_id` (IDEMPOTENCY_MISMATCH) or by the attempt
(DUPLICATE_ATTEMPT), whatever the numbers say; both refusals mean "the first form counts", so they change no row here: the
first form's own receipt or settlement does. A runner that has never seen it runs it, once.
The lease token is not raised for it either: it is the same attempt, and a living one must go on renewing the token it has.

Why an attempt that we do not know is believed. Only we sign starts, so what a runner that has had an attempt of the execution tells
of another one is something that we forgot: an earlier attempt, or, from the runner that has the current one, its successor.

Rule 1: an attempt settles once. Rule 2: what is said of an earlier attempt is kept with it and settles nothing else.
Rule 3: a settlement outranks every guess of ours, also "cancelled".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from controlplane.rows import (
    STARTS,
    STOPS,
    ExecutionRow,
    ExecutionState,
    IntentRow,
    IntentState,
    RunnerRow,
    WorktreeRow,
    WorktreeState,
)
from protocol.commands import Kind
from protocol.errors import Reason
from protocol.identity import HelloClaims
from protocol.ids import Attempt, Digest, ExecutionId, FencingToken, is_id
from protocol.receipt import INFRA_STATUS, Outcome, Receipt, Settlement, Verdict
from protocol.replay import Adopt, Mark, reconcile

STOP_MET_NOTHING = "tombstone"
"""What the receipt of a stop says when the runner knows no such attempt."""
_FIRST_FORM_COUNTS = frozenset({Reason.IDEMPOTENCY_MISMATCH, Reason.DUPLICATE_ATTEMPT})


# --- a runner comes back -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meeting:
    """How a session begins: under `inc`; `reborn` when the runner needs a new certificate for it."""

    inc: int
    told: Mark
    """The runner's own mark, or zero: what the welcome goes on from."""
    ctl: Mark
    """Our mark: behind it the next number is given."""
    out_hw: int
    reborn: bool
    requeue: bool
    """What was sent and has no receipt becomes an intent again: its numbers died with the old incarnation."""


def meet(runner: RunnerRow, claims: HelloClaims, digest_there: Digest | None, *, unanswered: bool) -> Meeting:
    """Judge a verified hello.

    Args:
        runner: as we know it.
        claims: its hello.
        digest_there: what we have under the hello's number, in our incarnation.
        unanswered: whether something we numbered has no receipt yet.
    """
    # A runner whose outbox is shorter than we remember was set back and uses numbers again: it is to report all it keeps.
    out_hw = runner.out_hw if claims.out_head >= runner.out_hw else 0
    theirs = Mark(claims.ctl.hw, Digest(claims.ctl.head))
    if claims.inc > runner.inc:
        # We come back from a backup older than a fork. Only our own certificate can have raised the incarnation.
        return Meeting(claims.inc, theirs, theirs, out_hw, reborn=False, requeue=True)
    if claims.inc == runner.inc:
        known = {} if digest_there is None else {theirs.hw: digest_there}
        verdict = reconcile(
            known,
            runner.ctl.hw,
            runner.acked_hw,
            theirs,
            unanswered=unanswered,
            out_hw=runner.out_hw,
            out_head=claims.out_head,
        )
        if isinstance(verdict, Adopt):
            ours = theirs if verdict.lost else runner.ctl
            return Meeting(runner.inc, theirs, ours, out_hw, reborn=False, requeue=False)
    # A true fork, or a runner that never got (or has lost) the certificate of our incarnation.
    return Meeting(runner.inc + 1, Mark(), Mark(), out_hw, reborn=True, requeue=True)


# --- what it says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Rows as they are after a statement; what is None stays as it was."""

    intent: IntentRow | None = None
    execution: ExecutionRow | None = None
    """An attempt of an execution, the current one or an earlier one."""
    settled: ExecutionRow | None = None
    """The attempt with its settlement, which counts if it has none yet."""
    unheard: ExecutionRow | None = None
    """An attempt we did not know: of a new execution, the successor of the attempt that we have, or an earlier one."""
    worktree: WorktreeRow | None = None
    conflict: str = ""
    """Set when the statement contradicts an earlier one: an event for people."""


Subject = ExecutionRow | WorktreeRow | None
Attempts = Sequence[ExecutionRow]


def receipted(intent: IntentRow | None, subject: Subject, receipt: Receipt, text: str, known: Attempts = ()) -> Change:
    """What a verified receipt changes.

    Args:
        intent: what it answers, None when that was forgotten.
        subject: what it is about: the attempt or worktree, None when that is not known.
        receipt: the receipt.
        text: its payload.
        known: every attempt that we know of the execution that it names, the current one last.
    """
    if intent is None:
        return Change(unheard=_unheard(receipt, text, known) if subject is None else None)
    if intent.state is IntentState.RECEIPTED:
        return Change()
    if receipt.outcome is Outcome.REFUSED and receipt.reason in _FIRST_FORM_COUNTS:
        return Change()
    answered = replace(intent, state=IntentState.RECEIPTED)
    match subject:
        case ExecutionRow() if intent.kind in STARTS:
            return Change(intent=answered, execution=_start_answered(subject, receipt, text))
        case ExecutionRow() if intent.kind in STOPS:
            return Change(intent=answered, execution=_stop_answered(subject, receipt))
        case ExecutionRow() if intent.kind == Kind.LEASE_ACQUIRE:
            return Change(intent=answered, execution=_acquire_answered(subject, receipt))
        case WorktreeRow() if intent.kind == Kind.WORKTREE_CREATE:
            return Change(intent=answered, worktree=_create_answered(subject, receipt))
        case WorktreeRow() if intent.kind == Kind.WORKTREE_REMOVE:
            return Change(intent=answered, worktree=_remove_answered(subject, receipt))
        case _:
            return Change(intent=answered)


def _start_answered(row: ExecutionRow, receipt: Receipt, text: str) -> ExecutionRow:
    row = replace(row, receipt=text)
    if row.settlement is not None:
        return row
    if receipt.outcome in (Outcome.ACCEPTED, Outcome.DONE):
        return replace(row, state=ExecutionState.RUNNING, exit_status=None, reason=None, detail="")
    return replace(
        row,
        state=ExecutionState.REFUSED,
        exit_status=INFRA_STATUS,
        reason=receipt.reason,
        detail=receipt.detail,
    )


def _stop_answered(row: ExecutionRow, receipt: Receipt) -> ExecutionRow | None:
    """The end of an attempt that was accepted and that its runner does not know any more: nobody else will tell it.

    A settlement is numbered before such a receipt, so it is here if there is one; should it come all the same, it outranks this.
    """
    unknown = receipt.outcome is Outcome.DONE and receipt.result.get("state") == STOP_MET_NOTHING
    if row.state is not ExecutionState.RUNNING or not unknown:
        return None
    return replace(
        row,
        state=ExecutionState.CANCELLED,
        exit_status=INFRA_STATUS,
        reason=Reason.UNKNOWN_TARGET,
        detail="the runner accepted it and does not know it any more",
        verdict=Verdict.LOST,
    )


def _acquire_answered(row: ExecutionRow, receipt: Receipt) -> ExecutionRow:
    refused = receipt.outcome in (Outcome.REFUSED, Outcome.FAILED)
    return replace(row, lease_refused=receipt.reason if refused else None)


def _create_answered(row: WorktreeRow, receipt: Receipt) -> WorktreeRow:
    if receipt.outcome is Outcome.DONE:
        told = {name: _text(receipt.result.get(name)) for name in ("path", "head", "branch")}
        return replace(
            row, state=WorktreeState.READY, path=told["path"], head=told["head"], branch=told["branch"], reason=None
        )
    state = WorktreeState.FAILED if receipt.outcome is Outcome.FAILED else WorktreeState.REFUSED
    after_ms = retry_after_ms(receipt)
    return replace(row, state=state, reason=receipt.reason, detail=receipt.detail, retry_after_ms=after_ms)


def _remove_answered(row: WorktreeRow, receipt: Receipt) -> WorktreeRow:
    if receipt.outcome is Outcome.DONE:
        return replace(row, state=WorktreeState.REMOVED, reason=None, detail="")
    # It is still there: whoever asked reads why, and may ask again.
    after_ms = retry_after_ms(receipt)
    state = WorktreeState.READY
    return replace(row, state=state, reason=receipt.reason, detail=receipt.detail, retry_after_ms=after_ms)


def retry_after_ms(receipt: Receipt) -> int | None:
    """When a refusal that will not last is worth asking again; None for every other receipt."""
    return _count(receipt.result.get("retry_after_ms")) if receipt.outcome is Outcome.REFUSED else None


def _unheard(receipt: Receipt, text: str, known: Attempts) -> ExecutionRow | None:
    """A start we do not remember (restored from a backup): what the runner's accepted receipt says of it."""
    execution_id, token = receipt.result.get("execution_id"), receipt.result.get("start_token")
    if receipt.kind not in STARTS or receipt.outcome is not Outcome.ACCEPTED:
        return None
    if not isinstance(execution_id, str) or not is_id(execution_id) or not isinstance(token, int) or token < 1:
        return None
    attempt = Attempt(ExecutionId(execution_id), FencingToken(token))
    row = _forgotten(attempt, receipt.runner, receipt.cmd_id, receipt.at_ms, known)
    return None if row is None else replace(row, receipt=text, detail="known from its receipt only")


def _forgotten(attempt: Attempt, runner_id: str, cmd_id: str, at_ms: int, known: Attempts) -> ExecutionRow | None:
    """The row of an attempt that a runner tells of and we do not know; None when it cannot be one of ours."""
    row = ExecutionRow(
        id=attempt.execution_id,
        runner_id=runner_id,
        start_token=attempt.start_token,
        state=ExecutionState.RUNNING,
        cmd_id=cmd_id,
        created_ms=at_ms,
    )
    if not known:
        return row
    current = known[-1]
    # The current one's place is given up to its own runner alone: nobody else may end what is another's.
    believed = [current] if attempt.start_token > current.start_token else known
    if runner_id not in {other.runner_id for other in believed}:
        return None
    return replace(
        row, created_ms=current.created_ms, argv=current.argv, cwd=current.cwd, worktree_id=current.worktree_id
    )


def settled(
    intent: IntentRow | None,
    row: ExecutionRow | None,
    settlement: Settlement,
    digest: str,
    text: str,
    known: Attempts = (),
) -> Change:
    """What a verified settlement changes; a second, different one changes nothing and is told.

    Args:
        intent: the start that it names, None when that was forgotten.
        row: the attempt that it ends, None when that is not known.
        settlement: the settlement.
        digest: of its payload.
        text: its payload.
        known: every attempt that we know of its execution, the current one last.
    """
    unheard = None
    if row is None:
        told = _forgotten(settlement.attempt, settlement.runner, settlement.cmd_id, settlement.at_ms, known)
        row = unheard = None if told is None else replace(told, detail="known from its settlement only")
    if row is None or row.runner_id != settlement.runner:
        return Change(conflict="a settlement of another attempt")
    if row.settlement is not None:
        return Change(conflict="" if row.settlement_digest == digest else "a second settlement of an attempt")
    mine = intent is not None and intent.subject == row.id and intent.runner_id == row.runner_id
    return Change(
        # An attempt that ended was started: the start must not be sent again, also if its receipt is still to come.
        intent=replace(intent, state=IntentState.RECEIPTED) if mine and intent is not None else None,
        unheard=unheard,
        settled=replace(
            row,
            state=ExecutionState.SETTLED,
            settlement=text,
            settlement_digest=digest,
            exit_status=settlement.exit_status,
            reason=settlement.cause.reason,
            detail=settlement.cause.detail,
            verdict=settlement.verdict,
        ),
    )


def stop_was_overtaken(row: ExecutionRow, start: IntentRow | None) -> bool:
    """Whether a stop may simply call back the start: it was never signed, so no runner can know it."""
    waits = start is not None and start.state in (IntentState.QUEUED, IntentState.HELD) and start.signed_times == 0
    return waits and not row.state.final


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
