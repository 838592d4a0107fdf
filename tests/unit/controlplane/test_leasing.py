"""Leases at the plane: what a beat renews, when a lease is granted anew, and that no two grants ever overlap."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import leasing
from controlplane.leasing import Grant, Living, Regrant
from controlplane.rows import ExecutionState
from protocol.errors import Reason
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import LEASE_TTL_MS, REGRANT_DELAY_MS
from protocol.messages import HeldLease

T0 = 1_000_000
ATTEMPT = Attempt(ExecutionId("ex_1"), FencingToken(1))


def living(**over: Any) -> Living:
    """A running attempt ex_1.1 whose lease has token 4."""
    fields: dict[str, Any] = {
        "execution_id": "ex_1",
        "start_token": 1,
        "token": 4,
        "cmd_id": "cm_1",
        "state": ExecutionState.RUNNING,
    }
    return Living(**(fields | over))


GRANTS = {"ex_1.1": Grant(4, T0)}


class TestRenewals:
    """A running grant, under its own token, and nothing else."""

    @pytest.mark.parametrize(
        ("res", "token", "reason"),
        [
            ("exec:ex_1", 4, None),
            ("exec:ex_1", 3, Reason.FENCED),
            ("exec:ex_1", 5, Reason.UNKNOWN_TARGET),
            ("exec:ex_2", 4, Reason.UNKNOWN_TARGET),
            ("worktree:wt_1", 1, Reason.UNKNOWN_TARGET),
        ],
    )
    def test_only_the_current_token_is_renewed(self, res: str, token: int, reason: Reason | None) -> None:
        """A lower one is fenced, what we did not grant is unknown."""
        renewed = leasing.renew([HeldLease(res=res, token=token)], [living()], GRANTS, T0 + 1)
        (answer,) = renewed.answers
        assert answer.reason == reason
        assert (answer.ttl_ms == LEASE_TTL_MS) == (reason is None)
        assert renewed.grants == ({"ex_1.1": Grant(4, T0 + 1)} if reason is None else {})

    @pytest.mark.parametrize(("late_ms", "reason"), [(-1, None), (0, Reason.EXPIRED), (10_000, Reason.EXPIRED)])
    def test_a_late_renewal_revives_nothing(self, late_ms: int, reason: Reason | None) -> None:
        """At the end of its ttl the grant is over, for good."""
        held = [HeldLease(res="exec:ex_1", token=4)]
        renewed = leasing.renew(held, [living()], GRANTS, T0 + LEASE_TTL_MS + late_ms)
        assert renewed.answers[0].reason == reason

    def test_what_was_never_granted_here_is_not_renewed(self) -> None:
        """Without a grant there is nothing to go on from."""
        renewed = leasing.renew([HeldLease(res="exec:ex_1", token=4)], [living()], {}, T0)
        assert renewed.answers[0].reason is Reason.EXPIRED

    def test_an_attempt_whose_place_was_taken_is_fenced(self) -> None:
        """On the runner of its successor by the higher token, on another one by what is remembered of it."""
        old = living(superseded_by="cm_2")
        new = living(start_token=7, token=7)
        held = [HeldLease(res="exec:ex_1", token=4)]
        for there in ([old, new], [old]):
            assert leasing.renew(held, there, GRANTS, T0).answers[0].reason is Reason.FENCED


class TestGrantingAnew:
    """No earlier than 15 s after the old grant ran out, only for what is wanted, only where it lives."""

    DUE = T0 + LEASE_TTL_MS + REGRANT_DELAY_MS

    def due(self, row: Living, now_ms: int = DUE, **over: Any) -> list[Regrant]:
        """The leases that are due while the beat names the attempt."""
        told, named = over.get("told", ()), over.get("named", {"ex_1.1"})
        return leasing.due([row], GRANTS, told, named, now_ms)

    def test_not_a_millisecond_early(self) -> None:
        """Also where the runner has lost it long before."""
        lost = [HeldLease(res="exec:ex_1", token=4)]
        assert self.due(living(), self.DUE - 1, told=lost) == []
        assert self.due(living(), told=lost) == [Regrant(ATTEMPT, 4)]

    def test_a_token_that_we_do_not_know_is_outdone(self) -> None:
        """A plane from a backup has forgotten what it granted; the runner has not."""
        assert self.due(living(), told=[HeldLease(res="exec:ex_1", token=9)]) == [Regrant(ATTEMPT, 9)]

    @pytest.mark.parametrize(
        "over",
        [
            {"stop_cmd_id": "cm_2"},
            {"superseded_by": "cm_2"},
            {"state": ExecutionState.SENT},
            {"lease_refused": Reason.UNKNOWN_TARGET},
            {"lease_refused": Reason.UNSUPPORTED_KIND},
        ],
    )
    def test_what_is_not_wanted_gets_none(self, over: dict[str, Any]) -> None:
        """Stopped, superseded, not accepted yet, or refused for good."""
        assert self.due(living(**over)) == []

    def test_a_refusal_that_may_pass_is_tried_again(self) -> None:
        """A grant that came too late to its runner says nothing of the next one."""
        assert self.due(living(lease_refused=Reason.EXPIRED))

    def test_what_does_not_live_there_any_more_wants_no_lease(self) -> None:
        """Comparing the lists brings it to its end."""
        assert self.due(living(), named=set()) == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * LEASE_TTL_MS), st.integers(0, 5_000), st.sampled_from(["beat", "lost beat", "silence"])
        ),
        max_size=40,
    )
)
def test_two_grants_never_overlap(story: list[tuple[int, int, str]]) -> None:
    """A runner that believes the latest answer it got is over at least 15 s before the plane grants anew.

    The runner's deadline is kept by the test alone: send time plus ttl, whatever the plane remembers.
    """
    row, grants, now_ms, deadline_ms = living(), {"ex_1.1": Grant(4, T0)}, T0, T0 + LEASE_TTL_MS
    for wait_ms, transit_ms, what in story:
        sent_ms = now_ms + wait_ms
        now_ms = sent_ms + transit_ms
        if what != "silence" and sent_ms < deadline_ms:
            renewed = leasing.renew([HeldLease(res=row.res, token=row.token)], [row], grants, now_ms)
            grants.update(renewed.grants)
            if what == "beat" and renewed.answers[0].ttl_ms is not None:
                deadline_ms = max(deadline_ms, sent_ms + renewed.answers[0].ttl_ms)
        for regrant in leasing.due([row], grants, [], {row.name}, now_ms):
            assert now_ms >= deadline_ms + REGRANT_DELAY_MS
            row = replace(row, token=regrant.above + 1)
            grants[row.name] = Grant(row.token, now_ms)
            deadline_ms = now_ms + LEASE_TTL_MS
