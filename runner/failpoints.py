"""Named crash points: where a test makes the daemon die, fail or wait. Nothing happens at any of them unless it is armed.

`LOCAL_RUNNER_FAILPOINTS="journal.after_commit=2*exit(137);report.sent=pause(/tmp/gate)"` is read once, at import. An entry is
`name=[count*]action`: with a count only that hit triggers, without one every hit does. Actions: `off`, `exit(code)`, `kill`,
`error(REASON)`, `delay(ms)`, `pause(path)`. Rule: a point that is not armed costs one look-up in an empty dict.
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
from runner.errors import Broken, ConfigError

ENVIRONMENT: Final = "LOCAL_RUNNER_FAILPOINTS"
NAMES: Final = frozenset(
    {
        "journal.before_commit",
        "journal.after_commit",
        "command.received",
        "attempt.dir_made",
        "attempt.forked",
        "attempt.prepared",
        "attempt.released",
        "exit.heard",
        "report.sent",
        "report.answered",
        "worktree.marker_written",
        "worktree.branch_made",
        "worktree.added",
        "worktree.verified",
        "worktree.ready",
        "worktree.trashed",
        "worktree.recorded",
    }
)
"""Every point in the code; `docs/reliability.md` has a row for each."""
PAUSE_S_MAX: Final = 30.0
"""A test that died must not leave a daemon waiting for ever."""
DELAY_MS_MAX: Final = 60_000
_POLL_S: Final = 0.005
_COUNT_DIGITS_MAX: Final = 6
_EXPECTED: Final = "[count*]off|exit(code)|kill|error(REASON)|delay(ms)|pause(/path)"
_ACTION: Final = re.compile(rf"(?:([1-9][0-9]{{0,{_COUNT_DIGITS_MAX - 1}}})\*)?([a-z]+)(?:\(([^()]*)\))?")


@dataclass(slots=True)
class _Point:
    act: Callable[[], None]
    on_hit: int | None
    """The one hit that triggers; None: every hit."""
    hits: int = 0


_armed: dict[str, _Point] = {}
_counting: Final = threading.Lock()


def hit(name: str) -> None:
    """Pass the point `name`: do what it is armed with, which may end the process. Raises Broken where armed with an error."""
    point = _armed.get(name)
    if point is None:
        return
    with _counting:
        point.hits += 1
        due = point.on_hit is None or point.hits == point.on_hit
    if due:
        point.act()


def arm(text: str) -> None:
    """Arm the points named in `text` and no others. Raises ConfigError for an unknown name or action; then nothing changed."""
    points: dict[str, _Point] = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, action = (part.strip() for part in entry.partition("="))
        if name not in NAMES:
            raise ConfigError(ENVIRONMENT, ascii(name), f"one of {', '.join(sorted(NAMES))}")
        if not equals or name in points:
            raise ConfigError(ENVIRONMENT, name, f"{_EXPECTED}, once")
        points[name] = _point(name, action)
    _armed.clear()
    _armed.update((name, point) for name, point in points.items() if point.act is not _nothing)


def _point(name: str, text: str) -> _Point:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ConfigError(ENVIRONMENT, name, _EXPECTED)
    count, action, argument = match.groups()
    act = _act(name, action, argument)
    if act is None:
        raise ConfigError(ENVIRONMENT, name, _EXPECTED)
    return _Point(act, int(count) if count else None)


def _act(name: str, action: str, argument: str | None) -> Callable[[], None] | None:
    """What `action(argument)` does; None when there is no such thing."""
    if argument is None:
        return {"off": _nothing, "kill": _kill}.get(action)
    number = int(argument) if re.fullmatch(r"[0-9]{1,6}", argument) else None
    match action:
        case "exit" if number is not None and number <= 255:
            return partial(os._exit, number)
        case "error" if argument in Reason.__members__:
            return partial(_fail, name, Reason(argument))
        case "delay" if number is not None and number <= DELAY_MS_MAX:
            return partial(time.sleep, number / 1000)
        case "pause" if argument.startswith("/") and argument.isprintable():
            return partial(_pause, Path(argument))
    return None


def _nothing() -> None:
    """Armed with `off`."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(name: str, reason: Reason) -> None:
    raise Broken(reason, f"failpoint {name}")


def _pause(path: Path) -> None:
    """Say that the point was reached by making `path`.hit, and wait until `path` is there."""
    Path(f"{path}.hit").touch()
    for _ in range(int(PAUSE_S_MAX / _POLL_S)):
        if path.exists():
            return
        time.sleep(_POLL_S)


arm(os.environ.get(ENVIRONMENT, ""))
