"""What users do to an attempt that runs: signals, and bytes for its stdin.

A signal is an order like any other: signed, numbered, receipted. A piece of stdin is signed by whoever started the attempt; it is
carried to the runner and nowhere kept: who sent it sends it again until the runner's shim has taken it.
"""

from typing import Final

import anyio

from controlplane import store, tables, told, views
from controlplane.desk import Desk
from controlplane.errors import Fault, RequestRefused
from controlplane.ledger import Ledger
from controlplane.requests import InputRequest, SignalRequest
from controlplane.rows import ExecutionState, IntentRow, IntentState
from controlplane.session import Session
from controlplane.store import Idempotency, Reply
from controlplane.tables import Db
from protocol.commands import ExecutionSignal, Kind
from protocol.messages import Input, InputFed

FED_WAIT_S: Final = 20.0
"""A piece that nobody took for so long is the user's again: it is sent once more, by whoever still wants it."""
SESSION_LOOK_S: Final = 0.5
"""Between two looks for a session, while there is none."""
PIECES_MAX: Final = 256
"""Pieces that wait at a time, in all: 12 MiB."""


class Running(Desk):
    """The users' side of attempts that run."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._pieces: Final[dict[str, anyio.Event]] = {}
        """Set when the runner told something of the stdin of an attempt."""
        self._fed: Final[dict[str, InputFed]] = {}

    # --- signals ------------------------------------------------------------------------------------------------

    async def ask_signal(self, execution_id: str, request: SignalRequest, asked: Idempotency | None = None) -> Reply:
        """Order a signal for an attempt. Raises RequestRefused."""
        row = self._attempt_row(execution_id, request.start_token)
        if row.state.final:
            raise RequestRefused(Fault.NOT_RUNNING, "it is over")
        args = ExecutionSignal(
            execution_id=row.id, start_token=row.start_token, signal=request.signal, to=request.to
        ).dump()
        intent = self._ledger.intent(row.runner_id, Kind.EXECUTION_SIGNAL, row.id, args)

        def order(db: Db) -> int:
            store.queue_intent(db, intent)
            return 202

        def show(db: Db, _execution_id: str) -> str:
            return self._order_view(intent, db).model_dump_json()

        return await self._ask(row.runner_id, row.id, asked, order, show)

    async def wait_order(self, cmd_id: str, timeout_s: float) -> views.Order:
        """An order once it is answered or given up, or as it is after `timeout_s`. Raises RequestRefused(UNKNOWN_ORDER)."""
        with anyio.move_on_after(timeout_s):
            while not self.closing.is_set():
                intent = self._order_row(cmd_id)
                if intent.state in (IntentState.RECEIPTED, IntentState.EXPIRED, IntentState.CANCELLED):
                    break
                await self._ledger.changed(intent.subject)
        return self._order_view(self._order_row(cmd_id), self._ledger.db.reader)

    def _order_row(self, cmd_id: str) -> IntentRow:
        row = tables.intent(self._ledger.db.reader, cmd_id)
        if row is None:
            raise RequestRefused(Fault.UNKNOWN_ORDER, "no order has this id")
        return row

    def _order_view(self, intent: IntentRow, db: Db) -> views.Order:
        return views.order_view(intent, self._ledger.name_of(intent.runner_id), told.statements(db, intent.cmd_id, 1))

    # --- stdin --------------------------------------------------------------------------------------------------

    async def feed(self, execution_id: str, request: InputRequest) -> views.Fed:
        """Carry a piece to its runner, until it is taken, nobody reads any more, or FED_WAIT_S are over.

        Raises:
            RequestRefused: UNKNOWN_EXECUTION, UNKNOWN_ATTEMPT, NOT_RUNNING, BUSY while another piece of it is on its way.
        """
        row = self._attempt_row(execution_id, request.start_token)
        name = row.attempt.name
        if row.state.final:
            raise RequestRefused(Fault.NOT_RUNNING, "it is over")
        if name in self._pieces or len(self._pieces) >= PIECES_MAX:
            raise RequestRefused(Fault.BUSY, "another piece is on its way")
        piece = Input(attempt=name, offset=request.offset, data=request.data, end=request.end, sig=request.sig)
        until = request.offset + request.size
        self._fed.pop(name, None)
        self._pieces[name] = anyio.Event()
        try:
            with anyio.move_on_after(FED_WAIT_S):
                # Before its runner has taken the start, it knows of nobody who could be fed.
                while (row := self._attempt_row(execution_id, row.start_token)).state is not ExecutionState.RUNNING:
                    if row.state.final:
                        raise RequestRefused(Fault.NOT_RUNNING, "it is over")
                    await self._ledger.changed(execution_id)
                await self._carry(row.runner_id, piece, until)
            return views.fed_view(self._fed.get(name))
        finally:
            del self._pieces[name]
            self._fed.pop(name, None)

    async def _carry(self, runner_id: str, piece: Input, until: int) -> None:
        sent: Session | None = None
        while True:
            session = self.switchboard.session_of(runner_id)
            if session is not None and session is not sent:
                session.say(piece)
                sent = session
            self._pieces[piece.attempt] = anyio.Event()
            with anyio.move_on_after(SESSION_LOOK_S):
                await self._pieces[piece.attempt].wait()
            fed = self._fed.get(piece.attempt)
            if fed is None:
                continue
            if fed.closed or fed.received >= until or fed.received < piece.offset:
                return
            if fed.credit > fed.received:
                # There was no room for all of it, and now there is.
                sent = None

    def fed(self, runner_id: str, fed: InputFed) -> None:
        """A runner took a piece, or did not: of an attempt of its own, and one that is waited for."""
        event = self._pieces.get(fed.attempt)
        if event is not None and self._ledger.owner(fed.attempt) == runner_id:
            self._fed[fed.attempt] = fed
            event.set()
