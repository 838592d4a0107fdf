"""A real daemon whose control plane says whatever a test wants, and the question after each attack: does it still do its work?"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from protocol.commands import Kind
from protocol.receipt import Outcome, Verdict
from tests.support.hostile_plane import HostilePlane
from tests.support.stand import Stand


@dataclass
class Siege:
    """A daemon on a stand, enrolled with a hostile plane."""

    plane: HostilePlane
    stand: Stand
    _serial: int = field(default=0)

    def start(self, args: dict[str, Any] | None = None, **header: Any) -> bytes:
        """The next command of the stream: `true` in the home of the stand, but for what is given."""
        good = {
            "execution_id": self.new_execution(),
            "start_token": 1,
            "argv": ["true"],
            "cwd": {"type": "path", "path": str(self.stand.home)},
        }
        return self.plane.command(header.pop("kind", Kind.EXECUTION_START), good | (args or {}), **header)

    def new_execution(self) -> str:
        """An id that no execution has."""
        self._serial += 1
        return f"ex_{self._serial}"

    async def lives(self) -> None:
        """The same daemon takes the next number and runs what it says, and leaves nothing but that."""
        execution_id = self.new_execution()
        pid, (attempts, worktrees) = self.stand.pid("daemon"), self.stand.effects()
        receipt = await self.plane.fate(self.start({"execution_id": execution_id}))
        assert (receipt.outcome, receipt.reason) == (Outcome.ACCEPTED, None)
        ended = await self.plane.end(execution_id)
        assert (ended.verdict, ended.code) == (Verdict.EXITED, 0)
        assert self.stand.pid("daemon") == pid
        assert self.stand.effects() == (tuple(sorted((*attempts, f"{execution_id}.1"))), worktrees)


@asynccontextmanager
async def siege() -> AsyncIterator[Siege]:
    """A daemon that is connected and has done one command."""
    stand = Stand()
    async with HostilePlane() as plane:
        try:
            await stand.enroll(join=plane.join)
            await stand.start_daemon()
            await plane.online()
            system = Siege(plane, stand)
            await system.lives()
            yield system
        except BaseException:
            print(stand.log_tail("daemon"))
            raise
        finally:
            await stand.close()
