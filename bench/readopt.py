"""What a daemon that starts needs to take a hundred living shims back: looking at their directories, and connecting to all of them.

Usage: .venv/bin/python bench/readopt.py [--shims 100] [--json]

On a machine that does other work, run it with real-time priority (`chrt -r 1 …`): what is timed is a start, not its neighbours.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.shims import a_plan, shims, sweep_all

ROUNDS = 5


async def measured(state_dir: Path, count: int) -> dict[str, float]:
    """Medians, in ms."""
    names = [f"ex_{number}.1" for number in range(count)]
    async with shims(state_dir) as first:
        for name in names:
            plan = a_plan(name, "sleep", "600")
            await first.adapter.prepare(plan, "/", again=False)
            await first.adapter.release(plan.attempt, {})
        await first.until(lambda: all(first.files(name).phase == "running" for name in names))
    looks, connects = [], []
    for _ in range(ROUNDS):
        async with shims(state_dir) as daemon:
            began = time.perf_counter()
            found = await daemon.adapter.observe()
            looked = time.perf_counter()
            answered = await asyncio.gather(*(daemon.adapter.adopt(each.attempt) for each in found))
            looks.append(looked - began)
            connects.append(time.perf_counter() - looked)
            if not all(answered) or len(answered) != count:
                raise SystemExit(f"{sum(answered)} of {count} shims answered")
    return {
        "observe, ms": statistics.median(looks) * 1e3,
        "adopt, ms": statistics.median(connects) * 1e3,
        "together, ms": statistics.median(map(sum, zip(looks, connects, strict=True))) * 1e3,
    }


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shims", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-bench-") as home:
        try:
            figures = await measured(Path(home), wanted.shims)
        finally:
            await sweep_all(Path(home))
    if wanted.json:
        print(json.dumps(figures))
    else:
        print(f"{wanted.shims} living shims taken back, median of {ROUNDS}; the budget is 100 ms together:")
        for name, value in figures.items():
            print(f"  {name:<14}{value:8.1f}")


if __name__ == "__main__":
    asyncio.run(main())
