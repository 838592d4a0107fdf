"""A viewer's loop over lines that break at every step: what was typed arrives once, what was shown is shown once, and it always ends."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from terminal.attach import Attachment, Line, LineLost, LineRefused
from terminal.viewing import (
    Absent,
    Begin,
    Begun,
    Ended,
    Finish,
    Heard,
    Live,
    Output,
    Resizing,
    Said,
    Seen,
    Taken,
    Typing,
    Viewing,
)

WAIT_S = 20.0
ROOM = 1 << 18


class Pty:
    """What is at the other end: takes by offset, echoes, and keeps a log of what it wrote."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.log = bytearray(b"$ ")
        self.seen = 0
        self.sizes: list[Resizing] = []
        self.status: int | None = None
        self.lines: list[FakeLine] = []

    def hear(self, said: Said) -> None:
        """A message of the viewer."""
        match said:
            case Typing(offset, data):
                if offset <= len(self.taken):
                    fresh = data[len(self.taken) - offset :]
                    self.taken += fresh
                    self.log += fresh
                self.tell(Taken(len(self.taken), len(self.taken) + ROOM))
            case Resizing():
                self.sizes.append(said)
            case Seen(offset):
                self.seen = max(self.seen, offset)
        if self.taken.endswith(b"exit\r"):
            self.status = 7

    def tell(self, heard: Heard) -> None:
        """Every line hears it, and what was written."""
        for line in self.lines:
            line.heard.put_nowait(heard)


class FakeLine:
    """One line, which breaks after `life` messages, both ways counted."""

    def __init__(self, pty: Pty, begin: Begin, life: int) -> None:
        self.heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._pty = pty
        self._at = begin.offset or 0
        self._life = life
        self.heard.put_nowait(Begun("ex_1.1", True, self._at, len(pty.taken)))
        self._replay()
        self.heard.put_nowait(Live(self._at))
        pty.lines.append(self)

    def _replay(self) -> None:
        if self._at < len(self._pty.log):
            self.heard.put_nowait(Output(len(self._pty.log), bytes(self._pty.log[self._at :])))
            self._at = len(self._pty.log)

    def _spend(self) -> bool:
        self._life -= 1
        return self._life >= 0

    async def hear(self) -> Heard:
        """See Line."""
        if not self._spend():
            raise LineLost("cut")
        if self.heard.empty():
            self._replay()
            if self._pty.status is not None and self.heard.empty():
                return Ended(self._pty.status)
        return await self.heard.get()

    def say(self, said: Said) -> None:
        """See Line. What is said on a line that broke is lost."""
        if self._spend():
            self._pty.hear(said)
        self.heard.put_nowait(Absent(False))  # wakes who listens, and changes nothing

    async def said(self) -> None:
        """See Line."""

    def drop(self) -> None:
        """See Line."""
        self._life = 0
        self.heard.put_nowait(Absent(False))


class Dialer:
    """The first lines live so long, the others for ever."""

    def __init__(self, pty: Pty, *lives: int) -> None:
        self.pty = pty
        self.lives = list(lives)
        self.begun: list[Begin] = []

    def delays(self) -> Iterator[float]:
        """See Dialer."""
        return iter([0.0] * 100)

    @asynccontextmanager
    async def dial(self, begin: Begin) -> AsyncIterator[Line]:
        """See Dialer."""
        self.begun.append(begin)
        line = FakeLine(self.pty, begin, self.lives.pop(0) if self.lives else 10**6)
        try:
            yield line
        finally:
            self.pty.lines.remove(line)


class Screen:
    """A person who types `keys`, one after the other, and sees what is shown."""

    def __init__(self, *keys: bytes, types: bool = True, shows: bool = True) -> None:
        self.types, self.shows = types, shows
        self.shown = bytearray()
        self.told: list[str] = []
        self._keys = list(keys)

    def size(self) -> tuple[int, int]:
        return 24, 80

    def make_room(self) -> None:
        pass

    def make_raw(self) -> None:
        pass

    def restore(self) -> None:
        pass

    def tell(self, text: str) -> None:
        self.told.append(text)

    async def show(self, data: bytes) -> None:
        await asyncio.sleep(0)
        self.shown += data

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if self._keys:
            return self._keys.pop(0)
        if not self.types:
            return b""
        await asyncio.Event().wait()
        return b""


async def run(dialer: object, screen: Screen, *, writes: bool = True) -> Finish:
    """Until it is over."""
    async with asyncio.timeout(WAIT_S):
        return await Attachment(dialer, screen, Viewing("replay", 24, 80, gen=1), writes=writes).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("first", range(30))
async def test_a_line_that_breaks_at_any_step_loses_and_doubles_nothing(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line breaks after so many messages, the second a little later; nobody has to wait for a resend."""
    monkeypatch.setattr("terminal.attach.RESEND_S", 1000.0)
    pty = Pty()
    dialer = Dialer(pty, first, first // 2 + 3)
    screen = Screen(b"l", b"s", b" -", b"l\r", b"echo ", b"hi\r", b"exit\r")
    finish = await run(dialer, screen)
    assert finish == Finish(7)
    assert bytes(pty.taken) == b"ls -l\recho hi\rexit\r"
    assert bytes(screen.shown) == bytes(pty.log)
    assert pty.sizes[-1].gen == len({size.gen for size in pty.sizes}) + min(size.gen for size in pty.sizes) - 1


async def test_what_was_shown_is_told() -> None:
    """At rest, and before it leaves."""
    pty = Pty()
    screen = Screen(b"x\r", b"~.")
    assert await run(Dialer(pty), screen) == Finish(0, left=True)
    assert pty.seen == len(screen.shown)


async def test_what_comes_from_no_keyboard_is_typed_to_its_end_and_then_it_leaves() -> None:
    """`~.` in it is for the program."""
    pty = Pty()
    assert await run(Dialer(pty, 4, 6), Screen(b"a\r~.\r", b"b" * 40_000, types=False)) == Finish(0, left=True)
    assert bytes(pty.taken) == b"a\r~.\r" + b"b" * 40_000


async def test_who_only_looks_on_without_a_keyboard_stays_to_the_end() -> None:
    """Its input is not even read."""
    pty = Pty()
    pty.status = 3
    assert await run(Dialer(pty), Screen(types=False), writes=False) == Finish(3)


async def test_there_may_be_no_way_to_it() -> None:
    """Refused, or tried as often as it should be."""

    class Nobody(Dialer):
        def __init__(self, fault: Callable[[], Exception]) -> None:
            super().__init__(Pty())
            self.fault = fault

        def delays(self) -> Iterator[float]:
            return iter([0.0, 0.0])

        @asynccontextmanager
        async def dial(self, begin: Begin) -> AsyncIterator[Line]:
            self.begun.append(begin)
            raise self.fault()
            yield

    refused = Nobody(lambda: LineRefused("no"))
    assert await run(refused, Screen()) == Finish(255, "no")
    assert len(refused.begun) == 1
    lost = Nobody(lambda: LineLost("gone"))
    assert await run(lost, Screen()) == Finish(255, "gone")
    assert len(lost.begun) == 3


async def test_a_line_that_was_good_begins_the_tries_anew() -> None:
    """Two tries each time, and many lines that break."""

    class Few(Dialer):
        def delays(self) -> Iterator[float]:
            return iter([0.0, 0.0])

    pty = Pty()
    assert await run(Few(pty, *[8] * 12), Screen(*[b"k"] * 30, b"exit\r")) == Finish(7)
    assert bytes(pty.taken) == b"k" * 30 + b"exit\r"


async def test_a_long_trouble_is_told_and_the_screen_drawn_anew_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written across the screen while a line is being made goes with a new replay."""
    monkeypatch.setattr("terminal.attach.TICK_S", 0.01)
    monkeypatch.setattr("terminal.attach.TROUBLE_S", 0.02)
    told = asyncio.Event()

    class Slow(Dialer):
        @asynccontextmanager
        async def dial(self, begin: Begin) -> AsyncIterator[Line]:
            if self.begun:
                await told.wait()
            if len(self.begun) == 2:
                self.pty.status = 5
            async with super().dial(begin) as line:
                yield line

    class Told(Screen):
        def tell(self, text: str) -> None:
            super().tell(text)
            told.set()

    pty, screen = Pty(), Told(b"a")
    dialer = Slow(pty, 8)
    assert await run(dialer, screen) == Finish(5)
    assert screen.told[0].startswith("[cut, for 0 s")
    offsets = [begin.offset for begin in dialer.begun]
    assert offsets[0] is None and offsets[1] is not None and offsets[2] is None
