"""What goes of attempts' directories: never what is needed, the oldest first, and never more than must."""

from hypothesis import example, given
from hypothesis import strategies as st

from runner.core import retention
from runner.core.retention import Drop, Spooled, Why, to_drop, to_limit

NOW_MS = 1_000_000
spooled = st.builds(
    Spooled,
    name=st.integers(0, 10**6).map(lambda number: f"ex_{number}.1"),
    size_bytes=st.integers(0, 100),
    settled=st.booleans(),
    acked=st.booleans(),
    alive=st.booleans(),
    since_ms=st.integers(NOW_MS - 100, NOW_MS + 20),
)
worlds = st.lists(spooled, max_size=12, unique_by=lambda one: one.name)
bounds = st.fixed_dictionaries(
    {"keep_ms": st.integers(0, 120), "bytes_max": st.integers(0, 500), "wanted_bytes": st.integers(0, 300)}
)


def names(drops: list[Drop], why: Why | None = None) -> list[str]:
    """Those that go, or go for that."""
    return [drop.one.name for drop in drops if why in (None, drop.why)]


@given(worlds, bounds)
def test_what_is_needed_stays(found: list[Spooled], bound: dict[str, int]) -> None:
    """Unsettled, not acked or alive: whatever the bounds are; and nothing goes twice."""
    drops = to_drop(found, now_ms=NOW_MS, **bound)
    assert all(drop.one.settled and drop.one.acked and not drop.one.alive for drop in drops)
    assert len(set(names(drops))) == len(drops) and set(names(drops)) <= {one.name for one in found}


@given(worlds, bounds)
@example(
    [Spooled(name="ex_1.1", size_bytes=1, settled=True, acked=True, alive=False, since_ms=NOW_MS - 7)],
    {"keep_ms": 7, "bytes_max": 1, "wanted_bytes": 0},
)
def test_what_is_old_goes_and_nothing_young_goes_for_its_age(found: list[Spooled], bound: dict[str, int]) -> None:
    """Of what may go; a clock that was set back makes nothing old."""
    old = {
        one.name
        for one in found
        if one.settled and one.acked and not one.alive and one.since_ms + bound["keep_ms"] <= NOW_MS
    }
    assert set(names(to_drop(found, now_ms=NOW_MS, **bound), Why.OLD)) == old


@given(worlds, bounds)
def test_the_oldest_go_first(found: list[Spooled], bound: dict[str, int]) -> None:
    """What goes is at no time younger than what may go and stays."""
    drops = to_drop(found, now_ms=NOW_MS, **bound)
    since = [drop.one.since_ms for drop in drops]
    assert since == sorted(since)
    gone = set(names(drops))
    staying = [one.since_ms for one in found if one.settled and one.acked and not one.alive and one.name not in gone]
    assert not since or not staying or since[-1] <= min(staying)


@given(worlds, bounds)
def test_enough_goes_and_not_one_more(found: list[Spooled], bound: dict[str, int]) -> None:
    """In the end it fits, or nothing that may go is left; before the last that went for room it did not fit."""

    def fits(gone: set[str]) -> bool:
        kept = sum(one.size_bytes for one in found if one.name not in gone)
        freed = sum(one.size_bytes for one in found if one.name in gone)
        return kept <= bound["bytes_max"] and freed >= bound["wanted_bytes"]

    drops = to_drop(found, now_ms=NOW_MS, **bound)
    gone = set(names(drops))
    left = [one for one in found if one.settled and one.acked and not one.alive and one.name not in gone]
    assert fits(gone) or not left
    if drops and drops[-1].why is Why.SPACE:
        assert not fits(gone - {drops[-1].one.name})


@given(worlds, st.integers(0, 500), st.integers(0, 20))
def test_the_largest_living_logs_give_first_and_enough(found: list[Spooled], bytes_max: int, least: int) -> None:
    """All together fit, unless each has only the least that there may be; and nobody gives who need not."""
    before, retention.LIMIT_BYTES_MIN = retention.LIMIT_BYTES_MIN, least
    try:
        limits = to_limit(found, bytes_max)
    finally:
        retention.LIMIT_BYTES_MIN = before
    living = {one.name: one.size_bytes for one in found if one.alive}
    room = bytes_max - sum(one.size_bytes for one in found if not one.alive)
    after = sum(limits.get(name, size) for name, size in living.items())
    assert limits.keys() <= living.keys() and all(size < living[name] for name, size in limits.items())
    assert (
        (not limits)
        if sum(living.values()) <= room
        else (after <= room or all(each >= least for each in limits.values()))
    )
    assert len(set(limits.values())) <= 1, "one limit for all"
    assert not limits or all(living[name] <= min(limits.values()) for name in living.keys() - limits.keys())
