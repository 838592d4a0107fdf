"""Run seeded worlds: `python -m tests.sim.run --seeds 1000`, or `--seed 42` to replay one with its story."""

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from tests.sim.world import Result, World

WORLDS_OF_RUBBISH = 10
"""Dead worlds are rings of objects: they are collected so many at a time, and nothing is looked for in between."""
CHUNK = 25
"""Worlds that one process runs before it tells of them."""
CHUNKS_MAX = 8
"""Then another process takes its place: what libraries remember of worlds goes with it."""


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="one world, with its story")
    parser.add_argument("--only", help="these faults and no others, by name, with commas between")
    parser.add_argument("--short", action="store_true", help="some seconds of chaos each instead of minutes")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first bad world")
    asked = parser.parse_args()
    only = None if asked.only is None else asked.only.split(",")
    if asked.seed is not None:
        return replay(asked.seed, only)
    seeds = range(asked.first, asked.first + asked.seeds)
    return many(seeds, only, short=asked.short, keep_going=asked.keep_going)


def replay(seed: int, only: list[str] | None) -> int:
    """One world, told."""
    world = World(seed, tell=True, only=only)
    result = world.run()
    print("\n".join(world.story.lines()))
    print(f"seed {seed}: story {result.digest}, {result.broken or 'every invariant held'}")
    return 1 if result.broken else 0


def chunk(seeds: range, only: list[str] | None, short: bool) -> list[Result]:
    """Some worlds, in a process of their own."""
    gc.disable()
    results = []
    for seed in seeds:
        results.append(World(seed, short=short, only=only).run())
        if seed % WORLDS_OF_RUBBISH == 0:
            gc.collect()
    return results


def worlds(seeds: range, only: list[str] | None, *, short: bool) -> Iterator[Result]:
    """Their results in the order of the seeds, from as many processes as there are cores."""
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    generation = CHUNKS_MAX * (os.cpu_count() or 1)
    for at in range(0, len(chunks), generation):
        with ProcessPoolExecutor() as pool:
            for results in pool.map(chunk, chunks[at : at + generation], repeat(only), repeat(short)):
                yield from results


def many(seeds: range, only: list[str] | None, *, short: bool, keep_going: bool) -> int:
    """Many worlds, counted."""
    began = time.perf_counter()
    bad: list[Result] = []
    total: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    for result in worlds(seeds, only, short=short):
        total.update(
            worlds=1,
            steps=result.steps,
            inputs=result.inputs,
            simulated_s=int(result.simulated_s),
            commands=result.commands,
            spawned=result.spawned,
            settled=result.settled,
        )
        faults.update(result.faults)
        reached.update(result.reached)
        if result.broken:
            bad.append(result)
            print(f"seed {result.seed}: {result.broken.splitlines()[-1][:300]}", flush=True)
            if not keep_going:
                break
    seconds = time.perf_counter() - began
    print(
        f"{total['worlds']} worlds in {seconds:.1f} s ({total['worlds'] / seconds * 60:.0f} a minute):"
        f" {total['simulated_s'] / 3600:.0f} simulated hours, {total['inputs']} inputs, {total['commands']} commands signed,"
        f" {total['spawned']} attempts run, {total['settled']} settled, {sum(faults.values())} faults"
    )
    print("faults: " + _listed(faults))
    print("reached: " + _listed(reached))
    if bad:
        print(f"{len(bad)} bad: SEED=n make sim tells the story of one: {' '.join(str(one.seed) for one in bad[:40])}")
        return 1
    print("every invariant held in every world")
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
