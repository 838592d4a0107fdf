"""One terminal state: an attempt is settled by compare and set, whoever else writes at the same time."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import hearing, tables
from controlplane.database import Database
from controlplane.dispatcher import Change
from controlplane.rows import ExecutionRow, ExecutionState
from controlplane.tables import Db
from protocol.receipt import Verdict

WAIT_S = 30


def a_row(token: int = 1) -> ExecutionRow:
    """A running attempt ex_1.N."""
    return ExecutionRow(
        id="ex_1",
        runner_id="rn",
        start_token=token,
        state=ExecutionState.RUNNING,
        argv=("true",),
        cmd_id=f"cm_{token}",
        created_ms=1,
    )


def ended(row: ExecutionRow, status: int) -> ExecutionRow:
    """The attempt as a settlement would leave it."""
    return replace(
        row,
        state=ExecutionState.SETTLED,
        settlement=f'{{"code":{status}}}',
        settlement_digest=f"d{status}",
        exit_status=status,
        verdict=Verdict.EXITED,
    )


@contextmanager
def opened(path: Path) -> Iterator[Db]:
    """A connection of its own to a file."""
    db = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    try:
        yield db
    finally:
        db.close()


async def make(path: Path, *rows: ExecutionRow) -> None:
    """A database in which each row is the successor of the one before."""
    database = Database(path)
    for row in rows:
        first = row is rows[0]
        await database.write(
            lambda db, row=row, first=first: tables.add_execution(db, row) if first else tables.supersede(db, row)  # type: ignore[misc]
        )
    await database.close()


def race(path: Path, works: list[Callable[[Db], object]]) -> list[object]:
    """Each in a thread, a connection and a transaction of its own, all at once."""
    start, results = threading.Barrier(len(works)), list[object]([None] * len(works))

    def work(number: int) -> None:
        with opened(path) as db:
            start.wait(WAIT_S)
            db.execute("BEGIN IMMEDIATE")
            results[number] = works[number](db)
            db.execute("COMMIT")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return results


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["settle", "guess", "receipt"]), min_size=2, max_size=5))
def test_one_settlement_wins_and_stays(kinds: list[str]) -> None:
    """Two writers at once, in any order, among guesses and receipts: one settlement, and what it said."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "db")
        run_async(make, path, a_row())
        works: list[Callable[[Db], object]] = []
        for number, kind in enumerate([*kinds, "settle", "settle"], start=1):
            works.append(_work(kind, number))
        won = [number for number, result in enumerate(race(path, works), start=1) if result is True]
        assert len(won) == 1
        with opened(path) as db:
            row = tables.execution(db, "ex_1")
        assert row is not None
        assert (row.state, row.exit_status, row.settlement_digest) == (ExecutionState.SETTLED, won[0], f"d{won[0]}")
        assert (row.receipt is not None) == ("receipt" in kinds)


def _work(kind: str, number: int) -> Callable[[Db], object]:
    if kind == "settle":
        return lambda db: tables.settle(db, ended(a_row(), number))
    if kind == "guess":
        cancelled = replace(a_row(), state=ExecutionState.CANCELLED, exit_status=125, detail="a guess")
        # It writes the receipt, too: as a row that was read before the others wrote would.
        return lambda db: tables.put_execution(db, replace(cancelled, receipt=_receipt(db)))
    return lambda db: tables.put_execution(db, replace(a_row(), receipt="{}"))


def _receipt(db: Db) -> str | None:
    row = tables.execution(db, "ex_1")
    assert row is not None
    return row.receipt


def run_async(do: Callable[..., object], *args: object) -> None:
    """Run a coroutine function to its end in a loop of its own."""
    import asyncio

    asyncio.run(do(*args))  # type: ignore[arg-type]


async def test_a_settlement_of_an_earlier_attempt_settles_that_one_alone(tmp_path: Path) -> None:
    """Fenced is the end of the attempt, and not of the execution."""
    path = tmp_path / "db"
    await make(path, a_row(1), a_row(2))
    fenced = replace(ended(a_row(1), 125), verdict=Verdict.FENCED)
    with opened(path) as db:
        assert tables.settle(db, fenced)
        assert not tables.settle(db, fenced)
        (earlier,) = tables.earlier_attempts(db, "ex_1")
        current = tables.execution(db, "ex_1")
    assert (earlier.start_token, earlier.verdict, earlier.exit_status) == (1, "fenced", 125)
    assert current is not None
    assert (current.start_token, current.state, current.settlement) == (2, ExecutionState.RUNNING, None)


async def test_a_settlement_that_lost_the_race_is_told(tmp_path: Path) -> None:
    """What was concluded from an older row is judged again by the row that there is."""
    path = tmp_path / "db"
    await make(path, a_row())
    with opened(path) as db:
        assert hearing._keep(db, Change(settled=ended(a_row(), 1)))[1] == ""
        assert hearing._keep(db, Change(settled=ended(a_row(), 2)))[1] == "a second settlement of an attempt"


@pytest.mark.parametrize("token", [1, 2])
async def test_an_attempt_is_found_wherever_it_is(tmp_path: Path, token: int) -> None:
    """The current one and an earlier one, by the same name; a third one is nobody."""
    path = tmp_path / "db"
    await make(path, a_row(1), a_row(2))
    with opened(path) as db:
        found = tables.attempt(db, "ex_1", token)
        assert found is not None
        assert found.cmd_id == f"cm_{token}"
        assert tables.attempt(db, "ex_1", 3) is None
        assert tables.attempt(db, "ex_1", None) is None
