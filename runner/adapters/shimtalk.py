"""What is said to living shims: at once where there is a connection, else with the next one."""

import asyncio
import signal as signals
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.ids import Attempt
from runner.adapters.shimlink import ShimLink, Words
from runner.core.plans import ExitRecord, LeaseAction, ProcessIdentity


@dataclass(slots=True)
class Held:
    """A shim we are connected to."""

    link: ShimLink
    welcomed: "asyncio.Future[ProcessIdentity]"
    tool_exit: "asyncio.Future[ExitRecord | None] | None" = None
    """Set for tools: their end is for the caller alone."""
    abandoned: bool = False
    settled: bool = False
    heard: bool = False


@dataclass(slots=True)
class ShimTalk:
    """Implements of the port Shims what needs no answer here."""

    on_cut: Callable[[Attempt], None] = field(init=False, default=lambda _attempt: None)
    """Called when there is no connection and there should be one: it is to be adopted."""
    _held: dict[str, Held] = field(init=False, default_factory=dict)
    _words: dict[str, Words] = field(init=False, default_factory=dict)
    _cuts: dict[str, int] = field(init=False, default_factory=dict)

    def stop(self, attempt: Attempt, grace_ms: int | None, by: str) -> None:
        """See the port."""
        self._words.setdefault(attempt.name, Words()).add_stop(grace_ms, by)
        held = self._held.get(attempt.name)
        if held is not None:
            held.link.stop(grace_ms, by)
        else:
            # It may have been silent for a while only: a stop is worth asking again.
            self.on_cut(attempt)

    def signal(self, attempt: Attempt, name: bytes, signal: str, *, tree: bool) -> None:
        """See the port."""
        number = signals.Signals[f"SIG{signal}"].value
        self._words.setdefault(attempt.name, Words()).signals[name] = (number, tree)
        held = self._held.get(attempt.name)
        if held is not None:
            held.link.signal(name, number, tree=tree)

    def input(self, name: str, offset: int, data: bytes, *, end: bool) -> bool:
        """Bytes for the stdin of an attempt (by name); False when there is no connection to its shim."""
        held = self._held.get(name)
        if held is not None:
            held.link.input(offset, data, end=end)
        return held is not None

    def settled(self, name: str) -> bool:
        """Whether an attempt (by name) is settled and its shim was told: it may leave without another answer."""
        held = self._held.get(name)
        return held is not None and held.settled

    def type(self, name: str, viewer: str, offset: int, data: bytes) -> ShimLink | None:
        """What a viewer of a PTY (by name) types; returns the connection that it went over, None without one."""
        held = self._held.get(name)
        if held is None:
            return None
        held.link.type(viewer, offset, data)
        return held.link

    def resize(self, name: str, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool) -> bool:
        """The size of a viewer's window; False when there is no connection to its shim."""
        held = self._held.get(name)
        if held is not None:
            held.link.resize(viewer, gen, rows, cols, redraw=redraw)
        return held is not None

    def seen(self, name: str, offset: int | None) -> None:
        """How far the foremost viewer that may type has followed a PTY (by name); None: nobody who may type does."""
        held = self._held.get(name)
        if held is not None:
            held.link.seen(offset)

    def leave(self, name: str, viewer: str) -> None:
        """A viewer's size counts no more."""
        held = self._held.get(name)
        if held is not None:
            held.link.leave(viewer)

    def limit(self, name: str, size: int) -> None:
        """The log of an attempt (by name) has to be smaller; said again by whoever looks again."""
        held = self._held.get(name)
        if held is not None:
            held.link.limit(size)

    def lease(
        self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction, grace_ms: int | None = None
    ) -> None:
        """See the port."""
        self._words.setdefault(attempt.name, Words()).lease = (token, deadline_ms, action, grace_ms)
        held = self._held.get(attempt.name)
        if held is not None:
            held.link.lease(token, deadline_ms, action, grace_ms)

    def collect(self, attempt: Attempt) -> None:
        """See the port."""
        self._words.pop(attempt.name, None)
        self._cuts.pop(attempt.name, None)
        held = self._held.get(attempt.name)
        if held is not None:
            held.settled = True
            held.link.collected()

    def arm(self, name: str, seen_end: int) -> None:
        """Ask the shim of an attempt to ring when its log is longer than `seen_end`."""
        held = self._held.get(name)
        if held is not None:
            held.link.arm(seen_end)

    def trim(self, name: str, offset: int) -> None:
        """Tell the shim of an attempt what is safe at the control plane."""
        held = self._held.get(name)
        if held is not None:
            held.link.trim(offset)

    def child_of(self, name: str) -> tuple[int | None, int | None]:
        """Pid and start (wall ms) of an attempt's child, where its shim told."""
        held = self._held.get(name)
        if held is None or held.link.child is None:
            return None, None
        return held.link.child[0], held.link.started_ms
