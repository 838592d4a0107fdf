"""Where the daemon's log lines go: to stderr or the journal, and into a window of memory that the owner reads at any time.

Theory of operation. A line is judged (its level, whether it only repeats), kept in the window, and told to one outlet. The window is
read by number, as often and as slowly as a reader likes: what has left it meanwhile is counted, and nobody waits for a reader.

Rule 1: nothing here waits, and nothing raises: a log must not stop or end what it tells of. Rule 2: what is not told is counted, and
the next line that is told says how much it was. Rule 3: every thread may write.
"""

import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import fstat
from os import write as write_fd
from stat import S_ISREG
from typing import Any, Final, Protocol, TextIO

from runner.adapters.journald import JournalSocket, encode, journal_fields, priority
from runner.adapters.wallclock import boot_ms
from runner.config import LOG_LEVELS
from runner.loglines import Line, console_text, encoded, field_text, plain_line

LEVELS: Final[Mapping[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
assert tuple(LEVELS) == LOG_LEVELS
KEPT_LINES_MAX: Final = 2000
KEPT_BYTES_MAX: Final = 1024 * 1024
"""The window: hours of a quiet daemon, and no weight in its memory; older lines are where the outlet took them."""
EXCERPT_LINES_MAX: Final = 500
EXCERPT_BYTES_MAX: Final = 256 * 1024
"""One answer to a reader: a few milliseconds of the event loop; the reader asks for the rest."""
REPEATS_BURST: Final = 20
REPEATS_WINDOW_MS: Final = 10_000
"""A person sees from twenty lines what goes on; a fault that repeats a thousand times a second must not wear out the disk."""
REPEATS_TABLE_MAX: Final = 512
"""Kinds of lines that are counted at a time; the one whose window began first makes room."""
PIECE_BYTES: Final = 4096
"""A pipe or socket that is ready takes so much (PIPE_BUF) without making the writer wait."""
_NEVER_SUPPRESSED: Final = ("daemon.", "alarm.")
_SUBJECTS: Final = ("cmd_id", "worktree_id", "session", "logger")


class Outlet(Protocol):
    """Takes lines out of the process."""

    def tell(self, level: str, line: Line, text: str) -> bool:
        """Whether the line was taken whole; `text` is it as JSON. Never waits. Raises OSError or ValueError."""


# --- outlets ------------------------------------------------------------------------------------------------------------


class StreamOutlet:
    """A stream of text, in practice stderr: JSON, or for people. One that takes nothing now gets nothing, and is not waited for."""

    def __init__(self, stream: TextIO, *, human: bool) -> None:
        self._stream = stream
        self._human = human
        self._torn = False
        self._always_ready = False
        try:
            self._fd: int | None = stream.fileno()
            self._always_ready = S_ISREG(fstat(self._fd).st_mode)
        except (OSError, ValueError):
            self._fd = None

    def tell(self, level: str, line: Line, text: str) -> bool:
        """See Outlet."""
        return self.write(console_text(line) if self._human else text)

    def write(self, text: str) -> bool:
        """Write one line; whether it went whole."""
        if self._fd is None:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            return True
        # What was cut short ends where the next line begins.
        data = memoryview(f"{chr(10) if self._torn else ''}{text}\n".encode("ascii", "backslashreplace"))
        done = 0
        try:
            while done < len(data) and self._ready(self._fd):
                done += write_fd(self._fd, data[done : done + PIECE_BYTES])
        finally:
            self._torn = done < len(data) and (done > 0 or self._torn)
        return done == len(data)

    def _ready(self, fd: int) -> bool:
        """Whether it takes a piece now."""
        if self._always_ready:
            return True
        asked = select.poll()
        asked.register(fd, select.POLLOUT)
        return any(happened & select.POLLOUT for _, happened in asked.poll(0))


class JournalOutlet:
    """The journal, field by field; where that fails, its stream, with the priority in front as sd-daemon(3) has it."""

    def __init__(self, journal: JournalSocket, fallback: StreamOutlet) -> None:
        self._journal = journal
        self._fallback = fallback

    def tell(self, level: str, line: Line, text: str) -> bool:
        """See Outlet."""
        values = {
            key: field_text(value)
            for key, value in line.items()
            if key not in ("timestamp", "level") and value is not None
        }
        message = console_text(
            {key: value for key, value in line.items() if key not in ("timestamp", "level", "exception")}
        )
        try:
            return self._journal.send(encode(journal_fields(level, message, values)))
        except OSError:
            return self._fallback.write(f"<{priority(level)}>{text}")


# --- repeats ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """How often a line came since `since_ms`."""

    event: str
    since_ms: int
    count: int = 0
    suppressed: int = 0


class Repeats:
    """Lets REPEATS_BURST lines of a kind through in REPEATS_WINDOW_MS, the first one always, and counts the others.

    A kind is event, level, reason and attempt. Lines without both are told apart by what they are about: two accepted commands
    are two facts, a thousand commands refused for one reason are one.
    """

    def __init__(self) -> None:
        self._windows: dict[tuple[str, ...], _Window] = {}
        self._owed: dict[str, int] = {}
        self.total = 0
        """Lines suppressed in all."""

    def admits(self, line: Line, now_ms: int) -> bool:
        """Whether this line is told."""
        event = str(line.get("event"))
        if event.startswith(_NEVER_SUPPRESSED):
            return True
        kind = _kind(event, line)
        window = self._windows.get(kind)
        if window is None or now_ms - window.since_ms >= REPEATS_WINDOW_MS:
            self._close(kind)
            if len(self._windows) >= REPEATS_TABLE_MAX:
                # Windows are put in as they begin, so the first one is the oldest.
                self._close(next(iter(self._windows)))
            window = self._windows[kind] = _Window(event, now_ms)
        window.count += 1
        if window.count <= REPEATS_BURST:
            return True
        window.suppressed += 1
        self.total += 1
        return False

    def owed(self, line: Line) -> int:
        """How many lines of this event were suppressed in windows that are over; told once."""
        return self._owed.pop(str(line.get("event")), 0)

    def _close(self, kind: tuple[str, ...]) -> None:
        window = self._windows.pop(kind, None)
        if window is not None and window.suppressed:
            # By event, of which there are as many as our code has names.
            self._owed[window.event] = self._owed.get(window.event, 0) + window.suppressed


def _kind(event: str, line: Line) -> tuple[str, ...]:
    about = [str(line[key]) if line.get(key) is not None else "" for key in ("reason", "attempt")]
    if not any(about):
        about += [str(line[key]) for key in _SUBJECTS if line.get(key) is not None]
    return (event, str(line.get("level")), *about)


# --- the sink -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Lines of the window. `end` is the number of the last one, from which to go on; `dropped` had left the window before."""

    lines: tuple[str, ...]
    end: int
    dropped: int


@dataclass(slots=True)
class Sink:
    """Where every line of this process goes. `clock` gives milliseconds that go on while the machine sleeps."""

    outlet: Outlet | None
    level: str = "info"
    """What is told when nobody asked for another level for a time."""
    clock: Callable[[], int] = boot_ms
    _for_now: tuple[str, int] | None = None
    _repeats: Repeats = field(default_factory=Repeats)
    _kept: deque[str] = field(default_factory=deque)
    _kept_bytes: int = 0
    _end: int = 0
    _untold: int = 0
    _untold_total: int = 0
    _listeners: set[Callable[[], None]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- levels -------------------------------------------------------------------------------------------------

    def wants(self, level: str) -> bool:
        """Whether lines of this level are told now."""
        return LEVELS.get(level, LEVELS["error"]) >= LEVELS[self.level_now()[0]]

    def level_now(self) -> tuple[str, int | None]:
        """The level that counts, and for how many milliseconds more (None: until somebody changes it)."""
        held = self._for_now
        if held is not None:
            left_ms = held[1] - self.clock()
            if left_ms > 0:
                return held[0], left_ms
            self._for_now = None
        return self.level, None

    def set_level(self, level: str, for_ms: int | None) -> None:
        """Tell from `level` on, for `for_ms` or for good."""
        assert level in LEVELS
        if for_ms is None:
            self.level, self._for_now = level, None
        else:
            self._for_now = level, self.clock() + for_ms

    def state(self) -> dict[str, Any]:
        """For `runner status`."""
        level, left_ms = self.level_now()
        return {
            "level": level,
            "falls_back_in_ms": left_ms,
            "falls_back_to": None if left_ms is None else self.level,
            "suppressed": self._repeats.total,
            "dropped": self._untold_total,
        }

    # --- writing ------------------------------------------------------------------------------------------------

    def write(self, line: Line) -> None:
        """Take one line, which has its level in it; any thread."""
        level = str(line.get("level", "info"))
        with self._lock:
            if not self._repeats.admits(line, self.clock()):
                return
            told = dict(line)
            if suppressed := self._repeats.owed(line):
                told["suppressed"] = suppressed
            if self._untold:
                told["dropped"] = self._untold
            told = plain_line(told)
            text = encoded(told)
            self._keep(text)
            if self._tell(level, told, text):
                self._untold = 0
            else:
                self._untold += 1
                self._untold_total += 1
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _tell(self, level: str, line: Line, text: str) -> bool:
        if self.outlet is None:
            return True
        try:
            return self.outlet.tell(level, line, text)
        except (OSError, ValueError):
            return False  # closed, or broken: the window has the line all the same

    def _keep(self, text: str) -> None:
        self._kept.append(text)
        self._kept_bytes += len(text)
        self._end += 1
        while len(self._kept) > KEPT_LINES_MAX or self._kept_bytes > KEPT_BYTES_MAX:
            self._kept_bytes -= len(self._kept.popleft())

    # --- reading ------------------------------------------------------------------------------------------------

    def excerpt(self, after: int, last: int | None = None) -> Excerpt:
        """What came after line number `after`, as much as one answer holds; with `last` only the newest so many."""
        with self._lock:
            first = self._end - len(self._kept)
            start = min(max(after, first), self._end)
            if last is not None:
                start = max(start, self._end - last)
            lines = tuple(_within(EXCERPT_BYTES_MAX, [self._kept[n - first] for n in self._next(start)]))
            dropped = 0 if last is not None or after > self._end else max(first - after, 0)
            return Excerpt(lines, start + len(lines), dropped)

    def _next(self, start: int) -> range:
        return range(start, min(self._end, start + EXCERPT_LINES_MAX))

    @property
    def end(self) -> int:
        """How many lines there were."""
        return self._end

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called after each line, in the thread that wrote it; what is returned ends that."""
        with self._lock:
            self._listeners.add(listener)

        def leave() -> None:
            with self._lock:
                self._listeners.discard(listener)

        return leave


def _within(size_max: int, lines: Iterable[str]) -> Iterable[str]:
    """The first lines that fit, and always one: no line is longer than the window."""
    size = 0
    for number, text in enumerate(lines):
        size += len(text)
        if number and size > size_max:
            return
        yield text
