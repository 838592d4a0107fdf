"""What users ask of PTYs: to open one, to be let in as a viewer, to close it.

A PTY is an execution whose start is `pty.open`; its states, receipts and settlement are those of one. A viewer is let in by an order
of its own, which names its key, and by a ticket, which opens one connection.
"""

from typing import Final

import anyio

from controlplane import ptytables, store, tables, views
from controlplane.errors import Fault, RequestRefused
from controlplane.ledger import Ledger
from controlplane.limits import PTY_ATTACH_WAIT_S, TICKET_TTL_MS
from controlplane.ptyhub import Hub
from controlplane.ptysocket import PtySocket
from controlplane.requests import AttachRequest, PtyRequest, StopRequest
from controlplane.rows import ExecutionRow, ExecutionState, IntentState
from controlplane.running import Running
from controlplane.store import Idempotency, Reply
from controlplane.tickets import Ticket, Tickets
from protocol.commands import Kind, PtyAttach, ViewerMode
from protocol.receipt import Outcome


class Terminals(Running):
    """The users' side of PTYs."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.hub: Final = Hub(ledger, self.switchboard.session_of)
        self.switchboard.line_changed = self.hub.line_changed
        self._tickets: Final = Tickets(ledger.boot_clock, ledger.entropy)
        self.pty_socket: Final = PtySocket(self.hub, self._tickets, self._admitted, lambda: ledger.address)

    async def ask_pty(self, request: PtyRequest, asked: Idempotency | None = None) -> Reply:
        """Open a PTY. Raises RequestRefused."""
        return await self.ask_execution(request.runner, request, asked)

    def ptys(self, runner: str | None, *, everything: bool, limit: int) -> list[views.Execution]:
        """PTYs that have not ended, or all, newest first. Raises RequestRefused(UNKNOWN_RUNNER)."""
        rows = ptytables.ptys(self._ledger.db.reader, self._runner_filter(runner), everything=everything, limit=limit)
        return [self._execution_view(row) for row in rows]

    def pty(self, execution_id: str) -> views.Execution:
        """A PTY as it is. Raises RequestRefused(UNKNOWN_EXECUTION | NOT_A_PTY)."""
        return self._execution_view(self._pty_row(execution_id))

    async def ask_close(self, execution_id: str, request: StopRequest, asked: Idempotency | None = None) -> Reply:
        """Hang a PTY up. Raises RequestRefused(UNKNOWN_EXECUTION | NOT_A_PTY)."""
        self._pty_row(execution_id)
        return await self.ask_stop(execution_id, request, asked)

    async def attach(self, execution_id: str, request: AttachRequest) -> views.Attached:
        """Have a viewer let in, and give it a ticket. One that was let in, or a PTY that has ended, needs no runner.

        Raises:
            RequestRefused: UNKNOWN_EXECUTION, NOT_A_PTY, DUPLICATE_VIEWER, ATTACH_REFUSED with the runner's reason, or RUNNER_SILENT.
        """
        row = self._pty_row(execution_id)
        with anyio.move_on_after(PTY_ATTACH_WAIT_S):
            # Before its runner has taken the start, it knows of no PTY.
            while (row := self._pty_row(execution_id)).state in (ExecutionState.QUEUED, ExecutionState.SENT):
                if self.closing.is_set():
                    break
                await self._ledger.changed(execution_id)
            if row.state.final:
                return self._let_in(row, request.viewer or self._ledger.new_id("vw"), ViewerMode.READ)
            if row.state is ExecutionState.RUNNING:
                return await self._order_attach(row, request)
        raise RequestRefused(Fault.RUNNER_SILENT, "its runner has not answered yet: ask again")

    async def _order_attach(self, row: ExecutionRow, request: AttachRequest) -> views.Attached:
        cmd_id, viewer = self._known(row, request)
        if cmd_id is None:
            args = PtyAttach(
                execution_id=row.id, start_token=row.start_token, viewer=viewer, key=request.key, mode=request.mode
            )
            intent = self._ledger.intent(row.runner_id, Kind.PTY_ATTACH, row.id, args.dump())
            await self._ledger.db.write(lambda db: store.queue_intent(db, intent))
            await self.switchboard.dispatch(row.runner_id)
            cmd_id = intent.cmd_id
        try:
            said = await self.wait_order(cmd_id, PTY_ATTACH_WAIT_S)
        finally:
            if (open_one := tables.intent(self._ledger.db.reader, cmd_id)) and open_one.state is IntentState.QUEUED:
                self._ledger.db.write(lambda db: ptytables.call_back(db, cmd_id))
        if said.outcome == Outcome.DONE:
            return self._let_in(row, viewer, request.mode)
        if said.outcome is not None:
            raise RequestRefused(Fault.ATTACH_REFUSED, ": ".join(filter(None, (said.reason, said.detail))))
        raise RequestRefused(Fault.RUNNER_SILENT, "its runner has not answered yet: ask again")

    def _known(self, row: ExecutionRow, request: AttachRequest) -> tuple[str | None, str]:
        """The order that let this viewer in, or is about to, and its name; a new name where it is a new one."""
        for intent, asked in ptytables.admitted(self._ledger.db.reader, row):
            same = (asked.key, asked.mode) == (request.key, request.mode)
            if same and request.viewer in (None, asked.viewer):
                return intent.cmd_id, asked.viewer
            if request.viewer == asked.viewer:
                raise RequestRefused(Fault.DUPLICATE_VIEWER, "the viewer has another key or mode")
        return None, request.viewer or self._ledger.new_id("vw")

    def _let_in(self, row: ExecutionRow, viewer: str, mode: ViewerMode) -> views.Attached:
        return views.Attached(
            viewer=viewer,
            ticket=self._tickets.issue(row.attempt, viewer, mode),
            expires_ms=self.now_ms + TICKET_TTL_MS,
            attempt=row.attempt.name,
            mode=mode,
        )

    def _admitted(self, ticket: Ticket) -> ExecutionRow:
        return self._attempt_row(ticket.attempt.execution_id, ticket.attempt.start_token)

    def _pty_row(self, execution_id: str) -> ExecutionRow:
        row = self._execution_row(execution_id)
        if ptytables.size_of(self._ledger.db.reader, row) is None:
            raise RequestRefused(Fault.NOT_A_PTY, "it has no terminal")
        return row
