"""Either side comes back from an older copy of itself, in a real system: nothing has its effect twice, nothing is stuck, all is told."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WAITING = "echo here; while [ ! -e go ]; do sleep 0.05; done; echo {name} >> marks"


def marking(name: str) -> tuple[str, ...]:
    """A command whose every effect is a line."""
    return ("sh", "-c", f"echo {name} >> marks")


def marks(system: Stand) -> list[str]:
    """The effects so far."""
    path = system.home / "marks"
    return path.read_text().split() if path.exists() else []


async def mark(system: Stand, name: str) -> dict[str, Any]:
    """Have one effect."""
    ended = await system.ran(*marking(name))
    assert ended["exit_status"] == 0
    return ended


async def inc(system: Stand) -> int:
    """The runner's incarnation, as both sides say it."""
    (listed,) = (await system.get("/runners"))["runners"]
    assert (await system.json("runner", "status"))["inc"] == listed["inc"]
    return int(listed["inc"])


async def in_state(system: Stand, execution: str, *states: str) -> dict[str, Any]:
    """Wait until the plane knows an execution, in one of `states`."""

    async def there() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = await system.get(f"/executions/{execution}")
        except httpx.HTTPStatusError:
            return None
        return found if found["state"] in states else None

    found: dict[str, Any] = await poll(there, f"{execution} to be {states}")
    return found


async def kinds(system: Stand, execution: str) -> list[str]:
    """What the runner signed of an execution, as the plane has it."""
    statements = (await system.get(f"/receipts/{execution}"))["statements"]
    return sorted(statement["kind"] for statement in statements)


# --- the control plane -----------------------------------------------------------------------------------------------


def databases(system: Stand) -> list[Path]:
    """The database and what SQLite keeps beside it."""
    return sorted((system.home / "plane").glob("control.db*"))


@asynccontextmanager
async def copied_plane(system: Stand) -> AsyncIterator[Path]:
    """Copy the database of a plane that stands still, go on, and put the copy back at the end."""
    copy = system.home / "copy"
    assert await system.end("plane") == 0
    copy.mkdir()
    for path in databases(system):
        shutil.copy2(path, copy / path.name)
    await system.start_plane()
    yield copy
    assert await system.end("plane") == 0
    for path in databases(system):
        path.unlink()
    for path in copy.iterdir():
        shutil.copy2(path, system.home / "plane" / path.name)
    await system.start_plane()
    await system.online()


async def test_a_plane_from_a_backup_goes_on_where_the_runner_is() -> None:
    """It adopts the signed mark, learns from receipts and settlements what it forgot, and what lives is settled."""
    async with stand() as system:
        before = await mark(system, "before")
        async with copied_plane(system):
            await system.online()
            forgotten = await mark(system, "forgotten")
            living = await system.order("sh", "-c", WAITING.format(name="living"))
            await in_state(system, living, "running")
        assert await inc(system) == 1
        assert (await system.get(f"/executions/{before['id']}"))["settlement"] == before["settlement"]
        known = await in_state(system, forgotten["id"], "settled")
        assert known["settlement"] == forgotten["settlement"]
        assert (await in_state(system, living, "running"))["detail"] == "known from its receipt only"
        await mark(system, "after")
        (system.home / "go").touch()
        assert (await in_state(system, living, "settled"))["exit_status"] == 0
        for execution in (before["id"], forgotten["id"], living):
            assert await kinds(system, execution) == ["receipt", "settlement"]
        assert marks(system) == ["before", "forgotten", "after", "living"]


async def test_what_was_only_asked_for_in_the_backup_is_not_done_again() -> None:
    """The request is in the copy, unsigned; it was signed and done since then: its receipt comes before anything is numbered."""
    async with stand() as system:
        await mark(system, "first")
        assert await system.end("daemon") == 0
        asked = await system.order(*marking("asked"))
        too = await system.order(*marking("too"))
        async with copied_plane(system):
            await system.start_daemon()
            await system.online()
            for execution in (asked, too):
                assert (await system.ended(execution))["exit_status"] == 0
        for execution in (asked, too):
            assert (await in_state(system, execution, "settled"))["exit_status"] == 0
            assert await kinds(system, execution) == ["receipt", "settlement"]
        await mark(system, "after")
        assert sorted(marks(system)) == ["after", "asked", "first", "too"]


async def test_what_was_sent_in_the_backup_and_done_since_then_is_not_done_again() -> None:
    """The copy has it signed and without a receipt; another was numbered behind it since then."""
    async with stand() as system:
        living = await system.order("sh", "-c", WAITING.format(name="living"))
        await in_state(system, living, "running")
        async with copied_plane(system):
            await system.online()
            (system.home / "go").touch()
            assert (await system.ended(living))["exit_status"] == 0
            await mark(system, "forgotten")
        assert (await in_state(system, living, "settled"))["exit_status"] == 0
        await mark(system, "after")
        assert marks(system) == ["living", "forgotten", "after"]


async def test_a_plane_from_a_backup_of_its_first_day_still_knows_its_runner() -> None:
    """Copied right after the enrolment, before any command."""
    async with stand() as system:
        async with copied_plane(system):
            await system.online()
            for name in ("one", "two", "three"):
                await mark(system, name)
        assert await inc(system) == 1
        await mark(system, "four")
        assert marks(system) == ["one", "two", "three", "four"]


# --- the runner ------------------------------------------------------------------------------------------------------


def sockets(directory: str, names: list[str]) -> list[str]:
    """What no backup holds."""
    return [name for name in names if Path(directory, name).is_socket()]


@asynccontextmanager
async def copied_runner(system: Stand) -> AsyncIterator[None]:
    """Copy the state directory of a runner that stands still, go on, and put the copy back at the end."""
    copy = system.home / "copied-state"
    assert await system.end("daemon") == 0
    shutil.copytree(system.state, copy, symlinks=True, ignore=sockets)
    await system.start_daemon()
    await system.online()
    yield
    assert await system.end("daemon") == 0
    system.state.rename(system.home / "newer")
    copy.rename(system.state)
    await system.start_daemon()
    await system.online()


async def test_a_runner_that_was_set_back_begins_a_new_incarnation() -> None:
    """Its plane knows better: what was done since then is not done again, and the next command is the first of a new stream."""
    async with stand() as system:
        await mark(system, "before")
        async with copied_runner(system):
            since = await mark(system, "since")
            await mark(system, "too")
        assert await inc(system) == 2
        assert (await system.get(f"/executions/{since['id']}"))["settlement"] == since["settlement"]
        after = await mark(system, "after")
        assert (after["receipt"]["inc"], after["receipt"]["seq"]) == (2, 1)
        assert marks(system) == ["before", "since", "too", "after"]


async def test_an_attempt_that_its_runner_forgot_is_not_started_again_and_can_be_given_up() -> None:
    """It lived when the runner was set back: it is nobody's now, and a stop is answered with what is known."""
    async with stand() as system:
        await mark(system, "before")
        async with copied_runner(system):
            living = await system.order("sh", "-c", WAITING.format(name="living"))
            await in_state(system, living, "running")
        assert await inc(system) == 2
        await mark(system, "after")
        await system.post(f"/executions/{living}/stop", {})
        given_up = await in_state(system, living, "cancelled", "settled")
        assert given_up["exit_status"] == 125
        assert marks(system) == ["before", "after"]


async def test_both_sides_set_back_to_the_same_day_go_on_together() -> None:
    """A whole machine that is restored: neither knows what was done since then, and nobody is told of it twice."""
    async with stand() as system:
        await mark(system, "before")
        async with copied_runner(system), copied_plane(system):
            await system.online()
            await mark(system, "since")
        await mark(system, "after")
        assert marks(system) == ["before", "since", "after"]
