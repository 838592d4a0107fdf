"""Runners that take nothing new: what waits, what goes all the same, and how it is shown."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane.limits import FIRST_BEAT_MS, INTENT_TTL_MS
from protocol.commands import Kind
from protocol.errors import Reason
from protocol.receipt import Outcome
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Line

pytestmark = pytest.mark.slow


async def nothing_comes(line: Line, admission: str) -> None:
    """Two beats later there is still no command."""
    for _ in range(2):
        await line.beat(admission=admission)
        await anyio.sleep(0.05)
    assert not [message for message in line.heard if message.t == "command"]


async def a_worktree(cp: Running, name: str) -> dict[str, Any]:
    """Ask for a worktree."""
    answer = await cp.post("/v1/runners/laptop/worktrees", {"repo": "/srv/r", "base": "main", "id": name})
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("word", ["paused", "draining"])
async def test_new_work_waits_and_says_why(tmp_path: Path, word: str) -> None:
    """Story.

    1. The runner takes nothing new: a start and a worktree stay queued, are shown as waiting for it, and get no number.
    2. A stop of what runs goes all the same, and so does the removal of a worktree.
    3. It opens: what has waited comes, in its order.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await a_worktree(cp, "wt_old")
            await line.report(runner.receipt(await line.command(), Outcome.DONE))
            asked = await cp.start()
            await line.report(runner.accepted(await line.command()))
            await line.beat(admission=word)
            waiting, tree = await cp.start(), await a_worktree(cp, "wt_new")
            assert waiting["waits"] == tree["waits"] == f"the runner is {word}"
            assert (await cp.get(f"/v1/executions/{waiting['id']}"))["waits"] == f"the runner is {word}"
            assert (await cp.get("/v1/runners/laptop"))["admission"] == word
            await nothing_comes(line, word)
            await cp.post(f"/v1/executions/{asked['id']}/stop")
            assert (await line.command()).value.kind == Kind.EXECUTION_STOP
            await cp.post("/v1/worktrees/wt_old/remove")
            remove = await line.command()
            assert (remove.value.kind, remove.value.seq) == (Kind.WORKTREE_REMOVE, 3)
            await nothing_comes(line, word)
            await line.beat(admission="open")
            kinds = [(await line.command()).value.kind for _ in range(2)]
            assert kinds == [Kind.EXECUTION_START, Kind.WORKTREE_CREATE]
            assert (await cp.get(f"/v1/executions/{waiting['id']}"))["waits"] == ""


async def test_another_word_holds_nothing_back(tmp_path: Path) -> None:
    """The runner refuses by itself, and says when to ask again."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.beat(admission="tired")
            await cp.start()
            assert (await line.command()).value.kind == Kind.EXECUTION_START


async def test_the_first_beat_says_whether_work_is_taken(tmp_path: Path) -> None:
    """One that was paused while it was away gets nothing that it would have to refuse; one that never says gets it after a while."""
    async with running(tmp_path) as cp:
        runner = (await cp.enrol()).started("A")
        await cp.start()
        async with runner.connect(cp.port) as line:
            await nothing_comes(line, "paused")
        async with runner.connect(cp.port) as line:
            await line.beat()
            await line.command()
        asked = await cp.start()
        async with runner.connect(cp.port) as line:
            assert asked["waits"] == ""
            cp.boot.ahead_ms += FIRST_BEAT_MS
            assert (await line.command()).value.cmd_id == asked["cmd_id"]


async def test_what_waits_too_long_runs_out(tmp_path: Path) -> None:
    """A paused runner keeps nobody's request for ever."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.beat(admission="paused")
            asked = await cp.start()
            cp.clock.ahead_ms = INTENT_TTL_MS
            await cp.plane._expire()
            shown = await cp.get(f"/v1/executions/{asked['id']}")
            assert (shown["state"], shown["reason"], shown["waits"]) == ("cancelled", "EXPIRED", "")
            await line.beat()
            assert not [message for message in line.heard if message.t == "command"]


@pytest.mark.parametrize(("told", "shown"), [(30_000, 30_000), (None, None), ("soon", None), (-1, None), (True, None)])
async def test_a_refusal_for_now_says_when_to_ask_again(tmp_path: Path, told: object, shown: int | None) -> None:
    """As the runner told it, if it is a time."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked, _ = await cp.start(), await a_worktree(cp, "wt_1")
            result = {} if told is None else {"retry_after_ms": told}
            for _ in range(2):
                order = await line.command()
                refusal = runner.receipt(order, Outcome.REFUSED, reason=Reason.DISK_LOW, result=result)
                await line.report(refusal)
            for path in (f"/v1/executions/{asked['id']}", "/v1/worktrees/wt_1"):
                found = await cp.get(path)
                assert (found["state"], found["reason"], found["retry_after_ms"]) == ("refused", "DISK_LOW", shown)
