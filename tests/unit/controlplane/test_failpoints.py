"""The plane's crash points: each is in the code, can be armed, and kills where its name says."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane import failpoints, told
from controlplane.database import Database
from controlplane.errors import StartRefused, StoreFailed
from controlplane.rows import EventRow
from controlplane.tables import Db
from tests.support.control_plane import running


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def add(db: Db) -> None:
    """One row."""
    told.add_event(db, EventRow(runner_id="rn", at_ms=1, kind="kept"))


def test_every_point_is_in_the_code_once_and_can_be_armed() -> None:
    """A name that is missing here could never be tested, one that is nowhere tests nothing."""
    sources = Path(failpoints.__file__).parent.rglob("*.py")
    hits = [name for path in sources for name in re.findall(r'failpoints\.hit\("([^"]+)"\)', path.read_text())]
    assert sorted(hits) == sorted(failpoints.NAMES)


@pytest.mark.parametrize("text", ["nowhere=kill", "plane.numbered", "plane.numbered=explode", "report.sent=kill"])
def test_a_wrong_entry_refuses_the_start(text: str, tmp_path: Path) -> None:
    """Naming the variable; a point of the runner is none of ours."""
    with pytest.raises(StartRefused, match=failpoints.ENVIRONMENT):
        failpoints.arm(text)
    environ = {**os.environ, failpoints.ENVIRONMENT: text}
    where = ["--listen", "127.0.0.1:0", "--db", str(tmp_path / "db")]
    command = [sys.executable, "-m", "controlplane.cli", "serve", *where]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert failpoints.ENVIRONMENT in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("point", "kept"), [("plane.before_commit", 0), ("plane.after_commit", 1)])
def test_a_kill_at_a_commit_is_before_or_after_it(tmp_path: Path, point: str, kept: int) -> None:
    """What the next one finds in the file."""
    script = (
        "import asyncio, pathlib, sys\n"
        "from controlplane.database import Database\n"
        "from tests.unit.controlplane.test_failpoints import add\n"
        "async def main():\n"
        "    await Database(pathlib.Path(sys.argv[1])).write(add)\n"
        "    print('answered')\n"
        "asyncio.run(main())\n"
    )
    environ = {**os.environ, failpoints.ENVIRONMENT: f"{point}=kill", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", script, str(tmp_path / "db")]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (-9, ""), ended.stderr
    with sqlite3.connect(tmp_path / "db") as db:
        assert db.execute("SELECT count(*) FROM events").fetchone() == (kept,)
    db.close()


@pytest.mark.parametrize(("point", "kept"), [("plane.before_commit", 0), ("plane.after_commit", 1)])
async def test_an_error_at_a_commit_fails_its_askers(tmp_path: Path, point: str, kept: int) -> None:
    """Nothing is answered as done; the next transaction is none of its business."""
    database = Database(tmp_path / "db")
    failpoints.arm(f"{point}=1*error(DISK_FULL)")
    with pytest.raises(StoreFailed):
        await database.write(add)
    await database.write(add)
    assert len(told.events(database.reader, None, 9)) == kept + 1
    await database.close()


@pytest.mark.slow
async def test_the_points_of_a_session_are_passed_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbered before it is sent, stored before it is answered, a beat's answer before what follows from it."""
    passed: list[str] = []
    monkeypatch.setattr(failpoints, "hit", passed.append)
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            passed.clear()
            await cp.start()
            command = await line.command()
            await line.report(runner.accepted(command))
            await line.beat()
    commit = ["plane.before_commit", "plane.after_commit"]
    wanted = [*commit, "plane.numbered", *commit, "plane.report_stored", "plane.beat_answered"]
    assert passed[: len(wanted)] == wanted
