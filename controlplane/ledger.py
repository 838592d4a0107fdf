"""What the control plane holds in memory: hot rows, who waits for what, clock and entropy.

The database is the truth; everything here is read from committed rows, and read again after every change. One process has the
data directory, so nobody else changes them.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from controlplane import logtrim, ptytables, tables, told
from controlplane.database import Database
from controlplane.enrolment import certify
from controlplane.errors import Fault, RequestRefused
from controlplane.keys import Keys
from controlplane.leasing import Grant, Living
from controlplane.limits import INTENT_TTL_MS, PTY_LOG_BYTES, PTY_TRIM_BYTES
from controlplane.logstore import Log, LogStore
from controlplane.rows import ExecutionRow, ExecutionState, IntentRow, IntentState, LogRow, RunnerRow
from protocol.commands import Kind
from protocol.ids import ENTROPY_BYTES, Attempt, new_id

Clock = Callable[[], int]
Entropy = Callable[[int], bytes]
_log = structlog.get_logger("controlplane.ledger")


@dataclass(frozen=True, slots=True)
class Held:
    """A start that waits for the leases of attempts elsewhere, until `until_ms` at the latest."""

    runner_id: str
    after: tuple[Attempt, ...]
    until_ms: int


@dataclass(slots=True)
class Ledger:
    """Shared by what serves users and what serves runners."""

    keys: Keys
    db: Database
    clock: Clock
    """Unix milliseconds."""
    boot_clock: Clock
    """Milliseconds that only rise and count while the machine sleeps: what leases run by."""
    entropy: Entropy
    beat_ms: int
    runners: dict[str, RunnerRow] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    """What was granted of each living attempt's lease last, by attempt."""
    held: dict[str, Held] = field(default_factory=dict)
    """By the `cmd_id` of the start."""
    last_seen_ms: dict[str, int] = field(default_factory=dict)
    address: tuple[str, int] = ("127.0.0.1", 0)
    """Where runners dial in; set by the server."""
    logs: LogStore = field(init=False)
    _living: dict[str, dict[str, Living]] = field(default_factory=dict)
    """Attempts that are not final, by runner and attempt."""
    _attempts: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Those of an execution, as (runner, attempt)."""
    _waiting: dict[str, anyio.Event] = field(default_factory=dict)

    def load(self, logs_directory: Path) -> None:
        """Read the hot rows."""
        self.logs = LogStore(logs_directory, self._load_log, self._save_log, self._trim_log)
        self.runners = {row.id: row for row in tables.runners(self.db.reader)}
        living = {row.id for row in (*tables.living_executions(self.db.reader), *tables.living_earlier(self.db.reader))}
        for execution_id in living:
            self._keep(execution_id)
        for intent in tables.held_intents(self.db.reader):
            self._hold(intent)

    def new_id(self, prefix: str) -> str:
        """A fresh id."""
        return new_id(prefix, self.clock(), self.entropy(ENTROPY_BYTES))

    def intent(self, runner_id: str, kind: Kind, subject: str, args: bytes) -> IntentRow:
        """A new intent, to be queued."""
        now_ms = self.clock()
        return IntentRow(
            cmd_id=self.new_id("cm"),
            runner_id=runner_id,
            kind=kind,
            subject=subject,
            args=args,
            lease=None,
            state=IntentState.QUEUED,
            created_ms=now_ms,
            expires_ms=now_ms + INTENT_TTL_MS,
        )

    def certify(self, runner: RunnerRow, inc: int) -> str:
        """Sign a runner's certificate for an incarnation."""
        return certify(runner, inc, org=self.keys.org, key=self.keys.command, now_ms=self.clock())

    def runner(self, ref: str) -> RunnerRow:
        """A living runner by id or name. Raises RequestRefused(UNKNOWN_RUNNER)."""
        row = self.runners.get(ref)
        if row is not None and row.living:
            return row
        named = next((row for row in self.runners.values() if row.living and row.name == ref), None)
        if named is None:
            raise RequestRefused(Fault.UNKNOWN_RUNNER, "no living runner has this id or name")
        return named

    def name_of(self, runner_id: str) -> str:
        """The name of a runner, also of one that was replaced."""
        row = self.runners.get(runner_id)
        return "" if row is None else row.name

    def owner(self, attempt: str) -> str | None:
        """The runner an attempt belongs to, also an earlier one; None when it is not known here (restored from a backup, say)."""
        execution_id, token = Attempt.parse(attempt)
        return tables.owner(self.db.reader, execution_id, token)

    def living(self, runner_id: str) -> Collection[Living]:
        """The attempts of a runner that are not final."""
        return self._living.get(runner_id, {}).values()

    def is_living(self, runner_id: str, attempt: str) -> bool:
        """Whether an attempt of a runner is not final."""
        return attempt in self._living.get(runner_id, {})

    def refresh(self, touched: Sequence[str]) -> None:
        """Rows with these ids changed: read them again, wake who waits."""
        for about in touched:
            self._keep(about)
            event = self._waiting.pop(about, None)
            if event is not None:
                event.set()

    def hold(self, execution_id: str) -> None:
        """The start of an execution may have to wait: remember for how long."""
        intent = tables.held_start(self.db.reader, execution_id)
        if intent is not None and intent.cmd_id not in self.held:
            self._hold(intent)

    async def changed(self, about: str) -> None:
        """Until a row changes."""
        event = self._waiting.get(about)
        if event is None:
            event = self._waiting[about] = anyio.Event()
        await event.wait()

    def wake_all(self) -> None:
        """Whoever waits for a row or a log looks again."""
        for event in self._waiting.values():
            event.set()
        self._waiting.clear()
        self.logs.wake_all()

    def _keep(self, execution_id: str) -> None:
        """Read the attempts of an execution again."""
        for runner_id, name in self._attempts.pop(execution_id, ()):
            self._living[runner_id].pop(name, None)
        row = tables.execution(self.db.reader, execution_id)
        if row is None:
            return
        self._keep_attempt(row, None)
        for earlier in tables.earlier_attempts(self.db.reader, execution_id):
            self._keep_attempt(earlier, row.cmd_id)

    def _keep_attempt(self, row: ExecutionRow, superseded_by: str | None) -> None:
        name = row.attempt.name
        if row.state.final:
            self.grants.pop(name, None)
            self.logs.wake(name)
            return
        living = Living(
            execution_id=row.id,
            start_token=row.start_token,
            token=row.token,
            cmd_id=row.cmd_id,
            state=row.state,
            sent=row.state is not ExecutionState.QUEUED or tables.was_sent(self.db.reader, row.runner_id, row.cmd_id),
            stop_cmd_id=row.stop_cmd_id,
            superseded_by=superseded_by,
            lease_refused=row.lease_refused,
        )
        self._living.setdefault(row.runner_id, {})[name] = living
        self._attempts.setdefault(row.id, set()).add((row.runner_id, name))
        grant = self.grants.get(name)
        if living.sent and (grant is None or grant.token != row.token):
            # Numbered a moment ago, or before our own start: later than it was, never earlier.
            self.grants[name] = Grant(row.token, self.boot_clock())

    def _hold(self, intent: IntentRow) -> None:
        now_ms = self.boot_clock()
        after = tuple(map(Attempt.parse, (intent.waits_for or "").split()))
        # What is not among the grants was given up by us and not by its runner: as if it had been granted now.
        grants = [self.grants.get(attempt.name) or Grant(attempt.start_token, now_ms) for attempt in after]
        until_ms = max((grant.regrant_at_ms for grant in grants), default=now_ms)
        self.held[intent.cmd_id] = Held(intent.runner_id, after, until_ms)

    def _load_log(self, attempt: str) -> LogRow | None:
        return told.log(self.db.reader, attempt)

    def _save_log(self, row: LogRow) -> Awaitable[None]:
        return self.db.write(lambda db: told.put_log(db, row))

    async def _trim_log(self, log: Log) -> None:
        """Give up the beginning of a PTY's log that has grown long."""
        kept = log.gaps[0][1] if log.gaps and log.gaps[0][0] == 0 else 0
        if log.whole - kept <= PTY_LOG_BYTES + PTY_TRIM_BYTES or not ptytables.is_pty(self.db.reader, log.attempt):
            return
        try:
            start = await anyio.to_thread.run_sync(logtrim.cut_of, log.row, log.path)
            if start > kept:
                log.forget(start)
                # A reader that finds zeros where the row promises records would take the log for damaged.
                await log.sync(self._save_log)
                await anyio.to_thread.run_sync(logtrim.punch, log.path, start)
        except OSError as exc:
            _log.warning("log.not_trimmed", attempt=log.attempt, error=exc.strerror)
