"""A PTY's log at the control plane is bounded: its beginning goes, and everybody is told."""

from pathlib import Path

import pytest

from controlplane import ledger, logtrim
from controlplane.logstore import Log
from controlplane.rows import LogRow
from protocol.limits import KIB
from protocol.messages import LogClosed
from protocol.records import RecordKind, records
from tests.unit.controlplane.test_ptys import opened


@pytest.mark.parametrize(
    ("before", "start", "after"),
    [
        ((), 100, [(0, 100)]),
        (((20, 50),), 100, [(0, 100)]),
        (((0, 50), (200, 300)), 100, [(0, 100), (200, 300)]),
        (((80, 150),), 100, [(0, 150)]),
        (((100, 150),), 100, [(0, 150)]),
        (((0, 50),), 0, [(0, 50)]),
    ],
)
def test_what_is_given_up_is_one_hole(
    tmp_path: Path, before: tuple[tuple[int, int], ...], start: int, after: list[tuple[int, int]]
) -> None:
    """From the beginning on; holes in it and at its end become part of it."""
    log = Log(LogRow(attempt="ex.1", runner_id="rn", end=1000, gaps=before), tmp_path / "log")
    log.forget(start)
    assert log.gaps == after


@pytest.mark.slow
async def test_the_beginning_of_a_long_log_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole segments of it: readers are shown a gap, a proof names it and stays true, and the disk has the room again."""
    keep, slack = 256 * KIB, 64 * KIB
    monkeypatch.setattr(logtrim, "PTY_LOG_BYTES", keep)
    monkeypatch.setattr(ledger, "PTY_LOG_BYTES", keep)
    monkeypatch.setattr(ledger, "PTY_TRIM_BYTES", slack)
    async with opened(tmp_path) as pty:
        for number in range(16):
            await pty.print(b"%02d" % number * (32 * KIB // 2))
            pty.log.roll()
            await pty.up()
        await pty.print(b"the end")
        await pty.line.send(LogClosed(channel=1, end=len(pty.log.data)))
        await pty.line.report(pty.runner.ended(pty.command, log=pty.log))
        path = f"/v1/executions/{pty.id}"
        while not (await pty.cp.get(path, wait_ms=100))["log"]["complete"]:
            pass
        log = pty.cp.plane._ledger.logs.acquire(pty.attempt, pty.runner.id)
        while not log.gaps:
            await log.wait()
        (gap,) = log.gaps
        assert gap[0] == 0
        assert len(pty.log.data) - gap[1] >= keep
        stored = (await pty.cp.http.get(f"{path}/log")).content
        first, *rest = records(stored, 0)
        assert first.kind == RecordKind.GAP
        assert stored[first.end :] == pty.log.data[gap[1] :]
        assert rest[0].kind == RecordKind.SEGMENT
        shown = await pty.cp.get(f"{path}/digests")
        assert (shown["gaps"], shown["proof"]["wrong"], bool(shown["proof"]["missing"])) == ([[0, gap[1]]], [], True)
        for _ in range(200):
            if log.path.stat().st_blocks * 512 < len(pty.log.data) - gap[1] + slack:
                break
            await pty.line.beat()
        assert log.path.stat().st_blocks * 512 < len(pty.log.data) - gap[1] + slack
        assert log.path.stat().st_size == len(pty.log.data)
        pty.cp.plane._ledger.logs.give_back(log)
