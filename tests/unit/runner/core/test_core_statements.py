"""What the runner signs: verifiable with its key alone, for every verdict, and never more than fits."""

from typing import Any

import pytest

from protocol.envelope import EnvelopeError
from protocol.errors import Reason
from protocol.events import Event
from protocol.execution import AttemptState
from protocol.messages import ItemKind
from protocol.receipt import Cause, Outcome, StreamDigest, Uploaded, Verdict, open_receipt
from runner.core.inputs import Now
from runner.core.journaling import SUPERSEDED_BY, AttemptRow
from runner.core.plans import ProcessLeft, Swept, UploadedCopy
from runner.core.statements import Statements
from tests.support.builders import NOW_MS, ORG, RUNNER, a_key, a_lease, an_attempt
from tests.support.engine import BOOT_ID, a_row, an_exit, opened_receipt, opened_settlement

NOW = Now(NOW_MS, 5_000_000)


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


def a_taken(**over: Any) -> AttemptRow:
    """The attempt `ex_1.1` as the journal has it."""
    row = a_row(1)
    fields: dict[str, Any] = {"attempt": an_attempt(), "digest": row.digest, "cmd_id": row.cmd_id}
    return AttemptRow(**(fields | {"state": AttemptState.RUNNING} | over))


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
    said = opened_settlement(statements().settlement(a_taken(), a_row(1), an_exit(**over), NOW))
    assert (said.verdict, said.exit_status, said.attempt) == (verdict, status, an_attempt())
    assert said.streams["stdout"].bytes == 4 and said.log is not None and said.log.end == 100
    assert [(step.tier, step.signal, step.count) for step in said.swept] == [("group", 15, 1)]
    assert (said.usage.utime_us, said.usage.stime_us, said.usage.maxrss_kib) == (1, 2, 3)


def test_lost_and_never_started_are_ends_of_our_doing() -> None:
    """With no exit record there is no code, and 125 is what a shell is told."""
    made = statements()
    lost = opened_settlement(made.lost(a_taken(), a_row(1), Reason.REBOOT, None, NOW))
    assert (lost.verdict, lost.exit_status, lost.cause.kind, lost.evidence) == (Verdict.LOST, 125, "reboot", {})
    swept = Swept(found=3, signalled=2, remaining=1)
    found = opened_settlement(made.lost(a_taken(), a_row(1), Reason.SHIM_LOST, swept, NOW))
    assert found.survivors == 1 and found.evidence == {"found": 3, "signalled": 2, "remaining": 1}
    never = opened_settlement(made.never_started(a_taken(), a_row(1), Reason.NOT_RELEASED, "x" * 900, NOW))
    assert (never.verdict, never.exit_status) == (Verdict.NEVER_STARTED, 125)
    assert never.cause == Cause(kind="unreleased", reason=Reason.NOT_RELEASED, detail="x" * 500)


def test_every_verdict_has_a_statement() -> None:
    """None is left out; FENCED is STOPPED by a successor, or never begun because of it."""
    assert {*ENDS, Verdict.LOST, Verdict.FENCED} == set(Verdict)


BY = f"{SUPERSEDED_BY}cmd_2"


@pytest.mark.parametrize(
    ("row", "record", "verdict"),
    [
        ({"fenced_by": 2, "stop_by": BY}, {"verdict": "stopped", "cause_kind": "stop", "cause_by": BY}, "fenced"),
        # A signed stop came first: the first cause of an end is the cause of it.
        ({"fenced_by": 2, "stop_by": "c"}, {"verdict": "stopped", "cause_kind": "stop", "cause_by": "c"}, "stopped"),
        # Its lease ran out before it heard of the successor.
        ({"fenced_by": 2, "stop_by": BY}, {"verdict": "stopped", "cause_kind": "lease"}, "stopped"),
        # It ended by itself while it was being stopped: what the command said is told.
        ({"fenced_by": 2, "stop_by": BY}, {"cause_kind": "stop", "cause_by": BY}, "exited"),
        ({"fenced_by": 2, "stop_by": BY}, {}, "exited"),
        # Its shim met the fence itself, before it would have started anything.
        ({}, {"verdict": "never_started", "cause_kind": "fenced"}, "fenced"),
        # No successor: whatever a record claims.
        ({}, {"verdict": "stopped", "cause_kind": "stop", "cause_by": BY}, "stopped"),
    ],
)
def test_fenced_is_an_end_whose_first_cause_is_the_successor(
    row: dict[str, Any], record: dict[str, Any], verdict: str
) -> None:
    """With its own reason, and the status of an end of our doing."""
    said = opened_settlement(statements().settlement(a_taken(**row), a_row(1), an_exit(**record), NOW))
    assert said.verdict == verdict
    assert (said.cause.reason is Reason.FENCED) is (verdict == "fenced") is (said.cause.kind == "fenced")
    assert said.exit_status == (125 if verdict == "fenced" else 0)


def test_never_begun_because_of_a_successor_is_fenced_too() -> None:
    """Accepted before a crash, superseded before it began again."""
    said = opened_settlement(statements().never_started(a_taken(), a_row(1), Reason.FENCED, "later", NOW))
    assert (said.verdict, said.cause.reason, said.exit_status) == (Verdict.FENCED, Reason.FENCED, 125)


def test_a_settlement_says_who_remains_who_outlived_how_it_was_looked_for_and_under_which_token() -> None:
    """Names of programs are the programs' own: bounded, and without lone surrogates."""
    stuck = ProcessLeft(pid=7, start=99, name="\udcff" + "n" * 99, state="D", wchan="folio_wait", why="d_state")
    daemon = ProcessLeft(pid=8, start=98, name="watchman")
    record = an_exit(survivors=1, remains=(stuck,), outlived=(daemon,), tiers=("cgroup", "cookie"))
    row = a_taken(lease=a_lease(token=6))
    said = opened_settlement(statements().settlement(row, a_row(1), record, NOW))
    assert (said.survivors, said.token, said.tiers) == (1, 6, ["cgroup", "cookie"])
    left = said.remains[0]
    assert (left.pid, left.name, left.state, left.wchan, left.why) == (7, "?" + "n" * 63, "D", "folio_wait", "d_state")
    assert [(each.pid, each.name, each.why) for each in said.outlived] == [(8, "watchman", "")]
    without = opened_settlement(statements().settlement(a_taken(), a_row(1), an_exit(), NOW))
    assert (without.token, without.remains, without.outlived, without.tiers) == (None, [], [], [])


def test_a_reason_that_is_none_of_ours_is_left_out() -> None:
    """The shim is another process: what it says is bounded and cleaned."""
    record = an_exit(cause_reason="NO_SUCH_REASON", cause_by="\udc80" + "b" * 900, cause_detail="\ud800" * 900)
    said = opened_settlement(statements().settlement(a_taken(), a_row(1), record, NOW))
    assert said.cause.reason is None and said.cause.by == "?" + "b" * 199 and said.cause.detail == "?" * 500
    known = an_exit(cause_reason="SPAWN_FAILED")
    assert (
        opened_settlement(statements().settlement(a_taken(), a_row(1), known, NOW)).cause.reason is Reason.SPAWN_FAILED
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
    said = [statements().settlement(a_taken(), a_row(1), an_exit(), NOW).body for _ in range(2)]
    assert said[0] == said[1]


def test_a_settlement_names_the_copy_that_was_masked() -> None:
    """Beside the digests of what was written; where they are the same, nothing."""
    copy = UploadedCopy(redactor="mask-1", streams={"stdout": (3, "ab" * 32)})
    masked = opened_settlement(statements().settlement(a_taken(), a_row(1), an_exit(uploaded=copy), NOW))
    plain = opened_settlement(statements().settlement(a_taken(), a_row(1), an_exit(), NOW))
    assert masked.log is not None and plain.log is not None
    assert masked.log.uploaded == Uploaded(
        redactor="mask-1", streams={"stdout": StreamDigest(bytes=3, sha256="ab" * 32)}
    )
    assert masked.streams == plain.streams and plain.log.uploaded is None
