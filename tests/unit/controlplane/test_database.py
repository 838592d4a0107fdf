"""The writer thread: groups, isolation, durability."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from controlplane import tables
from controlplane.database import SCHEMA_VERSION, Database
from controlplane.errors import StartRefused, StoreFailed
from controlplane.rows import EventRow
from controlplane.tables import Db


def add(db: Db, kind: str = "kind") -> None:
    """One row."""
    tables.add_event(db, EventRow(runner_id="rn", at_ms=1, kind=kind))


def adds(kind: str) -> Callable[[Db], None]:
    """A closure that adds one row."""
    return lambda db: add(db, kind)


def kinds(database: Database) -> list[str]:
    """Committed rows."""
    return [row.kind for row in reversed(tables.events(database.reader, None, 1000))]


async def test_what_waits_is_committed_together(tmp_path: Path) -> None:
    """A hundred askers at once cost a few transactions."""
    database = Database(tmp_path / "db")
    await asyncio.gather(*[database.write(adds(f"k{n}")) for n in range(100)])
    assert kinds(database) == [f"k{n}" for n in range(100)]
    assert database.commits < 30
    await database.close()


async def test_one_failing_closure_does_not_poison_the_others(tmp_path: Path) -> None:
    """Its own rows are rolled back, its neighbours stay."""

    def broken(db: Db) -> None:
        add(db, "half")
        raise ValueError("no")

    database = Database(tmp_path / "db")
    first, bad, last = database.write(add), database.write(broken), database.write(add)
    await first
    with pytest.raises(ValueError, match="no"):
        await bad
    await last
    assert kinds(database) == ["kind", "kind"]
    await database.close()


async def test_the_consequence_happens_though_the_asker_is_gone(tmp_path: Path) -> None:
    """A cancelled request whose transaction was on its way still updates memory."""
    database, seen = Database(tmp_path / "db"), asyncio.Event()
    asked = database.write(add, lambda _: seen.set())
    asked.cancel()
    await asyncio.wait_for(seen.wait(), 5)
    await database.close()


async def test_consequences_come_in_the_order_of_the_transactions(tmp_path: Path) -> None:
    """So memory can never be older than the file."""

    def number(n: int, db: Db) -> int:
        add(db)
        return n

    database, order = Database(tmp_path / "db"), list[int]()
    await asyncio.gather(*[database.write(partial(number, n), order.append) for n in range(50)])
    assert order == list(range(50))
    await database.close()


async def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    """A process dies by KILL right after the answer; the row is there."""
    script = (
        "import asyncio, os, sys, pathlib\n"
        "from controlplane.database import Database\n"
        "from controlplane import tables\n"
        "from controlplane.rows import EventRow\n"
        "async def main():\n"
        "    database = Database(pathlib.Path(sys.argv[1]))\n"
        "    await database.write(lambda db: tables.add_event(db, EventRow(runner_id='rn', at_ms=1, kind='last')))\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    path = tmp_path / "db"
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(path)], cwd=Path.cwd(), check=False, env=dict(os.environ)
    )
    assert died.returncode == -9
    database = Database(path)
    assert kinds(database) == ["last"]
    await database.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """An older control plane must not touch it."""
    path = tmp_path / "db"
    with sqlite3.connect(path) as made:
        made.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    made.close()
    with pytest.raises(StartRefused, match="newer version"):
        Database(path)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """With the file's name."""
    (tmp_path / "db").write_bytes(b"not a database, surely" * 100)
    with pytest.raises(StartRefused, match="db"):
        Database(tmp_path / "db")


async def test_a_disk_that_does_not_take_it_fails_the_askers(tmp_path: Path) -> None:
    """Nothing is answered as done, and the next one may succeed."""
    database = Database(tmp_path / "db")
    await database.write(lambda db: db.execute("PRAGMA max_page_count = 1").close())

    def large(db: Db) -> None:
        for n in range(2000):
            add(db, f"{n:0200}")

    with pytest.raises((StoreFailed, sqlite3.Error)):
        await database.write(large)
    await database.write(lambda db: db.execute("PRAGMA max_page_count = 1000000").close())
    await database.write(add)
    assert kinds(database) == ["kind"]
    await database.close()


async def test_a_closed_store_refuses(tmp_path: Path) -> None:
    """It does not hang."""
    database = Database(tmp_path / "db")
    await database.close()
    with pytest.raises(StoreFailed):
        await database.write(add)


async def test_events_of_one_runner_are_bounded(tmp_path: Path) -> None:
    """The newest thousand stay, others' are untouched."""
    database = Database(tmp_path / "db")
    await database.write(lambda db: tables.add_event(db, EventRow(runner_id="other", at_ms=1, kind="kept")))
    await asyncio.gather(*[database.write(adds(f"k{n}")) for n in range(1100)])
    rows = tables.events(database.reader, "rn", 5000)
    assert (len(rows), rows[0].kind, rows[-1].kind) == (1000, "k1099", "k100")
    assert len(tables.events(database.reader, "other", 10)) == 1
    await database.close()
