"""A person at a PTY: keys go there, output comes from there, over lines that come and go, until it ends or they leave.

What is to be done is decided in `viewing`; here it is done. `Dialer` and `Line` are the port: both programs have one.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final, Protocol

from terminal.escapes import HELP, Act, Escapes
from terminal.raw import RawTerminal
from terminal.viewing import (
    HELD_BYTES_MAX,
    Again,
    Begin,
    Begun,
    Effect,
    Finish,
    Heard,
    Resizing,
    Said,
    Seen,
    Show,
    Typing,
    Viewing,
)

DETACHED: Final = 0
FAILED: Final = 255
"""As with ssh: the trouble is ours, and no status of the program."""
REST_S: Final = 0.05
"""Nothing came for so long: it was all shown."""
TICK_S: Final = 0.5
RESEND_S: Final = 5.0
"""Typed and not answered for so long: said again. Longer than a machine that is there ever takes."""
TROUBLE_S: Final = 1.0
"""A line that is back before this was not missed."""
RESIZE_S: Final = 0.05
"""A window that is dragged is told once it rests."""
LAST_S: Final = 1.0
"""Whoever leaves waits no longer than this for his last word to be sent."""
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class LineLost(Exception):
    """The line broke, or there is none yet: it is worth another try."""


class LineRefused(Exception):
    """There will be no line; the text says why."""


class Line(Protocol):
    """A line to a PTY; closed by leaving the context that made it."""

    async def hear(self) -> Heard:
        """The next message. Raises LineLost or LineRefused."""

    def say(self, said: Said) -> None:
        """Send this behind what was said before; never waits. What is under way is bounded by the credit."""

    async def said(self) -> None:
        """Wait until all of it was sent, or the line is lost."""

    def drop(self) -> None:
        """Break it: who listens hears LineLost."""


class Dialer(Protocol):
    """Makes lines."""

    def dial(self, begin: Begin) -> AbstractAsyncContextManager[Line]:
        """A line that has begun so. Raises LineLost or LineRefused."""

    def delays(self) -> Iterable[float]:
        """How long to wait before each try, from the first one after a line that was good; as many as there are tries."""


class Screen(Protocol):
    """The terminal of the person: `RawTerminal`, or less."""

    types: bool
    shows: bool

    def size(self) -> tuple[int, int]: ...
    def make_room(self) -> None: ...
    def make_raw(self) -> None: ...
    def restore(self) -> None: ...
    def tell(self, text: str) -> None: ...
    async def show(self, data: bytes) -> None: ...
    async def read(self) -> bytes: ...


class Attachment:
    """One person at one PTY."""

    def __init__(self, dialer: Dialer, screen: Screen, viewing: Viewing, *, writes: bool = True) -> None:
        self._dialer = dialer
        self._screen = screen
        self._viewing = viewing
        # Somebody who only looks on leaves by a key; what is no keyboard has nothing to say then.
        self._listens = writes or screen.types
        self._line: Line | None = None
        self._made_room = False
        self._over: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()
        self._lively = asyncio.Event()
        self._answered = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._trouble_since_s: float | None = None
        self._told: str | None = None
        self._waited: tuple[int, float] = (0, 0.0)

    async def run(self) -> Finish:
        """Until it is over, one way or the other."""
        try:
            async with asyncio.TaskGroup() as tasks:
                works = [tasks.create_task(self._follow())]
                if self._listens:
                    works.append(tasks.create_task(self._keys()))
                with self._signals():
                    finish = await self._over
                    await self._say_last()
                for work in works:
                    work.cancel()
        finally:
            for timer in self._timers.values():
                timer.cancel()
        return finish

    # --- the line -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        delays = iter(self._dialer.delays())
        while True:
            self._lively.clear()
            try:
                async with self._dialer.dial(self._viewing.begin()) as self._line:
                    await self._listen(self._line)
                continue
            except LineLost as exc:
                self._viewing.lost(str(exc))
            except LineRefused as exc:
                self._finish(Finish(FAILED, str(exc)))
                return
            finally:
                if self._lively.is_set():
                    delays = iter(self._dialer.delays())
                self._line = None
                self._stir()
            delay = next(delays, None)
            if delay is None:
                self._finish(Finish(FAILED, self._viewing.trouble or ""))
                return
            await asyncio.sleep(delay)

    async def _listen(self, line: Line) -> None:
        """Until the line is to be made anew. Raises LineLost or LineRefused."""
        while not self._over.done():
            heard = await line.hear()
            if isinstance(heard, Begun) and self._viewing.clears and not self._made_room:
                self._made_room = True
                self._screen.make_room()
            for effect in self._viewing.hear(heard):
                if isinstance(effect, Again):
                    return
                if isinstance(effect, Show):
                    await self._show(effect.data)
                else:
                    self._do([effect])
            if self._viewing.live:
                self._lively.set()
            self._answered.set()
            self._stir()
        await asyncio.Event().wait()

    async def _show(self, data: bytes) -> None:
        try:
            await self._screen.show(data)
        except OSError:
            self._finish(Finish(128 + signal.SIGPIPE))

    async def _say_last(self) -> None:
        """What was typed and shown is told, if that can be soon."""
        if self._line is not None:
            self._do(self._viewing.rested())
            with contextlib.suppress(LineLost, TimeoutError):
                async with asyncio.timeout(LAST_S):
                    await self._line.said()

    # --- the keyboard -------------------------------------------------------------------------------------------

    async def _keys(self) -> None:
        escapes = Escapes()
        while data := await self._screen.read():
            for typed in escapes.feed(data) if self._screen.types else (data,):
                match typed:
                    case bytes():
                        self._do(self._viewing.typed(typed))
                    case Act.DETACH:
                        self._finish(Finish(DETACHED, left=True))
                    case Act.HELP:
                        self._tell(HELP)
                    case Act.SUSPEND:
                        os.kill(os.getpid(), signal.SIGTSTP)
            await self._until(lambda: self._viewing.unanswered < HELD_BYTES_MAX)
        self._do(self._viewing.typed(escapes.flush()))
        await self._lively.wait()
        await self._until(lambda: not self._viewing.unanswered)
        self._finish(Finish(DETACHED, left=True))

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._answered.clear()
            await self._answered.wait()

    # --- both ---------------------------------------------------------------------------------------------------

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Typing() | Resizing() | Seen():
                    if self._line is not None:
                        self._line.say(effect)
                case Finish():
                    self._finish(effect)
                case Show() | Again():
                    raise AssertionError("what is heard asks for these, and nothing else does")
        self._stir()

    def _finish(self, finish: Finish) -> None:
        if not self._over.done():
            self._over.set_result(finish)

    def _stir(self) -> None:
        """See to it that somebody looks again when that may matter."""
        if self._viewing.unsaid:
            self._in("rest", REST_S, self._rested)
        if self._viewing.trouble is not None or self._viewing.unanswered:
            self._in("tick", TICK_S, self._tick)

    def _in(self, name: str, delay_s: float, act: Callable[[], None]) -> None:
        """Once, unless it is to be done already."""
        if name not in self._timers and not self._over.done():

            def due() -> None:
                del self._timers[name]
                act()

            self._timers[name] = asyncio.get_running_loop().call_later(delay_s, due)

    def _rested(self) -> None:
        self._do(self._viewing.rested())

    def _tick(self) -> None:
        now_s = asyncio.get_running_loop().time()
        trouble = self._viewing.trouble
        if trouble is None:
            self._trouble_since_s = None
        else:
            since_s = self._trouble_since_s = now_s if self._trouble_since_s is None else self._trouble_since_s
            if now_s - since_s >= TROUBLE_S:
                self._tell(f"[{trouble}, for {now_s - since_s:.0f} s; what you type is kept; Enter ~. leaves]")
        if self._viewing.base != self._waited[0] or not self._viewing.live:
            self._waited = (self._viewing.base, now_s)
        elif self._viewing.unanswered and now_s - self._waited[1] >= RESEND_S:
            self._waited = (self._viewing.base, now_s)
            self._do(self._viewing.resend())
        self._stir()

    def _tell(self, text: str) -> None:
        """A line of ours: across the screen, which is drawn anew later; without a screen, once on stderr."""
        if self._screen.shows:
            self._screen.tell(text)
            self._viewing.spoiled = True
        elif (first := text.partition(",")[0]) != self._told:
            self._told = first
            sys.stderr.write(f"{text}\n")

    # --- signals ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        acts: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGWINCH: lambda: self._in("size", RESIZE_S, self._resized),
            signal.SIGTSTP: self._suspend,
            signal.SIGCONT: self._resume,
        }
        for number in _ENDING:
            acts[number] = partial(self._finish, Finish(128 + number))
        for number, act in acts.items():
            loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in acts:
                loop.remove_signal_handler(number)

    def _resized(self) -> None:
        self._do(self._viewing.resized(*self._screen.size()))

    def _suspend(self) -> None:
        self._screen.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _resume(self) -> None:
        """Somebody else had the screen meanwhile."""
        self._screen.make_raw()
        self._viewing.spoiled = True
        if self._line is not None:
            self._line.drop()


def say_how_it_ended(finish: Finish, name: str, again: str) -> None:
    """A line for a person at a terminal; programs have the status."""
    if sys.stderr.isatty() and sys.stdin.isatty():
        what = f"[left {name}, which goes on; back: {again}]" if finish.left else f"[{name} ended: {finish.status}]"
        sys.stderr.write(f"{what}\n")


async def attach(dialer: Dialer, terminal: RawTerminal, mode: str, *, gen: int, writes: bool = True) -> Finish:
    """Be at a PTY until it ends or the person leaves; the terminal is raw meanwhile. `gen`: sizes are numbered from it on."""
    with terminal:
        viewing = Viewing(mode, *terminal.size(), gen=gen)
        return await Attachment(dialer, terminal, viewing, writes=writes).run()
