"""Attempt directories that go: as a whole, only where journal and files agree, and nothing else with them."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from runner.adapters import retention
from runner.adapters.attemptfiles import segment_name
from runner.adapters.retention import Kept, Retention, delete_aside, survey
from runner.core.inputs import Now
from tests.unit.runner.test_exitrecord import a_record
from tests.unit.runner.test_pump import Clock

DAY_MS = 86_400_000
NOW = Now(wall_ms=100 * DAY_MS, boot_ms=1)


def an_attempt(root: Path, name: str, *, age_days: int = 8, ack: int | None = 100, log: int = 100) -> Path:
    """A directory with a log of that many bytes, of which the plane has so many."""
    directory = root / "x" / name
    (directory / "log").mkdir(parents=True)
    (directory / "log" / segment_name(0)).write_bytes(b"x" * log)
    (directory / "lock").touch()
    if ack is not None:
        (directory / "ack").write_text(f"{ack}\n")
        seconds = (NOW.wall_ms - age_days * DAY_MS) / 1000
        os.utime(directory / "ack", (seconds, seconds))
    return directory


class House:
    """A state directory, what the journal knows, and what is looked at."""

    def __init__(self, root: Path, *, keep_days: int = 7, host_bytes: int = 2**40) -> None:
        self.root = root
        self.settled: dict[str, int] = {}
        self.living: set[str] = set()
        self.lacks = 0
        self.notes: list[tuple[str, Mapping[str, Any]]] = []
        self.limits: dict[str, int] = {}
        self.retention = Retention(
            limit=self.limits.__setitem__,
            state_dir=root,
            kept=Kept(keep_ms=keep_days * DAY_MS, host_bytes=host_bytes),
            clock=Clock(NOW),
            settled=self._settled,
            living=lambda: self.living,
            wanted=lambda: self.lacks,
            note=lambda event, fields: self.notes.append((event, fields)),
        )

    async def _settled(self, names: Sequence[str]) -> Mapping[str, int]:
        return {name: self.settled[name] for name in names if name in self.settled}

    async def prune(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Ask for it."""
        return await self.retention.prune(by="owner:7", dry_run=dry_run)

    @property
    def there(self) -> set[str]:
        """Names in the directory of attempts."""
        return {path.name for path in (self.root / "x").iterdir()}


async def test_only_what_files_and_journal_agree_on_goes(tmp_path: Path) -> None:
    """Old, settled, acked to its end, dead: any other stays, and so does what is nobody's."""
    house = House(tmp_path)
    unlike: dict[str, Any] = {"ex_unacked.1": {"ack": None}, "ex_half.1": {"ack": 99}, "ex_young.1": {"age_days": 6}}
    for name in ("ex_gone.1", "ex_unsettled.1", "ex_living.1", "ex_alive.1", *unlike):
        an_attempt(tmp_path, name, **unlike.get(name, {}))
        house.settled[name] = 5
    del house.settled["ex_unsettled.1"]
    house.living = {"ex_living.1"}
    (tmp_path / "x" / "notes of mine").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "ack").write_text("1\n")
    (tmp_path / "x" / "ex_link.1").symlink_to(tmp_path / "precious")
    house.settled["ex_link.1"] = 5
    os.utime(tmp_path / "precious" / "ack", (1, 1))
    before = house.there
    with open(tmp_path / "x" / "ex_alive.1" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        planned = await house.prune(dry_run=True)
        assert house.there == before and not house.notes
        said = await house.prune()
    assert [one["attempt"] for one in said["attempts"]] == ["ex_gone.1"] and said["bytes"] > 0
    assert planned["attempts"] == said["attempts"]
    assert (said["left"]["alive"], said["left"]["unacked"], said["left"]["unsettled"]) == (1, 2, 2)
    assert delete_aside(tmp_path) is None
    assert house.there == before - {"ex_gone.1"} and (tmp_path / "precious" / "ack").exists()
    assert [event for event, _ in house.notes] == ["spool.pruned"] and house.notes[0][1]["by"] == "owner:7"


async def test_what_was_settled_late_is_young(tmp_path: Path) -> None:
    """Its log was stored long before its last word was written."""
    house = House(tmp_path)
    an_attempt(tmp_path, "ex_1.1")
    house.settled["ex_1.1"] = NOW.wall_ms - DAY_MS
    assert (await house.prune())["count"] == 0


async def test_an_end_that_its_shim_told_is_the_end_of_the_log(tmp_path: Path) -> None:
    """`exit.json` counts, also when segments are gone; what lost its shim has its files alone."""
    house = House(tmp_path)
    told = an_attempt(tmp_path, "ex_1.1", ack=100)
    (told / "exit.json").write_text(json.dumps(a_record(log={"end": 101, "segments": 1, "chain": "0" * 64})))
    trimmed = an_attempt(tmp_path, "ex_2.1", ack=100)
    (trimmed / "log" / segment_name(0)).unlink()
    acked = {one.name: one.acked for one in survey(tmp_path)}
    assert acked == {"ex_1.1": False, "ex_2.1": True}
    house.settled = {"ex_1.1": 5, "ex_2.1": 5}
    assert [one["attempt"] for one in (await house.prune())["attempts"]] == ["ex_2.1"]


@pytest.mark.parametrize("bound", ["host", "disk"])
async def test_for_room_the_oldest_go(tmp_path: Path, bound: str) -> None:
    """Above the bound of the host, or when the disk lacks room: as many as that takes."""
    for number in range(4):
        an_attempt(tmp_path, f"ex_{number}.1", age_days=5 - number, log=100_000, ack=100_000)
    size = max(one.size_bytes for one in survey(tmp_path))
    house = House(tmp_path, host_bytes=2 * size if bound == "host" else 2**40)
    house.lacks = 0 if bound == "host" else size + 1
    house.settled = {f"ex_{number}.1": 5 for number in range(4)}
    said = await house.prune()
    assert [(one["attempt"], one["why"]) for one in said["attempts"]] == [("ex_0.1", "space"), ("ex_1.1", "space")]
    assert said["over_bytes"] == 0


async def test_more_than_the_bound_that_may_not_go_is_told(tmp_path: Path) -> None:
    """Nothing is deleted for it."""
    an_attempt(tmp_path, "ex_1.1", log=100_000)
    house = House(tmp_path, host_bytes=1000)
    said = await house.prune()
    assert said["count"] == 0 and said["over_bytes"] > 90_000 and house.there == {"ex_1.1"}


async def test_what_a_dead_daemon_set_aside_is_deleted_by_the_next(tmp_path: Path) -> None:
    """At its first look; and what the owner sets aside, soon."""
    an_attempt(tmp_path, "ex_1.1").rename(tmp_path / "x" / ".gone-ex_1.1")
    house = House(tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.retention.keep)
        with anyio.fail_after(10):
            while house.there:
                await anyio.sleep(0.01)
            an_attempt(tmp_path, "ex_2.1")
            house.settled["ex_2.1"] = 5
            assert (await house.prune())["count"] == 1
            while house.there:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


async def test_a_disk_that_fills_is_not_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at far more often than all directories are."""
    monkeypatch.setattr(retention, "LOOK_S", 0.01)
    an_attempt(tmp_path, "ex_1.1", age_days=1)
    house = House(tmp_path)
    house.settled["ex_1.1"] = 5
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.retention.keep)
        await anyio.wait_all_tasks_blocked()
        assert house.there == {"ex_1.1"}
        house.lacks = 1
        with anyio.fail_after(10):
            while house.there:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert house.notes[0][1]["by"] == "daemon"


async def test_a_house_without_attempts_is_looked_after(tmp_path: Path) -> None:
    """There is nothing, and nothing is wrong."""
    house = House(tmp_path)
    said = await house.prune()
    assert (said["count"], said["left"]["count"], delete_aside(tmp_path)) == (0, 0, None)
