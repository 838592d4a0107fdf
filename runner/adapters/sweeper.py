"""What is left of an attempt whose shim is gone: found by its cookie, ended through pidfds, until two scans find nobody.

The cookie is in the environment of everything the attempt started, unless it cleaned its environment; the shim, which would have
been the parent of such processes, is gone. So this is the last tier, and what it cannot see it does not claim.
"""

import contextlib
import os
import signal
import time
from typing import Final

from runner.adapters.system import process_start
from runner.core.plans import Swept

COOKIE_NAME: Final = "LOCAL_RUNNER_COOKIE"
SCANS_MAX: Final = 50
"""A tree that breeds faster than this many rounds is reported as remaining."""
ROUND_S: Final = 0.05
"""Between two rounds: killed processes need a moment to be gone."""
ENVIRON_BYTES_MAX: Final = 1024 * 1024


def carriers(cookie: str) -> list[int]:
    """Process ids whose environment carries `cookie`; zombies and processes of other users are not seen."""
    wanted = f"{COOKIE_NAME}={cookie}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and wanted in _environ(name).split(b"\0"):
            found.append(int(name))
    return found


def end_remains(cookie: str) -> Swept:
    """Kill every carrier of `cookie` of this user. Returns how many were found, signalled, and are still there."""
    seen: set[tuple[int, int | None]] = set()
    signalled: set[tuple[int, int | None]] = set()
    empty = 0
    for _round in range(SCANS_MAX):
        now = carriers(cookie)
        empty = 0 if now else empty + 1
        if empty == 2:
            break
        for pid in now:
            who = (pid, process_start(pid))
            seen.add(who)
            if _kill(pid, who[1]):
                signalled.add(who)
        time.sleep(ROUND_S)
    return Swept(found=len(seen), signalled=len(signalled), remaining=0 if empty == 2 else len(carriers(cookie)))


def _kill(pid: int, start: int | None) -> bool:
    """KILL by pidfd after the start time was compared again: the number may have been given to somebody else."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if start is not None and process_start(pid) == start:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                return True
        finally:
            os.close(fd)
    return False


def _environ(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(ENVIRON_BYTES_MAX)
    except OSError:
        return b""
