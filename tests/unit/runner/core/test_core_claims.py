"""Claims: in order, all or nothing, shared or alone; and the same as a model that is too slow to be wrong."""

from hypothesis import given
from hypothesis import strategies as st

from runner.core.claims import Claims

RESOURCES = st.dictionaries(st.sampled_from("abc"), st.booleans(), max_size=3)
MOVES = st.lists(st.one_of(RESOURCES, st.integers(0, 30)), max_size=40)


class NaiveClaims:
    """Holders are recomputed from the whole queue after every move."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, dict[str, bool]]] = []

    def holders(self) -> list[int]:
        """Everyone with nobody before them in conflict."""
        found = []
        for at, (owner, mine) in enumerate(self.queue):
            before = [theirs for _, theirs in self.queue[:at]]
            if not any(name in theirs and (mine[name] or theirs[name]) for theirs in before for name in mine):
                found.append(owner)
        return found


def test_alone_means_alone_and_shared_beside_shared() -> None:
    """A worktree may be used by many and removed by one."""
    claims: Claims[str] = Claims()
    assert claims.want("reader 1", {"tree": False}) and claims.want("reader 2", {"tree": False})
    assert not claims.want("writer", {"tree": True})
    assert claims.drop("reader 1") == [] and claims.drop("reader 2") == ["writer"]
    assert claims.holds("writer") and len(claims) == 1


def test_nobody_overtakes_on_a_shared_resource() -> None:
    """A stream of readers cannot starve a writer."""
    claims: Claims[str] = Claims()
    claims.want("reader 1", {"tree": False})
    claims.want("writer", {"tree": True})
    assert not claims.want("reader 2", {"tree": False})
    assert claims.drop("reader 1") == ["writer"]
    assert claims.drop("writer") == ["reader 2"]


def test_who_shares_nothing_does_not_wait() -> None:
    """Serial per resource, concurrent otherwise."""
    claims: Claims[str] = Claims()
    claims.want("a", {"x": True})
    assert not claims.want("b", {"x": True, "y": True})
    assert claims.want("c", {"z": True})
    assert not claims.want("d", {"y": True})  # behind b, which holds nothing yet
    assert claims.drop("a") == ["b"]
    assert claims.drop("b") == ["d"]


def test_all_who_may_begin_now_are_named_in_order() -> None:
    """One drop may wake several."""
    claims: Claims[str] = Claims()
    claims.want("writer", {"x": True, "y": True})
    for owner, wanted in (("r1", "x"), ("r2", "y"), ("r3", "x")):
        assert not claims.want(owner, {wanted: False})
    assert claims.drop("writer") == ["r1", "r2", "r3"]


def test_one_that_only_waits_can_leave() -> None:
    """Whoever waited for it alone goes on."""
    claims: Claims[str] = Claims()
    claims.want("a", {"x": False})
    claims.want("b", {"x": True})
    claims.want("c", {"x": False})
    assert claims.drop("b") == ["c"]
    assert claims.drop("nobody") == [] and not claims.holds("nobody")


@given(MOVES)
def test_claims_do_what_the_naive_model_does(moves: list[dict[str, bool] | int]) -> None:
    """Any order of wanting and dropping: the same holders, and each is told of exactly once, in order."""
    claims: Claims[int] = Claims()
    model = NaiveClaims()
    owners = 0
    for move in moves:
        before = model.holders()
        if isinstance(move, dict):
            model.queue.append((owners, move))
            assert claims.want(owners, move) == (owners in model.holders())
            owners += 1
        else:
            owner = move % owners if owners else 0
            model.queue = [(other, theirs) for other, theirs in model.queue if other != owner]
            assert claims.drop(owner) == [other for other in model.holders() if other not in before]
        assert [owner for owner in range(owners) if claims.holds(owner)] == model.holders()
        assert len(claims) == len(model.queue)
