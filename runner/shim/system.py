"""The few facts and switches a shim needs from the kernel: identities, clocks, digests, descriptors.

Everything here is safe to call between fork and exec of a payload. It never decides anything.
"""

from __future__ import annotations

import _ctypes
import errno
import fcntl
import posix as os
import time

try:
    from _hashlib import openssl_sha256 as sha256
except ImportError:  # an interpreter without OpenSSL: slower, same digests
    try:
        from _sha2 import sha256  # type: ignore[import-not-found,no-redef,unused-ignore]
    except ImportError:
        from _sha256 import sha256  # type: ignore[import-not-found,no-redef,unused-ignore]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
    from typing import Final

    signals = signal
else:
    import _signal as signals

RECORD_PAYLOAD_MAX: Final = 65_536
RECORD_HEADER_BYTES: Final = 16
# Four full records for each read: a larger gather leaves the L2 cache, a smaller one costs system calls.
GATHER_RECORDS: Final = 4
STAT_BYTES_MAX: Final = 4096
READ_BYTES: Final = 65_536
PR_SET_CHILD_SUBREAPER: Final = 36
IGNORED_SIGNALS: Final = (
    signals.SIGHUP,
    signals.SIGINT,
    signals.SIGPIPE,
    signals.SIGTTIN,
    signals.SIGTTOU,
    signals.SIGTERM,
    signals.SIGXFSZ,
)


class Warm:
    """What a fork server prepares once and every shim shares copy-on-write."""

    __slots__ = ("boot_id", "buffer", "digest")

    def __init__(self) -> None:
        self.boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        self.buffer = bytearray(GATHER_RECORDS * (RECORD_HEADER_BYTES + RECORD_PAYLOAD_MAX))
        self.digest = sha256()


def boottime_ms() -> int:
    """Milliseconds of CLOCK_BOOTTIME, the clock of every deadline."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def awake_ms() -> int:
    """Milliseconds of CLOCK_MONOTONIC, which stands still in suspend; only compared with `boottime_ms`."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000


def wall_ns() -> int:
    """Unix time in nanoseconds, for timestamps only."""
    return time.time_ns()


def read_text(path: str) -> str:
    """The first page of a small kernel file, decoded as Latin-1 so that it cannot fail."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, STAT_BYTES_MAX).decode("latin-1")
    finally:
        os.close(fd)


def read_whole(path: str | bytes) -> bytes:
    """A kernel file of any length. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = chunk = os.read(fd, READ_BYTES)
        while chunk:
            chunk = os.read(fd, READ_BYTES)
            whole += chunk
        return whole
    finally:
        os.close(fd)


def stat_fields(pid: int) -> list[str]:
    """Fields 3 and on of `/proc/<pid>/stat` (state first); empty when the process is gone."""
    try:
        # The name may hold spaces and parentheses; the last parenthesis ends it.
        return read_text(f"/proc/{pid}/stat").rpartition(") ")[2].split()
    except OSError:
        return []


def start_time(pid: int) -> int:
    """Field 22 of `/proc/<pid>/stat` in clock ticks since boot, 0 when the process is gone."""
    fields = stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def become_subreaper() -> None:
    """Make orphaned descendants reparent to this process. Raises OSError when the kernel refuses."""
    call = getattr(_ctypes, "call_function", None)
    if call is not None:
        result = call(_PRCTL, (PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    else:
        import ctypes

        result = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if result != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) was refused")


def ignore_signals() -> None:
    """Ignore what a terminal, a service stop or a closed pipe would send to a shim."""
    for number in IGNORED_SIGNALS:
        signals.signal(number, signals.SIG_IGN)


def detach_stdio() -> None:
    """Point stdin, stdout and stderr at /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in `keep`, and mark the kept ones close-on-exec."""
    kept = set(keep)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError as exc:
                if exc.errno != errno.EBADF:  # the listing's own descriptor
                    raise
    for fd in kept:
        os.set_inheritable(fd, False)


def is_open(fd: int) -> bool:
    """Whether `fd` is an open descriptor of this process."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _symbol(name: str) -> int:
    if not hasattr(_ctypes, "call_function"):
        return 0
    # Typeshed does not know that None means this process.
    return _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]


_PRCTL = _symbol("prctl")
