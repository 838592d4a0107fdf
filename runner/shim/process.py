"""One living process: what `/proc` tells of it, and signals that reach it and nobody else.

A pid is never trusted alone: a process is signalled through a pidfd after its start time was compared. The daemon's
sweeper looks and signals through the same functions.
"""

from __future__ import annotations

import posix as os

from runner.shim import system
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

# Why a process lives on after everything was tried.
EPERM, D_STATE, ALIVE = "eperm", "d_state", "alive"
# The longest environment or command line that is read: above the kernel's own limit for most processes.
STRINGS_BYTES_MAX: Final = 4_194_304
WCHAN_CHARS_MAX: Final = 64
NOT_TOLD: Final = "?"


class Process:
    """One living process, and in which tier it was found."""

    __slots__ = ("name", "parent", "pid", "start", "tier")

    def __init__(self, pid: int, start: int, tier: str, name: str = "", parent: int = 0) -> None:
        self.pid = pid
        self.start = start
        self.tier = tier
        self.name = name
        self.parent = parent


def look(pid: int, tier: str) -> Process | None:
    """The living process `pid`; None for a zombie or nobody."""
    try:
        # The name may hold spaces and parentheses; the last parenthesis ends it.
        head, _, tail = system.read_text(f"/proc/{pid}/stat").rpartition(") ")
        fields = tail.split()
        # A leader that has ended while other threads run shows as a zombie, and is none.
        if fields[0] in ("Z", "X") and int(fields[17]) <= 1:
            return None
        return Process(pid, int(fields[19]), tier, head.partition("(")[2], int(fields[1]))
    except (OSError, ValueError, IndexError):
        return None


def pids() -> Iterator[int]:
    """Every process id of this machine, zombies included."""
    for name in os.listdir("/proc"):
        if name[0] in "123456789":
            yield int(name)


def children(pid: int) -> list[int]:
    """The children of a process, zombies included; none when it is gone."""
    if not _HAS_CHILDREN:
        return [each for each in pids() if _parent(each) == pid]
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            data = system.read_whole(f"/proc/{pid}/task/{thread}/children")
        except OSError:
            continue
        found.extend(int(each) for each in data.split())
    return found


def session(pid: int) -> int:
    """The session of a process, 0 when it is gone."""
    fields = system.stat_fields(pid)
    return int(fields[3]) if len(fields) > 3 else 0


def carries(pid: int, mark: bytes) -> bool:
    """Whether `mark` (a whole `NAME=value`) stands in the environment the process was started with."""
    whole = _strings(pid, "environ")
    return mark in whole and mark in whole.split(b"\0")


def marked(pid: int, mark: bytes) -> list[bytes]:
    """The variables (`NAME=value`) that begin with `mark` in the environment the process was started with."""
    whole = _strings(pid, "environ")
    return [each for each in whole.split(b"\0") if each.startswith(mark)] if mark in whole else []


def belongs_to(pid: int, uid: int) -> bool:
    """Whether the process is of the user `uid`; not when it is gone."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == uid
    except OSError:
        return False


def answers_to(process: Process, names: list[bytes]) -> bool:
    """Whether a process goes by one of `names`: its own name, its program's file, or an argument that is it or ends with `.` and it."""
    if process.name.encode("latin-1") in names:
        return True
    argv = _strings(process.pid, "cmdline").split(b"\0")
    if argv[0].rpartition(b"/")[2] in names:
        return True
    return any(item == name or item.endswith(b"." + name) for item in argv for name in names)


def spared(kin: dict[int, Process], names: list[bytes], never: int) -> dict[int, Process]:
    """Those of `kin` that may live on: who goes by one of `names` (but not the process `never`), and their descendants."""
    if not names:
        return {}
    kept = {pid: each for pid, each in kin.items() if pid != never and answers_to(each, names)}
    grown = bool(kept)
    while grown:
        heirs = {pid: each for pid, each in kin.items() if pid not in kept and each.parent in kept}
        kept.update(heirs)
        grown = bool(heirs)
    return kept


def send(process: Process, number: int, *, alone: bool = False) -> bool:
    """Send `number`, then CONT (unless `alone`, or `number` stops), if it is still the same process; whether it was reached."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:
        fd = -1  # no pidfd on this kernel: the comparison below still guards against a reused pid
    try:
        if system.start_time(process.pid) != process.start:
            return False
        for each in (number,) if alone or number in (signals.SIGSTOP, signals.SIGCONT) else (number, signals.SIGCONT):
            if fd >= 0:
                signals.pidfd_send_signal(fd, each)
            else:
                os.kill(process.pid, each)
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)
    return True


def standing(process: Process) -> tuple[str, str, str] | None:
    """How a process that should be gone stands: state letter, kernel function it sleeps in, and why; None when it is gone."""
    try:
        os.kill(process.pid, 0)
        refused = False
    except PermissionError:
        refused = True
    except OSError:
        return None
    state = _state(process.pid)
    try:
        wchan = system.read_text(f"/proc/{process.pid}/wchan")[:WCHAN_CHARS_MAX]
    except OSError:
        wchan = ""
    if system.start_time(process.pid) != process.start:
        return None
    why = EPERM if refused else D_STATE if state == "D" else ALIVE
    return state, "" if wchan == "0" else wchan, why


def shown(name: str) -> str:
    """The name of a process as text that can be written anywhere; the kernel's bytes need not be UTF-8."""
    return name.encode("latin-1").decode("utf-8", "backslashreplace")


def _strings(pid: int, name: str) -> bytes:
    """`/proc/<pid>/environ` or `cmdline`, texts that end with a NUL; empty when it may not be read."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        whole = data = os.read(fd, system.READ_BYTES)
        while len(data) == system.READ_BYTES and len(whole) < STRINGS_BYTES_MAX:
            data = os.read(fd, system.READ_BYTES)
            whole += data
    except OSError:
        return b""
    finally:
        os.close(fd)
    return whole


def _state(pid: int) -> str:
    """The state of a process, or of one of its threads when its leader has ended."""
    letter = (system.stat_fields(pid) or [NOT_TOLD])[0]
    if letter != "Z":
        return letter
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return letter
    others = [fields[0] for thread in threads if (fields := system.stat_fields(int(thread))) and fields[0] != "Z"]
    return others[0] if others else letter


def _parent(pid: int) -> int:
    fields = system.stat_fields(pid)
    return int(fields[1]) if len(fields) > 1 else 0


_HAS_CHILDREN = os.access(f"/proc/self/task/{os.getpid()}/children", os.F_OK)
