"""Times as RFC 3339: to the nanosecond, exact both ways, and nothing that is no time."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.moments import moment_ns, show_moment


@given(st.integers(0, 2**63 - 1))
def test_a_moment_is_read_back_as_it_was(unix_ns: int) -> None:
    """And the calendar is the one that everybody has."""
    text = show_moment(unix_ns)
    assert moment_ns(text) == unix_ns
    assert text.startswith(datetime.fromtimestamp(unix_ns // 10**9, UTC).isoformat().removesuffix("+00:00"))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2026-11-21T21:30:00Z", "2026-11-21T21:30:00.000000000Z"),
        ("2026-11-21t22:30:00.5+01:00", "2026-11-21T21:30:00.500000000Z"),
        ("2026-11-21 16:00:00.000000001-05:30", "2026-11-21T21:30:00.000000001Z"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00.000000000Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00.000000000Z"),
    ],
)
def test_offsets_and_fractions_are_read(text: str, same: str) -> None:
    """A leap second is the first of the next minute."""
    assert show_moment(moment_ns(text)) == same


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "10m", "2026-11-21", "2026-11-21T21:30Z", "2026-11-21T21:30:00", "2026-13-01T00:00:00Z",
        "2026-02-29T00:00:00Z", "2026-04-31T00:00:00Z", "2026-00-10T00:00:00Z", "2026-11-00T00:00:00Z",
        "2026-11-21T24:00:00Z", "2026-11-21T21:60:00Z", "2026-11-21T21:30:61Z", "2026-11-21T21:30:00+24:00",
        "2026-11-21T21:30:00.Z", "1969-12-31T23:59:59Z", "1970-01-01T00:30:00+01:00", " 2026-11-21T21:30:00Z",
    ],
)  # fmt: skip
def test_what_is_no_time_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r"expected a time|no such time|before 1970"):
        moment_ns(text)
