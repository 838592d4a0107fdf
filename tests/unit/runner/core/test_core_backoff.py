"""Delays between dials."""

from hypothesis import given
from hypothesis import strategies as st

from runner.core.backoff import CAP_MS, FIRST_MS, Backoff

ALMOST_ONE = 1 - 2**-53


def test_delays_double_up_to_the_cap() -> None:
    """Half a second, one, two … thirty, and thirty for ever."""
    backoff = Backoff()
    ceilings = [backoff.next_ms(ALMOST_ONE) + 1 for _ in range(9)]
    assert ceilings == [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]


def test_only_a_welcome_begins_anew() -> None:
    """`reset` is for nobody else."""
    backoff = Backoff(failures=9)
    backoff.reset()
    assert backoff.next_ms(ALMOST_ONE) == FIRST_MS - 1


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_jitter_is_full_and_bounded(failures: int, fraction: float) -> None:
    """Anywhere between nothing and the ceiling, after any number of failures."""
    assert 0 <= Backoff(failures=failures).next_ms(fraction) < CAP_MS
    assert Backoff(failures=failures).next_ms(0.0) == 0
