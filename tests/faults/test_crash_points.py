"""Every crash point of docs/reliability.md, for every kind of command that reaches it: the daemon is killed there, comes back, and there is
exactly one effect and exactly one receipt (and, for an execution, one settlement)."""

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import pytest
import pytest_asyncio

from tests.faults.crash import Crash, crash

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

ALL: Final = ("start", "stop", "early_stop", "release", "acquire", "create", "remove", "attach")
STARTING: Final = ("start", "pty")
ENDING: Final = ("start", "stop", "release", "pty")
TREES: Final = ("create", "remove")


class Row(NamedTuple):
    """One crash point, its hit, and the kinds that pass it."""

    name: str
    point: str
    kinds: tuple[str, ...]
    hit: int = 1


ROWS: Final = (
    Row("C0", "command.received", ALL),
    Row("C1", "command.judged", ALL),
    Row("C2", "journal.before_commit", ALL),
    Row("C3", "journal.after_commit", ALL),
    Row("C7a", "attempt.dir_made", ("start",)),
    Row("C7b", "attempt.spec_written", ("start",)),
    Row("C7c", "attempt.forked", ("start",)),
    Row("C8", "attempt.prepared", ("start",)),
    Row("C10a", "journal.before_commit", ("start", "stop", "release", "attach", *TREES), hit=2),
    Row("C11a", "journal.after_commit", ("start", "stop", "release", "attach", *TREES), hit=2),
    Row("C8b", "attempt.released", STARTING),
    Row("C8c", "viewer.admitted", ("attach",)),
    Row("C9", "exit.heard", ENDING),
    Row("C10b", "journal.before_commit", ("start",), hit=3),
    Row("C11b", "journal.after_commit", ("start",), hit=3),
    Row("L1", "lease.pushed", ("acquire",), hit=2),
    Row("S1", "stop.said", ("stop", "release", "close")),
    Row("C12", "report.sent", ALL),
    Row("C13", "report.answered", ALL),
    Row("W1", "worktree.marker_written", ("create",)),
    Row("W2", "worktree.branch_made", ("create",)),
    Row("W3", "worktree.added", ("create",)),
    Row("W4", "worktree.verified", ("create",)),
    Row("W5", "worktree.ready", ("create",)),
    Row("W6", "worktree.trashed", ("remove",)),
    Row("W7", "worktree.recorded", ("remove",)),
)
CASES: Final = [pytest.param(row, kind, id=f"{row.name}-{row.point}-{kind}") for row in ROWS for kind in row.kinds]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Crash]:
    """One state directory for all: what an earlier case left behind is there, as on a real machine."""
    async with crash() as crashing:
        yield crashing


@pytest.mark.parametrize(("row", "kind"), CASES)
async def test_a_daemon_killed_there_leaves_one_effect_and_one_receipt(system: Crash, row: Row, kind: str) -> None:
    """Killed at the point while it does the command; then another daemon, and the command once more."""
    try:
        order = await getattr(system, kind)()
        await system.killed_while(order, f"{row.point}={row.hit}*kill")
        await system.survives(order)
    except BaseException:
        print(system.system.stand.log_tail("daemon"))
        raise
