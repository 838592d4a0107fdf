"""What this machine has left: disk and inodes where the runner writes, memory, descriptors of this process.

Rule: what cannot be measured is not told (None), so nothing is refused for it; the fault is noted once, until it is over.
"""

import errno
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from protocol.limits import KIB
from runner.core.plans import Headroom

T = TypeVar("T")

MEMINFO: Final = Path("/proc/meminfo")
MEMINFO_BYTES_MAX: Final = 16 * KIB
"""It has about 1.5 KiB."""
DESCRIPTORS: Final = "/proc/self/fd"
_AVAILABLE: Final = b"MemAvailable:"


class Gauge:
    """Measures `places` and this process. A dozen system calls on local files: cheap enough for the event loop."""

    def __init__(self, places: Sequence[Path], note: Callable[[str], None] = lambda _fault: None) -> None:
        self._places = places
        self._note = note
        self._faulty = False

    def measure(self) -> Headroom:
        """As of now."""
        faults: list[str] = []
        disk = _tried(lambda: _least(self._places), faults)
        memory = _tried(memory_available, faults)
        descriptors = _tried(descriptors_free, faults)
        if faults and not self._faulty:
            self._note("; ".join(faults))
        self._faulty = bool(faults)
        free, total, inodes_free, inodes_total = disk or (None, None, None, None)
        return Headroom(
            disk_free=free,
            disk_total=total,
            inodes_free=inodes_free,
            inodes_total=inodes_total,
            memory_available=memory,
            fds_free=descriptors,
        )


def memory_available() -> int:
    """Bytes that new programs may have without swapping, as the kernel reckons. Raises OSError."""
    with MEMINFO.open("rb") as file:
        content = file.read(MEMINFO_BYTES_MAX)
    for line in content.splitlines():
        if line.startswith(_AVAILABLE):
            return int(line.split()[1]) * KIB
    raise OSError(errno.ENODATA, "it names no MemAvailable", str(MEMINFO))


def descriptors_free() -> int | None:
    """Descriptors that this process may still open; None where there is no limit. Raises OSError."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    # Since Linux 6.2 the directory's size is their number; before, it is 0, and the directory that is read is one of them.
    used = os.stat(DESCRIPTORS).st_size or len(os.listdir(DESCRIPTORS)) - 1
    return max(soft - used, 0)


def _least(places: Sequence[Path]) -> tuple[int, int, int | None, int | None]:
    """Of the file systems that hold `places`: of the one with the least space its size, of the one with the least inodes theirs."""
    found = [os.statvfs(place) for place in places if place.exists()]
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(places[0]))
    small = min(found, key=lambda disk: disk.f_bavail * disk.f_frsize)
    # File systems without a fixed number of inodes (btrfs) say that they have none at all.
    counted = [disk for disk in found if disk.f_files > 0]
    few = min(counted, key=lambda disk: disk.f_favail / disk.f_files, default=None)
    return (
        small.f_bavail * small.f_frsize,
        small.f_blocks * small.f_frsize,
        None if few is None else few.f_favail,
        None if few is None else few.f_files,
    )


def _tried(measure: Callable[[], T], faults: list[str]) -> T | None:
    try:
        return measure()
    except (OSError, ValueError, IndexError) as exc:
        faults.append(str(exc))
        return None
