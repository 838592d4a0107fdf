"""Attempts as their directories tell of them, read by a person's tools whether the daemon is up or not (docs/shim.md §1).

What is read are claims of other processes: checked for form, shown, and never acted upon.
"""

import errno
import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from runner.errors import Refused

ATTEMPTS_DIR: Final = "x"
LOG_DIR: Final = "log"
FORMAT: Final = 1
SPEC_BYTES_MAX: Final = 256 * 1024
FILE_BYTES_MAX: Final = 64 * 1024
"""Both are bounds of the file format (docs/shim.md §1): a longer file is none of ours."""
_OURS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Faults of who asks, which tell nothing of the file: taken for its absence, they would declare living attempts dead."""
_NAME: Final = re.compile(r"(?P<execution>[A-Za-z0-9_-]{1,64})\.(?P<token>[1-9][0-9]{0,15})")
_SEGMENT: Final = re.compile(r"([0-9a-f]{16})\.seg")
_GIT_PREFIX: Final = "g-"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFiles:
    """One attempt directory at one moment."""

    directory: Path
    alive: bool
    """Its lock is held: the shim lives."""
    phase: str
    """`none`, `ready`, `released` or `running`."""
    exit: dict[str, Any] | None
    argv: tuple[str, ...]
    cwd: str
    cookie: str
    boot_id: str
    """The boot its shim, or else the daemon that wrote its spec, lived in."""
    child_pid: int | None
    started_ms: int | None
    shim: tuple[int, int] | None
    """Pid and start time of its shim, in the boot that `meta.json` names."""
    spec: bool
    """Whether its spec is there and of our format."""
    outlive: tuple[str, ...]
    """Names of processes that may live on."""
    cgroup: str | None
    """Where its payload was to be."""
    terminal: tuple[int, int] | None
    """Rows and columns that its terminal was opened with; None: it has pipes."""
    leaves: bool
    """What it has in the background may live on when it has ended."""

    @property
    def name(self) -> str:
        """The attempt's name."""
        return self.directory.name

    @property
    def state(self) -> str:
        """`ended`, `running`, `waiting` (behind its start barrier), or `lost`: no shim and no word on how it ended."""
        if self.exit is not None:
            return "ended"
        if not self.alive:
            return "lost" if self.phase != "none" else "waiting"
        return "running" if self.phase == "running" else "waiting"


def attempt_directories(state_dir: Path, *, tools: bool = False) -> list[Path]:
    """Directories of attempts, by name; with `tools` also those of git verbs."""
    try:
        names = os.listdir(state_dir / ATTEMPTS_DIR)
    except FileNotFoundError:
        return []
    wanted = (name for name in names if _NAME.fullmatch(name) and (tools or not name.startswith(_GIT_PREFIX)))
    return [state_dir / ATTEMPTS_DIR / name for name in sorted(wanted)]


def read_attempt(directory: Path) -> AttemptFiles:
    """Read one attempt directory; whether it lives is asked first, so that an end seen with a dead shim is the end.

    Raises OSError when this process may open no more files.
    """
    alive = is_alive(directory)
    ended = read_object(f"{directory}/exit.json", FILE_BYTES_MAX)
    meta = read_object(f"{directory}/meta.json", FILE_BYTES_MAX) or {}
    found_spec = read_object(f"{directory}/spec.json", SPEC_BYTES_MAX)
    spec = found_spec or {}
    child, shim, started_ns, tty = meta.get("child"), meta.get("shim"), meta.get("started_ns"), spec.get("tty")
    return AttemptFiles(
        directory=directory,
        alive=alive,
        phase=_text(meta.get("phase")) or "none",
        exit=ended,
        argv=_texts(spec.get("argv")),
        cwd=_text(spec.get("cwd")),
        cookie=_text(spec.get("cookie")),
        boot_id=_text(meta.get("boot_id")) or _text(spec.get("boot_id")),
        child_pid=_count(child.get("pid")) if isinstance(child, dict) else None,
        started_ms=started_ns // 1_000_000 if isinstance(started_ns, int) else None,
        shim=_identity(shim) if "boot_id" in meta else None,
        spec=found_spec is not None,
        outlive=_texts(spec.get("outlive")),
        cgroup=_text(spec.get("cgroup")) or None,
        terminal=_size(tty),
        leaves=isinstance(tty, dict) and tty.get("background") == "leave",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingPty:
    """A PTY whose shim lives. Rows and columns are those it was opened with."""

    attempt: str
    directory: Path
    argv: tuple[str, ...]
    rows: int
    cols: int
    started_ms: int | None


def living_ptys(state_dir: Path) -> list[LivingPty]:
    """PTYs of this machine that live and have not ended, oldest first. Raises OSError when this process may open no more files."""
    found = [read_attempt(directory) for directory in attempt_directories(state_dir)]
    ptys = [
        LivingPty(
            attempt=files.name,
            directory=files.directory,
            argv=files.argv,
            rows=files.terminal[0],
            cols=files.terminal[1],
            started_ms=files.started_ms,
        )
        for files in found
        if files.terminal is not None and files.alive and files.exit is None
    ]
    return sorted(ptys, key=lambda pty: (pty.started_ms or 0, pty.attempt))


def shown_size(files: AttemptFiles) -> str | None:
    """The size that a PTY was opened with, as people write it: columns first. None for what has pipes."""
    return None if files.terminal is None else f"{files.terminal[1]}x{files.terminal[0]}"


def written_end(directory: Path) -> int | None:
    """The offset at which the log of an attempt ends now, as its files say; None where there is none."""
    log_dir = directory / LOG_DIR
    try:
        last = max(segment_bases(log_dir), default=None)
        return None if last is None else last + (log_dir / segment_name(last)).stat().st_size
    except OSError:
        return None


def read_spec(directory: Path) -> dict[str, Any] | None:
    """What an attempt was started with; None when there is none, or it cannot be read."""
    return read_object(f"{directory}/spec.json", SPEC_BYTES_MAX)


def segment_bases(log_dir: Path) -> list[int]:
    """Offsets at which the segments of a log begin, in order; none where there is no directory. Raises OSError."""
    try:
        names = os.listdir(log_dir)
    except FileNotFoundError:
        return []
    # The child's own user owns the directory: whatever else it has put there is no segment.
    return sorted(int(match[1], 16) for name in names if (match := _SEGMENT.fullmatch(name)))


def segment_name(base: int) -> str:
    """The file of the segment that begins at an offset (docs/shim.md §3)."""
    return f"{base:016x}.seg"


def is_alive(directory: Path) -> bool:
    """Whether a shim holds the lock of this directory; the probe holds it for a moment, for which a shim waits."""
    return is_locked(f"{directory}/lock")


def is_locked(path: Path | str) -> bool:
    """Whether another process holds this lock file. Raises OSError when it cannot be asked now."""
    fd = _opened(path)
    if fd is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def find_attempt(state_dir: Path, wanted: str) -> Path:
    """The directory of an attempt by its name, or of the newest attempt of an execution. Raises Refused(UNKNOWN_TARGET)."""
    known = attempt_directories(state_dir, tools=True)
    exact = [directory for directory in known if directory.name == wanted]
    tries = [directory for directory in known if directory.name.rpartition(".")[0] == wanted]
    if not exact and not tries:
        raise Refused(Reason.UNKNOWN_TARGET, "no such execution or attempt on this machine")
    return (exact or sorted(tries, key=lambda directory: int(directory.suffix[1:])))[-1]


def _opened(path: Path | str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        if exc.errno in _OURS:
            raise
        return None


def read_object(path: Path | str, size_max: int) -> dict[str, Any] | None:
    """A JSON object of our format; None when there is none. Raises OSError when this process may open no more files."""
    fd = _opened(path)
    if fd is None:
        return None
    with open(fd, "rb", buffering=0) as file:
        # One read takes a small file whole; a buffer would only be copied from.
        data = file.read(size_max + 1) or b""
    try:
        found = json.loads(data) if len(data) <= size_max else None
    except (ValueError, RecursionError):
        return None
    # `type`, not `isinstance`: true is no version.
    return found if isinstance(found, dict) and type(found.get("v")) is int and found["v"] == FORMAT else None


def _identity(process: object) -> tuple[int, int] | None:
    if not isinstance(process, dict):
        return None
    pid, start = _count(process.get("pid")), _count(process.get("start"))
    return None if pid is None or start is None else (pid, start)


def _size(tty: object) -> tuple[int, int] | None:
    if not isinstance(tty, dict):
        return None
    rows, cols = _count(tty.get("rows")), _count(tty.get("cols"))
    return None if rows is None or cols is None else (rows, cols)


def _texts(values: object) -> tuple[str, ...]:
    return tuple(_text(value) for value in values) if isinstance(values, list) else ()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
