"""Both sides' lists of attempts compared, so that no lost message matters for longer than RECONCILE_MS. Pure.

Theory of operation. A full beat names every attempt that lives at its runner; its answer has a hint for every attempt that we
believe to be that runner's. What only the runner names is a stranger: it is told to people and left alone. What only we have, twice
in a row RECONCILE_MS apart, is asked for by a signed stop: the answer is its settlement, or that nobody knows it.

Rule 1: nothing is stopped for being unknown. Rule 2: one list proves nothing: what it leaves out may have been on its way.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from controlplane.leasing import Living
from controlplane.rows import ExecutionState
from protocol.limits import BEAT_LEASES_MAX, HINTS_MAX, RECONCILE_MS
from protocol.messages import Hint

RUN = "run"
STOP = "stop"


def hints(living: Iterable[Living]) -> list[Hint]:
    """The stops that still wait for their attempt's end: what every answer has."""
    wanted = [_hint(row, STOP, row.stop_cmd_id) for row in living if row.stop_cmd_id is not None]
    return wanted[:HINTS_MAX]


def full_hints(living: Iterable[Living]) -> tuple[list[Hint], bool]:
    """A hint for every attempt, stops first; False when there are more than one answer holds."""
    stops: list[Hint] = []
    runs: list[Hint] = []
    for row in living:
        # An attempt whose place was taken is ended by its successor's start, where nobody has signed a stop for it.
        ending = row.stop_cmd_id or row.superseded_by
        if ending is not None:
            stops.append(_hint(row, STOP, ending))
        elif row.sent:
            runs.append(_hint(row, RUN, row.cmd_id))
    wanted = [*stops, *runs]
    return wanted[:HINTS_MAX], len(wanted) <= HINTS_MAX


def _hint(row: Living, want: str, cmd_id: str) -> Hint:
    return Hint(attempt=row.name, want=want, cmd_id=cmd_id)


@dataclass(frozen=True, slots=True)
class Compared:
    """What the lists of a full beat differ in."""

    strangers: tuple[str, ...]
    """Named by the runner, and not living here as its own."""
    superseded: tuple[Living, ...]
    """Living there although a later attempt took their place, and nobody has signed a stop."""
    missing: tuple[Living, ...]
    """Accepted by the runner, and not named."""


def compare(named: Collection[str], living: Iterable[Living]) -> Compared:
    """Compare the attempts that a full beat names with ours."""
    ours = {row.name: row for row in living}
    # A list as long as a beat can hold may have been cut: then nothing is missing from it.
    whole = len(named) < BEAT_LEASES_MAX
    there = set(named)
    return Compared(
        strangers=tuple(name for name in named if name not in ours),
        superseded=tuple(
            row for name, row in ours.items() if row.superseded_by and name in there and row.stop_cmd_id is None
        ),
        missing=tuple(
            row for name, row in ours.items() if whole and row.state is ExecutionState.RUNNING and name not in there
        ),
    )


def overdue(missing: Iterable[Living], since_ms: Mapping[str, int], now_ms: int) -> tuple[list[Living], dict[str, int]]:
    """Which of the missing ones were so RECONCILE_MS ago, too, and since when each is; what was asked for begins anew."""
    found: list[Living] = []
    after: dict[str, int] = {}
    for row in missing:
        first_ms = since_ms.get(row.name, now_ms)
        if now_ms - first_ms >= RECONCILE_MS:
            found.append(row)
            first_ms = now_ms
        after[row.name] = first_ms
    return found, after
