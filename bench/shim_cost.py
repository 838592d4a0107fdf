"""What a shim costs: start latency, throughput, memory, with posix_spawn + wait beside it in the same run.

Usage: python bench/shim_cost.py [directory [cgroup]]. The directory should be on the disk that holds the state directory;
below the cgroup (an absolute path; default: what systemd delegated) payloads are started in leaves of their own, too.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner.adapters import cgroups
from runner.shim import wire
from tests.support.shim import ForkServer, Shim

STARTS = 200
IDLE_SHIMS = 50
FLOOD_BYTES = 1 << 30
FLOODS = 5
# Longer than the kernel's grace period: a start that no other start came before.
PAUSE_S = 0.1


def main() -> None:
    """Run every part and print one table."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        root = Path(name)
        server = ForkServer()
        try:
            one_start(root, server)
            _starts(root, server)
            _starts_in_cgroup(root, server, cgroups.base(sys.argv[2] if len(sys.argv) > 2 else cgroups.AUTO))
            _flood(root, server)
            _memory(root, server)
        finally:
            server.close()


def one_start(root: Path, server: ForkServer | None, **spec: str) -> tuple[float, float]:
    """Milliseconds from the request to STARTED and to EXIT of /bin/true."""
    shim = Shim(root, server, argv=["/bin/true"], **spec)
    begun = shim.requested
    shim.start()
    started = time.perf_counter()
    shim.exit()
    ended = time.perf_counter()
    shim.controller.send(wire.COLLECTED)
    shim.wait_gone()
    shim.close()
    return (started - begun) * 1e3, (ended - begun) * 1e3


def _starts(root: Path, server: ForkServer) -> None:
    spawns: list[float] = []
    pairs: list[tuple[float, float]] = []
    for _ in range(STARTS):
        begun = time.perf_counter()
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        spawns.append((time.perf_counter() - begun) * 1e3)
        pairs.append(one_start(root, server))
    _line("posix_spawn + wait of /bin/true", spawns)
    _line("request -> STARTED, fork server", [first for first, _ in pairs])
    _line("request -> EXIT, fork server", [second for _, second in pairs])
    alone = [one_start(root, None) for _ in range(STARTS // 10)]
    _line("request -> STARTED, own interpreter", [first for first, _ in alone])


def _starts_in_cgroup(root: Path, server: ForkServer, base: Path | None) -> None:
    if base is None:
        print("no cgroup of version 2 to make leaves in: not measured")
        return
    for pause_s, label in ((0.0, "one after the other"), (PAUSE_S, f"{PAUSE_S:g} s apart")):
        values = []
        for turn in range(STARTS // 4):
            time.sleep(pause_s)
            outside = one_start(root, server)[0]
            time.sleep(pause_s)
            inside = one_start(root, server, cgroup=str(cgroups.leaf(base, f"bench.{turn + 1}")))[0]
            values.append((outside, inside))
        _line(f"request -> STARTED, {label}", [outside for outside, _ in values])
        _line("  the same, child born in a cgroup", [inside for _, inside in values])


def _flood(root: Path, server: ForkServer) -> None:
    speeds = []
    for _ in range(FLOODS):
        shim = Shim(root, server, argv=["head", "-c", str(FLOOD_BYTES), "/dev/zero"])
        begun = time.perf_counter()
        shim.release()
        record = shim.exit(120)
        speeds.append(FLOOD_BYTES / (time.perf_counter() - begun) / 1e6)
        assert record["streams"]["stdout"]["bytes"] == FLOOD_BYTES
        shim.controller.send(wire.COLLECTED)
        shim.wait_gone(60)
        shim.close()
        shutil.rmtree(shim.dir)
    print(
        f"{'1 GiB from a pipe into segments':40} {statistics.median(speeds):8.0f} MB/s median {max(speeds):7.0f} best"
    )


def _memory(root: Path, server: ForkServer) -> None:
    shims = [Shim(root, server, argv=["sleep", "600"]) for _ in range(IDLE_SHIMS)]
    for shim in shims:
        shim.start()
    for label, field in (("PSS", "Pss:"), ("private dirty", "Private_Dirty:")):
        sizes = [_rollup(shim.pid, field) for shim in shims]
        print(f"{f'mean {label} of {IDLE_SHIMS} idle shims':40} {statistics.mean(sizes) / 1024:8.2f} MiB")
    for shim in shims:
        shim.stop(0)
    for shim in shims:
        shim.exit()
        shim.close()


def _rollup(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise LookupError(field)


def _line(label: str, values: list[float]) -> None:
    ordered = sorted(values)
    top = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{label:40} {statistics.median(ordered):8.2f} ms median {top:8.2f} ms p99")


if __name__ == "__main__":
    main()
