"""What processes use: CPU time and peak RSS of trees of them, by the role they play, from /proc; and the same ground for all of them."""

import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SAMPLE_S: Final = 0.025
"""What a process used after its last sample is missed: of a run of seconds a percent or two; more often would disturb two cores."""
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
SOURCES: Final = frozenset({"cat", "seq", "yes", "echo", "sh"})
"""Programs that write the output: the same for every way."""


@dataclass(slots=True)
class Cost:
    """What the processes of one role used."""

    cpu_s: float = 0.0
    rss_mib: float = 0.0


@dataclass(slots=True)
class _Seen:
    role: str
    before: int
    ticks: int
    hwm_kib: int = 0


class Meter:
    """CPU time and peak RSS of trees of processes, by role; a process that ended counts as it was last seen.

    `roots` name the role of a process, and, separated by `>`, of its descendants: the last one is that of all further down.
    """

    def __init__(self, roots: Mapping[int, str]) -> None:
        self.roots = dict(roots)
        self._seen: dict[int, _Seen] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter")

    def __enter__(self) -> "Meter":
        """The peaks of what lives already are forgotten."""
        for pid, (role, ticks) in self._tree().items():
            self._seen[pid] = _Seen(role, ticks, ticks)
            try:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            except OSError:
                continue
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def costs(self) -> dict[str, Cost]:
        """Of each role: CPU of all its processes, and the largest of them."""
        found: dict[str, Cost] = {}
        for seen in self._seen.values():
            cost = found.setdefault(seen.role, Cost())
            cost.cpu_s += (seen.ticks - seen.before) * TICK_S
            cost.rss_mib = max(cost.rss_mib, seen.hwm_kib / 1024)
        # The listener of a server or a shim that is kept ahead used nothing: they are not on this way.
        return {role: cost for role, cost in found.items() if cost.cpu_s or role != "source"}

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        for pid, (role, ticks) in self._tree().items():
            seen = self._seen.setdefault(pid, _Seen(role, 0, 0))
            seen.role, seen.ticks = role, max(seen.ticks, ticks)
            seen.hwm_kib = max(seen.hwm_kib, peak_kib(pid))

    def _tree(self) -> dict[int, tuple[str, int]]:
        """Roots and their descendants: role, and ticks used."""
        stats = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
        found: dict[int, tuple[str, int]] = {}
        for pid, (comm, _parent, ticks) in stats.items():
            depth, at = 0, pid
            while at not in self.roots and at in stats:
                depth, at = depth + 1, stats[at][1]
            if at in self.roots:
                roles = self.roots[at].split(">")
                found[pid] = ("source" if depth and comm in SOURCES else roles[min(depth, len(roles) - 1)], ticks)
        return found


def peak_kib(pid: int) -> int:
    """VmHWM; 0 when the process is gone."""
    return status_kib(pid, "VmHWM")


def status_kib(pid: int, name: str) -> int:
    """A size of /proc/<pid>/status; 0 when the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Name, parent, and ticks of CPU; None when it is gone."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    words = tail.split()
    return head.partition("(")[2], int(words[1]), int(words[11]) + int(words[12])


def level(home: Path, size: int) -> None:
    """The same ground for whoever comes next, who writes at most `size` bytes: a quiet disk, no cache, memory that was touched.

    A virtual machine pays ten times as much for a page that its host has to find first. Who got those would be chance.
    """
    os.sync()
    for path in home.rglob("*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # a socket, or deleted meanwhile
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
