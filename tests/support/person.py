"""Somebody at a terminal, a real one, with one of our programs in it; what they see is what an emulator shows."""

import os
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import ptyprocess

from terminal.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 40.0
"""Two cores run everything at once."""


class Person:
    """At a terminal of 30 rows and 90 columns."""

    def __init__(self, program: str, *argv: str, env: Mapping[str, str] | None = None) -> None:
        path = str(Path(sys.executable).parent / program)
        self.child = ptyprocess.PtyProcess.spawn(
            [path, *argv], cwd=str(ROOT), dimensions=(30, 90), env={**(env or os.environ), "TERM": "xterm-256color"}
        )
        self.screen = Emulator(30, 90)
        self.shown = b""

    def types(self, keys: bytes) -> None:
        """Keys."""
        self.child.write(keys)

    def sees(self, text: str) -> None:
        """Wait until it stands on the screen."""
        self._looks(text, there=True)

    def misses(self, text: str) -> None:
        """Wait until it stands there no more."""
        self._looks(text, there=False)

    def _looks(self, text: str, *, there: bool) -> None:
        until = time.monotonic() + WAIT_S
        while any(text in line for line in self.screen.lines) != there:
            assert time.monotonic() < until, "\n".join(self.screen.lines)
            assert self.reads(), "\n".join([*self.screen.lines, "(ended)"])

    def reads(self) -> bool:
        """What is there to be seen; False behind the end."""
        if select.select([self.child.fd], [], [], 0.1)[0]:
            try:
                data = self.child.read(65536)
            except EOFError:
                return False
            self.shown += data
            self.screen.feed(data)
        return True

    def status(self) -> int:
        """Wait for the end."""
        until = time.monotonic() + WAIT_S
        while self.reads():
            assert time.monotonic() < until, "\n".join(self.screen.lines)
        return int(self.child.wait())

    def close(self) -> None:
        """Whatever it does."""
        self.child.close(force=True)
