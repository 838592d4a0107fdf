"""What the runner signs: verifiable with its key alone, for every verdict, and never more than fits."""

from typing import Any

import pytest

from protocol.envelope import EnvelopeError
from protocol.errors import Reason
from protocol.events import Event
from protocol.messages import ItemKind
from protocol.receipt import Cause, Outcome, Verdict, open_receipt
from runner.core.plans import Swept
from runner.core.statements import Statements
from tests.support.builders import NOW_MS, ORG, RUNNER, a_key, an_attempt
from tests.support.engine import BOOT_ID, a_row, an_exit, opened_receipt, opened_settlement


def statements(**over: Any) -> Statements:
    """Those of the runner, with nothing said yet."""
    fields: dict[str, Any] = {
        "org": ORG,
        "runner": RUNNER,
        "inc": 3,
        "key": a_key("runner"),
        "boot_id": BOOT_ID,
        "out_head": 0,
    }
    return Statements(**(fields | over))


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_receipt_says_which_command_under_which_policy_and_keys(outcome: Outcome) -> None:
    """And opens with the runner's key only."""
    row = a_row(7)
    item = statements().receipt(row, outcome, keyset_version=4, at_ms=NOW_MS, reason=Reason.INFRA, result={"a": 1})
    said = opened_receipt(item)
    assert (said.org, said.runner, said.inc) == (ORG, RUNNER, 3)
    assert (said.cmd_id, said.cmd_digest, said.kind, said.seq) == (row.cmd_id, row.digest, row.kind, 7)
    assert (said.outcome, said.reason, said.result) == (outcome, Reason.INFRA, {"a": 1})
    assert (said.policy_digest, said.keyset_version, said.at_ms) == (row.policy_digest, 4, NOW_MS)
    stranger = a_key("stranger")
    with pytest.raises(EnvelopeError):
        open_receipt(item.body.encode(), {stranger.key_id: stranger.public})


ENDS: dict[Verdict, tuple[dict[str, Any], int]] = {
    Verdict.EXITED: ({"code": 7}, 7),
    Verdict.SIGNALLED: ({"verdict": "signalled", "code": None, "signal": 11, "core": True}, 139),
    Verdict.STOPPED: ({"verdict": "stopped", "code": None, "signal": 15, "cause_kind": "stop"}, 143),
    Verdict.TIMED_OUT: ({"verdict": "timed_out", "code": None, "signal": 9, "cause_kind": "timeout"}, 137),
    Verdict.NEVER_STARTED: ({"verdict": "never_started", "code": None, "cause_reason": "EXEC_NOT_FOUND"}, 125),
}


@pytest.mark.parametrize("verdict", list(ENDS))
def test_a_settlement_says_what_the_shim_wrote(verdict: Verdict) -> None:
    """With digests, times and what was swept."""
    over, status = ENDS[verdict]
    said = opened_settlement(statements().settlement(an_attempt(), a_row(1), an_exit(**over), NOW_MS))
    assert (said.verdict, said.exit_status, said.attempt) == (verdict, status, an_attempt())
    assert said.streams["stdout"].bytes == 4 and said.log is not None and said.log.end == 100
    assert [(step.tier, step.signal, step.count) for step in said.swept] == [("group", 15, 1)]
    assert (said.usage.utime_us, said.usage.stime_us, said.usage.maxrss_kib) == (1, 2, 3)


def test_lost_and_never_started_are_ends_of_our_doing() -> None:
    """With no exit record there is no code, and 125 is what a shell is told."""
    made = statements()
    lost = opened_settlement(made.lost(an_attempt(), a_row(1), Reason.REBOOT, None, NOW_MS))
    assert (lost.verdict, lost.exit_status, lost.cause.kind, lost.evidence) == (Verdict.LOST, 125, "reboot", {})
    swept = Swept(found=3, signalled=2, remaining=1)
    found = opened_settlement(made.lost(an_attempt(), a_row(1), Reason.SHIM_LOST, swept, NOW_MS))
    assert found.survivors == 1 and found.evidence == {"found": 3, "signalled": 2, "remaining": 1}
    never = opened_settlement(made.never_started(an_attempt(), a_row(1), Reason.NOT_RELEASED, "x" * 900, NOW_MS))
    assert (never.verdict, never.exit_status) == (Verdict.NEVER_STARTED, 125)
    assert never.cause == Cause(kind="unreleased", reason=Reason.NOT_RELEASED, detail="x" * 500)


def test_every_verdict_has_a_statement() -> None:
    """None is left out."""
    assert {*ENDS, Verdict.LOST} == set(Verdict)


def test_a_reason_that_is_none_of_ours_is_left_out() -> None:
    """The shim is another process: what it says is bounded and cleaned."""
    record = an_exit(cause_reason="NO_SUCH_REASON", cause_by="\udc80" + "b" * 900, cause_detail="\ud800" * 900)
    said = opened_settlement(statements().settlement(an_attempt(), a_row(1), record, NOW_MS))
    assert said.cause.reason is None and said.cause.by == "?" + "b" * 199 and said.cause.detail == "?" * 500
    known = an_exit(cause_reason="SPAWN_FAILED")
    assert (
        opened_settlement(statements().settlement(an_attempt(), a_row(1), known, NOW_MS)).cause.reason
        is Reason.SPAWN_FAILED
    )


def test_numbers_go_on_from_the_journal() -> None:
    """Each item has the next one, events too."""
    made = statements(out_head=41)
    first = made.receipt(a_row(1), Outcome.DONE, keyset_version=1, at_ms=NOW_MS)
    second = made.event(Event(kind="alarm.raised", at_ms=NOW_MS))
    assert [(item.out_seq, item.kind) for item in (first, second)] == [(42, ItemKind.RECEIPT), (43, ItemKind.EVENT)]
    assert Event.parse(second.body.encode()).kind == "alarm.raised"


def test_the_same_statement_is_the_same_bytes() -> None:
    """Signatures are deterministic, so a replayed seed is a replayed world."""
    said = [statements().settlement(an_attempt(), a_row(1), an_exit(), NOW_MS).body for _ in range(2)]
    assert said[0] == said[1]
