"""The control plane's transactions: each function is one closure for the writer thread, and all or nothing.

The deciding is done by `dispatcher` and `orders`; here is what they are given and what is kept of their answers.
"""

from dataclasses import dataclass, replace
from typing import Final

from controlplane import dispatcher, orders, tables
from controlplane.errors import Fault, RequestRefused
from controlplane.leasing import lease_resource, token_floor, worktree_resource
from controlplane.limits import IDEMPOTENCY_TTL_MS, INTENTS_QUEUED_MAX
from controlplane.rows import (
    STARTS,
    CommandRow,
    ExecutionRow,
    ExecutionState,
    IntentRow,
    IntentState,
    WorktreeRow,
    WorktreeState,
)
from controlplane.tables import Db
from protocol.commands import STREAM_OF, Kind, LeaseGrant, OnLoss, Stream
from protocol.errors import Reason
from protocol.limits import LEASE_TTL_MS

_KINDS_OF: Final = {stream: tuple(kind for kind, of in STREAM_OF.items() if of is stream) for stream in Stream}
_BEGINNING: Final = (*STARTS, Kind.WORKTREE_CREATE)
"""What a runner that is paused or draining takes nothing of."""
_LEASED: Final = (*STARTS, Kind.LEASE_ACQUIRE)
_SWEEP_MAX: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """What a session allows to be numbered: only while it is the runner's session."""

    session: str
    room: int
    safety_room: int
    beginning: bool = True
    """Whether new work may be among it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a dispatch made: commands to send, and the rows that changed."""

    commands: tuple[CommandRow, ...] = ()
    touched: tuple[str, ...] = ()


# --- asking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """A request's key, and the keyed digest of everything that was asked under it."""

    key: str
    request: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a request: HTTP status and JSON text."""

    status: int
    body: str


def replayed(db: Db, asked: Idempotency | None, now_ms: int) -> Reply | None:
    """The stored answer of the same request. Raises RequestRefused(IDEMPOTENCY_MISMATCH) for another one."""
    if asked is None:
        return None
    sql = "SELECT request, status, response FROM idempotency WHERE key = ? AND at_ms > ?"
    found = db.execute(sql, (asked.key, now_ms - IDEMPOTENCY_TTL_MS)).fetchone()
    if found is None:
        return None
    if found["request"] != asked.request:
        raise RequestRefused(Fault.IDEMPOTENCY_MISMATCH, "the key was used for another request")
    return Reply(found["status"], found["response"])


def remember(db: Db, asked: Idempotency | None, reply: Reply, now_ms: int) -> None:
    """Keep the answer under its key, in the transaction of its effect."""
    if asked is not None:
        row = (asked.key, asked.request, reply.status, reply.body, now_ms)
        db.execute("INSERT OR REPLACE INTO idempotency VALUES (?,?,?,?,?)", row)


def queue_intent(db: Db, intent: IntentRow) -> None:
    """Take an intent. Raises RequestRefused(TOO_MANY_INTENTS)."""
    if tables.queued_count(db, intent.runner_id) >= INTENTS_QUEUED_MAX:
        raise RequestRefused(Fault.TOO_MANY_INTENTS, f"{INTENTS_QUEUED_MAX} intents wait for this runner already")
    tables.add_intent(db, intent)


def start_execution(db: Db, row: ExecutionRow, intent: IntentRow) -> None:
    """Take a new execution; its id is new, so the token its secrets were sealed for is the first one."""
    token = tables.grant_token(db, lease_resource(row.id))
    assert token == row.start_token, "an execution id is never used twice"
    queue_intent(db, intent)
    tables.add_execution(db, row)


def stop_execution(db: Db, execution_id: str, stop: IntentRow) -> tuple[ExecutionRow, bool]:
    """Ask for an end: call the start back if it was never signed, else queue the stop. True when something changed."""
    row = tables.execution(db, execution_id)
    if row is None:
        raise RequestRefused(Fault.UNKNOWN_EXECUTION)
    if row.state.final or row.stop_cmd_id is not None:
        return row, False
    start = tables.intent(db, row.cmd_id)
    if start is not None and dispatcher.stop_was_overtaken(row, start):
        tables.put_intent_state(db, replace(start, state=IntentState.CANCELLED))
        detail = "called back before it was sent"
        row = replace(row, state=ExecutionState.CANCELLED, stop_cmd_id=stop.cmd_id, detail=detail)
    else:
        # No limit for a stop: what can be started can be stopped.
        tables.add_intent(db, stop)
        row = replace(row, stop_cmd_id=stop.cmd_id)
    tables.put_execution(db, row)
    return row, True


def create_worktree(db: Db, row: WorktreeRow, intent: IntentRow) -> None:
    """Take a new worktree. Raises RequestRefused(WORKTREE_EXISTS)."""
    known = tables.worktree(db, row.id)
    gone = (WorktreeState.REMOVED, WorktreeState.REFUSED, WorktreeState.FAILED)
    if known is not None and (known.state not in gone or known.runner_id != row.runner_id):
        raise RequestRefused(Fault.WORKTREE_EXISTS, "the id is taken")
    queue_intent(db, replace(intent, lease=_worktree_lease(db, row, intent.created_ms)))
    tables.put_worktree(db, row)


def remove_worktree(db: Db, worktree_id: str, intent: IntentRow) -> WorktreeRow:
    """Ask for the removal of a worktree. Raises RequestRefused(UNKNOWN_WORKTREE | WORKTREE_NOT_READY)."""
    row = tables.worktree(db, worktree_id)
    if row is None:
        raise RequestRefused(Fault.UNKNOWN_WORKTREE)
    if row.state in (WorktreeState.REMOVED, WorktreeState.REMOVING):
        return row
    if not row.state.final:
        raise RequestRefused(Fault.WORKTREE_NOT_READY, "its creation has not been answered yet")
    lease = _worktree_lease(db, row, intent.created_ms)
    queue_intent(db, replace(intent, runner_id=row.runner_id, lease=lease))
    state = WorktreeState.REMOVING
    row = replace(row, state=state, cmd_id=intent.cmd_id, reason=None, detail="", retry_after_ms=None)
    tables.put_worktree(db, row)
    return row


def _worktree_lease(db: Db, row: WorktreeRow, now_ms: int) -> bytes:
    """A token for one order about a worktree: the marker of its owner refuses an order that a later one has overtaken."""
    return next_lease(db, worktree_resource(row.id), OnLoss.CONTINUE, token_floor(row.created_ms, now_ms)).dump()


def next_lease(db: Db, res: str, on_loss: OnLoss, floor: int) -> LeaseGrant:
    """A grant of a resource under the next token, at least `floor`."""
    return LeaseGrant(res=res, token=tables.grant_token(db, res, floor), ttl_ms=LEASE_TTL_MS, on_loss=on_loss)


# --- sending -----------------------------------------------------------------------------------------------------


def is_due(db: Db, runner_id: str, permit: Permit) -> bool:
    """Whether anything is queued that `permit` lets through."""
    ctl = _ctl_kinds(permit) if permit.room > 0 else ()
    return tables.is_queued(db, runner_id, (*_KINDS_OF[Stream.SAFETY], *ctl))


def dispatch(db: Db, runner_id: str, org: str, permit: Permit, now_ms: int) -> Sent:
    """Number, word and keep the next intents of a runner, if `permit` is of its session."""
    runner = tables.runner(db, runner_id)
    if runner is None or runner.session != permit.session:
        return Sent()
    safety = tables.queued_intents(db, runner_id, _KINDS_OF[Stream.SAFETY], max(permit.safety_room, 0))
    ctl = tables.queued_intents(db, runner_id, _ctl_kinds(permit), max(permit.room, 0))
    dropped = [intent for intent in ctl if _drop(db, intent)]
    queue = [*safety, *(intent for intent in ctl if intent not in dropped)]
    address = orders.Address(org=org, runner=runner.id, inc=runner.inc, keyset_min=runner.keyset_version)
    done = orders.number(
        queue,
        ctl=runner.ctl,
        room=permit.room,
        safety_room=permit.safety_room,
        address=address,
        now_ms=now_ms,
    )
    intents = {intent.cmd_id: intent for intent in queue}
    for command in done.commands:
        tables.add_command(db, command)
        _sent(db, intents[command.cmd_id])
    if done.ctl != runner.ctl:
        tables.put_runner(db, replace(runner, ctl=done.ctl))
    for intent in done.expired:
        _expire(db, intent)
    touched = {intents[command.cmd_id].subject for command in done.commands}
    touched |= {row.subject for row in (*done.expired, *dropped)}
    return Sent(commands=done.commands, touched=tuple(touched))


def _ctl_kinds(permit: Permit) -> tuple[str, ...]:
    kinds = _KINDS_OF[Stream.CTL]
    return kinds if permit.beginning else tuple(kind for kind in kinds if kind not in _BEGINNING)


def _drop(db: Db, intent: IntentRow) -> bool:
    """Give up what is not wanted any more: a start whose place was taken, a lease for what is stopped or over."""
    if intent.kind not in _LEASED:
        return False
    current = tables.execution(db, intent.subject)
    superseded = current is not None and current.start_token != intent.start_token
    if intent.kind in STARTS:
        if superseded:
            call_back_start(db, intent)
        return superseded
    wanted = current is not None and not superseded and not current.state.final and current.stop_cmd_id is None
    if not wanted:
        tables.put_intent_state(db, replace(intent, state=IntentState.CANCELLED))
    return not wanted


def call_back_start(db: Db, start: IntentRow) -> None:
    """Never send the start of an attempt whose place was taken. What its runner may tell of an earlier form still counts."""
    tables.put_intent_state(db, replace(start, state=IntentState.CANCELLED))
    row = tables.attempt(db, start.subject, start.start_token)
    if row is not None and not row.state.final:
        detail = "a later attempt took its place"
        tables.put_execution(db, replace(row, state=ExecutionState.CANCELLED, detail=detail))


def expire(db: Db, now_ms: int) -> Sent:
    """Give up intents whose time ran out while their runner was away."""
    overdue = tables.overdue_intents(db, now_ms, _SWEEP_MAX)
    for intent in overdue:
        _expire(db, intent)
    db.execute("DELETE FROM idempotency WHERE at_ms <= ?", (now_ms - IDEMPOTENCY_TTL_MS,))
    db.execute("DELETE FROM join_tokens WHERE expires_ms <= ?", (now_ms - IDEMPOTENCY_TTL_MS,))
    return Sent(touched=tuple({intent.subject for intent in overdue}))


def _sent(db: Db, intent: IntentRow) -> None:
    tables.put_intent_state(db, replace(intent, state=IntentState.SENT, signed_times=intent.signed_times + 1))
    execution = tables.attempt(db, intent.subject, intent.start_token) if intent.kind in _LEASED else None
    if execution is not None and intent.kind == Kind.LEASE_ACQUIRE:
        assert intent.lease is not None, "it is what this kind is for"
        # From here on only the new token is renewed, whatever becomes of the command.
        execution = replace(execution, lease_token=LeaseGrant.parse(intent.lease).token, lease_refused=None)
        tables.put_execution(db, execution)
    elif execution is not None and execution.state is ExecutionState.QUEUED:
        tables.put_execution(db, replace(execution, state=ExecutionState.SENT))
    worktree = tables.worktree(db, intent.subject) if intent.kind == Kind.WORKTREE_CREATE else None
    if worktree is not None and worktree.state is WorktreeState.QUEUED:
        tables.put_worktree(db, replace(worktree, state=WorktreeState.CREATING))


def _expire(db: Db, intent: IntentRow) -> None:
    tables.put_intent_state(db, replace(intent, state=IntentState.EXPIRED))
    detail = "no runner took it in time"
    start = intent.kind in STARTS
    execution = tables.attempt(db, intent.subject, intent.start_token) if start else None
    if execution is not None and not execution.state.final:
        row = replace(execution, state=ExecutionState.CANCELLED, reason=Reason.EXPIRED, detail=detail)
        tables.put_execution(db, row)
    worktree = tables.worktree(db, intent.subject) if intent.kind.startswith("worktree.") else None
    if worktree is not None and worktree.cmd_id == intent.cmd_id and not worktree.state.final:
        state = WorktreeState.REFUSED if intent.kind == Kind.WORKTREE_CREATE else WorktreeState.READY
        tables.put_worktree(db, replace(worktree, state=state, reason=Reason.EXPIRED, detail=detail))
