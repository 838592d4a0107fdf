"""One runner, one machine: whether a hello comes from the daemon that has the line, its successor, or a copy. Pure.

Theory of operation. A daemon draws a random `instance` at its start and counts its dials. One key in two places shows: an instance
that was succeeded dials again, or one count is used twice, or a new instance knows less than its runner has told while another
one still beats. A machine that was started anew, moved to another network or set back alone shows none of these.

Rule 1: a copy is refused and changes nothing but what people are told. Rule 2: an instance that does not say who it is is not judged.
"""

import json
from dataclasses import dataclass, replace
from typing import Final

from controlplane.rows import RunnerRow
from protocol.identity import HelloClaims

RETIRED_MAX: Final = 32
"""Instances remembered as succeeded: a copy that sleeps through so many restarts of the original is told by its marks."""
BEATS_MISSED_MAX: Final = 3
"""An instance that has not beaten for so many intervals is not known to live."""
_HOSTNAME_CHARS: Final = 64
"""Shown of a name, so that both machines fit one sentence of DETAIL_CHARS_MAX."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A hello of a runner that is somewhere else, too: `detail` names both machines."""

    runner: RunnerRow
    detail: str
    fresh: bool
    """Whether this machine was not told of before."""


def judge(runner: RunnerRow, claims: HelloClaims, *, other_lives: bool) -> str | None:
    """Why a verified hello is of a copy, or None. `other_lives`: another instance has beaten in our incarnation a moment ago."""
    if not claims.instance:
        return None
    if claims.instance == runner.instance:
        return "a count of dials came twice" if claims.dial <= runner.dial else None
    if claims.instance in runner.retired:
        return "another daemon has succeeded it"
    receding = claims.inc < runner.inc or (
        claims.inc == runner.inc and (claims.ctl.hw < runner.acked_hw or claims.out_head < runner.out_hw)
    )
    return "it knows less than its runner has told" if receding and other_lives else None


def conflict(runner: RunnerRow, claims: HelloClaims, why: str, now_ms: int) -> Conflict:
    """The refusal of a copy, and the runner with it kept."""
    detail = (
        f"{_machine(claims.hostname, claims.boot_id)} was refused: {why};"
        f" {_machine(runner.hostname, runner.boot_id)} has this runner's key, too"
    )
    before = json.loads(runner.conflict) if runner.conflict is not None else {}
    kept = {
        "at_ms": now_ms,
        "hostname": claims.hostname,
        "boot_id": claims.boot_id,
        "instance": claims.instance,
        "detail": detail,
    }
    same = ("hostname", "boot_id", "instance")
    fresh = any(before.get(name) != kept[name] for name in same)
    return Conflict(replace(runner, conflict=json.dumps(kept)), detail, fresh)


def taken(runner: RunnerRow, claims: HelloClaims) -> RunnerRow:
    """The runner once the hello's instance has the line."""
    retired = runner.retired
    if runner.instance and runner.instance != claims.instance:
        retired = (*retired, runner.instance)[-RETIRED_MAX:]
    return replace(
        runner,
        instance=claims.instance,
        dial=claims.dial,
        retired=retired,
        boot_id=claims.boot_id,
        hostname=claims.hostname,
    )


def _machine(hostname: str, boot_id: str) -> str:
    return f"{hostname[:_HOSTNAME_CHARS] or 'a machine without a name'} (boot {boot_id or 'unknown'})"
