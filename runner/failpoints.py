"""The runner's crash points: see `terminal.failpoints` for what they are and how an entry is written.

`LOCAL_RUNNER_FAILPOINTS` is read once, at import.
"""

import os
from typing import Final

from protocol.errors import Reason
from runner.errors import Broken, ConfigError
from terminal.failpoints import BadEntry, Failpoints

ENVIRONMENT: Final = "LOCAL_RUNNER_FAILPOINTS"
NAMES: Final = frozenset(
    {
        "journal.before_commit",
        "journal.after_commit",
        "command.received",
        "command.judged",
        "recovery.observed",
        "recovery.decided",
        "recovery.performed",
        "stop.said",
        "lease.pushed",
        "sweep.ended",
        "identity.kept",
        "log.acked",
        "fence.raised",
        "attempt.dir_made",
        "attempt.spec_written",
        "attempt.forked",
        "attempt.prepared",
        "attempt.released",
        "viewer.admitted",
        "exit.heard",
        "report.sent",
        "report.answered",
        "worktree.marker_written",
        "worktree.branch_made",
        "worktree.added",
        "worktree.verified",
        "worktree.ready",
        "worktree.trashed",
        "worktree.recorded",
    }
)
"""Every point in the code; `docs/reliability.md` has a row for each."""
SHIM_NAMES: Final = frozenset(
    {"shim.ready", "shim.released", "shim.spawned", "shim.child_ended", "shim.exit_told", "shim.exit_durable"}
)
"""Points of a shim, which reads no environment: the daemon asks for them when it writes a spec. They take `kill` and `stop`."""


def _fail(name: str, reason: Reason) -> None:
    raise Broken(reason, f"failpoint {name}")


_POINTS: Final = Failpoints(NAMES, _fail, SHIM_NAMES)
hit: Final = _POINTS.hit
"""Pass the point of a name: do what it is armed with, which may end the process. Raises Broken where armed with an error."""


def for_shim() -> dict[str, str]:
    """What the next shim is to do at which of its points: the key `fail` of its spec."""
    asked = {name.removeprefix("shim."): _POINTS.ask(name) for name in sorted(SHIM_NAMES)}
    return {point: action for point, action in asked.items() if action is not None}


def arm(text: str) -> None:
    """Arm the points named in `text` and no others. Raises ConfigError for an unknown name or action; then nothing changed."""
    try:
        _POINTS.arm(text)
    except BadEntry as exc:
        raise ConfigError(ENVIRONMENT, exc.key, exc.expected) from None


arm(os.environ.get(ENVIRONMENT, ""))
