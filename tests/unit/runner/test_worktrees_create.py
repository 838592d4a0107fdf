"""Worktrees of real repositories are made as asked, once, or not at all."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from protocol.errors import Reason
from runner import failpoints
from runner.core.plans import WorktreeMade, WorktreePlan
from runner.errors import Broken, Refused, RunnerError
from tests.support.repositories import git, make_repository, snapshot
from tests.support.worktrees import Place

pytestmark = pytest.mark.slow

STEPS = ["marker_written", "branch_made", "added", "verified", "ready"]


class Crash(BaseException):
    """The daemon ends here."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A repository and an empty state directory."""
    return Place(tmp_path)


async def test_a_worktree_on_a_new_branch_is_made(place: Place) -> None:
    """Path, commit and branch are what git says as well."""
    made = await place.trees.create(place.plan())
    assert made.path == str(place.managed() / "repo")
    assert made.head == git(place.repo, "rev-parse", "main") == git(made.path, "rev-parse", "HEAD")
    assert made.branch == "feat/x" == git(made.path, "branch", "--show-current")
    assert git(made.path, "status", "--porcelain") == ""
    assert place.trees.path("w1") == made.path
    assert json.loads((place.managed() / ".runner-owner.json").read_text())["state"] == "ready"


async def test_every_writing_step_has_its_own_name(place: Place) -> None:
    """Tools are told apart by command and step."""
    await place.trees.create(place.plan())
    assert place.tools.names == ["g-c1.1", "g-c1.2"]


@pytest.mark.parametrize("base", ["v1", "HEAD~1", "main~1", "sha"])
async def test_a_detached_worktree_starts_at_its_base(place: Place, base: str) -> None:
    """A tag, a revision expression and an object id name the same commit."""
    first = git(place.repo, "rev-parse", "v1^{commit}")
    made = await place.trees.create(place.plan(base=first if base == "sha" else base, branch=None))
    assert (made.head, made.branch) == (first, None)
    assert not (Path(made.path) / "second").exists()


async def test_a_branch_may_start_at_a_tag(place: Place) -> None:
    """An annotated one is peeled."""
    git(place.repo, "tag", "-a", "-m", "t", "v1a", "v1")
    made = await place.trees.create(place.plan(base="v1a"))
    assert made.head == git(place.repo, "rev-parse", "v1^{commit}") == git(place.repo, "rev-parse", "feat/x")


async def test_a_branch_named_like_a_tag_is_checked_out_as_the_branch(place: Place) -> None:
    """git's own lookup would prefer the tag."""
    made = await place.trees.create(place.plan(branch="v1"))
    assert made.head == git(place.repo, "rev-parse", "main")
    assert git(made.path, "symbolic-ref", "HEAD") == "refs/heads/v1"


async def test_bare_repositories_and_other_worktrees_are_repositories(place: Place) -> None:
    """Both lead to the same kind of shared git directory."""
    git(place.root, "clone", "-q", "--bare", "repo", "copy.git")
    git(place.repo, "worktree", "add", "-q", "--detach", str(place.root / "linked"))
    bare = await place.trees.create(place.plan("w1", "c1", repo=place.root / "copy.git"))
    linked = await place.trees.create(place.plan("w2", "c2", repo=place.root / "linked"))
    assert (Path(bare.path).name, Path(linked.path).name) == ("copy", "linked")


def _nested(place: Place) -> WorktreePlan:
    (place.repo / "inner").mkdir()
    return place.plan(repo=place.repo / "inner")


def _outside(place: Place) -> WorktreePlan:
    return place.plan(repo=make_repository(place.root.parent / "other"))


def _link_outside(place: Place) -> WorktreePlan:
    make_repository(place.root.parent / "other")
    (place.root / "link").symlink_to(place.root.parent / "other")
    return place.plan(repo=place.root / "link")


def _pointer_outside(place: Place) -> WorktreePlan:
    other = make_repository(place.root.parent / "other")
    (place.root / "pointer").mkdir()
    (place.root / "pointer" / ".git").write_text(f"gitdir: {other}/.git\n")
    return place.plan(repo=place.root / "pointer")


def _dead_git(place: Place) -> WorktreePlan:
    (place.repo / "dead").mkdir()
    (place.repo / "dead" / ".git").mkdir()
    return place.plan(repo=place.repo / "dead")


def _work_tree_elsewhere(place: Place) -> WorktreePlan:
    git(place.repo, "config", "core.worktree", str(place.root.parent))
    return place.plan()


REFUSALS: list[tuple[Reason, Callable[[Place], WorktreePlan]]] = [
    (Reason.REPO_OUTSIDE_ROOTS, _outside),
    (Reason.REPO_OUTSIDE_ROOTS, _link_outside),
    (Reason.REPO_OUTSIDE_ROOTS, _pointer_outside),
    (Reason.REPO_OUTSIDE_ROOTS, lambda place: place.plan(repo=place.root / ".." / "state")),
    (Reason.REPO_OUTSIDE_ROOTS, lambda place: replace(place.plan(), roots=())),
    (Reason.REPO_OUTSIDE_ROOTS, lambda place: replace(place.plan(), roots=(str(place.root)[:-1],))),
    (Reason.REPO_INVALID, lambda place: place.plan(repo=place.root)),
    (Reason.REPO_INVALID, lambda place: place.plan(repo=place.root / "none")),
    (Reason.REPO_INVALID, lambda place: place.plan(repo=place.root / "a\nb")),
    (Reason.REPO_INVALID, _nested),
    (Reason.REPO_INVALID, _dead_git),
    (Reason.REPO_INVALID, _work_tree_elsewhere),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="nowhere")),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="0" * 40)),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="--all")),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="--output=/tmp/x")),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="v1..main")),
    (Reason.BASE_NOT_FOUND, lambda place: place.plan(base="main:second")),
    (Reason.BRANCH_EXISTS, lambda place: place.plan(branch="main")),
    (Reason.BRANCH_EXISTS, lambda place: place.plan(branch="main/x")),
    (Reason.BRANCH_INVALID, lambda place: place.plan(branch="-b")),
    (Reason.BRANCH_INVALID, lambda place: place.plan(branch="../../x")),
    (Reason.BAD_ARGS, lambda place: place.plan(worktree_id="../x")),
    (Reason.BAD_ARGS, lambda place: place.plan(worktree_id=".new-x")),
    (Reason.BAD_ARGS, lambda place: place.plan(cmd_id="a/b")),
]


@pytest.mark.parametrize(("reason", "make"), REFUSALS, ids=[f"{i}-{r}" for i, (r, _) in enumerate(REFUSALS)])
async def test_what_cannot_be_is_refused_and_leaves_nothing(
    place: Place, reason: Reason, make: Callable[[Place], WorktreePlan]
) -> None:
    """A refusal has its reason, and changes neither the repository nor the state."""
    plan = make(place)
    before = snapshot(place.repo / ".git")
    with pytest.raises(Refused) as caught:
        await place.trees.create(plan)
    assert caught.value.reason is reason
    assert snapshot(place.repo / ".git") == before
    await place.trees.sweep_trash()
    assert os.listdir(place.state / "worktrees") == [] == os.listdir(place.state / "trash")


async def test_a_place_that_is_taken_is_not_touched(place: Place) -> None:
    """Neither another command's worktree, nor another runner's, nor a directory or link of unknown origin."""
    made = await place.trees.create(place.plan())
    with pytest.raises(Refused) as caught:
        await place.trees.create(place.plan(cmd_id="c2"))
    assert caught.value.reason is Reason.WORKTREE_EXISTS
    with pytest.raises(Refused) as caught:
        await place.daemon(runner="run_2").create(place.plan())
    assert caught.value.reason is Reason.WORKTREE_FOREIGN
    assert Path(made.path, "second").exists()
    (place.managed("plain")).mkdir()
    (place.managed("plain") / "work").write_text("x")
    (place.managed("link")).symlink_to(place.managed("plain"))
    for name in ("plain", "link"):
        with pytest.raises(Refused) as caught:
            await place.trees.create(place.plan(name, "c3", branch="y"))
        assert caught.value.reason is Reason.WORKTREE_FOREIGN
        assert place.trees.path(name) is None
    assert (place.managed("plain") / "work").read_text() == "x"


async def test_the_same_command_again_finds_its_worktree(place: Place) -> None:
    """Also in the next incarnation, and although work has begun."""
    made = await place.trees.create(place.plan())
    git(made.path, "commit", "-q", "--allow-empty", "-m", "work")
    assert await place.trees.create(place.plan()) == made
    assert await place.daemon(inc=2).create(place.plan()) == made


def _die_at(monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException) -> None:
    def hit(name: str) -> None:
        if name == f"worktree.{step}":
            raise failure

    monkeypatch.setattr(failpoints, "hit", hit)


@pytest.mark.parametrize(
    ("step", "branch"),
    [(step, branch) for step in STEPS for branch in ("feat/x", None) if branch or step != "branch_made"],
)
async def test_the_same_command_finishes_what_a_crash_left(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str, branch: str | None
) -> None:
    """Wherever it happened, and although the base has moved since: one worktree at the commit that was chosen first."""
    chosen = git(place.repo, "rev-parse", "main")
    with monkeypatch.context() as patched:
        _die_at(patched, step, Crash())
        with pytest.raises(Crash):
            await place.trees.create(place.plan(branch=branch))
    after = place.daemon(inc=2)
    assert await after.leftovers() == ([] if step == "ready" else ["w1"])
    git(place.repo, "commit", "-q", "--allow-empty", "-m", "third")
    made = await after.create(place.plan(branch=branch))
    assert made == WorktreeMade(path=str(place.managed() / "repo"), head=chosen, branch=branch)
    assert git(made.path, "status", "--porcelain") == ""
    assert git(place.repo, "worktree", "list").count("\n") == 1
    assert await after.leftovers() == []


async def test_a_checkout_that_git_was_killed_over_is_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are missing and git's own lock is there, although HEAD is right."""
    with monkeypatch.context() as patched:
        _die_at(patched, "added", Crash())
        with pytest.raises(Crash):
            await place.trees.create(place.plan())
    (place.managed() / "repo" / "second").unlink()
    (place.repo / ".git" / "worktrees" / "repo" / "locked").write_text("initializing")
    made = await place.daemon().create(place.plan())
    assert git(made.path, "status", "--porcelain") == ""
    assert "locked" not in git(place.repo, "worktree", "list", "--porcelain")


@pytest.mark.parametrize("step", STEPS)
async def test_a_failure_undoes_everything(place: Place, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Directory, registration and branch go; then the same command may try again."""
    before = snapshot(place.repo / ".git")
    with monkeypatch.context() as patched:
        _die_at(patched, step, Broken(Reason.DISK_FULL, "no space"))
        with pytest.raises(Broken) as caught:
            await place.trees.create(place.plan())
    assert caught.value.reason is Reason.DISK_FULL
    assert snapshot(place.repo / ".git") == before
    assert not place.managed().exists()
    assert (await place.trees.create(place.plan())).branch == "feat/x"


async def test_undoing_spares_a_branch_that_moved_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever committed to it has the last word."""

    def hit(name: str) -> None:
        if name == "worktree.added":
            git(place.managed() / "repo", "commit", "-q", "--allow-empty", "-m", "work")
            raise Broken(Reason.INFRA, "x")

    monkeypatch.setattr(failpoints, "hit", hit)
    with pytest.raises(Broken):
        await place.trees.create(place.plan())
    assert git(place.repo, "log", "-1", "--format=%s", "feat/x") == "work"


async def test_a_branch_that_somebody_else_made_after_the_crash_is_not_ours(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It points at the base too, and its reflog does not name the command: it is neither taken nor dropped."""
    with monkeypatch.context() as patched:
        _die_at(patched, "marker_written", Crash())
        with pytest.raises(Crash):
            await place.trees.create(place.plan())
    git(place.repo, "branch", "feat/x", "main")
    with pytest.raises(Refused) as caught:
        await place.daemon().create(place.plan())
    assert caught.value.reason is Reason.BRANCH_EXISTS
    assert git(place.repo, "rev-parse", "feat/x") == git(place.repo, "rev-parse", "main")
    assert not place.managed().exists()


async def test_what_is_half_made_of_a_repository_that_vanished_is_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal leaves nothing behind."""
    with monkeypatch.context() as patched:
        _die_at(patched, "added", Crash())
        with pytest.raises(Crash):
            await place.trees.create(place.plan())
    place.repo.rename(place.root / "moved")
    with pytest.raises(Refused) as caught:
        await place.daemon().create(place.plan())
    assert caught.value.reason is Reason.REPO_INVALID
    assert not place.managed().exists()


async def test_eight_worktrees_of_one_repository_are_made_at_once(place: Place) -> None:
    """The repository's lock keeps git from tripping over itself."""
    made: list[WorktreeMade] = []

    async def one(number: int) -> None:
        made.append(await place.trees.create(place.plan(f"w{number}", f"c{number}", branch=f"b{number}")))

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    assert sorted(tree.branch or "" for tree in made) == [f"b{number}" for number in range(8)]
    assert all(git(tree.path, "status", "--porcelain") == "" for tree in made)


async def test_of_many_commands_for_one_id_one_wins(place: Place) -> None:
    """Two adapters on one state directory, four commands each: one worktree, one branch, seven refusals."""
    ends: list[object] = []
    before = git(place.repo, "for-each-ref")
    daemons = [place.trees, place.daemon()]

    async def one(number: int) -> None:
        try:
            ends.append(await daemons[number % 2].create(place.plan("w1", f"c{number}", branch=f"b{number}")))
        except RunnerError as exc:
            ends.append(exc.reason)

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    assert sum(isinstance(end, WorktreeMade) for end in ends) == 1
    assert ends.count(Reason.WORKTREE_EXISTS) == 7
    assert len(git(place.repo, "for-each-ref").splitlines()) == len(before.splitlines()) + 1


async def test_the_same_command_twice_at_once_makes_one_worktree(place: Place) -> None:
    """The second waits for the first and finds its work."""
    made: list[WorktreeMade] = []

    async def one() -> None:
        made.append(await place.trees.create(place.plan()))

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        group.start_soon(one)
    assert made[0] == made[1]


async def test_a_relative_state_directory_reached_through_a_link_works(place: Place, tmp_path: Path) -> None:
    """Registrations are compared by real path."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    place.state = tmp_path / "link"
    trees = place.daemon()
    made = await trees.create(place.plan())
    assert made.path.startswith(str(tmp_path / "real"))
    assert (await trees.remove(place.removal())).branch == "feat/x"
    assert git(place.repo, "worktree", "list").count("\n") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
async def test_nothing_is_left_open(place: Place) -> None:
    """Descriptors of locks, pipes and directories are given back."""
    await place.trees.create(place.plan())
    before = len(os.listdir("/proc/self/fd"))
    await place.trees.create(place.plan("w2", "c2", branch="y"))
    await place.trees.remove(place.removal("w2", "r2"))
    await place.trees.sweep_trash()
    assert len(os.listdir("/proc/self/fd")) <= before
