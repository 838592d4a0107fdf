"""How long somebody waits for output, in quiet and beside a flood: the first byte of a command, the lines of one that is followed."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.ours import Bench, Figures, follower, over
from bench.peers import Sshd
from bench.run import median, p99
from tests.support.stand import Stand, poll

MIB: Final = 1 << 20
TICK_S: Final = 0.02
TICKER: Final = (
    "import os, time\n"
    "for _ in range({count}):\n"
    "    os.write(1, b'%d\\n' % time.monotonic_ns())\n"
    f"    time.sleep({TICK_S})\n"
)
"""Prints the time, which is one clock for all processes of a machine."""


@asynccontextmanager
async def our_flood(bench: Bench, overflow: str, rates: Figures) -> AsyncIterator[None]:
    """`yes` on the same runner while this lasts; leaves in `rates` how many MB/s of it came."""
    execution = await bench.system.order("yes", overflow=overflow)

    async def came() -> int:
        return int((await bench.system.get(f"/executions/{execution}"))["log"]["end"])

    async def flows() -> bool:
        return await came() > 8 * MIB

    await poll(flows, "the flood")
    began, before = time.perf_counter(), await came()
    try:
        yield
    finally:
        rates[f"ours, {overflow}"] = (await came() - before) / (time.perf_counter() - began) / 1e6
        await bench.system.post(f"/executions/{execution}/stop", {"grace_ms": 100})
        await over(bench.system, execution)


@asynccontextmanager
async def ssh_flood(sshd: Sshd, rates: Figures) -> AsyncIterator[None]:
    """`yes` over the same connection of ssh while this lasts."""
    with subprocess.Popen(sshd.argv("yes"), stdout=subprocess.DEVNULL) as program:
        await asyncio.sleep(0.5)
        began, before = time.perf_counter(), written(sshd.master)
        try:
            yield
        finally:
            rates["ssh"] = (written(sshd.master) - before) / (time.perf_counter() - began) / 1e6
            program.terminate()


def written(pid: int) -> int:
    """Bytes that a process has written."""
    return int(Path(f"/proc/{pid}/io").read_text().split("wchar:")[1].split()[0])


async def quiet_and_flooded(
    bench: Bench, ours: Callable[[], Any], ssh: Callable[[Sshd], list[float]]
) -> tuple[Figures, Figures]:
    """Times of ours and of ssh, in quiet and beside floods; and the floods' rates."""
    rates: Figures = {}
    times = {"ours": await ours()}
    for overflow in ("head_tail", "block"):
        async with our_flood(bench, overflow, rates):
            times[f"ours, beside yes ({overflow})"] = await ours()
    if bench.sshd is not None:
        times["ssh"] = await asyncio.to_thread(ssh, bench.sshd)
        async with ssh_flood(bench.sshd, rates):
            times["ssh, beside yes"] = await asyncio.to_thread(ssh, bench.sshd)
    return {name: {"p50": median(some), "p99": p99(some), "n": len(some)} for name, some in times.items()}, rates


async def first_byte(bench: Bench) -> Figures:
    """From asking for `echo x` to its first byte where it was asked for."""
    count = 25 if bench.quick else 100

    async def ours() -> list[float]:
        return [await our_first_byte(bench.system) for _ in range(count)]

    def ssh(sshd: Sshd) -> list[float]:
        return [program_first_byte(sshd.argv("echo", "x")) for _ in range(count)]

    times, rates = await quiet_and_flooded(bench, ours, ssh)
    raw = [program_first_byte(["echo", "x"]) for _ in range(count)]
    return {**times, "raw subprocess": {"p50": median(raw), "p99": p99(raw), "n": count}, "floods MB/s": rates}


async def our_first_byte(system: Stand) -> float:
    """Seconds; the execution has ended when this returns."""
    began = time.perf_counter()
    execution = await system.order("echo", "x")
    async with system.http.stream("GET", f"/executions/{execution}/log", params={"follow": 1}) as answer:
        async for _piece in answer.aiter_raw():
            took = time.perf_counter() - began
            break
    await over(system, execution)
    return took


def program_first_byte(argv: list[str]) -> float:
    """Seconds until a program of this machine has printed something."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stdout.read(1) == b"x", "it echoes"
        return time.perf_counter() - began


async def lag(bench: Bench) -> Figures:
    """From a line's making to its arrival in the pipe of whoever follows."""
    count = 50 if bench.quick else 250

    async def ours() -> list[float]:
        # More than are wanted: whoever follows comes late, and what was there before says nothing.
        execution = await bench.system.order(sys.executable, "-I", "-S", "-c", TICKER.format(count=2 * count + 100))
        times = await asyncio.to_thread(arrivals, follower(bench.system, execution), bench.system.env, count)
        await bench.system.post(f"/executions/{execution}/stop", {"grace_ms": 100})
        await over(bench.system, execution)
        return times

    def ssh(sshd: Sshd) -> list[float]:
        program = sshd.home / "ticker.py"
        program.write_text(TICKER.format(count=count + 100))
        return arrivals(sshd.argv(sys.executable, "-I", "-S", str(program)), None, count)

    times, rates = await quiet_and_flooded(bench, ours, ssh)
    return {**times, "floods MB/s": rates}


def arrivals(argv: list[str], env: dict[str, str] | None, count: int) -> list[float]:
    """How late so many lines come that were made after the first one had come."""
    times: list[float] = []
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None, "it is a pipe"
        first = 0
        for line in program.stdout:
            now = time.monotonic_ns()
            first = first or now
            if int(line) > first:
                times.append((now - int(line)) / 1e9)
            if len(times) == count:
                break
        program.terminate()
    assert len(times) == count, f"{len(times)} of {count} lines came"
    return times
