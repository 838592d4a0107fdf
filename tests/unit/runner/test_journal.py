"""The journal keeps what it was given, keeps its own rules, and refuses what is no journal."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.envelope import digest_of
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import CommandId, WorktreeId
from protocol.messages import ItemKind, ReportItem
from protocol.replay import Mark
from runner import failpoints
from runner.adapters import journal as journal_module
from runner.adapters import journal_rows
from runner.adapters.journal import KEPT_MS, PRUNE_ROWS, QUEUED_MAX, RESERVE_BYTES, Pruned, SqliteJournal
from runner.adapters.journal_schema import MIGRATIONS, SCHEMA_VERSION, migrate
from runner.core.journaling import (
    AppendLeaf,
    DropWorktree,
    Image,
    PutAdmission,
    PutAnswered,
    PutAttempt,
    PutCommand,
    PutEvent,
    PutMark,
    PutReceipt,
    PutSettlement,
    PutTombstone,
    PutWorktree,
    WorktreeRow,
    Write,
)
from runner.core.plans import Admission, WorktreeMade
from runner.errors import JournalBroken
from tests.unit.runner.journalrows import LEASE, POLICY, SHIM, attempt, command, item, rows, settlement

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


async def test_what_was_committed_is_there_after_a_reopen(tmp_path: Path) -> None:
    """Every kind of write comes back as the value it was."""
    path = tmp_path / "journal.db"
    made = WorktreeMade(path="/w/1", head="a" * 40, branch="topic")
    full = attempt(
        1,
        state=AttemptState.STOPPING,
        shim=SHIM,
        lease=LEASE,
        stop_by="owner",
        stop_grace_ms=0,
        worktree_id=WorktreeId("wt_1"),
    )
    async with SqliteJournal(path) as journal:
        assert await journal.load() == Image(
            marks={}, commands=[], attempts=[], tombstones={}, worktrees=[], out_head=0
        )
        await journal.commit([PutCommand(command(1), 10), PutMark(1, Mark(1, digest_of(b"1"))), PutAttempt(full, 11)])
        await journal.commit(
            [PutCommand(command(2, seq=None, kind="execution.stop"), 12), PutReceipt(digest_of(b"1"), item(1), 13)]
        )
        await journal.commit([PutTombstone("ex_9.1", CommandId("cmd_2"), 99), PutEvent(item(2, ItemKind.EVENT), 14)])
        await journal.commit(
            [
                PutWorktree(WorktreeRow(worktree_id=WorktreeId("wt_1"), digest=POLICY, repo="/r", made=None)),
                PutWorktree(WorktreeRow(worktree_id=WorktreeId("wt_1"), digest=POLICY, repo="/r", made=made)),
                PutWorktree(WorktreeRow(worktree_id=WorktreeId("wt_2"), digest=POLICY, repo="/r", made=None)),
                DropWorktree(WorktreeId("wt_2")),
            ]
        )
    async with SqliteJournal(path) as journal:
        assert await journal.load() == Image(
            marks={1: Mark(1, digest_of(b"1"))},
            commands=[
                command(1, receipt_seq=1),
                command(2, seq=None, kind="execution.stop"),
            ],
            attempts=[full],
            tombstones={"ex_9.1": (CommandId("cmd_2"), 99)},
            worktrees=[WorktreeRow(worktree_id=WorktreeId("wt_1"), digest=POLICY, repo="/r", made=made)],
            out_head=2,
        )
        assert await journal.outbox(0, 10) == [item(1), item(2, ItemKind.EVENT)]
        assert await journal.outbox(1, 10) == [item(2, ItemKind.EVENT)]
        assert await journal.outbox(0, 1) == [item(1)]
        assert await journal.items([2, 7, 1]) == [item(2, ItemKind.EVENT), item(1)]


async def test_decisions_leave_leaves_that_nobody_can_change(tmp_path: Path) -> None:
    """A command, its receipt, its attempt and the settlement, each under the policy the command was judged under."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path) as journal:
        await journal.commit(
            [PutCommand(command(1), 1), PutReceipt(digest_of(b"1"), item(1), 2), PutAttempt(attempt(1), 3)]
        )
        await journal.commit([PutSettlement(attempt(1).attempt, settlement(2), 4)])
        await journal.commit([AppendLeaf("policy.loaded", "policy.toml", "", digest_of(b""), 5)])
    digest = digest_of(b"1")
    assert rows(path, "SELECT at_ms, kind, subject, detail, policy_digest FROM leaf ORDER BY n") == [
        (1, "command.received", digest, "cmd_1 execution.start 1", POLICY),
        (2, "command.receipted", digest, digest_of(b'{"n":1}'), POLICY),
        (3, "attempt.intent", "ex_1.1", "command cmd_1", POLICY),
        (4, "attempt.settled", "ex_1.1", digest_of(b'{"n":2}'), POLICY),
        (5, "policy.loaded", "policy.toml", "", digest_of(b"")),
    ]
    for statement in (
        "UPDATE leaf SET detail = 'x'",
        *(f"DELETE FROM {name}" for name in ("leaf", "command", "attempt")),
    ):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            rows(path, statement)


def a_first_version(path: Path) -> None:
    """A journal as the first version wrote it: an execution under a lease, a worktree, a report without an answer."""
    first = [*MIGRATIONS[0], "CREATE TABLE migration(n INTEGER PRIMARY KEY)", "INSERT INTO migration VALUES(1)"]
    rows_of = (
        ("stream_mark", (1, 2, digest_of(b"2"))),
        ("command", (1, digest_of(b"1"), "cmd_1", "execution.start", 1, b"envelope 1", POLICY, 10, 1)),
        ("command", (2, digest_of(b"2"), "cmd_2", "execution.start", 2, b"envelope 2", POLICY, 10, None)),
        (
            "attempt",
            (
                *("ex_1.1", digest_of(b"1"), "cmd_1", "running", SHIM.boot_id, SHIM.pid, SHIM.start),
                *(LEASE.res, LEASE.token, LEASE.ttl_ms, "stop", LEASE.deadline_ms, "lost"),
                *(None, None, "wt_1", None, 11),
            ),
        ),
        ("worktree", ("wt_1", POLICY, "/r", "/w/1", "a" * 40, "topic")),
        ("outbox", (1, "receipt", '{"n":1}', 12, None)),
        ("leaf", (1, 10, "command.received", digest_of(b"1"), "cmd_1 execution.start 1", POLICY)),
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in first:
            db.execute(statement)
        for table, values in rows_of:
            db.execute(f"INSERT INTO {table} VALUES({', '.join('?' * len(values))})", values)


async def test_a_journal_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """1. Opened, everything in it is there. 2. What the second version knows is written into it. 3. And is there, too."""
    path = tmp_path / "journal.db"
    a_first_version(path)
    made = WorktreeMade(path="/w/1", head="a" * 40, branch="topic")
    tree = WorktreeRow(worktree_id=WorktreeId("wt_1"), digest=POLICY, repo="/r", made=made)
    known = attempt(1, state=AttemptState.RUNNING, shim=SHIM, lease=LEASE, worktree_id=WorktreeId("wt_1"))
    async with SqliteJournal(path) as journal:
        assert await journal.load() == Image(
            marks={1: Mark(2, digest_of(b"2"))},
            commands=[command(1, receipt_seq=1), command(2)],
            attempts=[known],
            tombstones={},
            worktrees=[tree],
            out_head=1,
        )
        assert await journal.oldest_unanswered() == 1
        fenced = replace(known, fenced_by=2, lease=replace(LEASE, boot_id="b-2"), state=AttemptState.STOPPING)
        await journal.commit(
            [
                PutAttempt(fenced, 20),
                PutWorktree(replace(tree, token=4)),
                PutAdmission(Admission.DRAINING, 99, "owner:0", 21),
                PutSettlement(attempt(1).attempt, settlement(2), 22),
            ]
        )
    async with SqliteJournal(path) as journal:
        image = await journal.load()
    assert image.attempts == [replace(fenced, state=AttemptState.SETTLED, settled_seq=2)]
    assert (image.worktrees, image.out_head) == ([replace(tree, token=4)], 2)
    assert (image.admission, image.drain_deadline_ms) == (Admission.DRAINING, 99)
    assert rows(path, "SELECT n FROM migration") == [(number,) for number in range(1, SCHEMA_VERSION + 1)]


async def test_a_migration_that_was_interrupted_is_done_as_a_whole(tmp_path: Path) -> None:
    """The disk is full in the middle of it: the first version is there as it was, and the next start takes it on."""
    path = tmp_path / "journal.db"
    a_first_version(path)
    before = rows(path, "SELECT sql FROM sqlite_schema ORDER BY name")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_CREATE_INDEX else 0)
        with pytest.raises(sqlite3.DatabaseError):
            migrate(db)
    assert rows(path, "SELECT sql FROM sqlite_schema ORDER BY name") == before
    async with SqliteJournal(path) as journal:
        assert (await journal.load()).out_head == 1


async def test_the_reserve_is_made_again_when_half_of_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that has run for weeks has as much room for its last sentences as one that has just started; or, full, goes on."""
    path = tmp_path / "journal.db"

    def free() -> int:
        (pages,) = rows(path, "PRAGMA freelist_count")[0]
        return int(pages) * 4096

    body = '{"n":"' + "x" * 100_000 + '"}'
    numbers = iter(range(1, 10_000))
    async with SqliteJournal(path) as journal:
        least = free()
        assert least > RESERVE_BYTES * 0.9
        for _ in range(80):
            event = ReportItem.model_construct(out_seq=next(numbers), kind=ItemKind.EVENT, body=body)
            await journal.commit([PutEvent(event, 1)])
            least = min(least, free())
        assert RESERVE_BYTES * 0.4 < least < RESERVE_BYTES * 0.6
        monkeypatch.setattr(journal_module, "RESERVE_ROOM", 2**60)
        for _ in range(80):
            event = ReportItem.model_construct(out_seq=next(numbers), kind=ItemKind.EVENT, body=body)
            await journal.commit([PutEvent(event, 1)])
        assert free() < RESERVE_BYTES * 0.1


BEGUN = [PutCommand(command(1), 1), PutAttempt(attempt(1), 1), PutMark(1, Mark(5, POLICY))]


@pytest.mark.parametrize(
    "writes",
    [
        pytest.param([PutMark(1, Mark(4, POLICY))], id="a mark falls"),
        pytest.param([PutMark(1, Mark(5, digest_of(b"other")))], id="a mark changes its head"),
        pytest.param([PutCommand(command(1), 2)], id="a command twice"),
        pytest.param([PutReceipt(digest_of(b"2"), item(1), 2)], id="a receipt of nothing"),
        pytest.param([PutReceipt(digest_of(b"1"), item(n), 2) for n in (1, 2)], id="two receipts"),
        pytest.param([PutReceipt(digest_of(b"1"), item(1), 2)] * 2, id="one receipt twice"),
        pytest.param([PutReceipt(digest_of(b"1"), settlement(1), 2)], id="a settlement as a receipt"),
        pytest.param([PutEvent(item(n, ItemKind.EVENT), 2) for n in (1, 1)], id="a number twice"),
        pytest.param([PutAttempt(attempt(2), 2)], id="an attempt of no command"),
        pytest.param([PutSettlement(attempt(2).attempt, settlement(1), 2)], id="a settlement of nothing"),
        pytest.param([PutSettlement(attempt(1).attempt, settlement(n), 2) for n in (1, 2)], id="two settlements"),
        pytest.param(
            [PutSettlement(attempt(1).attempt, settlement(1), 2), PutAttempt(attempt(1), 3)], id="a settled one revived"
        ),
        pytest.param(
            [PutAttempt(attempt(1, state=AttemptState.SETTLED), 2), PutAttempt(attempt(1), 3)],
            id="a closed one revived",
        ),
    ],
)
async def test_a_broken_rule_breaks_the_journal_and_nothing_of_it_stays(tmp_path: Path, writes: list[Write]) -> None:
    """It is our own mistake: fatal for good, and what was there before is untouched."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path) as journal:
        await journal.commit(BEGUN)
        before = await journal.load()
        with pytest.raises(JournalBroken):
            await journal.commit(writes)
        with pytest.raises(JournalBroken):
            await journal.commit([PutEvent(item(9, ItemKind.EVENT), 3)])
        with pytest.raises(JournalBroken):
            await journal.load()
    async with SqliteJournal(path) as journal:
        assert await journal.load() == before
        assert await journal.outbox(0, 10) == []


async def test_calls_that_meet_share_a_transaction(tmp_path: Path) -> None:
    """Far fewer commits than callers, and all of them are there."""
    path, begun = tmp_path / "journal.db", 0
    hit = failpoints.hit

    def counting(name: str) -> None:
        nonlocal begun
        begun += name == "journal.before_commit"
        hit(name)

    callers = 2 * QUEUED_MAX
    async with SqliteJournal(path) as journal:
        failpoints.hit = counting
        try:
            async with asyncio.TaskGroup() as group:
                for n in range(1, callers + 1):
                    group.create_task(journal.commit([PutEvent(item(n, ItemKind.EVENT), n)]))
        finally:
            failpoints.hit = hit
        assert len(await journal.outbox(0, 2 * callers)) == callers
    assert 0 < begun < callers / 8


async def test_a_full_queue_holds_callers_back(tmp_path: Path) -> None:
    """While the thread stands still, no more than QUEUED_MAX calls are in the queue; then all are answered."""
    gate = tmp_path / "gate"
    async with SqliteJournal(tmp_path / "journal.db") as journal:
        failpoints.arm(f"journal.before_commit=1*pause({gate})")
        calls = [
            asyncio.ensure_future(journal.commit([PutEvent(item(n, ItemKind.EVENT), n)]))
            for n in range(1, QUEUED_MAX + 100)
        ]
        while not Path(f"{gate}.hit").exists():
            await asyncio.sleep(0.001)
        assert journal._queue.qsize() < QUEUED_MAX
        assert journal._room.locked()
        gate.touch()
        await asyncio.gather(*calls)
        assert len(await journal.outbox(0, 2 * QUEUED_MAX)) == len(calls)


async def test_a_cancelled_caller_leaves_the_others_alone(tmp_path: Path) -> None:
    """Its writes may be on the disk; those of the next are."""
    gate = tmp_path / "gate"
    async with SqliteJournal(tmp_path / "journal.db") as journal:
        failpoints.arm(f"journal.before_commit=1*pause({gate})")
        first = asyncio.ensure_future(journal.commit([PutEvent(item(1, ItemKind.EVENT), 1)]))
        while not Path(f"{gate}.hit").exists():
            await asyncio.sleep(0.001)
        first.cancel()
        second = asyncio.ensure_future(journal.commit([PutEvent(item(2, ItemKind.EVENT), 1)]))
        await asyncio.gather(first, return_exceptions=True)
        gate.touch()
        await second
        assert len(await journal.outbox(0, 9)) == 2


async def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    """It says so; closing twice is fine, and what was queued before is done."""
    journal = SqliteJournal(tmp_path / "journal.db")
    await journal.open()
    queued = asyncio.ensure_future(journal.commit([PutEvent(item(1, ItemKind.EVENT), 1)]))
    await asyncio.sleep(0)
    await journal.close()
    await queued
    await journal.close()
    with pytest.raises(JournalBroken, match="closed"):
        await journal.load()


@pytest.mark.parametrize("reason", [Reason.DISK_FULL, Reason.INFRA])
@pytest.mark.parametrize("point", ["journal.before_commit", "journal.after_commit"])
async def test_an_error_around_the_commit_is_final(tmp_path: Path, point: str, reason: Reason) -> None:
    """Before it nothing stays; after it the disk holds what was not acknowledged."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path) as journal:
        failpoints.arm(f"{point}=2*error({reason})")
        await journal.commit([PutEvent(item(1, ItemKind.EVENT), 1)])
        for _ in range(2):
            with pytest.raises(JournalBroken) as caught:
                await journal.commit([PutEvent(item(2, ItemKind.EVENT), 1)])
            assert caught.value.reason is reason
    async with SqliteJournal(path) as journal:
        assert (await journal.load()).out_head == (1 if point.endswith("before_commit") else 2)


async def test_nothing_is_done_after_a_break_not_even_what_was_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls wait, one to a transaction; the second breaks a rule, so the third never happens."""
    monkeypatch.setattr(journal_module, "BATCH_MAX", 1)
    path, gate = tmp_path / "journal.db", tmp_path / "gate"
    async with SqliteJournal(path) as journal:
        failpoints.arm(f"journal.before_commit=1*pause({gate})")
        calls = [
            asyncio.ensure_future(journal.commit([write]))
            for write in (
                PutEvent(item(1, ItemKind.EVENT), 1),
                PutEvent(item(1, ItemKind.EVENT), 1),
                PutEvent(item(2, ItemKind.EVENT), 1),
            )
        ]
        while not Path(f"{gate}.hit").exists():
            await asyncio.sleep(0.001)
        gate.touch()
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None), JournalBroken, JournalBroken]
    async with SqliteJournal(path) as journal:
        assert await journal.outbox(0, 9) == [item(1, ItemKind.EVENT)]


async def test_the_image_is_bounded_but_forgets_nothing_that_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old receipted commands and old settled attempts are left out; pending and living ones never are."""
    monkeypatch.setattr(journal_rows, "COMMANDS_REMEMBERED_MAX", 3)
    monkeypatch.setattr(journal_rows, "SETTLED_REMEMBERED_MAX", 2)
    async with SqliteJournal(tmp_path / "journal.db") as journal:
        for n in range(1, 11):
            await journal.commit([PutCommand(command(n), n), PutAttempt(attempt(n), n)])
            if n != 2:
                await journal.commit([PutReceipt(digest_of(b"%d" % n), item(2 * n), n)])
                await journal.commit([PutSettlement(attempt(n).attempt, settlement(2 * n + 1), n)])
        image = await journal.load()
    assert [row.seq for row in image.commands] == [2, 8, 9, 10]
    assert [bool(row.envelope) for row in image.commands] == [True, False, False, False]
    assert [row.attempt.name for row in image.attempts] == ["ex_2.1", "ex_9.1", "ex_10.1"]
    assert image.out_head == 21


async def test_pruning_forgets_the_old_and_answered_only(tmp_path: Path) -> None:
    """Numbers, marks, leaves, pending envelopes and unanswered reports stay."""
    path, count = tmp_path / "journal.db", PRUNE_ROWS + 5
    async with SqliteJournal(path) as journal:
        await journal.commit([PutCommand(command(n), 0) for n in range(1, count + 3)])
        await journal.commit([PutReceipt(digest_of(b"%d" % n), item(n), 0) for n in range(1, count + 2)])
        await journal.commit([PutAnswered(tuple(range(1, count + 1)), 0), PutMark(1, Mark(7, POLICY))])
        await journal.commit([PutAnswered((1, 2, 3), KEPT_MS), PutTombstone("a", CommandId("c"), 5)])
        assert await journal.prune(KEPT_MS) == Pruned(0, 0, 1)
        assert await journal.prune(KEPT_MS + 1) == Pruned(count + 1, count, 0)
        assert await journal.prune(KEPT_MS + 1) == Pruned(0, 0, 0)
        assert await journal.outbox(0, 9) == await journal.items([1, count + 1]) == [item(count + 1)]
        image = await journal.load()
    assert image.out_head == count + 1
    assert image.marks == {1: Mark(7, POLICY)}
    assert [row.envelope for row in image.commands if row.receipt_seq is None] == [b"envelope %d" % (count + 2)]
    assert rows(path, "SELECT count(*) FROM leaf") == [(2 * count + 3,)]


async def test_the_envelope_of_a_living_attempt_is_kept(tmp_path: Path) -> None:
    """Recovery may have to begin it again, receipted or not, however old; once it is settled the envelope goes."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path) as journal:
        await journal.commit(
            [PutCommand(command(1), 0), PutAttempt(attempt(1), 0), PutReceipt(digest_of(b"1"), item(1), 0)]
        )
        assert await journal.prune(KEPT_MS + 1) == Pruned(0, 0, 0)
        assert (await journal.load()).commands == [command(1, receipt_seq=1)]
        await journal.commit([PutSettlement(attempt(1).attempt, settlement(2), 0)])
        assert (await journal.load()).commands == [command(1, receipt_seq=1, envelope=b"")]
        assert await journal.prune(KEPT_MS + 1) == Pruned(1, 0, 0)


async def test_the_file_is_private_and_durable_by_its_settings(tmp_path: Path) -> None:
    """0600 for it and its companions, whatever the umask was; WAL; no reserve left inside."""
    path = tmp_path / "journal.db"
    path.touch(0o644)
    old = os.umask(0)
    try:
        async with SqliteJournal(path) as journal:
            assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {
                "journal.db": 0o600,
                "journal.db-wal": 0o600,
                "journal.db-shm": 0o600,
            }
            assert (tmp_path / "journal.db-wal").stat().st_size > 4_000_000
            pragmas = [
                await journal._ask(lambda db, name=name: db.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("journal_mode", "synchronous", "freelist_count")
            ]
            assert pragmas[:2] == ["wal", 2]
            assert pragmas[2] > 900
    finally:
        os.umask(old)


async def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    """An older runner does not touch what it cannot understand."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path):
        pass
    db = sqlite3.connect(path)
    with db:
        db.execute("INSERT INTO migration VALUES(99)")
    db.close()
    with pytest.raises(JournalBroken, match=rf"version 99, this runner knows up to {SCHEMA_VERSION}: run a newer"):
        await SqliteJournal(path).open()


def foreign_database(path: Path) -> None:
    """A database of somebody else."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes(x)")
    db.close()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path.write_bytes(b"no database at all" * 1000), "not a database"),
        (foreign_database, "no journal"),
        (lambda path: path.symlink_to("/etc/passwd"), "symbolic link"),
        (lambda path: path.mkdir(), "directory"),
    ],
)
async def test_what_is_no_journal_is_refused(tmp_path: Path, prepare: Callable[[Path], object], said: str) -> None:
    """With a sentence that names the file; a later call says the same."""
    path = tmp_path / "journal.db"
    prepare(path)
    journal = SqliteJournal(path)
    with pytest.raises(JournalBroken, match=said) as caught:
        await journal.open()
    assert str(path) in str(caught.value)
    with pytest.raises(JournalBroken):
        await journal.load()
    await journal.close()
