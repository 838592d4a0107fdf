"""The logs of attempts as sparse files: file offset is log offset, holes are gaps, and durable is what was fdatasync'ed.

Theory of operation. Bytes are written where they belong as they come, by the event loop, into the page cache. A background task
syncs a log when much is unsynced, when its tail rests, or when it is complete, and only then the row that names the durable end is
written and told. After a crash the row is the truth; what the file holds beyond it is written again.

Rule 1: nothing between a frame and its bytes in the file costs a transaction, a copy or a parse.
Rule 2: `end` moves forward only, but for Rule 5. Rule 3: nothing beyond `durable` is ever acked. Rule 4: what is durable ends with a
whole record, so a runner is never asked to go on inside one. Rule 5: after a sync that failed everything behind `durable` comes again.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from controlplane.errors import StoreFailed
from controlplane.limits import (
    GAPS_MAX,
    SYNC_AFTER_BYTES,
    SYNC_AGE_MS,
    SYNC_IDLE_MS,
    SYNC_TICK_MS,
    SYNCS_AT_ONCE_MAX,
)
from controlplane.rows import LogRow
from protocol.errors import CloseCode, Reason, RemoteError

_NS_PER_MS: Final = 1_000_000
_log = structlog.get_logger("controlplane.logs")


class Log:
    """One attempt's log. Everything here happens in the event loop."""

    def __init__(self, row: LogRow, path: Path) -> None:
        self.attempt: Final = row.attempt
        self.runner_id: Final = row.runner_id
        self.path: Final = path
        self.end = row.end
        self.whole = row.end
        """Where the last record that is all there ends."""
        self.durable = row.end
        self.complete = row.complete
        self.gaps: list[tuple[int, int]] = list(row.gaps)
        self.closing: int | None = None
        """Where it will be complete, once the runner has told."""
        self.heard: Callable[[], None] | None = None
        """Called when `durable` moved; belongs to the one session that writes."""
        self.lost: Callable[[], None] | None = None
        """Called when what is not durable has to come again; belongs to the same session."""
        self.on_watch: Callable[[bool], None] | None = None
        """Called when the first follower comes or the last one goes; belongs to the same session."""
        self.users = 0
        self.watchers: Final[set[Callable[[], None]]] = set()
        """Called when something about the log changed."""
        self._followers = 0
        self._fd = -1
        self._waiting: anyio.Event | None = None
        self._unsynced_since_ns = 0
        self._written_ns = 0
        self._unsaved = False

    @property
    def row(self) -> LogRow:
        """What would be saved if everything were durable."""
        done = self.closing is not None and self.whole >= self.closing
        return LogRow(
            attempt=self.attempt,
            runner_id=self.runner_id,
            end=self.whole,
            complete=self.complete or done,
            gaps=tuple(self.gaps),
        )

    @property
    def followed(self) -> bool:
        """Whether somebody reads along."""
        return self._followers > 0

    def follow(self, more: int) -> None:
        """A follower comes (1) or goes (-1)."""
        before, self._followers = self.followed, self._followers + more
        if self.followed != before and self.on_watch is not None:
            self.on_watch(self.followed)

    def append(self, data: memoryview, *, goes_on: bool = False) -> None:
        """Write `data` at the end; `goes_on`: its last record does. Raises StoreFailed, or RemoteError behind a complete log."""
        if self.complete:
            raise RemoteError(Reason.BAD_FRAME, "the log is complete", CloseCode.BAD_FRAME)
        try:
            if self._fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self.path, flags, 0o600)
            while data:
                written = os.pwrite(self._fd, data, self.end)
                self.end += written
                data = data[written:]
        except OSError as exc:
            raise StoreFailed(f"a log cannot be written: {exc.strerror}") from exc
        if not goes_on:
            self.whole = self.end
        self._moved()

    def gap(self, end: int) -> None:
        """The log goes on at `end`; what lies before exists nowhere."""
        if self.complete or end <= self.end:
            return
        # The half of a record that is there is worth nothing without the other.
        if self.gaps and self.gaps[-1][1] == self.whole:
            self.gaps[-1] = (self.gaps[-1][0], end)
        elif len(self.gaps) >= GAPS_MAX:
            raise RemoteError(Reason.BAD_FRAME, "too many gaps in one log", CloseCode.BAD_FRAME)
        else:
            self.gaps.append((self.whole, end))
        self.end = self.whole = end
        self._moved()

    def forget(self, start: int) -> None:
        """What lies before `start` is given up: from here on it exists nowhere. It may be removed once the row is saved."""
        if start > 0:
            later = [(max(gap, start), end) for gap, end in self.gaps if end > start]
            joined = [end for gap, end in later if gap == start]
            self.gaps = [(0, joined[0] if joined else start), *(gap for gap in later if gap[0] > start)]
            self._unsaved = True

    def close(self, end: int) -> None:
        """The runner told where the log ends; it is complete when that is reached and durable."""
        if not self.complete:
            self.closing = end
            self._unsaved = True
            self.changed()

    def unsynced(self) -> bool:
        """Whether something is not durable yet."""
        return self.durable < self.whole or self._unsaved

    def due(self, now_ns: int) -> bool:
        """Whether it wants a sync now."""
        if not self.unsynced():
            return False
        ended = self.closing is not None and self.whole >= self.closing
        rested = now_ns - self._written_ns >= SYNC_IDLE_MS * _NS_PER_MS
        aged = now_ns - self._unsynced_since_ns >= SYNC_AGE_MS * _NS_PER_MS
        return ended or rested or aged or self.end - self.durable >= SYNC_AFTER_BYTES

    async def sync(self, save: Callable[[LogRow], Awaitable[object]]) -> None:
        """Make what is written durable, then its row. Raises StoreFailed."""
        row = self.row
        self._unsaved = False
        self._unsynced_since_ns = monotonic_ns()
        try:
            if self._fd >= 0:
                # A dup, since the session may let the log go while the thread is at it.
                await anyio.to_thread.run_sync(_fdatasync, os.dup(self._fd))
            await save(row)
        except BaseException as exc:
            self._unsaved = True
            if isinstance(exc, OSError):
                self._go_back()
                raise StoreFailed(f"a log cannot be synced: {exc.strerror}") from exc
            raise
        self.durable = max(self.durable, row.end)
        if not self.unsynced():
            # A session may have thousands of logs, and a process has few descriptors: only what is being written has one.
            self.release()
        self.complete = self.complete or row.complete
        if self.heard is not None:
            self.heard()
        self.changed()

    def changed(self) -> None:
        """Wake whoever follows."""
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None
        for watcher in self.watchers:
            watcher()

    async def wait(self) -> None:
        """Until something about this log changed."""
        if self._waiting is None:
            self._waiting = anyio.Event()
        await self._waiting.wait()

    def _go_back(self) -> None:
        """Forget all that is not durable: a kernel that could not write pages may drop them and call the next sync a success."""
        self.end = self.whole = self.durable
        self.gaps = [(start, min(end, self.end)) for start, end in self.gaps if start < self.end]
        self.closing = None
        if self.lost is not None:
            self.lost()

    def release(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _moved(self) -> None:
        self._written_ns = monotonic_ns()
        if not self._unsaved:
            self._unsynced_since_ns = self._written_ns
            self._unsaved = True
        if self._waiting is not None or self.watchers:
            self.changed()


def _fdatasync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


class LogStore:
    """All logs of a control plane, and the task that makes them durable."""

    def __init__(
        self,
        directory: Path,
        load: Callable[[str], LogRow | None],
        save: Callable[[LogRow], Awaitable[object]],
        trim: Callable[[Log], Awaitable[None]] | None = None,
    ) -> None:
        """`load` reads the saved row of an attempt's log; `save` writes one and returns when it is durable.

        `trim` is called behind each sync, and gives up what is not kept.
        """
        self._directory = directory
        self._load = load
        self._save = save
        self._trim = trim
        self._logs: dict[str, Log] = {}
        self._kick = anyio.Event()
        self._idle = True
        """The task sleeps until it is kicked; else it looks at every tick."""
        self._syncing: set[str] = set()
        directory.mkdir(mode=0o700, exist_ok=True)

    def acquire(self, attempt: str, runner_id: str) -> Log:
        """The log of an attempt, kept in memory until it is given back."""
        log = self._logs.get(attempt)
        if log is None:
            row = self._load(attempt) or LogRow(attempt=attempt, runner_id=runner_id)
            log = self._logs[attempt] = Log(row, self._directory / f"{attempt}.log")
        log.users += 1
        return log

    def give_back(self, log: Log) -> None:
        """Whoever acquired it needs it no more."""
        log.users -= 1
        self._forget(log)

    def peek(self, attempt: str) -> LogRow | None:
        """How far a log is: as it is written, not only what is durable."""
        log = self._logs.get(attempt)
        return log.row if log is not None else self._load(attempt)

    def wake(self, attempt: str) -> None:
        """Something outside of the log changed that its followers wait for."""
        log = self._logs.get(attempt)
        if log is not None:
            log.changed()

    def wake_all(self) -> None:
        """Every follower looks again."""
        for log in self._logs.values():
            log.changed()

    def wrote(self, log: Log) -> None:
        """A log moved: look at it soon, at once when much is unsynced or it is complete."""
        heavy = log.end - log.durable >= SYNC_AFTER_BYTES and log.attempt not in self._syncing
        if self._idle or heavy:
            self._kick.set()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Sync what is due, until cancelled."""
        limiter = anyio.Semaphore(SYNCS_AT_ONCE_MAX)
        async with anyio.create_task_group() as tasks:
            task_status.started()
            while True:
                self._idle = True
                await self._kick.wait()
                self._idle = False
                while open_logs := [log for log in self._logs.values() if log.unsynced()]:
                    now_ns = monotonic_ns()
                    for log in open_logs:
                        if log.attempt not in self._syncing and log.due(now_ns):
                            self._syncing.add(log.attempt)
                            tasks.start_soon(self._sync, log, limiter)
                    self._kick = anyio.Event()
                    with anyio.move_on_after(SYNC_TICK_MS / 1000):
                        await self._kick.wait()
                self._kick = anyio.Event()

    async def flush(self) -> None:
        """Make everything durable: the last thing before the store closes."""
        for log in list(self._logs.values()):
            if log.unsynced():
                await log.sync(self._save)
            log.release()
        self._logs.clear()

    async def _sync(self, log: Log, limiter: anyio.Semaphore) -> None:
        try:
            async with limiter:
                await log.sync(self._save)
                if self._trim is not None:
                    await self._trim(log)
        except StoreFailed as exc:
            # Nothing is acked, so the runner keeps it; the next tick tries again.
            _log.error("log.sync_failed", attempt=log.attempt, detail=exc.detail)
            await anyio.sleep(SYNC_AGE_MS / 1000)
        finally:
            self._syncing.discard(log.attempt)
            self._forget(log)

    def _forget(self, log: Log) -> None:
        if log.users == 0 and not log.unsynced() and log.attempt not in self._syncing:
            log.release()
            self._logs.pop(log.attempt, None)


def next_gap(gaps: Sequence[tuple[int, int]], offset: int) -> tuple[int, int] | None:
    """The first gap that ends behind `offset`."""
    return next((gap for gap in gaps if gap[1] > offset), None)
