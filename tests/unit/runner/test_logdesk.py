"""The daemon's answers about its log: a follower hears each line soon and once, however slow it is."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest

from protocol.errors import Reason
from runner.adapters.control import ControlCall
from runner.errors import Refused
from runner.logdesk import WAIT_MS_MAX, WAITING_MAX, LogDesk
from runner.logsink import KEPT_LINES_MAX, Sink


def write(sink: Sink, *numbers: int) -> None:
    """Lines with numbers."""
    for number in numbers:
        sink.write({"event": "daemon.started", "level": "info", "number": number})


def numbers(said: dict[str, Any]) -> list[int]:
    """Those of the lines of an answer."""
    return [json.loads(text)["number"] for text in said["lines"]]


async def ask(desk: LogDesk, **args: Any) -> dict[str, Any]:
    """`log`, of uid 7."""
    return await desk.lines(ControlCall(verb="log", args=args, uid=7, pid=1))


@asynccontextmanager
async def asked(desk: LogDesk, count: int = 1, **args: Any) -> AsyncIterator[list[dict[str, Any]]]:
    """Questions that wait while the body runs; their answers are there after it."""
    answers: list[dict[str, Any]] = []

    async def one() -> None:
        answers.append(await ask(desk, **args))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(one)
            await anyio.wait_all_tasks_blocked()
            yield answers


async def test_a_follower_is_answered_when_a_line_comes() -> None:
    """Not before, and from any thread; then it goes on from there."""
    sink = Sink(None)
    desk = LogDesk(sink)
    write(sink, 1, 2)
    first = await ask(desk)
    assert numbers(first) == [1, 2] and first["end"] == 2 and not first["more"]
    async with asked(desk, daemon=first["daemon"], after=2, wait_ms=WAIT_MS_MAX) as answers:
        assert answers == []
        await anyio.to_thread.run_sync(write, sink, 3)
    (second,) = answers
    assert numbers(second) == [3] and second["waited"] and second["dropped"] == 0
    assert not sink._listeners


async def test_a_wait_has_an_end() -> None:
    """Nothing came: an answer without lines, from which it goes on."""
    sink = Sink(None)
    desk = LogDesk(sink)
    first = await ask(desk)
    said = await ask(desk, daemon=first["daemon"], after=0, wait_ms=1)
    assert (said["lines"], said["end"], said["waited"]) == ([], 0, True) and not sink._listeners


async def test_a_slow_follower_is_told_how_much_it_missed() -> None:
    """What left the window is a number; what is there is given in pieces."""
    sink = Sink(None)
    desk = LogDesk(sink)
    write(sink, 0)
    said = await ask(desk)
    write(sink, *range(1, KEPT_LINES_MAX + 6))
    said = await ask(desk, daemon=said["daemon"], after=said["end"])
    assert said["dropped"] == 5 and said["more"] and numbers(said)[0] == 6
    read = numbers(said)
    while said["more"]:
        said = await ask(desk, daemon=said["daemon"], after=said["end"])
        read += numbers(said)
        assert said["dropped"] == 0
    assert read == list(range(6, KEPT_LINES_MAX + 6))


async def test_a_follower_of_a_daemon_that_is_gone_begins_anew() -> None:
    """Its numbers mean nothing here."""
    sink = Sink(None)
    write(sink, 1, 2)
    assert numbers(await ask(LogDesk(sink), daemon="another", after=1)) == [1, 2]


async def test_more_followers_than_may_wait_are_answered_at_once() -> None:
    """The control socket has places for other questions."""
    sink = Sink(None)
    desk = LogDesk(sink)
    name = (await ask(desk))["daemon"]
    async with asked(desk, WAITING_MAX, daemon=name, wait_ms=WAIT_MS_MAX) as answers:
        with anyio.fail_after(1):
            assert (await ask(desk, daemon=name, wait_ms=WAIT_MS_MAX))["waited"] is False
        write(sink, 1)
    assert [numbers(said) for said in answers] == [[1]] * WAITING_MAX


@pytest.mark.parametrize(
    "args",
    [
        {"after": -1},
        {"after": "1"},
        {"after": True},
        {"wait_ms": WAIT_MS_MAX + 1},
        {"last": KEPT_LINES_MAX + 1},
        {"last": 1.5},
    ],
)
async def test_nonsense_is_refused(args: dict[str, Any]) -> None:
    """With its reason."""
    with pytest.raises(Refused) as caught:
        await ask(LogDesk(Sink(None)), **args)
    assert caught.value.reason is Reason.BAD_ARGS


async def test_the_level_is_changed_for_good_or_for_a_time() -> None:
    """And without an argument it is only told."""
    sink = Sink(None)
    desk = LogDesk(sink)

    async def level(**args: Any) -> dict[str, Any]:
        return await desk.level(ControlCall(verb="log_level", args=args, uid=7, pid=1))

    assert (await level())["level"] == "info"
    assert (await level(level="warning"))["falls_back_in_ms"] is None and not sink.wants("info")
    said = await level(level="debug", for_ms=60_000)
    assert (said["level"], said["falls_back_to"]) == ("debug", "warning") and sink.wants("debug")
    for wrong in ({"level": "loud"}, {"level": "info", "for_ms": 0}, {"level": "info", "for_ms": "1"}, {"level": 1}):
        with pytest.raises(Refused):
            await level(**wrong)
    assert sink.level_now()[0] == "debug"
