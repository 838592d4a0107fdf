"""A shim whose clocks a test can move: the entry point of the shim, and the hand that turns its clocks.

Every time of a shim comes from `system.boottime_ms` and `system.awake_ms`, asked through their module. Here they add
what the file `clock` in the attempt's directory says, two numbers in ms. A production shim has nothing of this.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENTRY = Path(__file__)
NAME = "clock"


class Clock:
    """The clocks of the shim over `folder`; before its first move they are this machine's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boot_ms = 0
        self._awake_ms = 0

    def pass_by(self, ms: int) -> None:
        """Time goes by while the machine is awake."""
        self._awake_ms += ms
        self.sleep(ms)

    def sleep(self, ms: int) -> None:
        """The machine sleeps: only the clock of deadlines goes on."""
        self._boot_ms += ms
        new = self._folder / "clock.new"
        new.write_text(f"{self._boot_ms} {self._awake_ms}")
        new.rename(self._folder / NAME)


def _main() -> None:
    sys.path.append(str(ENTRY.resolve().parents[2]))
    from runner.shim import __main__ as entry
    from runner.shim import system

    boottime_ms, awake_ms = system.boottime_ms, system.awake_ms

    def moved(which: int) -> int:
        try:
            fd = os.open(NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=entry.DIRECTORY_FD)
        except OSError:
            return 0
        try:
            return int(os.read(fd, 100).split()[which])
        finally:
            os.close(fd)

    system.boottime_ms = lambda: boottime_ms() + moved(0)
    system.awake_ms = lambda: awake_ms() + moved(1)
    os._exit(entry.main(sys.argv))


if __name__ == "__main__":
    _main()
