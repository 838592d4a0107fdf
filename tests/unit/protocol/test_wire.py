"""The base of all that is written as JSON."""

import pytest

from protocol import strict_json
from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.ids import GENESIS
from protocol.limits import DETAIL_CHARS_MAX
from protocol.messages import Need
from protocol.wire import is_plain
from tests.support.builders import NOW_MS, a_command, a_receipt


def test_an_order_is_closed_and_a_statement_is_open() -> None:
    """Unknown fields are refused in the one and ignored in the other."""
    for value, closed in ((a_command(), True), (a_receipt(), False), (Need(seq=1), False)):
        document = strict_json.dumps(value.model_dump(mode="json") | {"new": 1})
        if closed:
            with pytest.raises(ValueError, match="new: Extra inputs"):
                type(value).parse(document)
        else:
            assert type(value).parse(document) == value


def test_values_do_not_change() -> None:
    """What was verified stays what it was."""
    with pytest.raises(ValueError, match="frozen"):
        a_receipt().seq = 2  # type: ignore[misc]


def test_a_refusal_says_where_in_one_bounded_line() -> None:
    """Places that are no plain words are shown as a question mark."""
    with pytest.raises(ValueError, match=r"^\?: Extra inputs are not permitted$"):
        type(a_command()).parse(strict_json.dumps(a_command().model_dump(mode="json") | {"\x1b[2J": 1}))
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        Need.parse(b'{"t":"need","seq":1}', 10)
    assert is_plain("argv")
    assert not is_plain("a\nb")


def test_an_event_survives_and_may_be_of_an_unknown_kind() -> None:
    """Kinds are words, details are bounded."""
    event = Event(kind=EventKind.ORPHAN_SWEPT, at_ms=NOW_MS, reason=Reason.SHIM_LOST, count=2)
    assert Event.parse(event.dump()) == event
    assert Event(kind="disk.warned", at_ms=0).kind == "disk.warned"
    with pytest.raises(ValueError, match="detail"):
        Event(kind="disk.warned", at_ms=0, detail="x" * (DETAIL_CHARS_MAX + 1))
    with pytest.raises(ValueError, match="kind"):
        Event(kind="disk", at_ms=0)


@pytest.mark.parametrize("digest", [GENESIS + "\n", GENESIS.upper(), "sha1:" + "0" * 64, GENESIS[:-1]])
def test_a_digest_has_one_spelling(digest: str) -> None:
    """Lower case, whole, and nothing behind it."""
    with pytest.raises(ValueError, match="cmd_digest"):
        a_receipt(cmd_digest=digest)
