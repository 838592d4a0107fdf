"""The journal against kill -9, files that cannot grow, full disks and damaged ones."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import Reason
from runner import failpoints
from runner.adapters.journal import SqliteJournal, measure_fsync
from runner.core.journaling import PutCommand
from runner.errors import JournalBroken
from tests.unit.runner.journalrows import command, rows, whole

TOP = str(Path(__file__).parents[3])

WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {top!r})
from runner.adapters.journal import SqliteJournal
from runner.errors import JournalBroken
from tests.unit.runner.journalrows import numbered, whole
async def main():
    async with SqliteJournal(Path(sys.argv[1])) as journal:
        hw = (await journal.load()).out_head
        for n in range(hw + 1, hw + 100_000):
            try:
                await journal.commit(numbered(n))
            except JournalBroken as exc:
                print(exc.reason, flush=True)
                sys.exit(3)
            print(n, flush=True)
{before}
asyncio.run(main())
"""


def start_writer(path: Path, armed: str = "", before: str = "") -> subprocess.Popen[str]:
    """A process that commits one number after the other, and says each when it was acknowledged."""
    code = WRITER.format(top=TOP, before=before)
    environ = {**os.environ, failpoints.ENVIRONMENT: armed}
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environ)


@pytest.mark.slow
async def test_everything_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Killed at some moment, again and again: what was said is there, and no transaction is there in part."""
    path, reached = tmp_path / "journal.db", 0
    for more in (1, 7, 60, 150):
        with start_writer(path) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                if int(line) >= reached + more:
                    break
            writer.kill()
            said = [int(line), *map(int, writer.stdout.read().split())]
        assert await whole(path) in (said[-1], said[-1] + 1)
        reached = await whole(path)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "there"), [("journal.before_commit", 2), ("journal.after_commit", 3)])
async def test_the_points_around_the_commit_are_where_they_say(tmp_path: Path, point: str, there: int) -> None:
    """Before it nothing of the third is there, after it all of it, and neither was acknowledged."""
    path = tmp_path / "journal.db"
    with start_writer(path, armed=f"{point}=3*kill") as writer:
        assert writer.stdout is not None
        assert writer.stdout.read().split() == ["1", "2"]
        assert writer.wait(30) == -signal.SIGKILL
    assert await whole(path) == there


@pytest.mark.slow
async def test_a_file_that_cannot_grow_ends_in_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """The reserve takes many sentences; then the journal is broken, and what it acknowledged is there."""
    path = tmp_path / "journal.db"
    limit = 4_600_000
    before = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))"
    )
    with start_writer(path, before=before) as writer:
        assert writer.stdout is not None
        said = writer.stdout.read().split()
        assert writer.wait(60) == 3
    assert said[-1] in (Reason.INFRA, Reason.DISK_FULL)
    acknowledged = int(said[-2])
    assert acknowledged > 1000
    assert await whole(path) == acknowledged


FULL_DISK = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {top!r})
from runner.adapters.journal import SqliteJournal
from runner.errors import JournalBroken
from tests.unit.runner.journalrows import numbered, whole
async def main():
    path = Path(sys.argv[1]) / "journal.db"
    async with SqliteJournal(path) as journal:
        filler = os.open(Path(sys.argv[1]) / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            while os.write(filler, bytes(4096)):
                pass
        except OSError:
            os.close(filler)
        n = 0
        try:
            while True:
                n += 1
                await journal.commit(numbered(n))
        except JournalBroken as exc:
            print(exc.reason, n - 1)
    print(await whole(path))
    os.unlink(Path(sys.argv[1]) / "filler")
    print(await whole(path))
asyncio.run(main())
"""


def may_mount() -> bool:
    """Whether a private file system can be had here."""
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="a small file system of its own needs the right to mount")
def test_a_full_disk_lets_it_finish_its_sentences(tmp_path: Path) -> None:
    """With not a byte free, hundreds of commands are still received and receipted; then it is DISK_FULL, and all is there."""
    code = FULL_DISK.format(top=TOP)
    mount = 'mount -t tmpfs -o size=24m none "$1" && exec "$2" -c "$3" "$1"'
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    reason, acknowledged, *there = ended.stdout.split()
    assert reason == Reason.DISK_FULL
    assert int(acknowledged) > 300
    # A daemon that starts on the full disk finds all of it, and so does one that starts when there is room again.
    assert there == [acknowledged, acknowledged]


async def test_a_damaged_page_is_found_at_open(tmp_path: Path) -> None:
    """Overwritten pages of the tables do not pass the check."""
    path = tmp_path / "journal.db"
    async with SqliteJournal(path) as journal:
        await journal.commit([PutCommand(command(n), n) for n in range(1, 200)])
    (page,) = rows(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'command'")[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)
    with pytest.raises(JournalBroken):
        await SqliteJournal(path).open()


def test_fsync_is_measured(tmp_path: Path) -> None:
    """Times in milliseconds; nothing stays behind."""
    assert all(0 < sample < 10_000 for sample in measure_fsync(tmp_path))
    assert list(tmp_path.iterdir()) == []
