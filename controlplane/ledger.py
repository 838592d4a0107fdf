"""What the control plane holds in memory: hot rows, who waits for what, clock and entropy.

The database is the truth; everything here is read from committed rows, and read again after every change. One process has the
data directory, so nobody else changes them.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from controlplane import tables
from controlplane.database import Database
from controlplane.dispatcher import Living, lease_resource
from controlplane.enrolment import certify
from controlplane.errors import Fault, RequestRefused
from controlplane.keys import Keys
from controlplane.logstore import LogStore
from controlplane.rows import ExecutionRow, LogRow, RunnerRow
from protocol.ids import ENTROPY_BYTES, Attempt, new_id

Clock = Callable[[], int]
Entropy = Callable[[int], bytes]


@dataclass(slots=True)
class Ledger:
    """Shared by what serves users and what serves runners."""

    keys: Keys
    db: Database
    clock: Clock
    """Unix milliseconds."""
    entropy: Entropy
    beat_ms: int
    runners: dict[str, RunnerRow] = field(default_factory=dict)
    living: dict[str, dict[str, Living]] = field(default_factory=dict)
    """Executions that are not final, by runner and lease resource."""
    last_seen_ms: dict[str, int] = field(default_factory=dict)
    address: tuple[str, int] = ("127.0.0.1", 0)
    """Where runners dial in; set by the server."""
    logs: LogStore = field(init=False)
    _waiting: dict[str, anyio.Event] = field(default_factory=dict)

    def load(self, logs_directory: Path) -> None:
        """Read the hot rows."""
        self.logs = LogStore(logs_directory, self._load_log, self._save_log)
        self.runners = {row.id: row for row in tables.runners(self.db.reader)}
        for row in tables.living_executions(self.db.reader):
            self._keep(row)

    def new_id(self, prefix: str) -> str:
        """A fresh id."""
        return new_id(prefix, self.clock(), self.entropy(ENTROPY_BYTES))

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
        """The runner an attempt belongs to; None when it is not known here (restored from a backup, say)."""
        row = tables.execution(self.db.reader, Attempt.parse(attempt).execution_id)
        return None if row is None else row.runner_id

    def refresh(self, touched: Sequence[str]) -> None:
        """Rows with these ids changed: read them again, wake who waits."""
        for about in touched:
            row = tables.execution(self.db.reader, about)
            if row is not None:
                self._keep(row)
                if row.state.final:
                    self.logs.wake(row.attempt.name)
            event = self._waiting.pop(about, None)
            if event is not None:
                event.set()

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

    def _keep(self, row: ExecutionRow) -> None:
        res = lease_resource(row.id)
        mine = self.living.setdefault(row.runner_id, {})
        if row.state.final:
            mine.pop(res, None)
        else:
            mine[res] = Living(row.id, row.start_token, row.stop_cmd_id)

    def _load_log(self, attempt: str) -> LogRow | None:
        return tables.log(self.db.reader, attempt)

    def _save_log(self, row: LogRow) -> Awaitable[None]:
        return self.db.write(lambda db: tables.put_log(db, row))
