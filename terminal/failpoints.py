"""Named crash points: where a test makes a process die, fail or wait. Nothing happens at any of them unless it is armed.

`"journal.after_commit=2*exit(137);report.sent=pause(/tmp/gate)"` arms two. An entry is `name=[count*]action`: with a count only that
hit triggers, without one every hit does. Actions: `off`, `exit(code)`, `kill`, `stop` (as by SIGSTOP), `error(REASON)`, `delay(ms)`,
`pause(path)`, which makes `path`.hit and waits for `path`. Rule: a point that is not armed costs one look-up in an empty dict.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from protocol.errors import Reason

PAUSE_S_MAX: Final = 30.0
"""A test that died must not leave a process waiting for ever."""
DELAY_MS_MAX: Final = 60_000
ELSEWHERE: Final = ("off", "kill", "stop")
"""What a point of another process can be armed with: it has no more than a signal to itself."""
_POLL_S: Final = 0.005
_COUNT_DIGITS_MAX: Final = 6
_EXPECTED: Final = "[count*]off|exit(code)|kill|stop|error(REASON)|delay(ms)|pause(/path)"
_ACTION: Final = re.compile(rf"(?:([1-9][0-9]{{0,{_COUNT_DIGITS_MAX - 1}}})\*)?([a-z]+)(?:\(([^()]*)\))?")


class BadEntry(ValueError):
    """An entry that arms nothing: `key` is the point it names, as ASCII, and `expected` what it could be."""

    def __init__(self, key: str, expected: str) -> None:
        self.key = key
        self.expected = expected
        super().__init__(f"{key}: expected {expected}")


@dataclass(slots=True)
class _Point:
    word: str
    """The action by name."""
    act: Callable[[], None]
    on_hit: int | None
    """The one hit that triggers; None: every hit."""
    hits: int = 0


class Failpoints:
    """The points of one program. `fail` raises its own error for a point that is armed with one.

    Points `elsewhere` are those of a process that it starts: `ask` tells what that one is to do.
    """

    def __init__(
        self, names: frozenset[str], fail: Callable[[str, Reason], None], elsewhere: frozenset[str] = frozenset()
    ) -> None:
        self._names = names | elsewhere
        self._elsewhere = elsewhere
        self._fail = fail
        self._armed: dict[str, _Point] = {}
        self._counting = threading.Lock()

    def hit(self, name: str) -> None:
        """Pass the point `name`: do what it is armed with, which may end the process. Raises what `fail` does."""
        point = self._due(name)
        if point is not None:
            point.act()

    def ask(self, name: str) -> str | None:
        """Pass the point `name` for a process that is about to be started: what it is to do there, None: nothing."""
        point = self._due(name)
        return None if point is None else point.word

    def _due(self, name: str) -> _Point | None:
        point = self._armed.get(name)
        if point is None:
            return None
        with self._counting:
            point.hits += 1
            return point if point.on_hit is None or point.hits == point.on_hit else None

    def arm(self, text: str) -> None:
        """Arm the points named in `text` and no others. Raises BadEntry for an unknown name or action; then nothing changed."""
        points: dict[str, _Point] = {}
        for entry in filter(None, (part.strip() for part in text.split(";"))):
            name, equals, action = (part.strip() for part in entry.partition("="))
            if name not in self._names:
                raise BadEntry(ascii(name), f"one of {', '.join(sorted(self._names))}")
            if not equals or name in points:
                raise BadEntry(name, f"{_EXPECTED}, once")
            points[name] = self._point(name, action)
        self._armed.clear()
        self._armed.update((name, point) for name, point in points.items() if point.act is not _nothing)

    def _point(self, name: str, text: str) -> _Point:
        match = _ACTION.fullmatch(text)
        if match is None:
            raise BadEntry(name, _EXPECTED)
        count, action, argument = match.groups()
        act = self._act(name, action, argument)
        if act is None or (name in self._elsewhere and action not in ELSEWHERE):
            raise BadEntry(name, _EXPECTED)
        return _Point(action, act, int(count) if count else None)

    def _act(self, name: str, action: str, argument: str | None) -> Callable[[], None] | None:
        """What `action(argument)` does; None when there is no such thing."""
        if argument is None:
            return {"off": _nothing, "kill": _kill, "stop": _stop}.get(action)
        number = int(argument) if re.fullmatch(r"[0-9]{1,6}", argument) else None
        match action:
            case "exit" if number is not None and number <= 255:
                return partial(os._exit, number)
            case "error" if argument in Reason.__members__:
                return partial(self._fail, name, Reason(argument))
            case "delay" if number is not None and number <= DELAY_MS_MAX:
                return partial(time.sleep, number / 1000)
            case "pause" if argument.startswith("/") and argument.isprintable():
                return partial(_pause, Path(argument))
        return None


def _nothing() -> None:
    """Armed with `off`."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause(path: Path) -> None:
    """Say that the point was reached by making `path`.hit, and wait until `path` is there."""
    Path(f"{path}.hit").touch()
    for _ in range(int(PAUSE_S_MAX / _POLL_S)):
        if path.exists():
            return
        time.sleep(_POLL_S)
