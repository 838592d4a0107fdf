"""The pure rules: numbering, meeting, receipts, settlements, renewals."""

import json
from dataclasses import replace
from typing import Any

import pytest

from controlplane import dispatcher, orders
from controlplane.orders import Address
from controlplane.rows import (
    ExecutionRow,
    ExecutionState,
    IntentRow,
    IntentState,
    WorktreeRow,
    WorktreeState,
)
from protocol.commands import Command, Kind, parse_args
from protocol.envelope import digest_of
from protocol.errors import Reason
from protocol.ids import GENESIS, Digest
from protocol.receipt import Cause, Outcome, Receipt, Settlement, Verdict
from protocol.replay import Mark

NOW = 1_795_000_000_000
DAY_MS = 24 * 60 * 60 * 1000
ADDRESS = Address(org="org", runner="rn", inc=3, keyset_min=2)
A, B = (Digest(digest_of(name)) for name in (b"a", b"b"))


def an_intent(cmd_id: str = "cm_1", kind: Kind = Kind.EXECUTION_START, **over: Any) -> IntentRow:
    """A queued intent."""
    args = {
        Kind.EXECUTION_START: {
            "execution_id": "ex_1",
            "start_token": 1,
            "argv": ["true"],
            "cwd": {"type": "path", "path": "/srv"},
        },
        Kind.EXECUTION_STOP: {"target": {"type": "attempt", "execution_id": "ex_1", "start_token": 1}},
        Kind.WORKTREE_CREATE: {"worktree_id": "wt_1", "repo": "/srv/r", "base": "main"},
        Kind.WORKTREE_REMOVE: {"worktree_id": "wt_1"},
    }[kind]
    fields: dict[str, Any] = {
        "cmd_id": cmd_id,
        "runner_id": "rn",
        "kind": kind,
        "subject": "wt_1" if kind.startswith("worktree") else "ex_1",
        "args": json.dumps(args).encode(),
        "lease": None,
        "state": IntentState.QUEUED,
        "created_ms": NOW,
        "expires_ms": NOW + DAY_MS,
    }
    return IntentRow(**(fields | over))


def an_execution(**over: Any) -> ExecutionRow:
    """A sent execution."""
    fields: dict[str, Any] = {
        "id": "ex_1",
        "runner_id": "rn",
        "start_token": 1,
        "state": ExecutionState.SENT,
        "cmd_id": "cm_1",
        "created_ms": NOW,
    }
    return ExecutionRow(**(fields | over))


def a_worktree(state: WorktreeState) -> WorktreeRow:
    """A worktree."""
    return WorktreeRow(
        id="wt_1", runner_id="rn", state=state, repo="/srv/r", base="main", cmd_id="cm_1", created_ms=NOW
    )


def a_receipt(outcome: Outcome, **over: Any) -> Receipt:
    """A receipt of cm_1."""
    fields: dict[str, Any] = {
        "org": "org",
        "runner": "rn",
        "inc": 3,
        "cmd_id": "cm_1",
        "cmd_digest": A,
        "kind": Kind.EXECUTION_START,
        "seq": 1,
        "outcome": outcome,
        "policy_digest": A,
        "keyset_version": 1,
        "at_ms": NOW,
    }
    return Receipt(**(fields | over))


def a_settlement(**over: Any) -> Settlement:
    """A settlement of ex_1.1."""
    fields: dict[str, Any] = {
        "org": "org",
        "runner": "rn",
        "inc": 3,
        "execution_id": "ex_1",
        "start_token": 1,
        "cmd_id": "cm_1",
        "cmd_digest": A,
        "verdict": Verdict.EXITED,
        "code": 3,
        "cause": Cause(kind="none"),
        "policy_digest": A,
        "at_ms": NOW,
    }
    return Settlement(**(fields | over))


def numbered(*intents: IntentRow, room: int = 10, safety_room: int = 10, now_ms: int = NOW) -> orders.Numbered:
    """Number behind mark 7."""
    return orders.number(intents, ctl=Mark(7, A), room=room, safety_room=safety_room, address=ADDRESS, now_ms=now_ms)


class TestNumbering:
    """Intents become a chain."""

    def test_numbers_rise_by_one_and_each_names_the_payload_before(self) -> None:
        """seq is gapless, prev is the digest of the payload before."""
        done = numbered(an_intent("cm_1"), an_intent("cm_2"), an_intent("cm_3"))
        commands = [Command.parse(row.payload) for row in done.commands]
        assert [command.seq for command in commands] == [8, 9, 10]
        assert [command.prev for command in commands] == [A, done.commands[0].digest, done.commands[1].digest]
        assert done.ctl == Mark(10, done.commands[2].digest)

    def test_a_command_is_what_its_intent_says(self) -> None:
        """Address, keyset and arguments arrive in the payload; ctl lives ten minutes."""
        command = Command.parse(numbered(an_intent()).commands[0].payload)
        assert (command.aud.org, command.aud.runner, command.aud.inc, command.keyset_min) == ("org", "rn", 3, 2)
        assert command.exp - command.iat == 600_000
        assert parse_args(command)

    def test_an_expired_intent_is_never_numbered(self) -> None:
        """It is told apart, and takes no number."""
        done = numbered(an_intent("cm_old", expires_ms=NOW), an_intent("cm_new"))
        assert [row.cmd_id for row in done.expired] == ["cm_old"]
        assert [(row.cmd_id, row.seq) for row in done.commands] == [("cm_new", 8)]

    def test_room_bounds_the_numbered_and_not_the_stops(self) -> None:
        """A full window holds starts back, a stop goes."""
        done = numbered(an_intent("cm_1"), an_intent("cm_2", Kind.EXECUTION_STOP), room=0)
        assert [(row.cmd_id, row.seq) for row in done.commands] == [("cm_2", None)]
        assert Command.parse(done.commands[0].payload).exp == NOW + DAY_MS

    def test_a_cancelled_intent_cannot_be_numbered_by_mistake(self) -> None:
        """Handing one over is a defect of ours."""
        with pytest.raises(AssertionError):
            numbered(an_intent(state=IntentState.CANCELLED))


SENT = an_intent(state=IntentState.SENT, signed_times=1)


class TestReceipts:
    """A receipt answers an intent, once."""

    def test_accepted_means_running(self) -> None:
        """The execution runs, the intent is answered."""
        change = dispatcher.receipted(SENT, an_execution(), a_receipt(Outcome.ACCEPTED), "{}")
        assert change.intent is not None
        assert change.intent.state is IntentState.RECEIPTED
        assert change.execution is not None
        assert change.execution.state is ExecutionState.RUNNING

    def test_refused_ends_it_with_the_reason(self) -> None:
        """Our failure is 125."""
        receipt = a_receipt(Outcome.REFUSED, reason=Reason.POLICY_DENIED)
        row = dispatcher.receipted(SENT, an_execution(), receipt, "{}").execution
        assert row is not None
        assert (row.state, row.reason, row.exit_status) == (ExecutionState.REFUSED, "POLICY_DENIED", 125)

    def test_a_second_receipt_changes_nothing(self) -> None:
        """An answered intent stays answered."""
        done = replace(SENT, state=IntentState.RECEIPTED)
        receipt = a_receipt(Outcome.REFUSED, reason=Reason.EXPIRED)
        assert dispatcher.receipted(done, an_execution(), receipt, "{}") == dispatcher.Change()

    @pytest.mark.parametrize("reason", [Reason.IDEMPOTENCY_MISMATCH, Reason.DUPLICATE_ATTEMPT])
    def test_a_refusal_that_knows_the_first_form_changes_nothing(self, reason: Reason) -> None:
        """The first form's own receipt or settlement is still to come and counts."""
        receipt = a_receipt(Outcome.REFUSED, reason=reason)
        assert dispatcher.receipted(SENT, an_execution(), receipt, "{}") == dispatcher.Change()

    def test_a_receipt_reaches_an_intent_that_was_never_sent_from_here(self) -> None:
        """A restored plane still has it queued: done, before it could be sent a second time."""
        change = dispatcher.receipted(
            an_intent(), an_execution(state=ExecutionState.QUEUED), a_receipt(Outcome.ACCEPTED), "{}"
        )
        assert change.intent is not None
        assert change.intent.state is IntentState.RECEIPTED

    def test_an_unknown_start_is_made_from_its_receipt(self) -> None:
        """The plane forgot it, the runner did not."""
        receipt = a_receipt(Outcome.ACCEPTED, result={"execution_id": "ex_9", "start_token": 2})
        row = dispatcher.receipted(None, None, receipt, "{}").unheard
        assert row is not None
        assert (row.id, row.start_token, row.state) == ("ex_9", 2, ExecutionState.RUNNING)

    def test_a_stop_that_meets_nothing_ends_what_was_accepted(self) -> None:
        """The runner was set back behind its own receipt: nobody else will ever tell this execution's end."""
        stop = an_intent("cm_2", Kind.EXECUTION_STOP, state=IntentState.SENT)
        receipt = a_receipt(
            Outcome.DONE, cmd_id="cm_2", kind=Kind.EXECUTION_STOP, seq=None, result={"state": "tombstone"}
        )
        row = dispatcher.receipted(stop, an_execution(state=ExecutionState.RUNNING), receipt, "{}").execution
        assert row is not None
        assert (row.state, row.exit_status, row.reason) == (ExecutionState.CANCELLED, 125, "UNKNOWN_TARGET")
        late = dispatcher.settled(None, row, a_settlement(), A, "{}").settled
        assert late is not None and late.state is ExecutionState.SETTLED

    @pytest.mark.parametrize(
        ("state", "met"),
        [
            (ExecutionState.SENT, "tombstone"),
            (ExecutionState.RUNNING, "stopping"),
            (ExecutionState.SETTLED, "tombstone"),
        ],
    )
    def test_any_other_stop_leaves_the_end_to_its_attempt(self, state: ExecutionState, met: str) -> None:
        """A start on its way has a receipt of its own to come, a living attempt its settlement."""
        stop = an_intent("cm_2", Kind.EXECUTION_STOP, state=IntentState.SENT)
        receipt = a_receipt(Outcome.DONE, cmd_id="cm_2", kind=Kind.EXECUTION_STOP, seq=None, result={"state": met})
        change = dispatcher.receipted(stop, an_execution(state=state), receipt, "{}")
        assert change.execution is None and change.intent is not None

    def test_a_worktree_is_ready_where_the_receipt_says(self) -> None:
        """Path, head and branch come from the result."""
        receipt = a_receipt(Outcome.DONE, result={"path": "/w", "head": "f" * 40, "branch": "b"})
        intent = an_intent(kind=Kind.WORKTREE_CREATE, state=IntentState.SENT)
        row = dispatcher.receipted(intent, a_worktree(WorktreeState.CREATING), receipt, "{}").worktree
        assert row is not None
        assert (row.state, row.path, row.branch) == (WorktreeState.READY, "/w", "b")

    def test_a_refused_removal_leaves_it_ready_and_says_why(self) -> None:
        """Nothing was removed."""
        receipt = a_receipt(Outcome.REFUSED, reason=Reason.WORKTREE_DIRTY)
        intent = an_intent(kind=Kind.WORKTREE_REMOVE, state=IntentState.SENT)
        row = dispatcher.receipted(intent, a_worktree(WorktreeState.REMOVING), receipt, "{}").worktree
        assert row is not None
        assert (row.state, row.reason) == (WorktreeState.READY, "WORKTREE_DIRTY")


class TestSettlements:
    """An attempt settles once."""

    def test_the_first_counts(self) -> None:
        """State, status and text."""
        row = dispatcher.settled(SENT, an_execution(), a_settlement(), A, "{}").settled
        assert row is not None
        assert (row.state, row.exit_status, row.settlement_digest) == (ExecutionState.SETTLED, 3, A)

    def test_a_second_different_one_is_told_and_changes_nothing(self) -> None:
        """Compare and set."""
        done = an_execution(state=ExecutionState.SETTLED, settlement="{}", settlement_digest=A)
        change = dispatcher.settled(SENT, done, a_settlement(code=0), B, "{}")
        assert change.settled is None
        assert change.conflict
        assert not dispatcher.settled(SENT, done, a_settlement(), A, "{}").conflict

    def test_one_of_another_attempt_settles_nothing(self) -> None:
        """A predecessor never ends its successor."""
        change = dispatcher.settled(SENT, None, a_settlement(runner="other"), A, "{}", [an_execution(start_token=2)])
        assert (change.settled, change.unheard, change.intent) == (None, None, None)
        assert change.conflict

    def test_it_outranks_our_guess(self) -> None:
        """Cancelled by us, run by the runner: what happened counts."""
        row = dispatcher.settled(None, an_execution(state=ExecutionState.CANCELLED), a_settlement(), A, "{}").settled
        assert row is not None
        assert row.state is ExecutionState.SETTLED

    def test_its_start_is_not_sent_again(self) -> None:
        """An attempt that ended was started, also where the receipt is still to come."""
        change = dispatcher.settled(an_intent(), an_execution(), a_settlement(), A, "{}")
        assert change.intent is not None
        assert change.intent.state is IntentState.RECEIPTED

    def test_one_of_an_unknown_execution_makes_the_row(self) -> None:
        """Restored from a backup: evidence is never thrown away."""
        change = dispatcher.settled(None, None, a_settlement(), A, "{}")
        row = change.settled
        assert row is not None and change.unheard is not None
        assert (row.id, row.state) == ("ex_1", ExecutionState.SETTLED)


def test_genesis_is_where_a_new_incarnation_starts() -> None:
    """The first command of a stream names it."""
    done = orders.number([an_intent()], ctl=Mark(), room=1, safety_room=0, address=ADDRESS, now_ms=NOW)
    assert Command.parse(done.commands[0].payload).prev == GENESIS
