"""Every pair of state and input of every table."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import execution
from protocol import lease as lease_module
from protocol.commands import OnLoss
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
    "held": {"renew": "held", "deadline": "lost", "release": "released", "supersede": "fenced", "acquire": "held"},
    "lost": {"deadline": "lost", "release": "released", "supersede": "fenced", "acquire": "held"},
    "released": {"release": "released", "supersede": "fenced", "acquire": "held"},
    "fenced": {"release": "fenced", "supersede": "fenced"},
}


@pytest.mark.parametrize(("state", "happened"), [*itertools.product(AttemptState, AttemptInput)])
def test_an_attempt_goes_where_the_page_says(state: AttemptState, happened: AttemptInput) -> None:
    """All thirty pairs."""
    assert execution.step(state, happened) == ATTEMPT[state].get(happened)


@pytest.mark.parametrize(("state", "happened"), [*itertools.product(LeaseState, LeaseInput)])
def test_a_lease_goes_where_the_page_says(state: LeaseState, happened: LeaseInput) -> None:
    """All twenty-four pairs; where there is no row the lease is the same."""
    assert a_lease(state=state).step(happened).state == LEASE[state].get(happened, state)
    assert lease_module.TRANSITIONS.get((state, happened)) == LEASE[state].get(happened)


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
        st.tuples(st.just("renew"), st.integers(1, 4), st.integers(0, 200_000), st.integers(1, 90_000))
        | st.tuples(st.just("acquire"), st.integers(1, 4), st.integers(0, 200_000), st.integers(1, 90_000))
        | st.tuples(st.sampled_from(LeaseInput), st.just(0), st.just(0), st.just(0))
        | st.tuples(st.just("hear"), st.integers(1, 5), st.just(0), st.just(0))
    )
)
def test_a_token_never_falls_and_a_lost_lease_is_held_again_under_a_higher_one_only(
    words: list[tuple[str, int, int, int]],
) -> None:
    """Whatever is heard: under one token deadlines never fall and HELD is entered once; FENCED is for ever."""
    lease = a_lease(token=2)
    for word, token, at_ms, ttl_ms in words:
        before = lease
        if isinstance(word, LeaseInput):
            # A grant has a token: it comes as the word below.
            lease = lease if word is LeaseInput.ACQUIRE else lease.step(word)
        elif word == "renew":
            lease = lease.renewed(token, at_ms, ttl_ms)
        elif word == "acquire":
            lease = lease.acquired(token, ttl_ms, OnLoss.FREEZE, at_ms + ttl_ms)
        else:
            lease = lease.superseded(token)
        assert lease.token >= before.token
        if lease.token == before.token:
            assert lease.deadline_ms >= before.deadline_ms
            assert lease.state is not LeaseState.HELD or before.state is LeaseState.HELD
            assert before.state is LeaseState.HELD or lease.deadline_ms == before.deadline_ms
        else:
            assert word == "acquire" and lease.state is LeaseState.HELD
        assert before.state is not LeaseState.FENCED or lease is before or lease == before
        assert 0 < lease.renew_at_ms - (lease.deadline_ms - lease.ttl_ms) < lease.ttl_ms // 2 or lease.ttl_ms < 10
