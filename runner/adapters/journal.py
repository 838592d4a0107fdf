"""The journal: one SQLite database, one thread that touches it, and nothing answered before it is on the disk.

Theory of operation. `commit` puts its writes into a queue and waits. The thread takes everything that is there, does it in one
transaction, and answers all of it in one call into the event loop: one hop each way, one fsync for as many callers as met.
Space for a while of writing is kept, in the file and in its write-ahead log: made at start, and again when half of it is used. So a
full disk lets the daemon finish what it has begun to say.

Rule 1: an error is final. The call that met it and every later one raise JournalBroken, since what the disk holds is unknown.
Rule 2: a read sees whatever was committed before it was asked for. Rule 3: a caller that is cancelled may have committed.
"""

import asyncio
import contextlib
import errno
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from protocol.errors import Reason
from protocol.messages import ReportItem
from runner import failpoints
from runner.adapters import journal_rows
from runner.adapters.journal_schema import SchemaRefused, migrate
from runner.core.journaling import Image, Write
from runner.errors import Broken, JournalBroken

T = TypeVar("T")

QUEUED_MAX: Final = 1024
"""Calls that wait for the thread; more are held back where they come from."""
BATCH_MAX: Final = 256
"""Calls that share a transaction: bounds how long the first of them waits."""
RESERVE_BYTES: Final = 4 * 1024 * 1024
"""Kept free in the file and in its log: several hundred settlements on a full disk, and never less than half as many."""
RESERVE_ROOM: Final = 4
"""Reserves that must be free to make one: it is written to the log and to the file, and some is left for others."""
RESERVE_AGAIN_S: Final = 60.0
"""Where none could be made it is not tried again with every commit."""
CHECKPOINT_PAGES: Final = 768
"""The write-ahead log is folded back at 3 MiB, so it stays within the space that was made for it."""
_PAGE_BYTES: Final = 4096
KEPT_MS: Final = 7 * 24 * 60 * 60 * 1000
"""Envelopes and answered reports: a control plane that comes back from a backup of this week gets them again."""
PRUNE_ROWS: Final = 500
"""Rows in one step of pruning: commits wait no longer than for this."""
BUSY_S: Final = 5.0
"""Another process that reads (doctor, a backup) may hold us for so long."""
FSYNC_SAMPLES: Final = 20
_FSYNC_BYTES: Final = 600
_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was forgotten."""

    envelopes: int
    reports: int
    tombstones: int


@dataclass(slots=True)
class _Call:
    """One caller: `writes` to commit, or else something to `do` between transactions."""

    future: asyncio.Future[Any]
    writes: Sequence[Write] = ()
    do: Callable[[sqlite3.Connection], object] | None = None
    last: bool = False


class SqliteJournal:
    """The port `Journal` on SQLite. Used from one event loop, between `open` and `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(QUEUED_MAX)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken: tuple[Reason, str] | None = None
        self._closing = False
        self._reserve_after_s = 0.0

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Open or make the file, check it and bring its tables up to date. Raises JournalBroken."""
        assert self._thread is None and not self._closing, "a journal is opened once"
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="journal", daemon=True)
        self._thread.start()
        try:
            await opened
        except BaseException:
            # Broken, or cancelled while the file was being opened: then the thread closes it again.
            self._closing = True
            self._queue.put(_Call(opened, last=True))
            raise

    async def close(self) -> None:
        """Finish what is queued and close the file; a broken journal closes too."""
        thread = self._thread
        if thread is None or self._loop is None or self._closing:
            return
        self._closing = True
        closed: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Call(closed, last=True))
        with contextlib.suppress(JournalBroken):
            await closed
        thread.join()

    async def commit(self, writes: Sequence[Write]) -> None:
        """Return when all of it is on the disk. Raises JournalBroken; then nothing more may be admitted."""
        if writes:
            await self._call(writes, None)

    async def load(self) -> Image:
        """What is known at start. Raises JournalBroken."""
        return await self._ask(journal_rows.read_image)

    async def outbox(self, above: int, limit: int) -> list[ReportItem]:
        """Report items with a higher `out_seq`, in order, answered or not. Raises JournalBroken."""
        return await self._ask(lambda db: journal_rows.read_outbox(db, above, limit))

    async def oldest_unanswered(self) -> int | None:
        """The lowest `out_seq` without an answer; None when all have theirs. Raises JournalBroken."""
        return await self._ask(journal_rows.read_oldest_unanswered)

    async def items(self, out_seqs: Sequence[int]) -> list[ReportItem]:
        """Stored report items by number; those that were pruned are left out. Raises JournalBroken."""
        return await self._ask(lambda db: journal_rows.read_items(db, out_seqs))

    async def settled(self, names: Sequence[str]) -> dict[str, int]:
        """Which of these attempts are settled, and since when (wall time). Raises JournalBroken."""
        found: dict[str, int] = {}
        for start in range(0, len(names), PRUNE_ROWS):
            # In steps: commits come in between.
            found |= await self._ask(partial(journal_rows.read_settled, names=names[start : start + PRUNE_ROWS]))
        return found

    async def prune(self, now_ms: int) -> Pruned:
        """Forget what is older than KEPT_MS (wall time): envelopes that are done with, answered reports; and expired tombstones.

        Raises JournalBroken.
        """
        before = now_ms - KEPT_MS
        return Pruned(
            envelopes=await self._forget(
                "UPDATE command SET envelope = x'' WHERE n IN (SELECT n FROM command"
                " WHERE length(envelope) > 0 AND received_ms < ? AND receipt_seq IS NOT NULL"
                " AND digest NOT IN (SELECT digest FROM attempt WHERE state != 'settled') LIMIT ?)",
                before,
            ),
            reports=await self._forget(
                "UPDATE outbox SET body = '' WHERE out_seq IN (SELECT out_seq FROM outbox"
                " WHERE length(body) > 0 AND answered_ms IS NOT NULL AND answered_ms < ? LIMIT ?)",
                before,
            ),
            tombstones=await self._forget(
                "DELETE FROM tombstone WHERE target IN (SELECT target FROM tombstone WHERE expires_ms < ? LIMIT ?)",
                now_ms,
            ),
        )

    async def _forget(self, statement: str, before_ms: int) -> int:
        count = 0
        while True:
            # Outside a transaction of ours, so each step is one of its own and commits come in between.
            step = await self._ask(lambda db: db.execute(statement, (before_ms, PRUNE_ROWS)).rowcount)
            count += step
            if step < PRUNE_ROWS:
                return count

    async def _ask(self, do: Callable[[sqlite3.Connection], T]) -> T:
        answer: T = await self._call((), do)
        return answer

    async def _call(self, writes: Sequence[Write], do: Callable[[sqlite3.Connection], object] | None) -> Any:
        assert self._thread is not None and self._loop is not None, "open the journal first"
        await self._room.acquire()
        if self._broken is not None or self._closing:
            self._room.release()
            raise JournalBroken(*(self._broken or (Reason.INFRA, "the journal is closed")))
        call = _Call(self._loop.create_future(), writes, do)
        self._queue.put(call)
        return await call.future

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, opened: asyncio.Future[None]) -> None:
        db = self._guarded(lambda: _open(self._path))
        self._tell([(opened, None)], rooms=0)
        if db is None:
            return
        last = None
        while last is None:
            last = self._turn(db)
        self._guarded(db.close)
        # Only now: whoever waits for the end may remove the file.
        self._tell([(last.future, None)], rooms=0)

    def _turn(self, db: sqlite3.Connection) -> _Call | None:
        """Do what is queued; returns the last call there will be, when it came."""
        calls = [self._queue.get()]
        with contextlib.suppress(queue.Empty):
            while len(calls) < BATCH_MAX and not calls[-1].last:
                calls.append(self._queue.get_nowait())
        last = calls.pop() if calls[-1].last else None
        committing = [call for call in calls if call.writes]
        if committing:
            self._guarded(lambda: _transact(db, committing))
            self._tell([(call.future, None) for call in committing], rooms=len(committing))
            self._guarded(lambda: self._keep_reserve(db))
        for call in calls:
            if call.do is not None:
                answer = self._guarded(partial(call.do, db))
                self._tell([(call.future, answer)], rooms=1)
        return last

    def _keep_reserve(self, db: sqlite3.Connection) -> None:
        """Whoever waits is answered by now: this is between two turns."""
        (free,) = db.execute("PRAGMA freelist_count").fetchone()
        if free * _PAGE_BYTES >= RESERVE_BYTES // 2 or time.monotonic() < self._reserve_after_s:
            return
        if not _reserve(db, self._path, "PASSIVE"):
            self._reserve_after_s = time.monotonic() + RESERVE_AGAIN_S

    def _guarded(self, do: Callable[[], T]) -> T | None:
        """Do it unless we are broken; any failure at all breaks us."""
        if self._broken is None:
            try:
                return do()
            except Exception as exc:
                self._break(exc)
        return None

    def _break(self, exc: Exception) -> None:
        if isinstance(exc, Broken):
            self._broken = (exc.reason, f"{self._path}: {exc.detail}")
        else:
            reason = Reason.DISK_FULL if _is_full(exc) else Reason.INFRA
            self._broken = (reason, f"{self._path}: {type(exc).__name__}: {exc}")

    def _tell(self, answers: Sequence[tuple[asyncio.Future[Any], object]], rooms: int) -> None:
        assert self._loop is not None, "set before the thread began"
        with contextlib.suppress(RuntimeError):
            # The loop may be gone when a process ends without closing us; then nobody waits.
            self._loop.call_soon_threadsafe(self._answer, answers, rooms, self._broken)

    def _answer(
        self, answers: Sequence[tuple[asyncio.Future[Any], object]], rooms: int, broken: tuple[Reason, str] | None
    ) -> None:
        for _ in range(rooms):
            self._room.release()
        for future, answer in answers:
            if future.done():
                continue
            if broken is not None:
                future.set_exception(JournalBroken(*broken))
            else:
                future.set_result(answer)


def _transact(db: sqlite3.Connection, calls: Sequence[_Call]) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for call in calls:
            for write in call.writes:
                journal_rows.apply(db, write)
        failpoints.hit("journal.before_commit")
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    failpoints.hit("journal.after_commit")


def _is_full(exc: Exception) -> bool:
    if isinstance(exc, sqlite3.Error):
        return getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)


def _open(path: Path) -> sqlite3.Connection:
    """Raises JournalBroken, sqlite3.Error or OSError."""
    _make_file(path)
    db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S, cached_statements=64)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        found = [row[0] for row in db.execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise JournalBroken(Reason.INFRA, f"the journal is damaged: {'; '.join(found)}")
        migrate(db)
        _reserve(db, path, "RESTART")
    except SchemaRefused as exc:
        db.close()
        raise JournalBroken(Reason.INFRA, str(exc)) from exc
    except BaseException:
        db.close()
        raise
    return db


def _make_file(path: Path) -> None:
    """The file is there, ours and private before SQLite sees it; its companions take their mode from it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    try:
        os.fchmod(fd, _MODE)
        os.fsync(fd)
    finally:
        os.close(fd)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _reserve(db: sqlite3.Connection, path: Path, checkpoint: str) -> bool:
    """Write RESERVE_BYTES and free them: pages of the file, and length of its log. False where there is no room for it."""
    try:
        # What a crash left: a log to fold back, for which a full disk may have no room, and a reserve that was not freed.
        db.execute(f"PRAGMA wal_checkpoint({checkpoint})")
        db.execute("DROP TABLE IF EXISTS reserve")
        disk = os.statvfs(path)
        if disk.f_bavail * disk.f_frsize < RESERVE_ROOM * RESERVE_BYTES:
            # Nearly full already: the last bytes are better spent on sentences, and there may be pages of an earlier time.
            return False
        db.execute("CREATE TABLE reserve(block BLOB)")
        db.execute("INSERT INTO reserve VALUES(zeroblob(?))", (RESERVE_BYTES,))
        db.execute("DROP TABLE reserve")
        db.execute(f"PRAGMA wal_checkpoint({checkpoint})")
    except sqlite3.Error as exc:
        if not _is_full(exc):
            raise
        return False
    return True


def measure_fsync(directory: Path) -> list[float]:
    """How long an append of one journal record to the disk takes, in milliseconds, several times. Raises OSError."""
    path = directory / f".fsync-{os.getpid()}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        path.unlink()
        samples = []
        for _ in range(FSYNC_SAMPLES):
            begun = time.perf_counter()
            os.write(fd, b"\0" * _FSYNC_BYTES)
            os.fdatasync(fd)
            samples.append((time.perf_counter() - begun) * 1000)
        return samples
    finally:
        os.close(fd)
