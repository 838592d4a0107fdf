"""`make chaos MINUTES=5 SEED=1`: kill everything for a while, then say what became of it. Exit status 1 when a promise broke."""

import asyncio
import os
import sys
import time
from typing import Final

from tests.chaos.rig import Rig
from tests.support.stand import stand

LIVING: Final = 8
"""Executions that are kept alive at a time: as many as let a laptop's two cores do something else, too."""
STATUS_S: Final = 10.0


async def chaos(minutes: float, seed: int) -> bool:
    """Run it; whether every promise held."""
    print(
        f"chaos for {minutes:g} min, seed {seed}: kill -9 of daemon, fork server, control plane, shims, children",
        flush=True,
    )
    async with stand() as system:
        rig = Rig(system, seed)
        ends = time.monotonic() + minutes * 60
        told = time.monotonic()
        while time.monotonic() < ends:
            while await rig.living() < LIVING:
                await rig.order()
            await rig.breathe()
            await rig.strike()
            if time.monotonic() - told > STATUS_S:
                told = time.monotonic()
                print(f"  {rig.tally.kills.total()} kills, {len(rig.work)} executions", flush=True)
        tally = await rig.judge()
    print("\n".join(tally.lines()))
    print("every promise held" if tally.good else "A PROMISE BROKE")
    return tally.good


if __name__ == "__main__":
    good = asyncio.run(chaos(float(os.environ.get("MINUTES", "2")), int(os.environ.get("SEED", "1"))))
    sys.exit(0 if good else 1)
