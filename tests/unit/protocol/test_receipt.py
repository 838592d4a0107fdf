"""Receipts and settlements."""

from typing import Any

import pytest

from protocol import strict_json
from protocol.envelope import PayloadType, seal
from protocol.errors import EnvelopeError, Reason
from protocol.receipt import (
    INFRA_STATUS,
    Outcome,
    Process,
    Receipt,
    Settlement,
    Verdict,
    open_receipt,
    open_settlement,
)
from tests.support.builders import a_key, a_receipt, a_settlement, an_attempt

KEY = a_key("runner")
KEYS = {KEY.key_id: KEY.public}


def test_a_receipt_opens_with_the_runners_key_only() -> None:
    """And is never a settlement."""
    receipt = a_receipt(outcome=Outcome.REFUSED, reason=Reason.EXPIRED)
    envelope = seal(receipt.dump(), PayloadType.RECEIPT, [KEY])
    assert open_receipt(envelope, KEYS).value == receipt
    for keys, door in (({}, open_receipt), (KEYS, open_settlement)):
        with pytest.raises(EnvelopeError):
            door(envelope, keys)


def test_a_settlement_names_its_attempt() -> None:
    """By both parts."""
    settlement = a_settlement(start_token=3)
    envelope = seal(settlement.dump(), PayloadType.SETTLEMENT, [KEY])
    assert open_settlement(envelope, KEYS).value.attempt == an_attempt("ex_1", 3)


def test_a_newer_runner_may_say_more() -> None:
    """Unknown fields of a statement are ignored; unknown outcomes and missing fields are not."""
    fields = a_receipt().model_dump(mode="json")
    assert Receipt.parse(strict_json.dumps(fields | {"new": 1})) == a_receipt()
    for broken in (fields | {"outcome": "maybe"}, {k: v for k, v in fields.items() if k != "cmd_digest"}):
        with pytest.raises(ValueError, match=r"outcome|cmd_digest"):
            Receipt.parse(strict_json.dumps(broken))


@pytest.mark.parametrize(
    ("over", "status"),
    [
        ({"code": 0}, 0),
        ({"code": 7}, 7),
        ({"verdict": Verdict.SIGNALLED, "code": None, "signal": 9}, 137),
        ({"verdict": Verdict.STOPPED, "code": None, "signal": 15}, 143),
        ({"verdict": Verdict.STOPPED, "code": 3}, 3),
        ({"verdict": Verdict.TIMED_OUT, "code": None, "signal": 9}, 137),
        ({"verdict": Verdict.LOST, "code": None}, INFRA_STATUS),
        ({"verdict": Verdict.LOST, "code": 0}, INFRA_STATUS),
        ({"verdict": Verdict.NEVER_STARTED, "code": None}, INFRA_STATUS),
        ({"verdict": Verdict.FENCED, "code": None, "signal": 15}, INFRA_STATUS),
        ({"verdict": Verdict.FENCED, "code": 0}, INFRA_STATUS),
        ({"verdict": Verdict.EXITED, "code": None}, INFRA_STATUS),
    ],
)
def test_a_missing_exit_is_never_zero(over: dict[str, Any], status: int) -> None:
    """As a shell says it, and 125 where the failure is ours."""
    assert a_settlement(**over).exit_status == status


def test_what_is_dumped_is_read() -> None:
    """Both statements survive their own bytes."""
    assert Receipt.parse(a_receipt().dump()) == a_receipt()
    assert Settlement.parse(a_settlement().dump()) == a_settlement()
    stuck = Process(pid=7, name="sleep", state="D", wchan="folio_wait", why="d_state")
    said = a_settlement(remains=[stuck], outlived=[Process(pid=8)], tiers=["cgroup", "cookie"], token=3, survivors=1)
    assert Settlement.parse(said.dump()) == said


def test_an_older_runner_says_less_of_its_end() -> None:
    """What it does not name is not there."""
    fields = a_settlement().model_dump(mode="json")
    older = {name: value for name, value in fields.items() if name not in ("remains", "outlived", "tiers", "token")}
    assert Settlement.parse(strict_json.dumps(older)) == a_settlement()
