"""What the engine remembers of commands, and what it may forget."""

import pytest

from protocol.ids import CommandId
from protocol.limits import CLOCK_SKEW_MS, SAFETY_TTL_MS_MAX
from runner.core import ledger as ledger_module
from runner.core.ledger import TOMBSTONE_MS, Ledger
from tests.support.builders import a_mark
from tests.support.engine import a_row


def filled(count: int, *, receipted: bool = True) -> Ledger:
    """A ledger of commands 1 to `count`."""
    ledger = Ledger()
    for number in range(1, count + 1):
        ledger.add(a_row(number), a_mark(number))
        if receipted:
            ledger.receipted(a_row(number).digest, number)
    return ledger


def test_what_was_added_is_seen_and_the_mark_moves() -> None:
    """The view is the memory itself."""
    ledger = filled(2)
    seen = ledger.seen()
    assert (seen.ctl.hw, set(seen.receipted)) == (2, {a_row(1).digest, a_row(2).digest})
    assert seen.digests == {"cmd_1": a_row(1).digest, "cmd_2": a_row(2).digest}


def test_the_first_payload_of_an_id_is_the_one_that_counts() -> None:
    """A second payload does not take its place."""
    ledger = filled(1)
    ledger.add(a_row(2, "cmd_1"), a_mark(2))
    assert ledger.first["cmd_1"] == a_row(1).digest


def test_a_receipted_command_keeps_no_envelope_and_has_one_receipt() -> None:
    """The bytes are only needed to begin again."""
    ledger = filled(1)
    row = ledger.commands[a_row(1).digest]
    assert (row.envelope, row.receipt_seq) == (b"", 1)
    with pytest.raises(AssertionError):
        ledger.receipted(row.digest, 2)


def test_the_oldest_are_forgotten_down_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their ids, so that memory has a bound."""
    monkeypatch.setattr(ledger_module, "COMMANDS_REMEMBERED_MAX", 3)
    ledger = filled(5)
    ledger.forget(())
    assert list(ledger.first) == ["cmd_3", "cmd_4", "cmd_5"] and len(ledger.commands) == 3
    ledger.forget(())
    assert len(ledger.commands) == 3


def test_pending_and_living_ones_are_kept_and_block_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One old pending command must not make the memory grow without end."""
    monkeypatch.setattr(ledger_module, "COMMANDS_REMEMBERED_MAX", 2)
    ledger = Ledger()
    ledger.add(a_row(1), a_mark(1))
    for number in (2, 3, 4):
        ledger.add(a_row(number, receipt_seq=number), a_mark(number))
    ledger.forget({a_row(2).digest})
    assert list(ledger.first) == ["cmd_1", "cmd_2"]


def test_an_id_that_came_again_outlives_its_second_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first digest of an id owns its entry."""
    monkeypatch.setattr(ledger_module, "COMMANDS_REMEMBERED_MAX", 1)
    ledger = Ledger()
    ledger.add(a_row(1, "cmd_a"), a_mark(1))
    ledger.add(a_row(2, "cmd_a", receipt_seq=2), a_mark(2))
    ledger.forget(())
    assert ledger.first == {"cmd_a": a_row(1).digest}


def test_a_tombstone_outlives_every_start_that_was_signed_before_the_stop() -> None:
    """A start lives ten minutes, a stop a day."""
    ledger = Ledger()
    assert ledger.bury("ex_1.1", CommandId("cmd_1"), 1_000) == 1_000 + TOMBSTONE_MS
    assert TOMBSTONE_MS >= SAFETY_TTL_MS_MAX + 2 * CLOCK_SKEW_MS


def test_tombstones_are_bounded_and_only_expired_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full graveyard refuses; it does not forget."""
    monkeypatch.setattr(ledger_module, "TOMBSTONES_MAX", 2)
    ledger = Ledger()
    assert ledger.bury("a.1", CommandId("c"), 0) and ledger.bury("b.1", CommandId("c"), 10)
    assert ledger.bury("c.1", CommandId("c"), 20) is None
    assert set(ledger.tombstones) == {"a.1", "b.1"}
    assert ledger.bury("c.1", CommandId("c"), TOMBSTONE_MS) is not None
    assert set(ledger.tombstones) == {"b.1", "c.1"}
