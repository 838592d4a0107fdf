"""Runners on the line: enrolment, handshakes, dispatch, and everything a session says.

Rule 1: a runner has one session; a new one ends the old. Rule 2: what changes rows goes through one transaction, and its
consequences in memory happen when that is durable, in order, whether or not anybody still waits.
"""

from collections.abc import Callable, Sequence
from typing import Final

import anyio.to_thread
import structlog

from controlplane import attempts, enrolment, failpoints, hearing, store, tables, told
from controlplane.beats import Beats
from controlplane.enrolment import Admitted
from controlplane.errors import RequestRefused
from controlplane.hearing import Begun, Heard, Line, Opened, Unreadable
from controlplane.instances import Conflict
from controlplane.ledger import Ledger
from controlplane.rows import (
    EventRow,
    ExecutionRow,
    ExecutionState,
    IntentState,
    RunnerRow,
    WorktreeRow,
    WorktreeState,
)
from controlplane.session import CLOSED, Session
from controlplane.store import Permit, Sent
from controlplane.tables import Db
from protocol.envelope import Verified
from protocol.errors import CloseCode, EnvelopeError, Reason, RemoteError
from protocol.events import Event
from protocol.handshake import seal_welcome
from protocol.identity import EnrollClaims, HelloClaims
from protocol.ids import Attempt, KeyId
from protocol.keys import PublicKey
from protocol.messages import (
    Beat,
    Enrolled,
    Fetch,
    ItemKind,
    Need,
    Refused,
    Report,
    Reported,
    ReportItem,
    Welcome,
)
from protocol.receipt import Receipt, Settlement, open_receipt, open_settlement

_INLINE_ITEMS: Final = 4
"""A report with more signatures than this is verified in a worker thread: each costs a tenth of a millisecond."""
_FORKED: Final = frozenset({Reason.CHAIN_FORK, Reason.SEQ_REPLAY})
_log = structlog.get_logger("controlplane.sessions")


class Switchboard:
    """Every session of the control plane."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sessions: dict[str, Session] = {}
        self.beats: Final = Beats(ledger)
        self.line_changed: Callable[[str], None] = lambda _: None  # of this runner: a session is there, or gone

    @property
    def sessions(self) -> Sequence[Session]:
        """The living sessions."""
        return tuple(self._sessions.values())

    def is_online(self, runner_id: str) -> bool:
        """Whether the runner has a session."""
        return runner_id in self._sessions

    def session_of(self, runner_id: str) -> Session | None:
        """The session of a runner that is there."""
        return self._sessions.get(runner_id)

    def waits(self, db: Db, row: ExecutionRow | WorktreeRow) -> str:
        """Why an order is not sent although its runner is there; empty when nothing but the runner is waited for."""
        if row.state not in (ExecutionState.QUEUED, WorktreeState.QUEUED):
            return ""
        intent, session = tables.intent(db, row.cmd_id), self._sessions.get(row.runner_id)
        if intent is not None and intent.state is IntentState.HELD:
            return f"{' and '.join((intent.waits_for or '').split())} may still run elsewhere"
        return f"the runner is {session.admission}" if session is not None and session.admission in CLOSED else ""

    # --- enrolment ----------------------------------------------------------------------------------------------

    async def enrol(self, opened: Verified[EnrollClaims]) -> Enrolled:
        """Take a runner in. Raises RemoteError(BAD_JOIN_TOKEN)."""
        ledger, claims = self._ledger, opened.value
        runner_id, now_ms = ledger.new_id("rn"), ledger.clock()

        def settle(admitted: Admitted) -> None:
            for old in admitted.replaced:
                row = tables.runner(ledger.db.reader, old)
                if row is not None:
                    ledger.runners[old] = row
                session = self._sessions.get(old)
                if session is not None:
                    session.end(Reason.UNKNOWN_RUNNER, CloseCode.UNKNOWN_RUNNER, "another runner has this name now")
            ledger.runners[admitted.runner.id] = admitted.runner
            ledger.refresh(admitted.touched)

        admitted = await ledger.db.write(
            lambda db: enrolment.admit(db, claims, runner_id, ledger.certify, now_ms), settle
        )
        _log.info("runner.enrolled", runner=admitted.runner.id, name=admitted.runner.name)
        keys = ledger.keys
        return Enrolled(root=keys.root, keyset=keys.keyset.envelope.decode(), certificate=admitted.runner.certificate)

    # --- the beginning and the end of a session -----------------------------------------------------------------

    def key_of(self, org: str, runner_id: str) -> PublicKey | None:
        """The enrolled key of a living runner of this organisation."""
        row = self._ledger.runners.get(runner_id)
        if row is None or not row.living or org != self._ledger.keys.org:
            return None
        return PublicKey.from_b64url(row.x)

    def session(self, runner_id: str, arrived: int) -> Session:
        """A session that has not begun; its connection was the `arrived`th."""
        ledger = self._ledger
        return Session(
            ledger.new_id("se"),
            runner_id,
            arrived,
            logs=ledger.logs,
            owner=ledger.owner,
            key=ledger.keys.command,
            clock_ms=ledger.boot_clock,
        )

    async def begin(self, session: Session, claims: HelloClaims) -> Welcome:
        """Agree where to go on and take the line.

        Raises:
            RemoteError: UNKNOWN_RUNNER, IDENTITY_CONFLICT, or SESSION_REPLACED for a handshake that a later one has overtaken.
        """
        ledger, there = self._ledger, self._sessions.get(session.runner_id)
        if there is not None and there.overtook(session, claims):
            raise RemoteError(Reason.SESSION_REPLACED, "a later connection has begun", CloseCode.SESSION_REPLACED)
        if claims.keyset_version > ledger.keys.keyset.value.version:
            # Our keyset was restored from a backup: the next one must be newer than what runners have seen.
            ledger.keys = ledger.keys.renewed(ledger.clock(), claims.keyset_version + 1)
        keys, now_ms = ledger.keys, ledger.clock()

        def settle(begun: Begun | Conflict) -> None:
            ledger.runners[session.runner_id] = begun.runner
            if isinstance(begun, Conflict):
                return
            ledger.last_seen_ms[session.runner_id] = now_ms
            before = self._sessions.pop(session.runner_id, None)
            if session.ending is None:
                # Else the connection went away while this was under way: nobody is there to be on the line.
                self._sessions[session.runner_id] = session
                session.begin(begun, claims.out_head)
            if before is not None:
                before.end(Reason.SESSION_REPLACED, CloseCode.SESSION_REPLACED, "a newer session began")
            self.line_changed(session.runner_id)
            ledger.refresh(begun.touched)

        line = Line(seen=tuple(self._marks(session.runner_id)), instance=self.beats.beating(session.runner_id))
        version = keys.keyset.value.version
        try:
            begun = await ledger.db.write(
                lambda db: hearing.begin_session(
                    db, session.runner_id, session.id, claims, line, ledger.certify, version, now_ms
                ),
                settle,
            )
        except RequestRefused as exc:
            raise RemoteError(Reason.UNKNOWN_RUNNER, "not enrolled here", CloseCode.UNKNOWN_RUNNER) from exc
        if isinstance(begun, Conflict):
            _log.error("identity.conflict", runner=session.runner_id, detail=begun.detail)
            raise RemoteError(Reason.IDENTITY_CONFLICT, begun.detail, CloseCode.IDENTITY_CONFLICT)
        return self._welcome(session, claims, begun)

    def _welcome(self, session: Session, claims: HelloClaims, begun: Begun) -> Welcome:
        ledger, keys = self._ledger, self._ledger.keys
        runner, meeting = begun.runner, begun.meeting
        _log.info("session.began", runner=runner.id, session=session.id, inc=runner.inc, reborn=meeting.reborn)
        env = seal_welcome(
            claims,
            inc=runner.inc,
            session=session.id,
            now_ms=ledger.clock(),
            beat_ms=ledger.beat_ms,
            ctl=meeting.told,
            out_hw=meeting.out_hw,
            key=keys.command,
        )
        stale = claims.keyset_version < keys.keyset.value.version
        return Welcome(
            env=env,
            keyset=keys.keyset.envelope.decode() if stale else None,
            certificate=runner.certificate if meeting.reborn else None,
        )

    def leave(self, session: Session) -> None:
        """The session is over."""
        session.end(Reason.GOING_AWAY, CloseCode.NORMAL)
        self.beats.left(session)
        session.channels.release()
        if self._sessions.get(session.runner_id) is session:
            del self._sessions[session.runner_id]
            self.line_changed(session.runner_id)
            _log.info("session.ended", runner=session.runner_id, session=session.id)

    # --- dispatch -----------------------------------------------------------------------------------------------

    def permit(self, runner_id: str) -> Permit | None:
        """Room for one more command of a runner that is ready for it; to be given back with `sent`."""
        session = self._sessions.get(runner_id)
        return None if session is None else session.permit(one=True)

    def repay(self, runner_id: str, permit: Permit | None) -> None:
        """The transaction of `permit` is over, however it ended."""
        session = self._sessions.get(runner_id)
        if permit is not None and session is not None and session.id == permit.session:
            session.repay(permit)

    def sent(self, runner_id: str, sent: Sent) -> None:
        """Commands are durable: send them."""
        if sent.commands:
            failpoints.hit("plane.numbered")
        session = self._sessions.get(runner_id)
        if session is not None:
            session.queue(sent.commands)
        self._ledger.refresh(sent.touched)

    async def dispatch(self, runner_id: str) -> None:
        """Number and send what waits for a runner, as far as there is room."""
        session, ledger = self._sessions.get(runner_id), self._ledger
        if session is None or session.dispatching:
            return
        session.dispatching = True
        try:
            while (permit := session.permit(one=False)) is not None:
                if not store.is_due(ledger.db.reader, runner_id, permit):
                    session.repay(permit)
                    return
                sent = await self._dispatch(runner_id, session, permit)
                if not sent.commands:
                    return
        finally:
            session.dispatching = False

    async def _dispatch(self, runner_id: str, session: Session, permit: Permit) -> Sent:
        ledger, now_ms = self._ledger, self._ledger.clock()
        asked = ledger.db.write(
            lambda db: store.dispatch(db, runner_id, ledger.keys.org, permit, now_ms),
            lambda sent: self.sent(runner_id, sent),
        )
        asked.add_done_callback(lambda _: session.repay(permit))
        return await asked

    # --- what runners say ---------------------------------------------------------------------------------------

    async def report(self, session: Session, message: Report) -> None:
        """Keep a report, then answer it. Raises StoreFailed; then nothing of it is answered."""
        ledger = self._ledger
        runner = ledger.runners[session.runner_id]
        items = message.items
        if len(items) <= _INLINE_ITEMS:
            opened = _open_items(items, runner, ledger.keys.org)
        else:
            opened = await anyio.to_thread.run_sync(_open_items, items, runner, ledger.keys.org)
        now_ms = ledger.clock()

        def settle(heard: Heard) -> None:
            for _, statement in opened:
                if isinstance(statement, Verified) and isinstance(statement.value, Receipt):
                    session.machine.receipted(statement.value.cmd_digest, statement.value.seq)
            ledger.refresh(heard.touched)
            failpoints.hit("plane.report_stored")
            session.say(Reported(answers=list(heard.answers)))

        await ledger.db.write(lambda db: hearing.hear(db, session.runner_id, opened, now_ms), settle)
        session.stored(max(item.out_seq for item in items))
        await self.dispatch(session.runner_id)

    async def beat(self, session: Session, message: Beat) -> None:
        """Answer a beat: no transaction, so it waits for nobody. Then do what it makes necessary. Raises StoreFailed."""
        ledger = self._ledger
        self._bounded(session, message.hw)
        ledger.last_seen_ms[session.runner_id] = ledger.clock()
        session.machine.receive(message)
        session.admission = message.admission
        self.beats.heard(session.runner_id, session.instance, session.inc)
        session.say(self.beats.answer(session.runner_id, message))
        failpoints.hit("plane.beat_answered")
        await self.beats.follow(session, message)
        await self.dispatch(session.runner_id)

    def fetch(self, session: Session, message: Fetch) -> None:
        """Send again what a hint named and never came."""
        reader, runner_id = self._ledger.db.reader, session.runner_id
        found = [tables.command_of(reader, runner_id, session.inc, cmd_id) for cmd_id in message.cmd_ids]
        session.fetch([command for command in found if command is not None])

    def need(self, session: Session, message: Need) -> None:
        """Send the numbered commands again. Raises RemoteError for a number from the future."""
        session.machine.receive(message)
        session.pump()

    async def refused(self, session: Session, message: Refused) -> None:
        """Keep what a runner did not take; where our histories differ, meet again."""
        event = EventRow(
            runner_id=session.runner_id,
            at_ms=self._ledger.clock(),
            kind="envelope.refused",
            reason=message.reason,
            detail=message.detail,
            digest=message.digest,
        )
        _log.warning("envelope.refused", runner=session.runner_id, reason=message.reason, digest=message.digest)
        await self._ledger.db.write(lambda db: told.add_event(db, event))
        ours = message.cmd_id is not None and tables.was_sent(self._ledger.db.reader, session.runner_id, message.cmd_id)
        if message.reason in _FORKED and ours:
            session.end(Reason.GOING_AWAY, CloseCode.GOING_AWAY, "the streams differ: meet again")

    async def tick(self, session: Session) -> None:
        """Once a second: what went unanswered, items that do not come, starts that have waited long enough."""
        session.pump()
        await self._release(session.runner_id)
        if session.lost_patience():
            _log.warning("outbox.incomplete", runner=session.runner_id)
            event = EventRow(
                runner_id=session.runner_id,
                at_ms=self._ledger.clock(),
                kind="outbox.incomplete",
                detail="announced items did not come; commands go on without them",
            )
            await self._ledger.db.write(lambda db: told.add_event(db, event))
        await self.dispatch(session.runner_id)

    async def _release(self, runner_id: str) -> None:
        """Queue the starts whose predecessors are over, by their runners' word or by their leases."""
        ledger, now_ms = self._ledger, self._ledger.boot_clock()
        due = [
            cmd_id
            for cmd_id, held in ledger.held.items()
            if held.runner_id == runner_id and (now_ms >= held.until_ms or all(map(self._is_over, held.after)))
        ]
        if not due:
            return

        def settle(_: None) -> None:
            for cmd_id in due:
                ledger.held.pop(cmd_id, None)

        await ledger.db.write(lambda db: attempts.release(db, due), settle)

    def _is_over(self, attempt: Attempt) -> bool:
        row = tables.attempt(self._ledger.db.reader, attempt.execution_id, attempt.start_token)
        return row is None or row.over

    def marks(self) -> list[tuple[str, int, int, int]]:
        """(runner, inc, last seen, acked mark) of every session, for the disk."""
        return [mark for runner_id in self._sessions for mark in self._marks(runner_id)]

    def _marks(self, runner_id: str) -> list[tuple[str, int, int, int]]:
        session = self._sessions.get(runner_id)
        if session is None:
            return []
        return [(runner_id, session.inc, self._ledger.last_seen_ms.get(runner_id, 0), session.machine.acked_hw)]

    def _bounded(self, session: Session, hw: int) -> None:
        """A runner cannot have consumed what was never numbered."""
        if hw <= session.machine.acked_hw:
            return
        row = tables.runner(self._ledger.db.reader, session.runner_id)
        if row is not None and row.inc == session.inc and hw > row.ctl.hw:
            raise RemoteError(Reason.SEQ_GAP, "consumed a number from the future", CloseCode.BAD_FRAME)


def _open_items(items: Sequence[ReportItem], runner: RunnerRow, org: str) -> list[tuple[ReportItem, Opened]]:
    key = PublicKey.from_b64url(runner.x)
    return [(item, _open_item(item, {key.key_id: key}, runner.id, org)) for item in items]


def _open_item(item: ReportItem, keys: dict[KeyId, PublicKey], runner_id: str, org: str) -> Opened:
    body = item.body.encode()
    try:
        if item.kind is ItemKind.EVENT:
            return Event.parse(body)
        opened: Verified[Receipt] | Verified[Settlement]
        opened = open_receipt(body, keys) if item.kind is ItemKind.RECEIPT else open_settlement(body, keys)
    except EnvelopeError as exc:
        return Unreadable(exc.reason, exc.detail)
    except ValueError as exc:
        return Unreadable(Reason.BAD_PAYLOAD, str(exc)[:200])
    if (opened.value.org, opened.value.runner) != (org, runner_id):
        return Unreadable(Reason.WRONG_AUD, "a statement of another runner")
    return opened
