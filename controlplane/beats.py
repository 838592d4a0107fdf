"""What follows from a beat: leases renewed, hints, the lists of both sides compared, leases granted anew.

Rule 1: the answer is made from memory, so that it waits for no transaction. Rule 2: what the beat makes necessary is a signed command.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from controlplane import attempts, instances, leasing, reconciling, tables, told
from controlplane.ledger import Ledger
from controlplane.limits import UNKNOWN_EVENTS_MAX
from controlplane.reconciling import Compared
from controlplane.rows import EventRow
from controlplane.session import Session
from controlplane.tables import Db
from protocol.errors import Reason
from protocol.events import EventKind
from protocol.ids import Attempt
from protocol.messages import Beat, Beaten

_log = structlog.get_logger("controlplane.beats")


@dataclass(frozen=True, slots=True)
class _Heartbeat:
    instance: str
    inc: int
    at_ms: int


class Beats:
    """Beats of every session."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # Who had the line before our own start may be beating: until it has had its chance, a copy does not get in.
        now_ms = ledger.boot_clock()
        self._last = {row.id: _Heartbeat(row.instance, row.inc, now_ms) for row in ledger.runners.values()}

    # --- who lives ----------------------------------------------------------------------------------------------

    def heard(self, runner_id: str, instance: str, inc: int) -> None:
        """An instance has beaten."""
        self._last[runner_id] = _Heartbeat(instance, inc, self._ledger.boot_clock())

    def left(self, session: Session) -> None:
        """A session is over; one that its runner ended with a word does not beat any more."""
        last = self._last.get(session.runner_id)
        if session.farewell and last is not None and last.instance == session.instance:
            del self._last[session.runner_id]

    def beating(self, runner_id: str) -> str:
        """The instance that has beaten in our incarnation a moment ago; empty for none."""
        last, row = self._last.get(runner_id), self._ledger.runners.get(runner_id)
        if last is None or row is None or last.inc != row.inc:
            return ""
        silent_ms = self._ledger.boot_clock() - last.at_ms
        return last.instance if silent_ms < instances.BEATS_MISSED_MAX * self._ledger.beat_ms else ""

    # --- the answer ---------------------------------------------------------------------------------------------

    def answer(self, runner_id: str, beat: Beat, *, renewals_only: bool = False) -> Beaten:
        """Renew what may be renewed, and say what we hold for."""
        ledger = self._ledger
        living = ledger.living(runner_id)
        renewed = leasing.renew(beat.leases, living, ledger.grants, ledger.boot_clock())
        ledger.grants.update(renewed.grants)
        hints, full = ([], False) if renewals_only else (reconciling.hints(living), False)
        if beat.full and not renewals_only:
            hints, full = reconciling.full_hints(living)
        return Beaten(
            n=beat.n,
            now_ms=ledger.clock(),
            beat_ms=ledger.beat_ms,
            leases=list(renewed.answers),
            hints=hints,
            full=full,
        )

    # --- what it makes necessary --------------------------------------------------------------------------------

    async def follow(self, session: Session, beat: Beat) -> None:
        """Grant anew what ran out, and act on what the lists of a full beat differ in. Raises StoreFailed."""
        await self._regrant(session, beat)
        # Before the outbox is in, what we do not know may be on its way, and so may the end of what is missing.
        if beat.full and session.outbox_in:
            compared = reconciling.compare(beat.attempts, self._ledger.living(session.runner_id))
            strangers = self._strangers(session.runner_id, compared.strangers)
            await self._tell(session, {name: why for name, why in strangers.items() if why != _SUPERSEDED})
            superseded = [Attempt.parse(name) for name, why in strangers.items() if why == _SUPERSEDED]
            await self._ask_for(session, compared, superseded)

    async def _regrant(self, session: Session, beat: Beat) -> None:
        ledger, runner_id = self._ledger, session.runner_id
        due = leasing.due(
            ledger.living(runner_id),
            ledger.grants,
            (*beat.leases, *beat.lost),
            set(beat.attempts),
            ledger.boot_clock(),
        )
        if due:
            await ledger.db.write(lambda db: attempts.regrant(db, runner_id, due, ledger.intent))

    def _strangers(self, runner_id: str, names: Collection[str]) -> dict[str, str]:
        """What only the runner names, each with what we know of it."""
        found: dict[str, str] = {}
        for name in names:
            attempt = Attempt.parse(name)
            row = tables.attempt(self._ledger.db.reader, attempt.execution_id, attempt.start_token)
            if row is None:
                found[name] = "not known here"
            elif row.runner_id != runner_id:
                found[name] = f"it is of {self._ledger.name_of(row.runner_id) or row.runner_id}"
            elif row.settlement is None and self._is_earlier(attempt):
                found[name] = _SUPERSEDED
            else:
                found[name] = f"{row.state} here"
        return found

    def _is_earlier(self, attempt: Attempt) -> bool:
        current = tables.execution(self._ledger.db.reader, attempt.execution_id)
        return current is not None and current.attempt != attempt

    async def _tell(self, session: Session, strangers: dict[str, str]) -> None:
        """Keep what nobody here started, and tell of each once: it is left alone until somebody signs its end."""
        session.unknown = strangers
        fresh = [name for name in strangers if name not in session.told]
        fresh = fresh[: max(UNKNOWN_EVENTS_MAX - len(session.told), 0)]
        if not fresh:
            return
        session.told.update(fresh)
        events = [
            EventRow(
                runner_id=session.runner_id,
                at_ms=self._ledger.clock(),
                kind=EventKind.ATTEMPT_UNKNOWN,
                reason=Reason.UNKNOWN_TARGET,
                detail=f"{name} lives there: {strangers[name]}",
            )
            for name in fresh
        ]
        _log.warning("attempts.unknown", runner=session.runner_id, attempts=fresh)
        await self._ledger.db.write(_adding(events))

    async def _ask_for(self, session: Session, compared: Compared, superseded: list[Attempt]) -> None:
        ledger, runner_id = self._ledger, session.runner_id
        lost, session.missing = reconciling.overdue(compared.missing, session.missing, ledger.boot_clock())
        wanted = [row.attempt for row in (*compared.superseded, *lost)] + superseded
        if not wanted:
            return
        _log.warning("attempts.differ", runner=runner_id, attempts=[attempt.name for attempt in wanted])
        await ledger.db.write(
            lambda db: attempts.stop_lost(db, runner_id, wanted, ledger.intent),
            lambda _: ledger.refresh([attempt.execution_id for attempt in wanted]),
        )


_SUPERSEDED = "a later attempt took its place"


def _adding(events: list[EventRow]) -> Callable[[Db], None]:
    def add(db: Db) -> None:
        for event in events:
            told.add_event(db, event)

    return add
