"""The birth of a shim: from a fork or a fresh interpreter to a process that owns its attempt and nothing else."""

from __future__ import annotations

import errno
import fcntl
import gc
import posix as os
import time

from runner.shim import child, files, guard, report, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# A prober holds the lock for a moment; another shim holds it for life.
LOCK_WAIT_MS: Final = 30_000
LOCK_RETRY_S: Final = 0.005


def settle() -> None:
    """Leave the life before: session, standard streams, signals, directory. Raises OSError."""
    gc.disable()
    if os.getsid(0) != os.getpid():
        os.setsid()
    system.detach_stdio()
    system.ignore_signals()
    system.become_subreaper()
    os.umask(child.SHIM_UMASK)
    os.chdir("/")


def main(dirfd: int, controller_fd: int, lock_fds: list[int], warm: system.Warm) -> int:
    """Guard the attempt in `dirfd` from birth to end; returns the exit status of the shim (0: it did its work).

    `settle` comes first, and other descriptors than those named and the standard three are closed before.
    """
    shim = None
    try:
        _lock(dirfd)
        report.refuse_used_directory(dirfd)
        shim = guard.Guard(dirfd, controller_fd, warm)
        shim.prepare()
        shim.run()
    except BaseException as exc:
        files.note_failure(dirfd, exc)
        if shim is not None:
            try:
                shim.last_resort()
            except BaseException as second:
                files.note_failure(dirfd, second)
        return 1
    return 0


def _lock(dirfd: int) -> None:
    """Hold `lock` for life; never closed on purpose. Raises TimeoutError when another shim holds it."""
    fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dirfd)
    end_ms = system.boottime_ms() + LOCK_WAIT_MS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
        else:
            return
        if system.boottime_ms() >= end_ms:
            raise TimeoutError("another shim holds the lock of this directory")
        time.sleep(LOCK_RETRY_S)
