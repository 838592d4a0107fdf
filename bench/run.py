"""The main job measured side by side with raw posix_spawn, a raw pipe and the disk's own fsync, in one run.

Usage: make bench   or   .venv/bin/python bench/run.py [--quick] [--json]

The control plane is embedded in this process, the daemon, its fork server and the shims are real processes. What is timed is
what a control plane feels: from an order (unsigned) to the stored, verified settlement.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from controlplane.plane import ControlPlane
from controlplane.requests import ExecutionRequest
from controlplane.server import run_embedded
from controlplane.views import Execution
from runner.adapters.policyfile import write_default

BIN = Path(sys.executable).parent
RUNNER = "bench"
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
GIB = 1 << 30
WAIT_S = 120.0
HELD = 50


class World:
    """An embedded control plane and a real runner."""

    def __init__(self, plane: ControlPlane, home: Path, daemon: subprocess.Popen[bytes]) -> None:
        self.plane = plane
        self.home = home
        self.daemon = daemon

    def status(self) -> Any:
        """What the daemon says of itself."""
        out = subprocess.run(
            [BIN / "runner", "status", "--json"], env=environment(self.home), capture_output=True, check=True
        )
        return json.loads(out.stdout)

    async def order(self, *argv: str) -> Execution:
        """Order an execution."""
        return await self.plane.submit_execution(RUNNER, ExecutionRequest(argv=list(argv), cwd=str(self.home)))

    async def run(self, *argv: str) -> Execution:
        """Order an execution and wait until its end is known."""
        return await self.plane.wait_execution((await self.order(*argv)).id, WAIT_S)


def environment(home: Path) -> dict[str, str]:
    """The runner's environment."""
    return {
        **ENV,
        "HOME": str(home),
        "LOCAL_RUNNER_STATE_DIR": f"{home}/state",
        "LOCAL_RUNNER_RUNTIME_DIR": f"{home}/run",
        "LOCAL_RUNNER_POLICY_FILE": f"{home}/policy.toml",
        "LOCAL_RUNNER_CONFIG": f"{home}/config.toml",
    }


async def measured(home: Path, quick: bool) -> dict[str, Any]:
    """All figures."""
    async with ControlPlane.open(home / "plane") as plane, run_embedded(plane, "127.0.0.1", 0) as port:
        plane.set_address("127.0.0.1", port)
        (home / "config.toml").touch(mode=0o600)
        write_default(home / "policy.toml", [str(home)], minimums=False)
        join = (await plane.join_token(RUNNER)).join
        enrol = [BIN / "runner", "enroll", "-", "--name", RUNNER, "--root", home]
        process = await asyncio.create_subprocess_exec(
            *map(str, enrol), env=environment(home), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
        )
        await process.communicate(join.encode())
        log = open(home / "daemon.log", "wb")  # noqa: SIM115 - the daemon's for its life
        began = time.perf_counter()
        daemon = subprocess.Popen(
            [BIN / "runner", "--log-level", "warning", "start"], env=environment(home), stderr=log
        )
        try:
            while not any(runner.online for runner in plane.runners()):
                await asyncio.sleep(0.005)
            world = World(plane, home, daemon)
            figures: dict[str, Any] = {"cold start to session, ms": (time.perf_counter() - began) * 1e3}
            for part in (idle_memory, true_latency, commands_per_second, throughput, held_memory, counted_fsyncs):
                figures.update(await part(world, quick))
            return figures
        finally:
            daemon.terminate()
            daemon.wait(20)
            log.close()


# --- latency and rate ---------------------------------------------------------------------------------------------


async def true_latency(world: World, quick: bool) -> dict[str, Any]:
    """`true`, one at a time, interleaved with a raw posix_spawn of the same."""
    count = 60 if quick else 400
    ours, raws, started = [], [], []
    for _ in range(20):
        await world.run("true")
    for _ in range(count):
        raws.append(raw_spawn())
        began = time.perf_counter()
        execution = await world.order("true")
        ended = await world.plane.wait_execution(execution.id, WAIT_S)
        ours.append(time.perf_counter() - began)
        assert ended.exit_status == 0, ended
        receipt, settlement = ended.receipt, ended.settlement
        assert receipt is not None and settlement is not None, "a settled execution has both"
        started.append((settlement["at_ms"] - receipt["at_ms"]) / 1e3)
    return {
        "true: order to exit known, ms p50": median(ours),
        "true: order to exit known, ms p99": p99(ours),
        "raw posix_spawn + wait of true, ms p50": median(raws),
        "true: times raw": statistics.median(ours) / statistics.median(raws),
        **await first_byte(world, count // 4),
    }


async def first_byte(world: World, count: int) -> dict[str, Any]:
    """From the order to the first byte of output at the control plane."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        execution = await world.order("echo", "x")
        _end, _start, stream = await world.plane.read_log(execution.id, 0, follow=True)
        async for _piece in stream:
            times.append(time.perf_counter() - began)
            break
        await world.plane.wait_execution(execution.id, WAIT_S)
    return {"order to first byte stored, ms p50": median(times), "order to first byte stored, ms p99": p99(times)}


def raw_spawn() -> float:
    """What the machine can do when nobody signs, journals or survives anything."""
    began = time.perf_counter()
    pid = os.posix_spawn("/bin/true", ["true"], ENV)
    os.waitpid(pid, 0)
    return time.perf_counter() - began


async def commands_per_second(world: World, quick: bool) -> dict[str, Any]:
    """64 executions of `true` in flight."""
    count, width = (300 if quick else 2000), 64
    todo = iter(range(count))

    async def worker() -> None:
        for _ in todo:
            ended = await world.run("true")
            assert ended.exit_status == 0, ended

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(width):
            tasks.create_task(worker())
    rate = count / (time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(count):
        raw_spawn()
    raw = count / (time.perf_counter() - began)
    return {"commands/s, 64 in flight": rate, "raw posix_spawn + wait, one at a time, /s": raw}


# --- bytes --------------------------------------------------------------------------------------------------------


async def throughput(world: World, quick: bool) -> dict[str, Any]:
    """1 GiB of output until every byte is durable at the control plane, beside a raw pipe."""
    size = GIB // 8 if quick else GIB
    rates, raws = [], []
    for _ in range(1 if quick else 3):
        raws.append(size / raw_pipe(size) / 1e6)
        began = time.perf_counter()
        execution = await world.order("head", "-c", str(size), "/dev/zero")
        await complete(world, execution.id)
        rates.append(size / (time.perf_counter() - began) / 1e6)
        digests = await world.plane.digests(execution.id)
        assert digests["streams"]["stdout"]["bytes"] == size, digests
    return {
        f"{size >> 20} MiB of output until all is acked, MB/s": statistics.median(rates),
        "raw pipe of the same, MB/s": statistics.median(raws),
        "throughput: share of raw": statistics.median(rates) / statistics.median(raws),
    }


async def complete(world: World, execution_id: str) -> None:
    """Until the log is durable to its end and the settlement is stored."""
    await world.plane.wait_execution(execution_id, WAIT_S)
    while not world.plane.execution(execution_id).log.complete:
        await asyncio.sleep(0.002)


def raw_pipe(size: int) -> float:
    """The same program into a pipe that is read and thrown away."""
    began = time.perf_counter()
    process = subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE)
    assert process.stdout is not None, "it is a pipe"
    buffer, fd, got = bytearray(65536), process.stdout.fileno(), 0
    while count := os.readv(fd, [buffer]):
        got += count
    process.wait()
    assert got == size, got
    return time.perf_counter() - began


# --- memory -------------------------------------------------------------------------------------------------------


async def idle_memory(world: World, quick: bool) -> dict[str, Any]:
    """PSS of the daemon and its fork server before any work."""
    await asyncio.sleep(0.5)
    status = world.status()
    daemon, server = pss_kib(status["pid"]), pss_kib(status["fork_server_pid"])
    return {"daemon PSS idle, MiB": daemon / 1024, "fork server PSS idle, MiB": server / 1024}


async def held_memory(world: World, quick: bool) -> dict[str, Any]:
    """Mean PSS of shims that hold a sleeping child."""
    count = HELD
    ids = [(await world.order("sleep", "600")).id for _ in range(count)]
    while sum(world.plane.execution(execution).state == "running" for execution in ids) < count:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    sizes = [pss_kib(pid) for pid in shims_of(world.home, ids)]
    for execution in ids:
        await world.plane.stop_execution(execution, 100)
    for execution in ids:
        await world.plane.wait_execution(execution, WAIT_S)
    return {"shims measured": len(sizes), "mean PSS of a shim, MiB": statistics.mean(sizes) / 1024}


def shims_of(home: Path, ids: list[str]) -> list[int]:
    """The shims of these executions, by what they wrote of themselves."""
    return [json.loads((home / "state" / "x" / f"{name}.1" / "meta.json").read_bytes())["shim"]["pid"] for name in ids]


def pss_kib(pid: int) -> int:
    """Proportional set size."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("smaps_rollup has Pss")


# --- fsync --------------------------------------------------------------------------------------------------------


async def counted_fsyncs(world: World, quick: bool) -> dict[str, Any]:
    """How many fsyncs one `true` costs all processes together, and what one costs here."""
    fsync = fsync_ms(world.home)
    figures = {"fdatasync of a 600 B overwrite, ms p50": fsync}
    strace = shutil.which("strace")
    if strace is None:
        return {**figures, "fsyncs for one true": "not counted: strace is not installed"}
    count, trace = 20, world.home / "trace"
    pids = [str(os.getpid()), str(world.daemon.pid), str(world.status()["fork_server_pid"])]
    watch = await asyncio.create_subprocess_exec(
        strace, "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(trace), *(word for pid in pids for word in ("-p", pid))
    )  # fmt: skip
    await asyncio.sleep(1.0)
    for _ in range(count):
        await world.run("true")
    await asyncio.sleep(0.3)
    watch.terminate()
    await watch.wait()
    calls = sum("sync(" in line for line in trace.read_text().splitlines())
    return {
        **figures,
        "fsyncs for one true, all processes": calls / count,
        "of its p50 that is, ms (if none overlapped)": calls / count * fsync,
    }


def fsync_ms(home: Path) -> float:
    """Median of an overwrite of a preallocated file, made durable."""
    fd = os.open(home / "probe", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, bytes(4096))
    os.fsync(fd)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        os.pwrite(fd, b"x" * 600, 0)
        os.fdatasync(fd)
        times.append(time.perf_counter() - began)
    os.close(fd)
    return median(times)


def median(times: list[float]) -> float:
    """In ms."""
    return statistics.median(times) * 1e3


def p99(times: list[float]) -> float:
    """In ms."""
    return sorted(times)[int(len(times) * 0.99) - 1] * 1e3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    wanted = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    home = Path(tempfile.mkdtemp(prefix="runner-bench-"))
    run: Callable[[Awaitable[dict[str, Any]]], dict[str, Any]] = uvloop.run  # type: ignore[assignment]
    try:
        figures = run(measured(home, wanted.quick))
    except BaseException:
        print((home / "daemon.log").read_text(errors="replace")[-2000:], file=sys.stderr)
        raise
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if wanted.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}\n")
    for name, value in figures.items():
        print(f"{name:<52} {value:>10.2f}" if isinstance(value, float) else f"{name:<52} {value:>10}")


if __name__ == "__main__":
    main()
