"""Entry point of the fork server and of a single shim, run as a file by `python -I -S`.

`forkserver` serves requests on fd 3. `shim` guards one attempt: fd 3 is its directory, fd 4 the controller, the
fds that follow without a break (at most four) are locks to hold for life. Nothing here may import `site`.
"""

from __future__ import annotations

import posix as os
import sys

# The root goes last: a file beside the project must never shadow the standard library.
sys.path.append(__file__.rsplit("/", 3)[0])

from runner.shim import birth, forkserver, system

DIRECTORY_FD = 3
CONTROLLER_FD = 4
FIRST_LOCK_FD = 5


def main(argv: list[str]) -> int:
    """Run the role that `argv[1]` names and return the process's exit status (2: usage)."""
    role = argv[1] if len(argv) == 2 else ""
    if role == "forkserver":
        return forkserver.serve(DIRECTORY_FD)
    if role == "shim":
        locks = []
        for fd in range(FIRST_LOCK_FD, FIRST_LOCK_FD + forkserver.LOCKS_MAX):
            if not system.is_open(fd):
                break
            locks.append(fd)
        birth.settle()
        system.close_all_but([DIRECTORY_FD, CONTROLLER_FD, *locks])
        return birth.main(DIRECTORY_FD, CONTROLLER_FD, locks, system.Warm())
    os.write(2, b"usage: __main__.py forkserver | shim\n")
    return 2


if __name__ == "__main__":
    # No interpreter teardown: the kernel frees faster, and a shim has nothing left to flush.
    os._exit(main(sys.argv))
