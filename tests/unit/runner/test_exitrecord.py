"""`exit.json` as the daemon reads it: claims of another process, checked for form."""

from typing import Any

import pytest

from runner.adapters.exitrecord import parse_exit
from runner.core.plans import ProcessLeft

HELD = {"pid": 4, "start": 5, "name": "sleep", "state": "D", "wchan": "folio_wait_bit", "why": "d_state"}
SPARED = {"pid": 6, "start": 7, "name": "watchman"}


def a_record(**over: Any) -> dict[str, Any]:
    """What a shim of today writes."""
    return {
        "v": 1,
        "attempt": "ex_1.1",
        "boot_id": "b",
        "verdict": "stopped",
        "code": None,
        "signal": None,
        "core": False,
        "cause": {"kind": "stop", "by": "tester"},
        "started_ns": 1,
        "ended_ns": 2,
        "duration_ms": 0,
        "rusage": {},
        "streams": {},
        "drain": "quiet",
        "swept": [{"tier": "cgroup", "signal": 9, "count": 2}],
        "survivors": 1,
        "tiers": ["cgroup", "descendants", "cookie"],
        "remains": [HELD],
        "outlived": [SPARED],
        "log": {"end": 1, "segments": 1, "chain": "0" * 64},
    } | over


def test_who_is_left_is_told() -> None:
    """Survivors with their state, the spared, and the tiers there were."""
    record = parse_exit("ex_1.1", a_record())
    assert record is not None
    assert record.remains == (
        ProcessLeft(pid=4, start=5, name="sleep", state="D", wchan="folio_wait_bit", why="d_state"),
    )
    assert record.outlived == (ProcessLeft(pid=6, start=7, name="watchman"),)
    assert record.tiers == ("cgroup", "descendants", "cookie")
    assert (record.survivors, record.swept) == (1, (("cgroup", 9, 2),))


def test_a_shim_of_an_older_runner_tells_less() -> None:
    """The keys that came later are empty, not missing."""
    old = {key: value for key, value in a_record().items() if key not in ("tiers", "remains", "outlived")}
    record = parse_exit("ex_1.1", old)
    assert record is not None
    assert (record.tiers, record.remains, record.outlived) == ((), (), ())


@pytest.mark.parametrize(
    "over",
    [
        {"remains": [HELD] * 33},
        {"outlived": [SPARED] * 33},
        {"remains": [HELD | {"pid": 0}]},
        {"remains": [HELD | {"name": "x" * 65}]},
        {"remains": [HELD | {"why": "<b>"}]},
        {"tiers": ["cgroup\n"]},
        {"remains": "many"},
    ],
)
def test_a_claim_out_of_form_is_no_record(over: dict[str, Any]) -> None:
    """Whoever wrote that is no shim: never a success."""
    assert parse_exit("ex_1.1", a_record(**over)) is None
