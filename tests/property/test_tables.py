"""Every pair of state and input of every table."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import execution, lease
from protocol.execution import AttemptInput, AttemptState
from protocol.handshake import PLANE_TABLE, RUNNER_TABLE, PlaneStep, RunnerStep
from protocol.lease import LeaseInput, LeaseState
from protocol.messages import Challenge, Hello, Proof, Welcome
from tests.support.builders import a_lease

# Written a second time, as the page says them: state → {input: state}.
ATTEMPT = {
    "intent": {"prepare": "prepared", "fail": "settled", "stop": "stopping", "lose": "settled"},
    "prepared": {"release": "running", "stop": "stopping", "exit": "settled", "lose": "settled"},
    "running": {"stop": "stopping", "exit": "settled", "lose": "settled"},
    "stopping": {"prepare": "stopping", "stop": "stopping", "exit": "settled", "fail": "settled", "lose": "settled"},
    "settled": {},
}
LEASE = {
    "held": {"renew": "held", "deadline": "lost", "release": "released", "supersede": "fenced"},
    "lost": {"deadline": "lost", "release": "released", "supersede": "fenced"},
    "released": {"release": "released", "supersede": "fenced"},
    "fenced": {"release": "fenced", "supersede": "fenced"},
}


@pytest.mark.parametrize(("state", "happened"), [*itertools.product(AttemptState, AttemptInput)])
def test_an_attempt_goes_where_the_page_says(state: AttemptState, happened: AttemptInput) -> None:
    """All thirty pairs."""
    assert execution.step(state, happened) == ATTEMPT[state].get(happened)


@pytest.mark.parametrize(("state", "happened"), [*itertools.product(LeaseState, LeaseInput)])
def test_a_lease_goes_where_the_page_says(state: LeaseState, happened: LeaseInput) -> None:
    """All sixteen pairs; where there is no row the lease is the same."""
    assert a_lease(state=state).step(happened).state == LEASE[state].get(happened, state)
    assert lease.TRANSITIONS.get((state, happened)) == LEASE[state].get(happened)


def test_a_handshake_goes_one_way() -> None:
    """Hello, challenge, proof, welcome; nothing else has a row."""
    assert dict(RUNNER_TABLE) == {
        (RunnerStep.GREETED, Challenge): RunnerStep.PROVED,
        (RunnerStep.PROVED, Welcome): RunnerStep.WELCOMED,
    }
    assert dict(PLANE_TABLE) == {
        (PlaneStep.IDLE, Hello): PlaneStep.CHALLENGED,
        (PlaneStep.CHALLENGED, Proof): PlaneStep.KNOWN,
    }


@given(st.lists(st.sampled_from(AttemptInput)))
def test_whatever_happens_an_attempt_is_settled_once(inputs: list[AttemptInput]) -> None:
    """And runs at most once, and never after it was settled or stopped."""
    state, visited = AttemptState.INTENT, [AttemptState.INTENT]
    for happened in inputs:
        following = execution.step(state, happened)
        if following is not None and following is not state:
            visited.append(following)
            state = following
    order = [
        AttemptState.INTENT,
        AttemptState.PREPARED,
        AttemptState.RUNNING,
        AttemptState.STOPPING,
        AttemptState.SETTLED,
    ]
    assert [s for s in order if s in visited] == visited


@given(
    st.lists(
        st.tuples(st.just("renew"), st.integers(1, 3), st.integers(0, 200_000), st.integers(1, 90_000))
        | st.tuples(st.sampled_from(LeaseInput), st.just(0), st.just(0), st.just(0))
        | st.tuples(st.just("hear"), st.integers(1, 5), st.just(0), st.just(0))
    )
)
def test_a_deadline_moves_forward_and_a_lost_lease_stays_lost(words: list[tuple[str, int, int, int]]) -> None:
    """Whatever is heard: tokens stay, deadlines never fall, HELD is never entered again."""
    held = a_lease(token=2)
    for word, token, sent_ms, ttl_ms in words:
        before = held
        if isinstance(word, LeaseInput):
            held = held.step(word)
        elif word == "renew":
            held = held.renewed(token, sent_ms, ttl_ms)
        else:
            held = held.superseded(token)
        assert held.token == 2
        assert held.deadline_ms >= before.deadline_ms
        assert held.state is not LeaseState.HELD or before.state is LeaseState.HELD
        if before.state is not LeaseState.HELD:
            assert held.deadline_ms == before.deadline_ms
