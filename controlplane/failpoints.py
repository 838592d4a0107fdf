"""The control plane's crash points: see `terminal.failpoints` for what they are and how an entry is written.

`LOCAL_CONTROLPLANE_FAILPOINTS` is read once, at import. `error(REASON)` is for the two points of a commit: it fails the transaction,
before or, as if its answer were lost, after it was made durable.
"""

import os
from typing import Final

from controlplane.errors import StartRefused, StoreFailed
from protocol.errors import Reason
from terminal.failpoints import BadEntry, Failpoints

ENVIRONMENT: Final = "LOCAL_CONTROLPLANE_FAILPOINTS"
NAMES: Final = frozenset(
    {
        "plane.before_commit",
        "plane.after_commit",
        "plane.numbered",
        "plane.report_stored",
        "plane.beat_answered",
    }
)
"""Every point in the code; `docs/reliability.md` has a row for each."""


def _fail(name: str, reason: Reason) -> None:
    raise StoreFailed(f"failpoint {name}: {reason}")


_POINTS: Final = Failpoints(NAMES, _fail)
hit: Final = _POINTS.hit
"""Pass the point of a name: do what it is armed with, which may end the process. Raises StoreFailed where armed with an error."""


def arm(text: str) -> None:
    """Arm the points named in `text` and no others. Raises StartRefused for an unknown name or action; then nothing changed."""
    try:
        _POINTS.arm(text)
    except BadEntry as exc:
        raise StartRefused(f"{ENVIRONMENT}: {exc}") from None


arm(os.environ.get(ENVIRONMENT, ""))
