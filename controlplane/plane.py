"""The control plane put together: what REST, the gateway, tests and benchmarks all use.

`async with ControlPlane.open(directory) as plane` is a whole one, without a port; `server.run_embedded` gives it one.
"""

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from controlplane import hearing, logread, logseek, store, told, views
from controlplane.database import Database
from controlplane.errors import Fault, RequestRefused, StoreFailed
from controlplane.gateway import Gateway
from controlplane.keys import lock_directory, open_keys
from controlplane.ledger import Clock, Entropy, Ledger
from controlplane.limits import EXPIRY_SWEEP_MS, KEYSET_CHECK_MS, LAST_SEEN_FLUSH_MS
from controlplane.renewals import Renewals
from controlplane.rows import RunnerRow
from controlplane.terminals import Terminals
from protocol.errors import CloseCode, Reason
from protocol.groups import ungrouped
from protocol.keys import PublicKey
from protocol.limits import BEAT_INTERVAL_MS
from protocol.logproof import claim_of
from protocol.logselect import Start, Wish
from protocol.wire import JsonObject

DATABASE_FILE: Final = "control.db"
_STATEMENTS_MAX: Final = 1000
_log = structlog.get_logger("controlplane.plane")


def wall_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def boottime_ms() -> int:
    """CLOCK_BOOTTIME in milliseconds: it counts while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class ControlPlane(Terminals):
    """A control plane that is open. Made by `open` alone."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        renewals = Renewals(ledger, self.switchboard.beats)
        self.gateway: Final = Gateway(
            self.switchboard, renewals, ledger.clock, ledger.entropy, self.fed, self.hub.taken
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        data_dir: Path,
        *,
        db: Path | None = None,
        clock: Clock = wall_ms,
        boot_clock: Clock = boottime_ms,
        entropy: Entropy = os.urandom,
        beat_ms: int = BEAT_INTERVAL_MS,
    ) -> AsyncIterator["ControlPlane"]:
        """Open the control plane of a data directory, and make what the first start wants.

        Raises:
            StartRefused: another process has it, a secret is readable by others, or a file is damaged or newer.
        """
        lock = lock_directory(data_dir)
        try:
            keys = open_keys(data_dir, clock(), entropy)
            database = Database(db or data_dir / DATABASE_FILE)
            ledger = Ledger(keys, database, clock, boot_clock, entropy, beat_ms)
            ledger.load(data_dir / "logs")
            plane = cls(ledger)
            try:
                with ungrouped():
                    async with anyio.create_task_group() as tasks:
                        await tasks.start(ledger.logs.run)
                        tasks.start_soon(plane._every, LAST_SEEN_FLUSH_MS, plane._flush_seen)
                        tasks.start_soon(plane._every, EXPIRY_SWEEP_MS, plane._expire)
                        tasks.start_soon(plane._every, KEYSET_CHECK_MS, plane.renew_keyset)
                        try:
                            yield plane
                        finally:
                            plane.end_sessions()
                            tasks.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await plane._close()
        finally:
            os.close(lock)

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def commits(self) -> int:
        """Transactions so far."""
        return self._ledger.db.commits

    def set_address(self, host: str, port: int) -> None:
        """Say where runners dial in: it goes into join strings."""
        self._ledger.address = (host, port)

    def runners(self) -> list[views.Runner]:
        """The living runners, by name."""
        rows = sorted((row for row in self._ledger.runners.values() if row.living), key=lambda row: row.name)
        return [self._runner_view(row) for row in rows]

    def runner(self, ref: str) -> views.Runner:
        """A living runner by id or name. Raises RequestRefused(UNKNOWN_RUNNER)."""
        return self._runner_view(self._ledger.runner(ref))

    def _runner_view(self, row: RunnerRow) -> views.Runner:
        session = self.switchboard.session_of(row.id)
        return views.runner_view(
            row,
            PublicKey.from_b64url(row.x).key_id,
            online=session is not None,
            last_seen_ms=self._ledger.last_seen_ms.get(row.id, 0),
            admission="" if session is None else session.admission,
            unknown=None if session is None else session.unknown,
        )

    def published_keys(self) -> JsonObject:
        """Everything a stranger needs to verify envelopes and receipts."""
        keys = self.keys
        return {
            "root": keys.root.model_dump(mode="json"),
            "root_fingerprint": keys.root.fingerprint,
            "keyset": keys.keyset.envelope.decode(),
            "runners": [
                {"id": row.id, "x": row.x, "key_id": PublicKey.from_b64url(row.x).key_id}
                for row in self._ledger.runners.values()
            ],
        }

    def statements(self, about: str) -> list[JsonObject]:
        """Signed statements about an execution, a worktree or a command."""
        rows = told.statements(self._ledger.db.reader, about, _STATEMENTS_MAX)
        return [views.statement_view(row) for row in rows]

    def events(self, runner: str | None, limit: int) -> list[JsonObject]:
        """What was told or refused, newest first. Raises RequestRefused(UNKNOWN_RUNNER)."""
        rows = told.events(self._ledger.db.reader, self._runner_filter(runner), limit)
        return [views.event_view(row) for row in rows]

    # --- logs ---------------------------------------------------------------------------------------------------

    async def read_log(
        self, execution_id: str, offset: int, *, follow: bool, start_token: int | None = None, wish: Wish | None = None
    ) -> tuple[int, Start, AsyncIterator[bytes]]:
        """The end of a log as it is now, where its records begin, and they; `follow` goes on until it is complete.

        It is that of the execution's current attempt, or of the one with `start_token`. It begins at `offset`, or where
        what is wished for does.

        Raises:
            RequestRefused: UNKNOWN_EXECUTION, UNKNOWN_ATTEMPT, or BAD_OFFSET where no record begins.
        """
        row = self._attempt_row(execution_id, start_token)
        logs, attempt = self._ledger.logs, row.attempt.name
        log = logs.acquire(attempt, row.runner_id)
        try:
            end, start = log.end, Start(offset=offset)
            if wish is not None:
                start = await anyio.to_thread.run_sync(logseek.find_start, log.row, log.path, wish)
            elif offset > end and follow and not log.complete:
                pass  # a crash took from us what a follower has already; the runner sends it again
            elif offset > end or not await anyio.to_thread.run_sync(logread.is_boundary, log, offset):
                raise RequestRefused(Fault.BAD_OFFSET, "no record begins at this offset")
        finally:
            logs.give_back(log)

        def more() -> bool:
            return not self.closing.is_set() and self._log_grows(execution_id, row.start_token)

        async def stream() -> AsyncIterator[bytes]:
            # Acquired here: a stream that nobody begins to read must hold nothing.
            log = logs.acquire(attempt, row.runner_id)
            log.follow(1 if follow else 0)
            try:
                async for block in logread.read_log(log, start.offset, more if follow else None):
                    yield block
            finally:
                log.follow(-1 if follow else 0)
                logs.give_back(log)

        return end, start, stream()

    async def digests(self, execution_id: str, start_token: int | None = None) -> JsonObject:
        """What the stored log adds up to, and what of it is proven by the settlement.

        Raises RequestRefused(UNKNOWN_EXECUTION | UNKNOWN_ATTEMPT).
        """
        execution = self._attempt_row(execution_id, start_token)
        attempt = execution.attempt.name
        settlement = None if execution.settlement is None else json.loads(execution.settlement)
        claim = claim_of(settlement, stored=True)
        log = self._ledger.logs.acquire(attempt, execution.runner_id)
        try:
            row = log.row
            sums = await anyio.to_thread.run_sync(logread.digests, row, log.path, claim)
        finally:
            self._ledger.logs.give_back(log)
        return views.digests_view(row, settlement, sums, claim)

    def _log_grows(self, execution_id: str, start_token: int) -> bool:
        """Whether more of a log may come: not for what never ran, nor for what settled without one."""
        row = self._attempt_row(execution_id, start_token)
        if not row.state.final:
            return True
        return row.settlement is not None and json.loads(row.settlement).get("log") is not None

    # --- in the background --------------------------------------------------------------------------------------

    def end_sessions(self) -> None:
        """Say goodbye to every runner and wake who waits: the plane is about to end."""
        self.closing.set()
        for session in self.switchboard.sessions:
            session.end(Reason.GOING_AWAY, CloseCode.GOING_AWAY, "the control plane ends")
        self._ledger.wake_all()

    async def renew_keyset(self) -> None:
        """Issue the next keyset when little of this one's life is left; runners fetch it by meeting again."""
        ledger = self._ledger
        if ledger.keys.wants_renewal(ledger.clock()):
            ledger.keys = await anyio.to_thread.run_sync(ledger.keys.renewed, ledger.clock())
            _log.info("keyset.renewed", version=ledger.keys.keyset.value.version)
        for session in self.switchboard.sessions:
            if session.keyset_version < ledger.keys.keyset.value.version:
                session.end(Reason.GOING_AWAY, CloseCode.GOING_AWAY, "there is a newer keyset")

    async def _every(self, interval_ms: int, do: Callable[[], Awaitable[object]]) -> None:
        while True:
            await anyio.sleep(interval_ms / 1000)
            try:
                await do()
            except StoreFailed as exc:
                _log.error("store.failed", detail=exc.detail)

    async def _flush_seen(self) -> None:
        marks = self.switchboard.marks()
        if marks:
            await self._ledger.db.write(lambda db: hearing.seen(db, marks))

    async def _expire(self) -> None:
        now_ms = self._ledger.clock()
        await self._ledger.db.write(
            lambda db: store.expire(db, now_ms), lambda sent: self._ledger.refresh(sent.touched)
        )

    async def _close(self) -> None:
        """Everything durable, everything closed."""
        try:
            await self._flush_seen()
            await self._ledger.logs.flush()
        except StoreFailed as exc:
            _log.error("store.failed", detail=exc.detail)
        await self._ledger.db.close()
