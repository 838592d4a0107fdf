"""Simulated time: an event loop that asyncio and anyio take for a real one, and that jumps from one event to the next.

Theory of operation. Everything that happens is a handle: ready now, or at a moment of physical time. Handles belong to the owner
whose context they were made in: a process, a machine, or nobody (the network, people). A dead owner's handles never run; those of
an owner that is held up wait, and so do the timers of one that sleeps, since the clock that timers count stood still.

Rule 1: no entropy and no real clock, so the same inputs give the same run. Rule 2: nothing runs inside of something else.
"""

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, TypeVar

T = TypeVar("T")
SECOND_US: Final = 1_000_000
MS_US: Final = 1_000
SAME_MOMENT_MAX: Final = 50_000
"""Handles in one and the same moment: beyond it something spins, and time would never go on."""

CLOSE_TRIES: Final = 5
"""A coroutine that awaits in its `finally` goes on when it is closed; a few times is enough for any of ours."""
RUNS, HELD, DEAD = 0, 1, 2


class Owner:
    """A process, as far as the loop is concerned."""

    __slots__ = ("context", "name", "parked", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = RUNS
        self.parked: list[Handle] = []
        self.context = copy_context()
        self.context.run(OWNER.set, self)

    def __repr__(self) -> str:
        return self.name

    @property
    def alive(self) -> bool:
        """Whether it may ever run again."""
        return self.state != DEAD

    def die(self) -> None:
        """Nothing of it runs any more."""
        self.state = DEAD
        self.parked.clear()


OWNER: Final[ContextVar[Owner | None]] = ContextVar("owner", default=None)


class Handle:
    """A callback that waits for its moment."""

    __slots__ = ("_when_us", "args", "callback", "context", "owner", "timer")

    def __init__(
        self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: Context, when_us: int, timer: bool
    ) -> None:
        self.timer = timer
        self.callback = callback
        self.args = args
        self.context = context
        self.owner = context.get(OWNER)
        self._when_us = when_us

    @property
    def when_us(self) -> int:
        """When it is due."""
        return self._when_us

    def when(self) -> float:
        """As asyncio's timers tell it."""
        return self._when_us / SECOND_US

    def cancel(self) -> None:
        """It will not run."""
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        """Whether it was called off."""
        return self.callback is None


class Spinning(BaseException):
    """Something happens again and again, and time does not go on."""


class Task(asyncio.Task[T]):
    """A task that sets and dictionaries know by its number, so that their order is the same in every run."""

    _count = 0

    def __init__(self, coro: Coroutine[Any, Any, T], **kwargs: Any) -> None:
        Task._count += 1
        self._number = Task._count
        super().__init__(coro, **kwargs)
        kwargs["loop"].tasks.append(self)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class Timeline(asyncio.AbstractEventLoop):
    """The loop. `failed` is called with what nobody caught."""

    def __init__(self, failed: Callable[[dict[str, Any]], None]) -> None:
        self.now_us = 0
        self.steps = 0
        """Handles that ran so far."""
        self.tasks: list[Task[Any]] = []
        """All there ever were: those of the dead are buried at the end, and not by the garbage collector in between."""
        self._failed = failed
        self._ready: deque[Handle] = deque()
        self._heap: list[tuple[int, int, Handle]] = []
        self._count = 0
        self._stopped = False

    # --- what asyncio and anyio ask for -------------------------------------------------------------------------

    def time(self) -> float:
        """Physical time in seconds."""
        return self.now_us / SECOND_US

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        """Run it behind what is ready."""
        handle = Handle(callback, args, copy_context() if context is None else context, self.now_us, False)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Run it in `delay` seconds."""
        return self._at(self.now_us + max(math.ceil(delay * SECOND_US), 0), callback, args, context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Run it at `when`, in seconds of `time`."""
        when_us = math.ceil(when * SECOND_US)
        if when_us / SECOND_US < when:
            # Who compares `time` with `when` must not find that it was woken too early.
            when_us += 1
        return self._at(max(when_us, self.now_us), callback, args, context)

    def create_future(self) -> asyncio.Future[Any]:
        """As of any loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> Any:
        """As of any loop."""
        return Task(coro, loop=self, name=name or "task", context=context)

    def get_task_factory(self) -> None:
        """None: `create_task` makes them."""

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """Always."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody caught."""
        self._failed(context)

    # --- what the world asks for --------------------------------------------------------------------------------

    def after(self, owner: Owner | None, delay_us: int, callback: Callable[..., object], *args: Any) -> Handle:
        """Run `callback` in `delay_us`, as something that `owner` does."""
        return self._at(self.now_us + delay_us, callback, args, _NOBODY if owner is None else owner.context)

    def start(self, owner: Owner, coro: Coroutine[Any, Any, T], name: str) -> "Task[T]":
        """Begin a task of `owner`."""
        return owner.context.copy().run(lambda: Task(coro, loop=self, name=name))

    async def sleep(self, delay_us: int) -> None:
        """As anyio's, and cheaper."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._at(self.now_us + delay_us, _awake, (future,), None)
        await future

    def hold(self, owner: Owner) -> None:
        """It is stopped: what is due waits until `go_on`."""
        if owner.state == RUNS:
            owner.state = HELD

    def go_on(self, owner: Owner) -> None:
        """What waited is due now."""
        if owner.state == HELD:
            owner.state = RUNS
            self._ready.extend(owner.parked)
            owner.parked.clear()

    def wake(self, owners: set[Owner], slept_us: int) -> None:
        """The machine of `owners` has slept: their timers stood still meanwhile, and what was ready is."""
        shifted = []
        for when_us, count, handle in self._heap:
            moved = handle.owner in owners
            shifted.append((when_us + slept_us if moved else when_us, count, handle))
            if moved:
                handle._when_us = when_us + slept_us
        heapq.heapify(shifted)
        self._heap = shifted
        begun_us = self.now_us - slept_us
        for owner in sorted(owners, key=lambda one: one.name):
            if owner.state != HELD:
                continue
            owner.state = RUNS
            for handle in owner.parked:
                if handle.timer and handle.when_us > begun_us:
                    # A timer that came due in the sleep is due as much later.
                    handle._when_us += slept_us
                    self._count += 1
                    heapq.heappush(self._heap, (max(handle.when_us, self.now_us), self._count, handle))
                else:
                    self._ready.append(handle)
            owner.parked.clear()

    def stop(self) -> None:
        """End `run` behind this handle."""
        self._stopped = True

    def bury(self) -> None:
        """Close what never came to its end; whatever it tries to do about it is not heard."""
        asyncio.events._set_running_loop(self)
        try:
            for task in self.tasks:
                coro = None if task.done() else task.get_coro()
                for _ in range(CLOSE_TRIES if coro is not None else 0):
                    with suppress(BaseException):
                        coro.close()  # type: ignore[union-attr]
                        break
        finally:
            asyncio.events._set_running_loop(None)
        self.tasks.clear()
        self._ready.clear()
        self._heap.clear()

    def run(self, until_us: int) -> None:
        """Let everything happen that happens up to `until_us`, or until somebody stops it. Raises Spinning."""
        asyncio.events._set_running_loop(self)
        self._stopped = False
        try:
            self._run(until_us)
        finally:
            asyncio.events._set_running_loop(None)

    def _run(self, until_us: int) -> None:
        ready, moment = self._ready, 0
        while not self._stopped:
            if ready:
                handle = ready.popleft()
                moment += 1
                if moment > SAME_MOMENT_MAX:
                    raise Spinning(f"{handle.owner}: {handle.callback}")
            else:
                if not self._heap or self._heap[0][0] > until_us:
                    self.now_us = max(self.now_us, until_us)
                    return
                when_us, _, handle = heapq.heappop(self._heap)
                if when_us > self.now_us:
                    self.now_us, moment = when_us, 0
            callback, owner = handle.callback, handle.owner
            if callback is None:
                continue
            if owner is not None and owner.state:
                if owner.state == HELD:
                    owner.parked.append(handle)
                continue
            self.steps += 1
            handle.context.run(callback, *handle.args)

    def _at(
        self, when_us: int, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> Handle:
        handle = Handle(callback, args, copy_context() if context is None else context, when_us, True)
        self._count += 1
        heapq.heappush(self._heap, (when_us, self._count, handle))
        return handle


def timeline(failed: Callable[[dict[str, Any]], None]) -> Timeline:
    """A new one. What it has not of an event loop nobody asks for."""
    return Timeline(failed)  # type: ignore[abstract]


def _awake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


_NOBODY: Final = Context()
