"""The system under measurement: control plane and daemon as processes of their own, and work that is proven to have come whole."""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.peers import Source, Sshd
from bench.run import GIB
from examples.demo.stage import BIN
from tests.support.stand import Stand

WAIT_MS: Final = 30_000
OVER_S: Final = 300.0
"""For an execution to end and its log to be complete; the slowest seen needed a tenth of it."""
Figures = dict[str, Any]


@dataclass(slots=True)
class Bench:
    """What all parts share."""

    system: Stand
    quick: bool
    rounds: int
    sshd: Sshd | None
    ways: list[Any] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return GIB // 8 if self.quick else GIB

    def ours(self) -> dict[int, str]:
        """Our processes: whoever the daemon starts is its fork server, and what that starts are shims."""
        return {
            self.system.pid("plane"): "plane",
            self.system.pid("daemon"): "daemon>fork server>shim",
        }


async def over(system: Stand, execution: str) -> Figures:
    """Until it is settled and its log complete."""
    async with asyncio.timeout(OVER_S):
        while True:
            found: Figures = await system.get(f"/executions/{execution}", wait_ms=WAIT_MS)
            if found["state"] in ("settled", "refused", "cancelled") and (
                found["log"]["complete"] or found["state"] != "settled"
            ):
                return found
            await asyncio.sleep(0.002)


async def carry(system: Stand, source: Source, **options: Any) -> tuple[str, float]:
    """An execution, and the seconds from its order until all it printed is durable at the plane."""
    began = time.perf_counter()
    execution = await system.order(*source.argv, **options)
    await over(system, execution)
    return execution, time.perf_counter() - began


async def prove(system: Stand, execution: str, source: Source) -> None:
    """What the plane has is what was printed, to the last byte."""
    digests = await system.get(f"/executions/{execution}/digests")
    found = digests["streams"]["stdout"]
    assert (found["bytes"], found["sha256"].removeprefix("sha256:")) == (source.size, source.sha256), (found, source)


def follower(system: Stand, execution: str) -> list[str]:
    """`runner-control logs -f`."""
    return [str(BIN / "runner-control"), "logs", "-f", execution]
