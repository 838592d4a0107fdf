"""The second and third promise, whatever is killed when: every byte in order, every status right, nothing twice."""

import hashlib
import random
import sys

import pytest

from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

EXECUTIONS = 8
KILLS = 20
LINES = 1500
PACE_S = 0.02
"""Between two lines: slow enough that all kills meet living executions."""
SEED = 20261121
PRINTER = f"""
import sys, time
name, code = sys.argv[1], int(sys.argv[2])
for i in range(1, {LINES} + 1):
    print(name, "out", i, flush=True)
    if i % 3 == 0:
        print(name, "err", i, file=sys.stderr, flush=True)
    time.sleep({PACE_S})
sys.exit(code)
"""


def expected(name: str) -> tuple[bytes, bytes]:
    """What a printer writes to stdout and stderr."""
    out = "".join(f"{name} out {i}\n" for i in range(1, LINES + 1))
    err = "".join(f"{name} err {i}\n" for i in range(3, LINES + 1, 3))
    return out.encode(), err.encode()


async def stored_at_least(system: Stand, size: int) -> None:
    """Wait until the control plane has `size` bytes of all logs together (headers of records count a little extra)."""

    async def enough() -> bool:
        listed = (await system.get("/executions", runner=RUNNER))["executions"]
        return sum(execution["log"]["end"] for execution in listed) >= size

    await poll(enough, f"{size} bytes at the control plane")


async def test_twenty_kills_of_the_daemon_lose_and_double_nothing() -> None:
    """Eight executions print through 20 kills of the daemon and one of the control plane; all is there once."""
    chance = random.Random(SEED)
    async with stand() as system:
        ids = {
            f"x{n}": await system.order(sys.executable, "-I", "-S", "-c", PRINTER, f"x{n}", str(n))
            for n in range(EXECUTIONS)
        }
        whole = sum(len(out) + len(err) for out, err in map(expected, ids))
        moments = sorted(chance.uniform(0, 0.9) for _ in range(KILLS))
        for kill, moment in enumerate(moments):
            await stored_at_least(system, int(whole * moment))
            await system.kill("daemon")
            if kill == KILLS // 2:
                await system.kill("plane")
                await system.start_daemon()
                await system.start_plane()
            else:
                await system.start_daemon()
        for number, (name, execution) in enumerate(ids.items()):
            ended = await system.ended(execution)
            settlement = ended["settlement"]
            assert (ended["exit_status"], settlement["verdict"]) == (number, "exited")
            out, err = expected(name)
            stored = await system.output(execution)
            assert stored == {"stdout": out, "stderr": err}
            assert settlement["streams"]["stdout"] == {"bytes": len(out), "sha256": hashlib.sha256(out).hexdigest()}
            assert settlement["streams"]["stderr"] == {"bytes": len(err), "sha256": hashlib.sha256(err).hexdigest()}
            statements = (await system.get(f"/receipts/{execution}"))["statements"]
            assert sorted(statement["kind"] for statement in statements) == ["receipt", "settlement"]
            assert (await system.get(f"/executions/{execution}/digests"))["chain_ok"]
        assert len((await system.get("/executions", runner=RUNNER))["executions"]) == EXECUTIONS
        assert system.carriers() == []
