"""One SQLite file: a writer thread that commits in groups, and a connection for reading.

Theory of operation. Every change is a closure. The writer takes what waits (at most 256), runs each inside a savepoint, and commits
them together with one fsync, so a busy control plane pays for the disk once. A closure that fails is rolled back alone.

Rule 1: `then` of a closure runs after its commit is durable, in the event loop, whether or not the asker still waits.
Rule 2: `then`s run in the order of the transactions. Rule 3: reading sees committed rows only.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from controlplane import failpoints
from controlplane.errors import StartRefused, StoreFailed
from controlplane.limits import TRANSACTION_CLOSURES_MAX

T = TypeVar("T")
SCHEMA_VERSION: Final = 2
_BUSY_S: Final = 5.0
"""A backup that reads the file may hold it for a moment."""
_CACHE_KIB: Final = 8192


@dataclass(slots=True)
class _Change:
    apply: Callable[[sqlite3.Connection], Any]
    then: Callable[[Any], None] | None
    answer: "asyncio.Future[Any]"
    result: Any = None
    error: BaseException | None = None


class Database:
    """The control plane's file. `open` and `close` belong to one event loop; one process has the file at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file at `path`. Raises StartRefused for a file of a newer version or a damaged one."""
        self._path = path
        self._queue: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._writer = _connect(path)
        try:
            _migrate(self._writer, path)
            self.reader: Final = _connect(path)
        except BaseException:
            self._writer.close()
            raise
        self.reader.execute("PRAGMA query_only = ON")
        self.commits = 0
        """Transactions so far: for measurements."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def write(
        self, apply: Callable[[sqlite3.Connection], T], then: Callable[[T], None] | None = None
    ) -> asyncio.Future[T]:
        """Run `apply` in a transaction, then `then` with its result in the event loop.

        The future fails with what `apply` raised, or with StoreFailed when the disk did not take it.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        # Whoever asked may be gone when the answer comes; an error nobody reads is no reason for a warning.
        answer.add_done_callback(_observe)
        if self._closed:
            answer.set_exception(StoreFailed("the store is closed"))
        else:
            self._queue.put(_Change(apply, then, answer))
        return answer

    async def close(self) -> None:
        """Commit what was asked for so far and close the file."""
        self._closed = True
        self._queue.put(None)
        await self._loop.run_in_executor(None, self._thread.join)
        # The last answers were posted to the loop by the thread; let them be delivered before the connections go.
        await asyncio.sleep(0)
        self.reader.close()
        self._writer.close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group, last = self._gather(first)
            self._commit(group)
            self._loop.call_soon_threadsafe(_deliver, group)
            if last:
                return

    def _gather(self, first: _Change) -> tuple[list[_Change], bool]:
        """`first` and whatever else waits; True when the end was among it."""
        group = [first]
        while len(group) < TRANSACTION_CLOSURES_MAX:
            try:
                change = self._queue.get_nowait()
            except queue.Empty:
                break
            if change is None:
                return group, True
            group.append(change)
        return group, False

    def _commit(self, group: Sequence[_Change]) -> None:
        db = self._writer
        try:
            db.execute("BEGIN IMMEDIATE")
            for change in group:
                _apply(db, change)
            failpoints.hit("plane.before_commit")
            db.execute("COMMIT")
            self.commits += 1
            failpoints.hit("plane.after_commit")
        except (sqlite3.Error, StoreFailed) as exc:
            if db.in_transaction:
                db.execute("ROLLBACK")
            for change in group:
                change.error = StoreFailed(type(exc).__name__)


def _apply(db: sqlite3.Connection, change: _Change) -> None:
    """Run one closure so that its failure undoes only itself."""
    db.execute("SAVEPOINT change")
    try:
        change.result = change.apply(db)
    except Exception as exc:
        # A full disk may have ended the whole transaction; then the next statement fails and the group with it.
        db.execute("ROLLBACK TO change")
        change.error = exc
    db.execute("RELEASE change")


def _deliver(group: Sequence[_Change]) -> None:
    for change in group:
        if change.error is not None:
            if not change.answer.done():
                change.answer.set_exception(change.error)
            continue
        try:
            if change.then is not None:
                change.then(change.result)
        except Exception as exc:
            if not change.answer.done():
                change.answer.set_exception(exc)
            raise
        if not change.answer.done():
            change.answer.set_result(change.result)


def _observe(answer: "asyncio.Future[Any]") -> None:
    if not answer.cancelled():
        answer.exception()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        db.execute("PRAGMA trusted_schema = OFF")
    except sqlite3.Error as exc:
        db.close()
        raise StartRefused(f"{path} is not a database we can open ({type(exc).__name__})") from exc
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in a new file, bring an older one up to date step by step; a newer one is left alone."""
    try:
        version = cast(int, db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StartRefused(
                f"{path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})"
            )
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise StartRefused(f"{path} is damaged: restore it from a backup")
        if version == 0:
            _run(db, "schema.sql", SCHEMA_VERSION)
        else:
            for step in range(version, SCHEMA_VERSION):
                _run(db, f"schema_{step}_to_{step + 1}.sql", step + 1)
    except sqlite3.Error as exc:
        raise StartRefused(f"{path} is not a database we can use ({type(exc).__name__})") from exc


def _run(db: sqlite3.Connection, script: str, version: int) -> None:
    """All of a script and the version it leads to, or nothing: whoever opens it closes it after an error."""
    text = (files("controlplane") / script).read_text("utf-8")
    db.executescript(f"BEGIN IMMEDIATE;\n{text}\nPRAGMA user_version = {version};\nCOMMIT;")
