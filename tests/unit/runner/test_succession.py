"""One identity follows another: what is owed is counted, what was is set aside, and a crash in between is made good."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from protocol.execution import AttemptState
from runner.adapters import succession
from runner.adapters.journal import SqliteJournal
from runner.adapters.keystore import Keystore
from runner.adapters.succession import FORMER, IDENTITY, JOURNAL, NEXT_IDENTITY, Owed, carry_through, owed
from runner.core.journaling import PutAnswered, PutAttempt, PutCommand, PutEvent, Write
from tests.support.attempts import AttemptDir
from tests.unit.runner.journalrows import attempt, command, item
from tests.unit.runner.planekeys import PlaneKeys


def enrolled(directory: Path, runner: str, plane: PlaneKeys | None = None) -> Keystore:
    """A complete identity."""
    plane = plane or PlaneKeys()
    keystore = Keystore(directory)
    mine, seal_seed = keystore.create_keys()
    certificate = plane.certificate(mine, seal_seed, runner=runner)
    keystore.keep_enrolment(plane.root, plane.keyset(), certificate, "ws://127.0.0.1:1/v1/runner")
    return keystore


async def journal_of(state: Path, *writes: Write) -> None:
    """A journal with these writes, closed."""
    async with SqliteJournal(state / JOURNAL) as journal:
        await journal.commit(list(writes))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of runner rn_1, and a complete enrolment as rn_2 that waits."""
    enrolled(tmp_path / IDENTITY, "rn_1")
    enrolled(tmp_path / NEXT_IDENTITY, "rn_2")
    return tmp_path


def who(state: Path) -> str:
    """The runner that this machine is."""
    return Keystore(state / IDENTITY).load().certificate.value.runner


async def test_what_is_owed_is_counted(tmp_path: Path) -> None:
    """Living attempts, those without a settlement, reports without an answer, logs that are not stored."""
    assert owed(tmp_path) == Owed() and not Owed().words
    await journal_of(
        tmp_path,
        PutCommand(command(1), 1),
        PutAttempt(attempt(1), 1),
        PutCommand(command(2), 1),
        PutAttempt(attempt(2, state=AttemptState.PREPARED), 1),
        PutEvent(item(1), 1),
        PutEvent(item(2), 1),
        PutAnswered((1,), 2),
    )
    living = AttemptDir(tmp_path, "ex_1.1")
    (AttemptDir(tmp_path, "ex_2.1").path / "ack").write_text("12")
    with living.held():
        found = owed(tmp_path)
    assert found == Owed(living=("ex_1.1",), unsettled=2, unreported=1, unstored_logs=1)
    assert found.words == "2 attempts without a settlement, 1 report unanswered, 1 log not stored there"


def test_a_journal_that_cannot_be_read_owes_who_knows_what(tmp_path: Path) -> None:
    """It is said, and counts as something that is owed."""
    (tmp_path / JOURNAL).write_bytes(b"no database at all" * 100)
    assert "cannot be read" in owed(tmp_path).words


async def test_what_was_is_set_aside_as_a_whole(state: Path) -> None:
    """Journal, attempts and keys of the former runner are below its name; the new one begins with nothing of it."""
    before = (state / IDENTITY / "runner.key").read_bytes()
    await journal_of(state, PutEvent(item(1), 1))
    AttemptDir(state, "ex_1.1").finish()
    (state / "worktrees").mkdir()
    former = carry_through(state)
    assert former == state / FORMER / "rn_1" and who(state) == "rn_2"
    assert sorted(path.name for path in former.iterdir()) == [IDENTITY, JOURNAL, "x"]
    assert sorted(path.name for path in state.iterdir()) == [FORMER, IDENTITY, "worktrees"]
    assert (former / IDENTITY / "runner.key").read_bytes() == before != (state / IDENTITY / "runner.key").read_bytes()
    with closing(sqlite3.connect(former / JOURNAL)) as db:
        assert db.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
    assert carry_through(state) is None


async def test_what_only_the_write_ahead_log_holds_is_not_lost(state: Path) -> None:
    """The daemon was killed: its log is folded in before the file is moved."""
    db = sqlite3.connect(state / JOURNAL, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute("CREATE TABLE outbox(n)")
    db.execute("INSERT INTO outbox VALUES(7)")
    killed = {name: (state / name).read_bytes() for name in (JOURNAL, f"{JOURNAL}-wal")}
    db.close()
    for name, content in killed.items():
        (state / name).write_bytes(content)
    former = carry_through(state)
    assert former is not None and not (former / f"{JOURNAL}-wal").exists()
    with closing(sqlite3.connect(former / JOURNAL)) as found:
        assert found.execute("SELECT n FROM outbox").fetchone() == (7,)


@pytest.mark.parametrize("survived", range(4))
def test_a_crash_in_between_is_made_good(state: Path, monkeypatch: pytest.MonkeyPatch, survived: int) -> None:
    """Cut short after any rename, the next one to hold the lock goes on; all is in one place in the end."""
    (state / JOURNAL).write_bytes(b"the journal of rn_1")
    AttemptDir(state, "ex_1.1").finish()
    rename, left = Path.rename, survived

    def die(path: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            carry_through(state)
    carry_through(state)
    assert who(state) == "rn_2"
    assert sorted(path.name for path in (state / FORMER).iterdir()) == ["rn_1"]
    assert sorted(path.name for path in (state / FORMER / "rn_1").iterdir()) == [IDENTITY, JOURNAL, "x"]
    assert (state / FORMER / "rn_1" / JOURNAL).read_bytes() == b"the journal of rn_1"


def test_an_enrolment_that_is_not_complete_changes_nothing(tmp_path: Path) -> None:
    """Keys alone are what a control plane said no to."""
    enrolled(tmp_path / IDENTITY, "rn_1")
    Keystore(tmp_path / NEXT_IDENTITY).create_keys()
    assert carry_through(tmp_path) is None
    assert who(tmp_path) == "rn_1"


def test_a_first_enrolment_sets_nothing_aside(tmp_path: Path) -> None:
    """Nothing was; but a journal without an identity is somebody's, and no beginning."""
    enrolled(tmp_path / NEXT_IDENTITY, "rn_1")
    assert carry_through(tmp_path) is None and who(tmp_path) == "rn_1"
    assert not (tmp_path / FORMER).exists()
    (tmp_path / IDENTITY).rename(tmp_path / NEXT_IDENTITY)
    (tmp_path / JOURNAL).touch()
    assert carry_through(tmp_path) == tmp_path / FORMER / succession.UNREADABLE
    assert not (tmp_path / JOURNAL).exists()


def test_two_former_ones_without_a_name_are_kept_apart(tmp_path: Path) -> None:
    """The second has a number."""
    for number in (1, 2):
        enrolled(tmp_path / NEXT_IDENTITY, f"rn_{number}")
        (tmp_path / JOURNAL).write_text(f"journal {number}")
        if number == 2:
            (tmp_path / IDENTITY / "certificate.json").write_text("damaged")
        carry_through(tmp_path)
    names = sorted(path.name for path in (tmp_path / FORMER).iterdir())
    assert names == [succession.UNREADABLE, f"{succession.UNREADABLE}.2"] and who(tmp_path) == "rn_2"
