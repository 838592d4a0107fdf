"""The transactions about attempts: another one of an execution, leases granted anew, stops that nobody asked for by name.

Theory of operation. An execution has one current attempt; whoever runs it again gives it the next, under a higher token. On the same
runner the start goes at once: the runner ends the predecessor before it begins the successor. Towards another runner it is held
until the lease of every attempt that may live elsewhere is over, or its end is signed.

Rule 1: what a superseded attempt still tells is kept with it. Rule 2: one lease of an attempt has one grant under way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from controlplane import ptytables, store, tables, told
from controlplane.errors import Fault, RequestRefused
from controlplane.leasing import Regrant, lease_resource, token_floor
from controlplane.requests import fitting, start_again
from controlplane.rows import STOPS, ExecutionRow, ExecutionState, IntentRow, IntentState, RunnerRow
from controlplane.tables import Db
from protocol.commands import AttemptTarget, ExecutionStop, Kind, LeaseAcquire, LeaseGrant, OnLoss
from protocol.ids import Attempt, ExecutionId, FencingToken

RECONCILE = "reconcile"
"""Who asked for a stop that no user asked for."""
_SKIPPED = 1000
"""Tokens passed over where one has a log already: a runner that names attempts to come does not hold up the next one."""
Make = Callable[[str, Kind, str, bytes], IntentRow]
"""A new intent of a runner, of a kind, about a subject, with these arguments."""


# --- another attempt ---------------------------------------------------------------------------------------------


def rerun(
    db: Db, execution_id: str, runner: RunnerRow, secrets: Mapping[str, str], make: Make
) -> tuple[ExecutionRow, tuple[str, ...]]:
    """Take another attempt of an execution on `runner`.

    Returns:
        The execution as it is now, and the other runners that have a stop to get.

    Raises:
        RequestRefused: UNKNOWN_EXECUTION, NOT_REPEATABLE, NOT_MOVABLE, SECRETS_WANTED, TOO_LARGE or TOO_MANY_INTENTS.
    """
    row = tables.execution(db, execution_id)
    if row is None:
        raise RequestRefused(Fault.UNKNOWN_EXECUTION)
    first = tables.intent(db, row.cmd_id)
    if first is None:
        raise RequestRefused(Fault.NOT_REPEATABLE, "what was asked for is known to its runner only")
    if row.worktree_id is not None and row.runner_id != runner.id:
        raise RequestRefused(Fault.NOT_MOVABLE, "it runs in a worktree of its runner")
    intent = make(runner.id, Kind(first.kind), row.id, b"")
    lease = _next_attempt(db, row, on_loss_of(first), intent.created_ms)
    attempt = Attempt(ExecutionId(row.id), FencingToken(lease.token))
    start = start_again(first.kind, first.args, secrets, runner.id, runner.seal_x, attempt)
    intent = replace(intent, args=fitting(start.dump()), lease=lease.dump())
    if first.state in (IntentState.QUEUED, IntentState.HELD):
        store.call_back_start(db, first)
    elsewhere = [other for other in tables.attempts(db, row.id) if other.runner_id != runner.id]
    living = [other for other in elsewhere if _may_live(db, other)]
    for other in living:
        stop(db, other.attempt, other.runner_id, make)
    if living:
        names = " ".join(other.attempt.name for other in living)
        intent = replace(intent, state=IntentState.HELD, waits_for=names)
    store.queue_intent(db, intent)
    after = ExecutionRow(
        id=row.id,
        runner_id=runner.id,
        start_token=attempt.start_token,
        state=ExecutionState.QUEUED,
        argv=row.argv,
        cwd=row.cwd,
        worktree_id=row.worktree_id,
        cmd_id=intent.cmd_id,
        created_ms=row.created_ms,
    )
    tables.supersede(db, after)
    return after, tuple({other.runner_id for other in living})


def _next_attempt(db: Db, row: ExecutionRow, on_loss: OnLoss, now_ms: int) -> LeaseGrant:
    """The lease of the next attempt, whose token nobody has told of: a log may be of an attempt that we forgot."""
    res, floor = lease_resource(row.id), token_floor(row.created_ms, now_ms)
    tables.raise_token(db, res, row.token)
    while True:
        lease = store.next_lease(db, res, on_loss, floor)
        if told.log(db, Attempt(ExecutionId(row.id), FencingToken(lease.token)).name) is None:
            return lease
        floor = lease.token + _SKIPPED


def _may_live(db: Db, row: ExecutionRow) -> bool:
    return not row.over and tables.was_sent(db, row.runner_id, row.cmd_id)


def release(db: Db, cmd_ids: Sequence[str]) -> None:
    """Queue held intents: what they waited for is over."""
    for cmd_id in cmd_ids:
        held = tables.intent(db, cmd_id)
        if held is not None and held.state is IntentState.HELD:
            tables.put_intent_state(db, replace(held, state=IntentState.QUEUED))


# --- leases ------------------------------------------------------------------------------------------------------


def regrant(db: Db, runner_id: str, wanted: Sequence[Regrant], make: Make) -> None:
    """Queue new grants for leases that ran out, each where it is still wanted and none is under way."""
    for one in wanted:
        row = tables.execution(db, one.attempt.execution_id)
        if row is None or row.attempt != one.attempt or row.runner_id != runner_id:
            continue
        stale = row.state is not ExecutionState.RUNNING or row.stop_cmd_id is not None
        if stale or tables.open_intents(db, row.id, Kind.LEASE_ACQUIRE):
            continue
        res = lease_resource(row.id)
        tables.raise_token(db, res, max(row.token, one.above))
        args = LeaseAcquire(execution_id=row.id, start_token=row.start_token).dump()
        intent = make(runner_id, Kind.LEASE_ACQUIRE, row.id, args)
        floor = token_floor(row.created_ms, intent.created_ms)
        lease = store.next_lease(db, res, on_loss_of(tables.intent(db, row.cmd_id)), floor)
        tables.add_intent(db, replace(intent, lease=lease.dump()))


def on_loss_of(start: IntentRow | None) -> OnLoss:
    """What a start said of the loss of its lease; of one that we forgot, what stops nothing."""
    return OnLoss.CONTINUE if start is None or start.lease is None else LeaseGrant.parse(start.lease).on_loss


# --- stops -------------------------------------------------------------------------------------------------------


def stop(
    db: Db, attempt: Attempt, runner_id: str, make: Make, *, grace_ms: int | None = None, actor: str | None = None
) -> str:
    """Queue a stop of one attempt at a runner, known here or not, unless one is under way. Returns its `cmd_id`."""
    for intent in [found for kind in STOPS for found in tables.open_intents(db, attempt.execution_id, kind)]:
        if (intent.runner_id, intent.start_token) == (runner_id, attempt.start_token):
            return intent.cmd_id
    row = tables.attempt(db, attempt.execution_id, attempt.start_token)
    target = AttemptTarget(type="attempt", execution_id=attempt.execution_id, start_token=attempt.start_token)
    args = ExecutionStop(target=target, grace_ms=grace_ms).dump()
    intent = replace(make(runner_id, ptytables.stop_kind(db, row), attempt.execution_id, args), actor=actor)
    # No limit for a stop: what can be started can be stopped.
    tables.add_intent(db, intent)
    if row is not None and row.runner_id == runner_id:
        tables.put_execution(db, replace(row, stop_cmd_id=intent.cmd_id))
    return intent.cmd_id


def stop_lost(db: Db, runner_id: str, attempts: Sequence[Attempt], make: Make) -> None:
    """Ask for the end of what only one side's list has: the answer is a settlement, or that nobody knows it."""
    for attempt in attempts:
        row = tables.attempt(db, attempt.execution_id, attempt.start_token)
        if row is not None and row.runner_id == runner_id and not row.over:
            stop(db, attempt, runner_id, make, actor=RECONCILE)
