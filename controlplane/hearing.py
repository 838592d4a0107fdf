"""The transactions of a session: how it begins, what its reports and beats leave behind.

The deciding is done by `dispatcher`; here is what it is given and what is kept of its answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from controlplane import dispatcher, instances, tables, told
from controlplane.dispatcher import Change, Meeting, Subject
from controlplane.errors import Fault, RequestRefused
from controlplane.instances import Conflict
from controlplane.leasing import lease_resource
from controlplane.rows import (
    STARTS,
    CommandRow,
    EventRow,
    ExecutionState,
    IntentRow,
    IntentState,
    RunnerRow,
    StatementRow,
    WorktreeState,
)
from controlplane.tables import Db
from protocol.commands import Command, Kind, Stream
from protocol.envelope import Verified, digest_of
from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.identity import HelloClaims
from protocol.ids import Digest
from protocol.messages import Answer, ReportItem
from protocol.receipt import Receipt, Settlement

# --- meeting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A session that has begun: the runner as it is now, what was agreed, and what must be sent again."""

    runner: RunnerRow
    meeting: Meeting
    again: tuple[CommandRow, ...]
    touched: tuple[str, ...]


Certify = Callable[[RunnerRow, int], str]
"""Signs a runner's certificate for an incarnation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What memory knows of the runner's line before a new session takes it."""

    seen: tuple[tuple[str, int, int, int], ...] = ()
    """As for `seen`: what the session that is there has told and nobody has written yet."""
    instance: str = ""
    """The instance that has beaten in our incarnation a moment ago."""


def begin_session(
    db: Db,
    runner_id: str,
    session: str,
    claims: HelloClaims,
    line: Line,
    certify: Certify,
    keyset_version: int,
    now_ms: int,
) -> Begun | Conflict:
    """Agree with a runner where to go on, or refuse a copy of it.

    Raises:
        RequestRefused: UNKNOWN_RUNNER when it was replaced meanwhile.
    """
    seen(db, line.seen)
    runner = tables.runner(db, runner_id)
    if runner is None or not runner.living:
        raise RequestRefused(Fault.UNKNOWN_RUNNER)
    why = instances.judge(runner, claims, other_lives=line.instance not in ("", claims.instance))
    if why is not None:
        return _refuse_copy(db, runner, claims, why, now_ms)
    unanswered = any(row.stream is Stream.CTL for row in tables.intents_in(db, runner_id, IntentState.SENT))
    meeting = dispatcher.meet(runner, claims, _digest_there(db, runner, claims), unanswered=unanswered)
    touched = _requeue(db, runner_id) if meeting.requeue else ()
    runner = replace(
        instances.taken(runner, claims),
        inc=meeting.inc,
        certificate=certify(runner, meeting.inc) if meeting.reborn else runner.certificate,
        session=session,
        ctl=meeting.ctl,
        acked_hw=meeting.told.hw,
        out_hw=meeting.out_hw,
        keyset_version=max(keyset_version, claims.keyset_version),
        last_seen_ms=now_ms,
        version=claims.version,
        platform=claims.platform,
        policy_digest=claims.policy_digest,
        attempts=claims.attempts,
    )
    tables.put_runner(db, runner)
    again = (
        *tables.open_safety(db, runner_id, runner.inc),
        *tables.commands_above(db, runner_id, runner.inc, meeting.told.hw),
    )
    return Begun(runner=runner, meeting=meeting, again=again, touched=touched)


def _refuse_copy(db: Db, runner: RunnerRow, claims: HelloClaims, why: str, now_ms: int) -> Conflict:
    """Keep that there was one. A copy that dials again and again is one event."""
    found = instances.conflict(runner, claims, why, now_ms)
    tables.put_runner(db, found.runner)
    if found.fresh:
        event = EventRow(
            runner_id=runner.id,
            at_ms=now_ms,
            kind=EventKind.IDENTITY_CONFLICT,
            reason=Reason.IDENTITY_CONFLICT,
            detail=found.detail,
        )
        told.add_event(db, event)
    return found


def _digest_there(db: Db, runner: RunnerRow, claims: HelloClaims) -> Digest | None:
    """The digest under the hello's number: of what we signed, or of what we adopted, which our mark or the next command names."""
    hw = claims.ctl.hw
    if (claims.inc, hw) == (runner.inc, runner.ctl.hw):
        return runner.ctl.head
    there = tables.command_at(db, runner.id, claims.inc, hw)
    if there is not None:
        return there.digest
    behind = tables.command_at(db, runner.id, claims.inc, hw + 1)
    prev = None if behind is None else Command.parse(behind.payload).prev
    return None if prev is None else Digest(prev)


def _requeue(db: Db, runner_id: str) -> tuple[str, ...]:
    """What was sent and has no receipt is an intent again, under its own `cmd_id` (see `dispatcher`)."""
    intents = tables.intents_in(db, runner_id, IntentState.SENT)
    for intent in intents:
        tables.put_intent_state(db, replace(intent, state=IntentState.QUEUED))
        start = intent.kind in STARTS
        execution = tables.attempt(db, intent.subject, intent.start_token) if start else None
        if execution is not None and execution.state is ExecutionState.SENT:
            tables.put_execution(db, replace(execution, state=ExecutionState.QUEUED))
        worktree = tables.worktree(db, intent.subject) if intent.kind == Kind.WORKTREE_CREATE else None
        if worktree is not None and worktree.state is WorktreeState.CREATING:
            tables.put_worktree(db, replace(worktree, state=WorktreeState.QUEUED))
    return tuple({intent.subject for intent in intents})


# --- hearing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An item that is refused for ever."""

    reason: Reason
    detail: str


Opened = Verified[Receipt] | Verified[Settlement] | Event | Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a report did: the final answers, and the rows that changed."""

    answers: tuple[Answer, ...]
    touched: tuple[str, ...]


def hear(db: Db, runner_id: str, items: Sequence[tuple[ReportItem, Opened]], now_ms: int) -> Heard:
    """Keep a report: each item once, by its number and its bytes."""
    answers: list[Answer] = []
    touched: set[str] = set()
    for item, opened in items:
        body = digest_of(item.body.encode())
        known, reason = told.answered(db, runner_id, item.out_seq, body)
        if not known:
            refusal = opened.reason if isinstance(opened, Unreadable) else None
            reason = None if refusal is None else str(refusal)
            touched |= _hear(db, runner_id, item, opened, body, now_ms)
            told.put_answered(db, runner_id, item.out_seq, body, reason)
        answers.append(
            Answer(out_seq=item.out_seq, stored=reason is None, reason=None if reason is None else Reason(reason))
        )
    # Items come in order from our own mark on, and one that was pruned never comes: the highest one is the mark.
    highest = max(item.out_seq for item, _ in items)
    db.execute("UPDATE runners SET out_hw = max(out_hw, ?) WHERE id = ?", (highest, runner_id))
    return Heard(answers=tuple(answers), touched=tuple(touched))


def _hear(db: Db, runner_id: str, item: ReportItem, opened: Opened, body: str, now_ms: int) -> set[str]:
    if isinstance(opened, Unreadable):
        event = EventRow(
            runner_id=runner_id,
            at_ms=now_ms,
            kind=f"{item.kind}.refused",
            reason=opened.reason,
            detail=opened.detail,
            digest=body,
        )
        told.add_event(db, event)
        return set()
    if isinstance(opened, Event):
        told.add_event(db, _event(runner_id, opened, body))
        return set()
    text = opened.payload.decode()
    said = opened.value
    intent = tables.intent(db, said.cmd_id)
    if intent is not None and intent.runner_id != runner_id:
        intent = None
    if isinstance(said, Receipt):
        change, about = _receipted(db, intent, said, text)
        if said.seq is not None:
            _acked(db, runner_id, said.inc, said.seq)
    else:
        row = tables.attempt(db, said.execution_id, said.start_token)
        known = tables.attempts(db, said.execution_id) if row is None else ()
        change = dispatcher.settled(intent, row, said, opened.digest, text, known)
        about = said.execution_id
    touched, conflict = _keep(db, change)
    statement = StatementRow(
        digest=opened.digest,
        runner_id=runner_id,
        kind=item.kind,
        cmd_id=said.cmd_id,
        subject=about,
        envelope=item.body,
        payload=text,
        received_ms=now_ms,
    )
    told.put_statement(db, statement)
    if conflict:
        event = EventRow(
            runner_id=runner_id, at_ms=now_ms, kind="settlement.conflict", detail=conflict, digest=opened.digest
        )
        told.add_event(db, event)
    return touched | ({about} if about else set())


def _receipted(db: Db, intent: IntentRow | None, said: Receipt, text: str) -> tuple[Change, str]:
    """What a receipt changes, and what it is about: the intent's subject, or, of an intent we forgot, what it names itself."""
    subject: Subject
    if intent is not None:
        subject = tables.attempt(db, intent.subject, intent.start_token) or tables.worktree(db, intent.subject)
        return dispatcher.receipted(intent, subject, said, text), intent.subject
    named, token = said.result.get("execution_id"), said.result.get("start_token")
    if not isinstance(named, str) or not isinstance(token, int):
        return Change(), ""
    known, subject = tables.attempts(db, named), tables.attempt(db, named, token)
    change = dispatcher.receipted(None, subject, said, text, known)
    return change, named if known or change.unheard is not None else ""


def _keep(db: Db, change: Change) -> tuple[set[str], str]:
    """Write what a statement changed: the ids of the rows, and what is to be told of it."""
    touched, conflict = set(), change.conflict
    if change.intent is not None:
        tables.put_intent_state(db, change.intent)
    if change.unheard is not None:
        tables.add_attempt(db, change.unheard)
    if change.execution is not None:
        tables.put_execution(db, change.execution)
    if change.settled is not None and not tables.settle(db, change.settled):
        conflict = conflict or "a second settlement of an attempt"
    for row in (change.unheard, change.execution, change.settled):
        if row is not None:
            tables.raise_token(db, lease_resource(row.id), row.token)
            touched.add(row.id)
    if change.worktree is not None:
        tables.put_worktree(db, change.worktree)
        touched.add(change.worktree.id)
    return touched, conflict


def _event(runner_id: str, event: Event, digest: str) -> EventRow:
    return EventRow(
        runner_id=runner_id,
        at_ms=event.at_ms,
        kind=event.kind,
        reason=event.reason,
        detail=event.detail,
        digest=digest,
    )


def seen(db: Db, marks: Sequence[tuple[str, int, int, int]]) -> None:
    """Write (runner, inc, last seen, acked mark) of the runners that are there."""
    for runner_id, inc, at_ms, hw in marks:
        db.execute("UPDATE runners SET last_seen_ms = max(last_seen_ms, ?) WHERE id = ?", (at_ms, runner_id))
        _acked(db, runner_id, inc, hw)


def _acked(db: Db, runner_id: str, inc: int, hw: int) -> None:
    """The runner told to have consumed `ctl` up to `hw`; a number we never gave is not worth keeping."""
    sql = "UPDATE runners SET acked_hw = max(acked_hw, ?1) WHERE id = ?2 AND inc = ?3 AND ctl_hw >= ?1"
    db.execute(sql, (hw, runner_id, inc))
