"""The lists of both sides compared: hints, strangers, what is missing, and what one list alone proves."""

from typing import Any

from controlplane import reconciling
from controlplane.leasing import Living
from controlplane.rows import ExecutionState
from protocol.limits import BEAT_LEASES_MAX, HINTS_MAX, RECONCILE_MS
from protocol.messages import Hint


def living(number: int = 1, **over: Any) -> Living:
    """A running attempt ex_N.1."""
    fields: dict[str, Any] = {
        "execution_id": f"ex_{number}",
        "start_token": 1,
        "token": 1,
        "cmd_id": f"cm_{number}",
        "state": ExecutionState.RUNNING,
    }
    return Living(**(fields | over))


def said(hints: list[Hint]) -> list[tuple[str, str, str]]:
    """Hints as words."""
    return [(hint.attempt, hint.want, hint.cmd_id) for hint in hints]


class TestHints:
    """Each names a signed command."""

    def test_an_ordinary_answer_has_the_stops(self) -> None:
        """Only where one was asked for."""
        rows = [living(1, stop_cmd_id="cm_9"), living(2), living(3, superseded_by="cm_8")]
        assert said(reconciling.hints(rows)) == [("ex_1.1", "stop", "cm_9")]

    def test_a_full_answer_has_every_attempt_stops_first(self) -> None:
        """A superseded one is ended by its own stop, or by the start of its successor."""
        rows = [
            living(1),
            living(2, state=ExecutionState.SENT),
            living(3, stop_cmd_id="cm_9"),
            living(4, superseded_by="cm_8"),
            living(5, superseded_by="cm_7", stop_cmd_id="cm_6"),
        ]
        hints, full = reconciling.full_hints(rows)
        assert full
        assert said(hints) == [
            ("ex_3.1", "stop", "cm_9"),
            ("ex_4.1", "stop", "cm_8"),
            ("ex_5.1", "stop", "cm_6"),
            ("ex_1.1", "run", "cm_1"),
            ("ex_2.1", "run", "cm_2"),
        ]

    def test_what_was_never_signed_has_no_hint(self) -> None:
        """No runner can know it."""
        assert reconciling.full_hints([living(state=ExecutionState.QUEUED, sent=False)]) == ([], True)
        requeued = living(state=ExecutionState.QUEUED)
        assert said(reconciling.full_hints([requeued])[0]) == [("ex_1.1", "run", "cm_1")]

    def test_an_answer_that_cannot_hold_all_says_so_and_keeps_the_stops(self) -> None:
        """The runner must take nothing for unknown that is not in it."""
        rows = [living(n) for n in range(HINTS_MAX)] + [living(n + 1000, stop_cmd_id="cm_9") for n in range(3)]
        hints, full = reconciling.full_hints(rows)
        assert (len(hints), full) == (HINTS_MAX, False)
        assert [hint.want for hint in hints[:4]] == ["stop", "stop", "stop", "run"]
        assert len(reconciling.hints([living(n, stop_cmd_id="cm_9") for n in range(HINTS_MAX + 1)])) == HINTS_MAX


class TestComparing:
    """What only one side has."""

    def test_a_stranger_is_what_only_the_runner_names(self) -> None:
        """And nothing is missing."""
        compared = reconciling.compare(["ex_1.1", "ex_9.1"], [living()])
        assert (compared.strangers, compared.missing, compared.superseded) == (("ex_9.1",), (), ())

    def test_missing_is_what_was_accepted_and_is_not_named(self) -> None:
        """A start on its way is not missing."""
        rows = [living(1), living(2, state=ExecutionState.SENT), living(3, state=ExecutionState.QUEUED)]
        assert [row.name for row in reconciling.compare([], rows).missing] == ["ex_1.1"]

    def test_a_list_that_may_have_been_cut_proves_nothing(self) -> None:
        """As long as a beat can be."""
        names = [f"ex_{n}.1" for n in range(2, BEAT_LEASES_MAX + 2)]
        assert reconciling.compare(names, [living(1)]).missing == ()
        assert reconciling.compare(names[:-1], [living(1)]).missing

    def test_a_superseded_one_that_lives_is_found_until_its_stop_is_signed(self) -> None:
        """Whoever took its place has ended it, or somebody signs a stop."""
        old = living(superseded_by="cm_2")
        assert reconciling.compare(["ex_1.1"], [old]).superseded == (old,)
        assert reconciling.compare([], [old]).superseded == ()
        assert reconciling.compare(["ex_1.1"], [living(superseded_by="cm_2", stop_cmd_id="cm_3")]).superseded == ()


class TestOverdue:
    """One list proves nothing; two do, when they are far enough apart."""

    def test_it_takes_two_lists_that_are_half_a_minute_apart(self) -> None:
        """1. First missed. 2. Missed again too soon. 3. Missed again in time. 4. Asked once, and later again."""
        found, since = reconciling.overdue([living()], {}, 1000)
        assert found == []
        found, since = reconciling.overdue([living()], since, 1000 + RECONCILE_MS - 1)
        assert found == []
        found, since = reconciling.overdue([living()], since, 1000 + RECONCILE_MS)
        assert [row.name for row in found] == ["ex_1.1"]
        assert reconciling.overdue([living()], since, 1000 + RECONCILE_MS + 1)[0] == []
        assert reconciling.overdue([living()], since, 1000 + 2 * RECONCILE_MS)[0]

    def test_one_that_comes_back_begins_anew(self) -> None:
        """Twice in a row, or not at all."""
        _, since = reconciling.overdue([living()], {}, 0)
        _, since = reconciling.overdue([], since, RECONCILE_MS)
        assert reconciling.overdue([living()], since, 2 * RECONCILE_MS)[0] == []
