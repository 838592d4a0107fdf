"""What users ask of the control plane: each request is one transaction, and its answer is kept for the same question.

Reading is from committed rows; waiting is for an event, never a poll.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

import anyio

from controlplane import attempts, ptytables, store, tables, told, views
from controlplane.errors import Fault, RequestRefused
from controlplane.keys import Keys, token_hash
from controlplane.leasing import lease_resource
from controlplane.ledger import Ledger
from controlplane.requests import (
    ExecutionRequest,
    JoinRequest,
    PtyRequest,
    RemoveRequest,
    RerunRequest,
    StopRequest,
    WorktreeRequest,
    fitting,
    start_of,
)
from controlplane.rows import (
    ExecutionRow,
    ExecutionState,
    JoinTokenRow,
    LogRow,
    RunnerRow,
    WorktreeRow,
    WorktreeState,
)
from controlplane.store import Idempotency, Reply, Sent
from controlplane.switchboard import Switchboard
from controlplane.tables import Db
from protocol.commands import AttemptTarget, ExecutionStop, Kind, LeaseGrant, WorktreeCreate, WorktreeRemove
from protocol.identity import JOIN_TOKEN_BYTES, JoinString
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import JOIN_TOKEN_TTL_MS, LEASE_TTL_MS

_FIRST_TOKEN: Final = FencingToken(1)
Row = TypeVar("Row", ExecutionRow, WorktreeRow)


class Desk:
    """The users' side of a control plane."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger: Final = ledger
        self.switchboard: Final = Switchboard(ledger)
        self.closing: Final = anyio.Event()
        """Set when the plane is about to end: whoever waits for something stops waiting."""

    @property
    def keys(self) -> Keys:
        """Its keys."""
        return self._ledger.keys

    @property
    def now_ms(self) -> int:
        """Its clock."""
        return self._ledger.clock()

    # --- join tokens --------------------------------------------------------------------------------------------

    async def join_token(
        self, name: str | None = None, labels: dict[str, str] | None = None, *, asked: Idempotency | None = None
    ) -> views.Join:
        """A join string for one runner, bound to `name` and `labels` where they are given."""
        request = JoinRequest(name=name, labels=labels or {})
        keys, now_ms, salt = self.keys, self.now_ms, self._ledger.entropy(JOIN_TOKEN_BYTES)
        expires_ms = now_ms + JOIN_TOKEN_TTL_MS
        row = JoinTokenRow(
            hash=token_hash(keys.join_token(salt)), name=request.name, labels=request.labels, expires_ms=expires_ms
        )

        def apply(db: Db) -> Reply:
            before = store.replayed(db, asked, now_ms)
            if before is not None:
                return before
            tables.put_join_token(db, row)
            # The token itself is never stored: it is made again from its salt.
            made = Reply(201, json.dumps({"salt": salt.hex(), "name": row.name, "expires_ms": expires_ms}))
            store.remember(db, asked, made, now_ms)
            return made

        made = json.loads((await self._ledger.db.write(apply)).body)
        host, port = self._ledger.address
        join = JoinString(host, port, keys.join_token(bytes.fromhex(made["salt"])), keys.root.fingerprint)
        return views.Join(join=str(join), name=made["name"], expires_ms=made["expires_ms"])

    # --- executions ---------------------------------------------------------------------------------------------

    async def submit_execution(self, runner_ref: str, request: ExecutionRequest) -> views.Execution:
        """Ask a runner to run something. Raises RequestRefused."""
        return views.Execution.model_validate_json((await self.ask_execution(runner_ref, request)).body)

    async def ask_execution(
        self, runner_ref: str, request: ExecutionRequest | PtyRequest, asked: Idempotency | None = None
    ) -> Reply:
        """As `submit_execution`, under an Idempotency-Key; also for what has a terminal."""
        ledger, runner, now_ms = self._ledger, self._ledger.runner(runner_ref), self.now_ms
        attempt = Attempt(ExecutionId(ledger.new_id("ex")), _FIRST_TOKEN)
        lease = LeaseGrant(
            res=lease_resource(attempt.execution_id), token=_FIRST_TOKEN, ttl_ms=LEASE_TTL_MS, on_loss=request.on_loss
        )
        args = start_of(request, runner.id, runner.seal_x, attempt)
        kind = Kind.PTY_OPEN if isinstance(request, PtyRequest) else Kind.EXECUTION_START
        intent = replace(ledger.intent(runner.id, kind, attempt.execution_id, args), lease=lease.dump())
        row = ExecutionRow(
            id=attempt.execution_id,
            runner_id=runner.id,
            start_token=attempt.start_token,
            state=ExecutionState.QUEUED,
            argv=tuple(request.argv),
            cwd=request.cwd,
            worktree_id=request.worktree,
            cmd_id=intent.cmd_id,
            created_ms=now_ms,
        )

        def start(db: Db) -> int:
            store.start_execution(db, row, intent)
            return 202

        return await self._ask(runner.id, row.id, asked, start, self._show_execution)

    async def stop_execution(self, execution_id: str, grace_ms: int | None = None) -> views.Execution:
        """Ask for the end of an execution; idempotent. Raises RequestRefused(UNKNOWN_EXECUTION)."""
        reply = await self.ask_stop(execution_id, StopRequest(grace_ms=grace_ms))
        return views.Execution.model_validate_json(reply.body)

    async def ask_stop(self, execution_id: str, request: StopRequest, asked: Idempotency | None = None) -> Reply:
        """As `stop_execution`, under an Idempotency-Key; 200 when it was over already."""
        if request.runner is not None or request.start_token is not None:
            return await self._ask_attempt_stop(execution_id, request, asked)
        row = self._execution_row(execution_id)
        target = AttemptTarget(type="attempt", execution_id=row.id, start_token=row.start_token)
        args = ExecutionStop(target=target, grace_ms=request.grace_ms).dump()
        kind = ptytables.stop_kind(self._ledger.db.reader, row)
        intent = self._ledger.intent(row.runner_id, kind, row.id, args)

        def stop(db: Db) -> int:
            before = tables.execution(db, execution_id)
            store.stop_execution(db, execution_id, intent)
            return 200 if before is not None and before.state.final else 202

        return await self._ask(row.runner_id, row.id, asked, stop, self._show_execution)

    async def _ask_attempt_stop(self, execution_id: str, request: StopRequest, asked: Idempotency | None) -> Reply:
        """Sign a stop of one attempt at one runner, whatever is known of it here."""
        reader = self._ledger.db.reader
        current = tables.execution(reader, execution_id)
        named = tables.attempt(reader, execution_id, request.start_token) or current
        if request.runner is not None:
            runner = self._ledger.runner(request.runner)
        elif named is not None:
            runner = self._ledger.runners[named.runner_id]
        else:
            raise RequestRefused(Fault.UNKNOWN_EXECUTION, "no execution has this id: name the runner it lives at")
        token = request.start_token or self._token_at(runner, execution_id, current)
        attempt = Attempt(ExecutionId(execution_id), FencingToken(token))
        if current is not None and current.attempt == attempt and (current.over or not current.state.final):
            return await self.ask_stop(execution_id, StopRequest(grace_ms=request.grace_ms), asked)
        cmd_id = ""

        def stop(db: Db) -> int:
            nonlocal cmd_id
            cmd_id = attempts.stop(db, attempt, runner.id, self._ledger.intent, grace_ms=request.grace_ms)
            return 202

        def show(_db: Db, _execution_id: str) -> str:
            return views.Stop(
                id=execution_id,
                runner=runner.id,
                runner_name=runner.name,
                start_token=attempt.start_token,
                cmd_id=cmd_id,
                state="stopping",
            ).model_dump_json()

        return await self._ask(runner.id, execution_id, asked, stop, show)

    def _token_at(self, runner: RunnerRow, execution_id: str, current: ExecutionRow | None) -> int:
        """Which attempt is meant: the one that the runner names and we do not know, else our own of it."""
        session = self.switchboard.session_of(runner.id)
        named = [Attempt.parse(name) for name in session.unknown] if session is not None else []
        tokens = [attempt.start_token for attempt in named if attempt.execution_id == execution_id]
        if not tokens and current is not None and current.runner_id == runner.id:
            tokens = [current.attempt.start_token]
        if len(tokens) != 1:
            raise RequestRefused(Fault.UNKNOWN_ATTEMPT, "the runner names no attempt of it, or several: give its token")
        return tokens[0]

    async def ask_rerun(self, execution_id: str, request: RerunRequest, asked: Idempotency | None = None) -> Reply:
        """Another attempt of an execution, on its runner or on another one. Raises RequestRefused."""
        ledger, row = self._ledger, self._execution_row(execution_id)
        runner = ledger.runner(request.runner or row.runner_id)
        elsewhere: tuple[str, ...] = ()

        def rerun(db: Db) -> int:
            nonlocal elsewhere
            _, elsewhere = attempts.rerun(db, execution_id, runner, request.secrets, ledger.intent)
            return 202

        reply = await self._ask(runner.id, execution_id, asked, rerun, self._show_execution)
        for other in elsewhere:
            await self.switchboard.dispatch(other)
        return reply

    async def rerun_execution(
        self, execution_id: str, runner: str | None = None, secrets: dict[str, str] | None = None
    ) -> views.Execution:
        """As `ask_rerun`, for once."""
        reply = await self.ask_rerun(execution_id, RerunRequest(runner=runner, secrets=secrets or {}))
        return views.Execution.model_validate_json(reply.body)

    def attempts(self, execution_id: str) -> list[views.Execution]:
        """Every attempt of an execution, oldest first. Raises RequestRefused(UNKNOWN_EXECUTION)."""
        self._execution_row(execution_id)
        return [self._execution_view(row) for row in tables.attempts(self._ledger.db.reader, execution_id)]

    def execution(self, execution_id: str) -> views.Execution:
        """An execution as it is. Raises RequestRefused(UNKNOWN_EXECUTION)."""
        return self._execution_view(self._execution_row(execution_id))

    def executions(self, runner: str | None, state: str | None, limit: int) -> list[views.Execution]:
        """Executions, newest first. Raises RequestRefused(UNKNOWN_RUNNER)."""
        rows = tables.executions(self._ledger.db.reader, self._runner_filter(runner), state, limit)
        return [self._execution_view(row) for row in rows]

    async def wait_execution(self, execution_id: str, timeout_s: float) -> views.Execution:
        """An execution once it is final, or as it is after `timeout_s`. Raises RequestRefused(UNKNOWN_EXECUTION)."""
        row = await self._wait(execution_id, timeout_s, lambda: self._execution_row(execution_id))
        return self._execution_view(row)

    # --- worktrees ----------------------------------------------------------------------------------------------

    async def submit_worktree(self, runner_ref: str, request: WorktreeRequest) -> views.Worktree:
        """Ask a runner for a worktree. Raises RequestRefused."""
        return views.Worktree.model_validate_json((await self.ask_worktree(runner_ref, request)).body)

    async def ask_worktree(self, runner_ref: str, request: WorktreeRequest, asked: Idempotency | None = None) -> Reply:
        """As `submit_worktree`, under an Idempotency-Key."""
        ledger, runner = self._ledger, self._ledger.runner(runner_ref)
        worktree_id = request.id or ledger.new_id("wt")
        create = WorktreeCreate(worktree_id=worktree_id, repo=request.repo, base=request.base, branch=request.branch)
        intent = ledger.intent(runner.id, Kind.WORKTREE_CREATE, worktree_id, fitting(create.dump()))
        row = WorktreeRow(
            id=worktree_id,
            runner_id=runner.id,
            state=WorktreeState.QUEUED,
            repo=request.repo,
            base=request.base,
            branch=request.branch,
            cmd_id=intent.cmd_id,
            created_ms=self.now_ms,
        )

        def create_row(db: Db) -> int:
            store.create_worktree(db, row, intent)
            return 202

        return await self._ask(runner.id, row.id, asked, create_row, self._show_worktree)

    async def remove_worktree(self, worktree_id: str, *, force: bool = False) -> views.Worktree:
        """Ask for the removal of a worktree. Raises RequestRefused."""
        reply = await self.ask_removal(worktree_id, RemoveRequest(force=force))
        return views.Worktree.model_validate_json(reply.body)

    async def ask_removal(self, worktree_id: str, request: RemoveRequest, asked: Idempotency | None = None) -> Reply:
        """As `remove_worktree`, under an Idempotency-Key."""
        row = self._worktree_row(worktree_id)
        args = WorktreeRemove(worktree_id=worktree_id, force=request.force).dump()
        intent = self._ledger.intent(row.runner_id, Kind.WORKTREE_REMOVE, worktree_id, args)

        def remove(db: Db) -> int:
            store.remove_worktree(db, worktree_id, intent)
            return 202

        return await self._ask(row.runner_id, row.id, asked, remove, self._show_worktree)

    def worktree(self, worktree_id: str) -> views.Worktree:
        """A worktree as it is. Raises RequestRefused(UNKNOWN_WORKTREE)."""
        return self._worktree_view(self._worktree_row(worktree_id))

    def worktrees(self, runner: str | None, limit: int) -> list[views.Worktree]:
        """Worktrees, newest first. Raises RequestRefused(UNKNOWN_RUNNER)."""
        rows = tables.worktrees(self._ledger.db.reader, self._runner_filter(runner), limit)
        return [self._worktree_view(row) for row in rows]

    async def wait_worktree(self, worktree_id: str, timeout_s: float) -> views.Worktree:
        """A worktree once its last order is answered, or as it is after `timeout_s`."""
        row = await self._wait(worktree_id, timeout_s, lambda: self._worktree_row(worktree_id))
        return self._worktree_view(row)

    # --- inside -------------------------------------------------------------------------------------------------

    async def _ask(
        self,
        runner_id: str,
        subject: str,
        asked: Idempotency | None,
        apply: Callable[[Db], int],
        show: Callable[[Db, str], str],
    ) -> Reply:
        """One transaction: the replayed answer, or the effect, the numbering of what may be sent, and the answer's memory."""
        ledger, now_ms = self._ledger, self._ledger.clock()
        permit = self.switchboard.permit(runner_id)

        def transact(db: Db) -> tuple[Reply, Sent]:
            before = store.replayed(db, asked, now_ms)
            if before is not None:
                return before, Sent()
            status = apply(db)
            sent = Sent() if permit is None else store.dispatch(db, runner_id, ledger.keys.org, permit, now_ms)
            reply = Reply(status, show(db, subject))
            store.remember(db, asked, reply, now_ms)
            return reply, sent

        def settle(done: tuple[Reply, Sent]) -> None:
            self.switchboard.sent(runner_id, done[1])
            ledger.refresh((subject,))
            ledger.hold(subject)

        writing = ledger.db.write(transact, settle)
        writing.add_done_callback(lambda _: self.switchboard.repay(runner_id, permit))
        reply, _ = await writing
        # An older intent may have had the place; whatever still fits goes now.
        await self.switchboard.dispatch(runner_id)
        return reply

    async def _wait(self, about: str, timeout_s: float, read: Callable[[], Row]) -> Row:
        """What `read` gives once it is final, or when the time is over or the plane ends."""
        row = read()
        with anyio.move_on_after(timeout_s):
            while not row.state.final and not self.closing.is_set():
                await self._ledger.changed(about)
                row = read()
        return row

    def _runner_filter(self, ref: str | None) -> str | None:
        """The id for a filter: also of runners that were replaced."""
        return ref if ref is None or ref in self._ledger.runners else self._ledger.runner(ref).id

    def _execution_row(self, execution_id: str) -> ExecutionRow:
        row = tables.execution(self._ledger.db.reader, execution_id)
        if row is None:
            raise RequestRefused(Fault.UNKNOWN_EXECUTION, "no execution has this id")
        return row

    def _attempt_row(self, execution_id: str, start_token: int | None) -> ExecutionRow:
        """One attempt of an execution, without a token the current one."""
        if start_token is None:
            return self._execution_row(execution_id)
        row = tables.attempt(self._ledger.db.reader, execution_id, start_token)
        if row is None:
            raise RequestRefused(Fault.UNKNOWN_ATTEMPT, "no attempt of it has this token")
        return row

    def _worktree_row(self, worktree_id: str) -> WorktreeRow:
        row = tables.worktree(self._ledger.db.reader, worktree_id)
        if row is None:
            raise RequestRefused(Fault.UNKNOWN_WORKTREE, "no worktree has this id")
        return row

    def _execution_view(self, row: ExecutionRow) -> views.Execution:
        return self._shown(self._ledger.db.reader, row, self._ledger.logs.peek(row.attempt.name))

    def _shown(self, db: Db, row: ExecutionRow, log: LogRow | None) -> views.Execution:
        waits, size = self.switchboard.waits(db, row), ptytables.size_of(db, row)
        return views.execution_view(row, self._ledger.name_of(row.runner_id), log, waits, size)

    def _worktree_view(self, row: WorktreeRow, db: Db | None = None) -> views.Worktree:
        waits = self.switchboard.waits(db or self._ledger.db.reader, row)
        return views.worktree_view(row, self._ledger.name_of(row.runner_id), waits)

    def _show_execution(self, db: Db, execution_id: str) -> str:
        """As it is inside the transaction, as JSON text."""
        row = tables.execution(db, execution_id)
        assert row is not None, "the transaction wrote or read it"
        return self._shown(db, row, told.log(db, row.attempt.name)).model_dump_json()

    def _show_worktree(self, db: Db, worktree_id: str) -> str:
        row = tables.worktree(db, worktree_id)
        assert row is not None, "the transaction wrote or read it"
        return self._worktree_view(row, db).model_dump_json()
