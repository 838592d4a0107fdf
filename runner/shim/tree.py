"""The processes of one attempt: finding them and signalling them.

First tier: descendants of this shim, complete because it is their subreaper. Second tier: processes of this user
that carry the attempt's cookie in their environment, wherever they hang. A pid is never trusted alone: a process
is signalled through a pidfd after its start time was compared.
"""

from __future__ import annotations

import posix as os
import time

from runner.shim import system
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

DESCENDANTS: Final = "descendants"
COOKIE: Final = "cookie"
# New processes between two scans mean the tree is forking; it is followed this many times before the next look.
PASSES_TERM: Final = 2
PASSES_KILL: Final = 10
ENVIRON_BYTES_MAX: Final = 4_194_304
END_RETRY_S: Final = 0.02
# Pids that were taken and given back without a fork being counted, when a fork failed half-way.
PIDS_SPARE: Final = 2048


class Process:
    """One living process of the tree."""

    __slots__ = ("pid", "start", "tier")

    def __init__(self, pid: int, start: int, tier: str) -> None:
        self.pid = pid
        self.start = start
        self.tier = tier


class Tree:
    """The tree of the attempt that carries `cookie` (a whole `NAME=value`)."""

    def __init__(self, cookie: bytes) -> None:
        self._cookie = cookie
        self._me = os.getpid()
        self._uid = os.geteuid()
        self._forks = _forks()
        self._eldest = 0

    def begin(self, pid: int) -> None:
        """The child is `pid`: nobody who was born before it carries the cookie."""
        self._eldest = pid

    def find(self) -> list[Process]:
        """Every living process of the tree; zombies and the shim itself are none."""
        found: dict[int, Process] = {}
        seen = {self._me}
        waiting = [self._me]
        while waiting:
            for pid in _children(waiting.pop()):
                if pid in seen:
                    continue
                seen.add(pid)
                waiting.append(pid)
                start = _living(pid)
                if start:
                    found[pid] = Process(pid, start, DESCENDANTS)
        for pid in self._strangers():
            if pid not in seen and self._carries_cookie(pid):
                start = _living(pid)
                if start:
                    found[pid] = Process(pid, start, COOKIE)
        return list(found.values())

    def signal(self, number: int, *, passes: int) -> tuple[list[Process], int]:
        """Send `number` and CONT once to each process of the tree; returns those it reached and how many were found.

        A process of another user that must not be signalled is counted as found.
        """
        reached: list[Process] = []
        tried: set[tuple[int, int]] = set()
        count = 0
        for _ in range(passes):
            processes = self.find()
            count = len(processes)
            fresh = [each for each in processes if (each.pid, each.start) not in tried]
            if not fresh:
                break
            for each in fresh:
                tried.add((each.pid, each.start))
                if send(each, number):
                    reached.append(each)
        return reached, count

    def _strangers(self) -> list[int]:
        """Whoever may carry the cookie: all who were born after the child.

        Reading the environment of every process would cost each end of an attempt milliseconds. Pids are given out in
        rising order, so the younger ones have higher numbers, as long as there were too few forks to come round.
        """
        pids = list(_pids())
        newest, tasks = _last_pid()
        born = _forks() - self._forks
        come_round = self._eldest + born + tasks + PIDS_SPARE >= _pid_max()
        if come_round or not 0 < self._eldest <= newest or born <= 0:
            return pids
        return [pid for pid in pids if pid > self._eldest]

    def _carries_cookie(self, pid: int) -> bool:
        path = f"/proc/{pid}"
        try:
            if os.stat(path).st_uid != self._uid:
                return False
            fd = os.open(path + "/environ", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            data = os.read(fd, system.READ_BYTES)
            whole = data
            while len(data) == system.READ_BYTES and len(whole) < ENVIRON_BYTES_MAX:
                data = os.read(fd, system.READ_BYTES)
                whole += data
        except OSError:
            return False
        finally:
            os.close(fd)
        return self._cookie in whole and self._cookie in whole.split(b"\0")


def send(process: Process, number: int) -> bool:
    """Send `number`, then CONT (unless `number` stops), if it is still the same process; whether it was reached."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:
        fd = -1  # no pidfd on this kernel: the comparison below still guards against a reused pid
    try:
        if system.start_time(process.pid) != process.start:
            return False
        for each in (number,) if number in (signals.SIGSTOP, signals.SIGCONT) else (number, signals.SIGCONT):
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


def end(tree: Tree, wait_ms: int) -> int:
    """Kill the tree without a loop around it, for at most `wait_ms`; returns how many live on."""
    end_ms = system.boottime_ms() + wait_ms
    while True:
        _reached, count = tree.signal(signals.SIGKILL, passes=PASSES_KILL)
        try:
            while os.wait4(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if count == 0 or system.boottime_ms() >= end_ms:
            return count
        time.sleep(END_RETRY_S)


def _living(pid: int) -> int:
    """The start time of a living process, 0 for a zombie or none."""
    fields = system.stat_fields(pid)
    if len(fields) <= 19:
        return 0
    # A leader that has ended while other threads run shows as a zombie, and is none.
    if fields[0] in ("Z", "X") and int(fields[17]) <= 1:
        return 0
    return int(fields[19])


def _children(pid: int) -> list[int]:
    if not _HAS_CHILDREN:
        return [each for each in _pids() if _parent(each) == pid]
    children: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return children
    for thread in threads:
        try:
            data = system.read_whole(f"/proc/{pid}/task/{thread}/children")
        except OSError:
            continue
        children.extend(int(each) for each in data.split())
    return children


def _parent(pid: int) -> int:
    fields = system.stat_fields(pid)
    return int(fields[1]) if len(fields) > 1 else 0


def _forks() -> int:
    """Processes and threads this machine has started since it booted, 0 where the kernel does not tell."""
    try:
        told = system.read_whole("/proc/stat").rpartition(b"\nprocesses ")[2]
        return int(told.split(None, 1)[0])
    except (OSError, ValueError, IndexError):
        return 0


def _last_pid() -> tuple[int, int]:
    """The pid that was given out last, and how many processes and threads there are; zeros where the kernel does not tell."""
    try:
        fields = system.read_text("/proc/loadavg").split()
        return int(fields[4]), int(fields[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0, 0


def _pid_max() -> int:
    try:
        return int(system.read_text("/proc/sys/kernel/pid_max"))
    except (OSError, ValueError):
        return 0


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name[0] in "123456789":
            yield int(name)


_HAS_CHILDREN = os.access(f"/proc/self/task/{os.getpid()}/children", os.F_OK)
