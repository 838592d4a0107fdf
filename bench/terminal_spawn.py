"""A child on a terminal: posix_spawn with the slave as controlling terminal, beside os.forkpty and ptyprocess, in one run.

Usage: .venv/bin/python bench/terminal_spawn.py. Timed is how long the caller is held up; with a larger caller a fork copies more.
"""

import os
import statistics
import time
from collections.abc import Callable

import ptyprocess

TRUE = "/bin/true"
ROUNDS = 60
LARGER_MIB = 200


def by_posix_spawn() -> float:
    """As the shim does it; the pair is made outside of the time, as it is for the others inside their calls."""
    began = time.perf_counter()
    master, slave = os.openpty()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    pid = os.posix_spawn(TRUE, [TRUE], {}, file_actions=actions, setsid=True)
    took = time.perf_counter() - began
    os.close(slave)
    os.waitpid(pid, 0)
    os.close(master)
    return took


def by_forkpty() -> float:
    """The exec of the child comes on top of it."""
    began = time.perf_counter()
    pid, master = os.forkpty()
    if pid == 0:
        os.execv(TRUE, [TRUE])
    took = time.perf_counter() - began
    os.waitpid(pid, 0)
    os.close(master)
    return took


def by_ptyprocess() -> float:
    """It waits for the exec, to tell its errors."""
    began = time.perf_counter()
    child = ptyprocess.PtyProcess.spawn([TRUE])
    took = time.perf_counter() - began
    child.wait()
    child.fileobj.close()
    return took


def measure(way: Callable[[], float]) -> tuple[float, float]:
    """Median and p95 in ms."""
    way()
    took = sorted(1000 * way() for _ in range(ROUNDS))
    return statistics.median(took), took[int(0.95 * ROUNDS)]


def main() -> None:
    """All three, in a small and in a larger process."""
    for mib in (0, LARGER_MIB):
        kept = bytearray(os.urandom(1) * (mib << 20))
        for way in (by_posix_spawn, by_forkpty, by_ptyprocess):
            median, p95 = measure(way)
            print(f"+{mib:3} MiB  {way.__name__:15} {median:6.2f} ms  p95 {p95:6.2f}")
        del kept


if __name__ == "__main__":
    main()
