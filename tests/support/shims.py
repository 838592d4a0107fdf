"""A real `ShimAdapter` over real shims in a temporary state directory, and everything it was heard to say."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from protocol.ids import Attempt, CommandId
from runner.adapters.attemptdir import ShimSettings
from runner.adapters.attemptfiles import read_attempt
from runner.adapters.shims import ShimAdapter
from runner.core.plans import AttemptPlan
from runner.ports import ShimEvent
from tests.support.shim import BOOT_ID, alive, wait_for

WAIT_S = 20.0
E = TypeVar("E")


def a_plan(name: str = "ex_1.1", *argv: str, **over: Any) -> AttemptPlan:
    """`true`, or `argv`, anywhere."""
    fields: dict[str, Any] = {
        "attempt": Attempt.parse(name),
        "cmd_id": CommandId("cmd_1"),
        "argv": argv or ("true",),
        "cwd": "/",
        "worktree_id": None,
        "subdir": None,
        "pre_head": None,
        "env": {"PATH": "/usr/local/bin:/usr/bin:/bin"},
        "secrets": {},
        "timeout_ms": None,
        "grace_ms": 1000,
        "roots": (),
    }
    return AttemptPlan(**(fields | over))


class Shims:
    """One daemon's adapter; `again` is the next daemon's over the same directory."""

    def __init__(self, state_dir: Path, **settings: Any) -> None:
        self.state_dir = state_dir
        self.heard: list[ShimEvent] = []
        self.cut: list[Attempt] = []
        self._news = asyncio.Event()
        fields: dict[str, Any] = {
            "state_dir": state_dir,
            "runner": f"rn_{os.getpid()}",
            "boot_id": BOOT_ID,
            "epoch": 7,
            "umask": 0o022,
            "segment_bytes": 1 << 20,
            "spool_bytes": 1 << 24,
        }
        self.adapter = ShimAdapter(ShimSettings(**(fields | settings)))
        self.adapter.listen(self._hear)
        self.adapter.on_cut = self.cut.append

    def _hear(self, event: ShimEvent) -> None:
        self.heard.append(event)
        self._news.set()

    async def told(self, kind: type[E], wait_s: float = WAIT_S) -> E:
        """The first event of a kind, waited for."""
        async with asyncio.timeout(wait_s):
            while not (found := [event for event in self.heard if isinstance(event, kind)]):
                self._news.clear()
                await self._news.wait()
        return found[0]

    async def start(self, plan: AttemptPlan) -> None:
        """Prepare and release an attempt, and wait until its child runs."""
        await self.adapter.prepare(plan, plan.cwd or "/", again=False)
        await self.adapter.release(plan.attempt, {})
        await self.until(lambda: self.files(plan.attempt.name).phase == "running")

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait for a fact of the file system or the process table, off the loop."""
        await asyncio.to_thread(wait_for, holds, "a fact")

    def files(self, name: str = "ex_1.1") -> Any:
        """An attempt's directory as it is now."""
        return read_attempt(self.state_dir / "x" / name)

    def shim_pid(self, name: str = "ex_1.1") -> int:
        """The pid of an attempt's shim."""
        found = self.files(name).shim
        assert found is not None
        return int(found[0])

    async def kill_shim(self, name: str = "ex_1.1") -> None:
        """`kill -9`, and wait until it is gone."""
        pid = self.shim_pid(name)
        os.kill(pid, signal.SIGKILL)
        await self.until(lambda: not alive(pid))


@asynccontextmanager
async def shims(state_dir: Path, **settings: Any) -> AsyncIterator[Shims]:
    """An adapter that is started; everything its attempts left alive is ended with it."""
    daemon = Shims(state_dir, **settings)
    daemon.adapter.start()
    try:
        yield daemon
    finally:
        daemon.adapter.close()


async def sweep_all(state_dir: Path) -> None:
    """End what a test left: shims by their identity, payloads by their cookie."""
    async with shims(state_dir) as last:
        for directory in sorted((state_dir / "x").iterdir()):
            await last.adapter.end_hung(Attempt.parse(directory.name), None)
