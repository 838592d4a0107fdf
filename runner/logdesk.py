"""The daemon's answers about its own log: the lines it keeps, and how much is told.

A follower asks again and again, each time for what came after the line it has; it is answered as soon as there is one. So a slow one
costs the daemon nothing but its place in the window of lines, and what it missed is a number.
"""

import asyncio
import contextlib
import os
from typing import Any, Final

import anyio
import structlog

from protocol.errors import Reason
from protocol.limits import TIMEOUT_MS_MAX
from runner.adapters.control import CONNECTIONS_MAX, EXCHANGE_TIMEOUT_S, ControlCall
from runner.errors import Refused
from runner.logsink import KEPT_LINES_MAX, LEVELS, Sink

WAIT_MS_MAX: Final = 8000
"""How long an answer may wait for a line; a follower that hears nothing asks again."""
WAITING_MAX: Final = CONNECTIONS_MAX // 2
"""Followers that wait at a time; more are answered at once, so that the socket has room for other questions."""
assert WAIT_MS_MAX < EXCHANGE_TIMEOUT_S * 1000


class LogDesk:
    """Answers `log` and `log_level`."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._name = f"{os.getpid()}.{sink.clock()}"
        self._waiting = 0
        self._log = structlog.get_logger()

    def state(self) -> dict[str, Any]:
        """For `status`."""
        return self._sink.state()

    async def lines(self, call: ControlCall) -> dict[str, Any]:
        """Lines after number `after` of the daemon called `daemon`, else of this one from the first that is kept (or the `last` so many).

        Where there are none yet it waits for `wait_ms`. Raises Refused.
        """
        after, last, wait_ms = call.args.get("after", 0), call.args.get("last"), call.args.get("wait_ms", 0)
        if not (
            _whole(after, 2**53) and _whole(wait_ms, WAIT_MS_MAX) and (last is None or _whole(last, KEPT_LINES_MAX))
        ):
            raise Refused(
                Reason.BAD_ARGS, f"log takes after, last (at most {KEPT_LINES_MAX}) and wait_ms (at most {WAIT_MS_MAX})"
            )
        if call.args.get("daemon") != self._name:
            after = 0  # its numbers are those of a daemon that is gone
        waited = wait_ms > 0 and self._sink.end <= after and await self._wait(after, wait_ms)
        found = self._sink.excerpt(after, last)
        return {
            "daemon": self._name,
            "lines": list(found.lines),
            "end": found.end,
            "more": found.end < self._sink.end,
            "dropped": found.dropped,
            "waited": waited,
        }

    async def level(self, call: ControlCall) -> dict[str, Any]:
        """Change the level, for `for_ms` or until the daemon ends; without one: say how it stands. Raises Refused."""
        level, for_ms = call.args.get("level"), call.args.get("for_ms")
        if level is not None:
            if level not in LEVELS or not (for_ms is None or (_whole(for_ms, TIMEOUT_MS_MAX) and for_ms > 0)):
                raise Refused(Reason.BAD_ARGS, f"log_level takes level ({', '.join(LEVELS)}) and for_ms")
            before = self._sink.level_now()[0]
            quieter = LEVELS[level] > LEVELS[before]
            if quieter:
                self._tell(call, level, for_ms)
            self._sink.set_level(level, for_ms)
            if not quieter:
                self._tell(call, level, for_ms)
        return self._sink.state()

    def _tell(self, call: ControlCall, level: str, for_ms: int | None) -> None:
        # While the more talkative of both levels counts: whoever reads the log sees why it changes.
        self._log.info("log.level_changed", to=level, for_ms=for_ms, by=f"owner:{call.uid}")

    async def _wait(self, after: int, wait_ms: int) -> bool:
        """Until there is a line after `after`; False when so many wait that this one may not."""
        if self._waiting >= WAITING_MAX:
            return False
        came = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            # A line may come from another thread; after a loop that is closed nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(came.set)

        leave = self._sink.listen(wake)
        self._waiting += 1
        try:
            with anyio.move_on_after(wait_ms / 1000):
                # A line that came before we listened is there already.
                if self._sink.end <= after:
                    await came.wait()
        finally:
            self._waiting -= 1
            leave()
        return True


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most
