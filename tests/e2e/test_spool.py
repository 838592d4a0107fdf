"""A log that is larger than its spool arrives whole, as long as the control plane keeps up."""

import json
import os
import sys

import pytest

from tests.support.stand import poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MIB = 1024 * 1024
SPOOL_BYTES = 4 * MIB
STEPS = 12
"""Of a MiB each: three times what the spool takes."""
CHILD = f"""
import os, sys
for step in range({STEPS}):
    open(f"go-{{step}}").read()
    for _ in range(16):
        os.write(1, bytes([65 + step]) * 65536)
"""


async def test_what_is_safe_at_the_plane_makes_room_in_the_spool() -> None:
    """Three spools' worth of output without a gap, and never more than one spool on the runner's disk."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        await system.start_daemon(LOCAL_RUNNER_SPOOL_BYTES=str(SPOOL_BYTES), LOCAL_RUNNER_SEGMENT_BYTES=str(MIB))
        await system.online()
        for step in range(STEPS):
            os.mkfifo(system.home / f"go-{step}")
        execution = await system.order(sys.executable, "-I", "-S", "-c", CHILD)
        log = system.state / "x" / f"{execution}.1" / "log"
        sizes = []
        for step in range(STEPS):

            async def waits(step: int = step) -> bool:
                try:
                    # Without a reader this fails: the child is not there yet, and nothing may block.
                    os.close(os.open(system.home / f"go-{step}", os.O_WRONLY | os.O_NONBLOCK))
                except OSError:
                    return False
                return True

            async def safe(size: int = (step + 1) * MIB) -> bool:
                found = await system.get(f"/executions/{execution}")
                told = json.loads(await system.run("runner", "status", "--json"))
                return bool(found["log"]["end"] >= size and told["log_backlog_bytes"] == 0)

            await poll(waits, f"step {step}")
            await poll(safe, f"{step + 1} MiB on the control plane's disk, and known to be")
            sizes.append(sum(path.stat().st_size for path in log.iterdir()))
        ended = await system.ended(execution)
        output = (await system.output(execution))["stdout"]
    assert (ended["exit_status"], ended["log"]["complete"]) == (0, True)
    assert output == b"".join(bytes([65 + step]) * MIB for step in range(STEPS))
    assert max(sizes) <= SPOOL_BYTES
