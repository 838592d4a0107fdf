"""The fencing token in a worktree's ownership marker: who comes with a lower one than the last is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import Reason
from runner.adapters.ownership import MARKER, Owner, look
from runner.errors import Broken, Refused
from tests.support.worktrees import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A repository and a state directory."""
    return Place(tmp_path)


def token_of(place: Place) -> int:
    """As the marker has it."""
    owner = look(place.managed())
    assert isinstance(owner, Owner)
    return owner.token


async def test_a_marker_carries_the_token_of_the_command_that_made_it(place: Place) -> None:
    """0 where the command had no lease."""
    await place.trees.create(replace(place.plan("w1"), token=4))
    assert token_of(place) == 4
    await place.trees.create(place.plan("w2", "c2", branch="feat/y"))
    owner = look(place.managed("w2"))
    assert isinstance(owner, Owner) and owner.token == 0


@pytest.mark.parametrize("force", [False, True])
async def test_a_lower_token_is_fenced_and_changes_nothing(place: Place, force: bool) -> None:
    """Also with force: that is about dirt, not about who may."""
    made = await place.trees.create(replace(place.plan(), token=4))
    with pytest.raises(Refused) as refused:
        await place.trees.remove(replace(place.removal(force=force), token=3))
    assert refused.value.reason is Reason.FENCED
    assert token_of(place) == 4 and place.trees.path("w1") == made.path


async def test_a_higher_token_is_remembered_although_its_command_was_refused(place: Place) -> None:
    """Whoever held it before is superseded from then on, dirty worktree or not."""
    made = await place.trees.create(replace(place.plan(), token=4))
    (Path(made.path) / "new.txt").write_text("work")
    with pytest.raises(Refused) as dirty:
        await place.trees.remove(replace(place.removal(), token=6))
    assert dirty.value.reason is Reason.WORKTREE_DIRTY and token_of(place) == 6
    with pytest.raises(Refused) as fenced:
        await place.trees.remove(replace(place.removal(cmd_id="r2", force=True), token=5))
    assert fenced.value.reason is Reason.FENCED
    await place.trees.remove(replace(place.removal(cmd_id="r3", force=True), token=6))
    assert look(place.managed()) is None


async def test_the_making_of_another_command_is_fenced_before_it_is_refused(place: Place) -> None:
    """And raises the marker where its token is higher, although the place is taken."""
    await place.trees.create(replace(place.plan(), token=4))
    for token, reason in ((3, Reason.FENCED), (7, Reason.WORKTREE_EXISTS), (6, Reason.FENCED)):
        with pytest.raises(Refused) as refused:
            await place.trees.create(replace(place.plan(cmd_id="c2"), token=token))
        assert refused.value.reason is reason
    assert token_of(place) == 7


async def test_a_command_without_a_lease_is_not_judged_by_a_token(place: Place) -> None:
    """It has none to compare; the marker stays."""
    await place.trees.create(replace(place.plan(), token=4))
    with pytest.raises(Refused) as refused:
        await place.trees.create(place.plan(cmd_id="c2"))
    assert refused.value.reason is Reason.WORKTREE_EXISTS and token_of(place) == 4
    await place.trees.remove(place.removal())


async def test_the_same_command_again_finds_its_worktree_under_its_own_token(place: Place) -> None:
    """It is its holder still."""
    plan = replace(place.plan(), token=4)
    assert await place.trees.create(plan) == await place.trees.create(plan)


async def test_a_marker_from_before_there_were_tokens_is_ours_still(place: Place) -> None:
    """It has the lowest of all."""
    await place.trees.create(place.plan())
    marker = place.managed() / MARKER
    found = json.loads(marker.read_text())
    del found["token"]
    marker.write_text(json.dumps(found))
    assert token_of(place) == 0
    await place.trees.remove(replace(place.removal(), token=1))


async def test_a_marker_that_cannot_be_raised_lets_nobody_at_the_worktree(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fence that is not durable is none."""
    await place.trees.create(replace(place.plan(), token=4))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("runner.adapters.worktree_ground.write_owner", full)
        with pytest.raises(Broken) as failed:
            await place.trees.remove(replace(place.removal(), token=5))
    assert failed.value.reason is Reason.DISK_FULL and token_of(place) == 4
