"""Removing worktrees: nobody's work is lost without `force`, nothing outside is touched, and once is once."""

import os
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from protocol.errors import Reason
from runner import failpoints
from runner.adapters import worktrees
from runner.core.plans import WorktreeGone
from runner.errors import Refused
from tests.support.repositories import git
from tests.support.worktrees import Place

pytestmark = pytest.mark.slow


class Crash(BaseException):
    """The daemon ends here."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A repository and an empty state directory."""
    return Place(tmp_path)


async def _refusal(place: Place, *, force: bool = False, runner: str = "run_1") -> Reason:
    with pytest.raises(Refused) as caught:
        await place.daemon(runner=runner).remove(place.removal(force=force))
    return caught.value.reason


async def test_a_removed_worktree_is_gone_and_its_branch_is_not(place: Place) -> None:
    """Directory and registration go; the branch keeps the work."""
    made = await place.trees.create(place.plan())
    git(made.path, "commit", "-q", "--allow-empty", "-m", "work")
    tip = git(made.path, "rev-parse", "HEAD")
    gone = await place.trees.remove(place.removal())
    assert gone == WorktreeGone(head=tip, branch="feat/x", was_dirty=False)
    assert not place.managed().exists()
    assert place.trees.path("w1") is None
    assert git(place.repo, "rev-parse", "feat/x") == tip
    assert git(place.repo, "worktree", "list").count("\n") == 0
    assert await place.trees.sweep_trash() == []
    assert os.listdir(place.state / "trash") == []


async def test_the_same_removal_again_has_the_same_result(place: Place) -> None:
    """Also after its trash is deleted and another worktree has the id."""
    await place.trees.create(place.plan())
    gone = await place.trees.remove(place.removal())
    await place.trees.sweep_trash()
    assert await place.daemon(inc=2).remove(place.removal()) == gone
    newer = await place.trees.create(place.plan(cmd_id="c2", branch="y"))
    assert await place.trees.remove(place.removal()) == gone
    assert place.trees.path("w1") == newer.path
    assert git(place.repo, "worktree", "list").count("\n") == 1


@pytest.mark.parametrize("step", ["recorded", "trashed"])
async def test_the_same_removal_finishes_what_a_crash_left(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before the rename nothing has happened; after it the registration is dropped."""
    await place.trees.create(place.plan())

    def hit(name: str) -> None:
        if name == f"worktree.{step}":
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", hit)
        with pytest.raises(Crash):
            await place.trees.remove(place.removal())
    gone = await place.daemon(inc=2).remove(place.removal())
    assert gone.branch == "feat/x"
    assert not place.managed().exists()
    assert git(place.repo, "worktree", "list").count("\n") == 0


async def test_an_unknown_worktree_is_refused(place: Place) -> None:
    """A removal of nothing is not a success."""
    assert await _refusal(place) is Reason.WORKTREE_UNKNOWN


def _edit(checkout: Path) -> None:
    (checkout / "second").write_text("edited")


def _stage(checkout: Path) -> None:
    (checkout / "second").unlink()
    git(checkout, "add", "-A")


def _untracked(checkout: Path) -> None:
    (checkout / "new").write_text("x")


def _beside(checkout: Path) -> None:
    (checkout.parent / "notes").write_text("x")


def _nested_clone(checkout: Path) -> None:
    git(checkout, "init", "-q", "inner")
    (checkout / "inner" / "file").write_text("x")


def _detached_commit(checkout: Path) -> None:
    git(checkout, "checkout", "-q", "--detach")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "on no branch")


def _submodule(checkout: Path) -> None:
    source = checkout.parents[3] / "src" / "repo"
    git(checkout, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(source), "sub")
    git(checkout, "commit", "-q", "-m", "sub")


DIRT = [_edit, _stage, _untracked, _beside, _nested_clone, _detached_commit, _submodule]


@pytest.mark.parametrize("soil", DIRT, ids=lambda soil: soil.__name__.strip("_"))
async def test_a_dirty_worktree_stays_unless_forced(place: Place, soil: Callable[[Path], None]) -> None:
    """Dirty is whatever would be lost: changes, files, files beside it, commits on no branch, work in submodules."""
    made = await place.trees.create(place.plan())
    soil(Path(made.path))
    assert await _refusal(place) is Reason.WORKTREE_DIRTY
    assert place.trees.path("w1") == made.path
    assert (await place.trees.remove(place.removal(force=True))).was_dirty
    assert not place.managed().exists()


async def test_ignored_files_and_commits_on_branches_are_not_dirt(place: Place) -> None:
    """Build output goes; what a branch holds stays."""
    made = await place.trees.create(place.plan())
    Path(made.path, "build.log").write_text("x")
    git(made.path, "checkout", "-q", "-b", "other")
    git(made.path, "commit", "-q", "--allow-empty", "-m", "work")
    git(made.path, "checkout", "-q", "--detach")
    assert await place.trees.remove(place.removal()) == WorktreeGone(
        head=git(place.repo, "rev-parse", "other"), branch=None, was_dirty=False
    )


async def test_a_locked_worktree_stays(place: Place) -> None:
    """Whoever said `git worktree lock` meant it, `force` or not."""
    made = await place.trees.create(place.plan())
    git(place.repo, "worktree", "lock", made.path)
    assert await _refusal(place, force=True) is Reason.WORKTREE_BUSY
    assert place.trees.path("w1") == made.path


async def test_a_foreign_directory_is_never_removed(place: Place) -> None:
    """No marker, a broken one, another runner's, or a link to somewhere: all stay, forced or not."""
    await place.trees.create(place.plan())
    assert await _refusal(place, force=True, runner="run_2") is Reason.WORKTREE_FOREIGN
    marker = place.managed() / ".runner-owner.json"
    whole = marker.read_bytes()
    for broken in (b"", whole[:-1], whole.replace(b'"w1"', b'"w2"'), whole.replace(b'"v":1', b'"v":2'), b"[]"):
        marker.write_bytes(broken)
        assert await _refusal(place, force=True) is Reason.WORKTREE_FOREIGN
    marker.write_bytes(whole)
    place.managed().rename(place.state / "elsewhere")
    place.managed().symlink_to(place.state / "elsewhere")
    assert await _refusal(place, force=True) is Reason.WORKTREE_FOREIGN
    assert (place.state / "elsewhere" / "repo" / "second").exists()


async def test_registrations_of_others_survive_a_removal(place: Place) -> None:
    """A worktree on a disk that is away for now is not ours to prune."""
    git(place.repo, "worktree", "add", "-q", "--detach", str(place.root / "usb"))
    (place.root / "usb").rename(place.root / "unplugged")
    await place.trees.create(place.plan())
    await place.trees.remove(place.removal())
    (place.root / "unplugged").rename(place.root / "usb")
    assert git(place.root / "usb", "status", "--porcelain") == ""


async def test_a_worktree_of_a_repository_that_is_gone_needs_force(place: Place) -> None:
    """Nobody can say what in it is new."""
    made = await place.trees.create(place.plan())
    place.repo.rename(place.root / "moved")
    assert await _refusal(place) is Reason.WORKTREE_DIRTY
    assert await place.trees.remove(place.removal(force=True)) == WorktreeGone(head=None, branch=None, was_dirty=True)
    assert not Path(made.path).exists()


async def test_links_in_a_worktree_are_removed_and_not_followed(place: Place) -> None:
    """A link to a directory outside costs nobody a file."""
    outside = place.root.parent / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    made = await place.trees.create(place.plan())
    Path(made.path, "d0", "link").symlink_to(outside)
    Path(made.path, "dangling").symlink_to("/nowhere")
    await place.trees.remove(place.removal(force=True))
    assert await place.trees.sweep_trash() == []
    assert (outside / "file").read_text() == "x"
    assert os.listdir(place.state / "trash") == []


async def test_a_half_made_worktree_can_be_removed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never handed out, so there is nothing in it to lose."""

    def hit(name: str) -> None:
        if name == "worktree.added":
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", hit)
        with pytest.raises(Crash):
            await place.trees.create(place.plan())
    assert not (await place.trees.remove(place.removal())).was_dirty
    assert git(place.repo, "worktree", "list").count("\n") == 0
    assert await place.trees.leftovers() == []


async def test_a_sweep_takes_what_earlier_daemons_left(place: Place) -> None:
    """Trash, and managed directories that never got their marker."""
    (place.state / "trash" / "old" / "deep").mkdir(parents=True)
    (place.state / "trash" / "old.1").write_text("x")
    (place.managed(".new-w9")).mkdir()
    assert await place.trees.sweep_trash() == []
    assert os.listdir(place.state / "trash") == [] == os.listdir(place.state / "worktrees")


async def test_the_trash_is_emptied_when_nothing_is_being_made(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper waits for a pause, and then for the next removal."""
    monkeypatch.setattr(worktrees, "TRASH_IDLE_MS", 1)
    complaints: list[str] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(place.trees.keep_trash_empty, complaints.append)
            for number in range(2):
                await place.trees.create(place.plan(cmd_id=f"c{number}", branch=f"b{number}"))
                await place.trees.remove(place.removal(cmd_id=f"r{number}"))
                while os.listdir(place.state / "trash"):
                    await anyio.sleep(0.005)
            group.cancel_scope.cancel()
    assert complaints == []


async def test_the_oldest_records_are_forgotten(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are bounded; the newest stay."""
    monkeypatch.setattr("runner.adapters.ownership.RECORDS_KEPT", 2)
    records = place.state / "removed"
    for number in range(4):
        (records / f"c{number}.json").write_text("{}")
        os.utime(records / f"c{number}.json", (number, number))
    await place.trees.sweep_trash()
    assert sorted(os.listdir(records)) == ["c2.json", "c3.json"]
