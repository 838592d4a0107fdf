"""Output on its way to the control plane, side by side in one run with a raw pipe, a raw loopback socket, ssh and asyncssh.

Usage: make bench   or   .venv/bin/python bench/output.py [--quick] [--json] [--rounds N]

Control plane, daemon, fork server, shim and every end of every peer are processes of their own. Ours is timed from the unsigned order
until every byte is durable in the control plane's store and the verified settlement is known; the stored bytes' digest is checked each
time. A peer is timed from the request until the last byte is thrown away, or durable in a file on the same disk.
"""

import argparse
import asyncio
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.delays import first_byte, lag
from bench.meter import Cost, Meter, level, status_kib
from bench.ours import Bench, Figures, carry, follower, over, prove
from bench.peers import Asyncssh, AsyncsshServer, PeerMissing, Raw, Source, Ssh, Sshd
from bench.run import GIB
from examples.demo.stage import free_port
from tests.support.stand import stand

MIB: Final = 1 << 20
LINES: Final = 30_000_000
"""`seq` to there is 247 MiB: lines of eight digits."""
BLOCK: Final = 64 * MIB
OURS: Final = "ours: spool and store, durable"


@dataclass(slots=True)
class Run:
    """One source on one way."""

    seconds: float
    costs: dict[str, Cost]


# --- how it is started --------------------------------------------------------------------------------------------


async def measured(quick: bool, rounds: int) -> Figures:
    """All figures."""
    store = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    with ExitStack() as stack:
        memory = Path(tempfile.mkdtemp(prefix="runner-bench-", dir=store))
        stack.callback(shutil.rmtree, memory, ignore_errors=True)
        async with stand() as system:
            bench = Bench(system, quick, rounds, None)
            skipped = start_peers(bench, stack)
            blob = write_blob(memory / "blob", bench.size)
            figures: Figures = {"size MiB": bench.size // MIB, "skipped": skipped}
            say("streaming")
            figures["streaming"] = await streaming(bench, blob)
            for name, part in (("first byte, ms", first_byte), ("logs -f lag, ms", lag)):
                say(name)
                figures[name] = await part(bench)
            say("memory")
            figures["memory"] = await memory_kept(bench, blob)
            return figures


def start_peers(bench: Bench, stack: ExitStack) -> list[str]:
    """The ways that this machine has; says which not, and why."""
    home = bench.system.home
    skipped = []
    for durable in (False, True):
        where = "file" if durable else "thrown away"
        bench.ways += [
            Raw(f"raw pipe, {where}", home, durable, False),
            Raw(f"raw socket, {where}", home, durable, True),
        ]
    sshd = Sshd(home / "ssh", free_port())
    stack.callback(sshd.close)
    try:
        sshd.start()
        bench.sshd = sshd
        bench.ways += [
            Ssh("ssh > /dev/null", home, False, sshd),
            Ssh("ssh > file", home, True, sshd),
        ]
    except (PeerMissing, OSError, subprocess.CalledProcessError) as exc:
        return [f"ssh and asyncssh: {exc}"]
    try:
        server = AsyncsshServer(home, free_port(), sshd)
        stack.callback(server.close)
        for name, port, roots in (
            ("asyncssh -> sshd", sshd.port, {sshd.pid: "sshd"}),
            ("asyncssh -> asyncssh", server.port, {server.process.pid: "server"}),
        ):
            for durable in (False, True):
                way = Asyncssh(f"{name}, {'file' if durable else 'thrown away'}", home, durable, sshd, port, roots)
                stack.callback(way.close)
                bench.ways.append(way)
    except (PeerMissing, OSError) as exc:
        skipped.append(f"asyncssh: {exc}")
    return skipped


def write_blob(path: Path, size: int) -> Source:
    """A file in memory that no compression makes smaller."""
    block, digest = os.urandom(min(BLOCK, size)), hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
            digest.update(block)
    return Source(f"blob: cat of {size // MIB} MiB", ("cat", str(path)), size, digest.hexdigest())


def many_lines(quick: bool) -> Source:
    """What `seq` prints, and its digest."""
    argv = ("seq", str(LINES // 8 if quick else LINES))
    digest, size = hashlib.sha256(), 0
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None, "it is a pipe"
        while piece := program.stdout.read(MIB):
            digest.update(piece)
            size += len(piece)
    return Source(f"short lines: seq, {size // MIB} MiB", argv, size, digest.hexdigest())


# --- streaming ----------------------------------------------------------------------------------------------------


async def streaming(bench: Bench, blob: Source) -> Figures:
    """Every source on every way, interleaved, each on the same ground."""
    sources = [blob, many_lines(bench.quick)]
    runs: dict[str, dict[str, list[Run]]] = {source.name: {} for source in sources}
    for _ in range(bench.rounds):
        for source in sources:
            smooth(bench, source)
            with Meter(bench.ours()) as meter:
                execution, seconds = await carry(bench.system, source)
            await prove(bench.system, execution, source)
            runs[source.name].setdefault(OURS, []).append(Run(seconds, meter.costs()))
            for way in bench.ways:
                smooth(bench, source)
                with Meter(way.roots) as meter:
                    seconds = way.carry(source, meter)
                runs[source.name].setdefault(way.name, []).append(Run(seconds, meter.costs()))
    return {source.name: table_of(runs[source.name], source.size) for source in sources}


def smooth(bench: Bench, source: Source) -> None:
    """Nothing is left of who came before, and there is touched memory for every byte in flight, in the spool and in the store."""
    (bench.system.home / "sink").unlink(missing_ok=True)
    level(bench.system.home, min(3 * source.size, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 2))


def table_of(runs: dict[str, list[Run]], size: int) -> Figures:
    """Medians of the rounds, and the largest of the peaks."""
    ours = statistics.median(run.seconds for run in runs[OURS])
    rows: Figures = {}
    for name, tried in runs.items():
        seconds = statistics.median(run.seconds for run in tried)
        roles = dict.fromkeys(role for run in tried for role in run.costs)
        cpu = {role: statistics.median(_cost(run, role).cpu_s for run in tried) * GIB / size for role in roles}
        rows[name] = {
            "MB/s": size / seconds / 1e6,
            "times ours": ours / seconds,
            "CPU-s/GiB": sum(cpu.values()),
            "CPU-s/GiB without the source": sum(used for role, used in cpu.items() if role != "source"),
            "CPU-s/GiB of": cpu,
            "peak RSS MiB of": {role: max(_cost(run, role).rss_mib for run in tried) for role in roles},
        }
    return rows


def _cost(run: Run, role: str) -> Cost:
    return run.costs.get(role, Cost())


# --- memory -------------------------------------------------------------------------------------------------------


async def memory_kept(bench: Bench, blob: Source) -> Figures:
    """Peak RSS with the blob, with twice as much of it, and with a follower whose output nobody reads."""
    twice = Source("twice", ("cat", blob.argv[1], blob.argv[1]), 2 * blob.size, twice_digest(Path(blob.argv[1])))
    figures: Figures = {"before": sizes(bench)}
    for name, source in (("once", blob), ("twice", twice)):
        with Meter(bench.ours()) as meter:
            execution, _seconds = await carry(bench.system, source, overflow="block")
        await prove(bench.system, execution, source)
        figures[name] = peaks(meter)
    with Meter(bench.ours()) as meter:
        execution = await bench.system.order(*twice.argv, overflow="block")
        with subprocess.Popen(
            follower(bench.system, execution), env=bench.system.env, stdout=subprocess.PIPE
        ) as program:
            try:
                meter.roots[program.pid] = "follower"
                await over(bench.system, execution)
                assert program.poll() is None, "the follower waits for its reader"
            finally:
                program.kill()
        await prove(bench.system, execution, twice)
    figures["twice, with a follower that nobody reads"] = peaks(meter)
    figures["after"] = sizes(bench)
    return figures


def twice_digest(path: Path) -> str:
    """Of the file behind itself."""
    digest = hashlib.sha256()
    for _ in range(2):
        with open(path, "rb") as file:
            while piece := file.read(MIB):
                digest.update(piece)
    return digest.hexdigest()


def peaks(meter: Meter) -> dict[str, float]:
    """MiB by role."""
    return {role: cost.rss_mib for role, cost in meter.costs().items() if role != "source"}


def sizes(bench: Bench) -> dict[str, float]:
    """RSS now, MiB."""
    return {name: status_kib(bench.system.pid(name), "VmRSS") / 1024 for name in ("plane", "daemon")}


# --- words --------------------------------------------------------------------------------------------------------


def say(what: str) -> None:
    """For whoever waits."""
    print(f"... {what}", file=sys.stderr, flush=True)


def lines_of(figures: Figures) -> Iterator[str]:
    """The tables."""
    yield f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}"
    yield from (f"skipped: {reason}" for reason in figures["skipped"])
    for source, rows in figures["streaming"].items():
        yield f"\n{source:<34} {'MB/s':>6} {'x ours':>7} {'CPU-s/GiB':>10}   CPU-s/GiB and peak RSS MiB of each process"
        for name, row in rows.items():
            cpu, rss = row["CPU-s/GiB of"], row["peak RSS MiB of"]
            each = ", ".join(f"{role} {cpu[role]:.2f} {rss[role]:.0f}" for role in cpu)
            yield f"{name:<34} {row['MB/s']:>6.0f} {row['times ours']:>7.2f} {row['CPU-s/GiB']:>10.2f}   {each}"
    for part in ("first byte, ms", "logs -f lag, ms"):
        yield f"\n{part:<34} {'p50':>7} {'p99':>7}"
        for name, row in figures[part].items():
            if name != "floods MB/s":
                yield f"{name:<34} {row['p50']:>7.1f} {row['p99']:>7.1f}"
        yield "floods, MB/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in figures[part]["floods MB/s"].items())
    yield "\npeak RSS, MiB"
    for name, row in figures["memory"].items():
        yield f"{name:<42} " + ", ".join(f"{role} {size:.1f}" for role, size in row.items())


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes, one round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, help="rounds of streaming [default: 2, quick: 1]")
    wanted = parser.parse_args()
    figures = asyncio.run(measured(wanted.quick, wanted.rounds or (1 if wanted.quick else 2)))
    print(json.dumps(figures, indent=1) if wanted.json else "\n".join(lines_of(figures)))


if __name__ == "__main__":
    main()
