"""Repositories that want to run something: they are refused, or nothing of theirs runs."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Reason
from runner.adapters.git import ENVIRONMENT, Git
from runner.core.gitkeys import first_hostile
from runner.errors import Broken, Refused, RunnerError
from tests.support.repositories import git
from tests.support.worktrees import Place

pytestmark = pytest.mark.slow

BLNS = Path(__file__).parents[4] / "shared" / "vectors" / "blns" / "blns.json"

REFUSED_KEYS = {
    "filter.x.smudge": "CANARY",
    "filter.x.clean": "CANARY",
    "filter.x.process": "CANARY",
    "include.path": "extra",
    "includeIf.gitdir:/.path": "extra",
    "core.worktree": "..",
    "core.gitProxy": "CANARY",
    "core.alternateRefsCommand": "CANARY",
    "diff.external": "CANARY",
    "diff.x.textconv": "CANARY",
    "diff.x.command": "CANARY",
    "merge.x.driver": "CANARY",
    "protocol.ext.allow": "always",
    "remote.origin.uploadpack": "CANARY",
    "remote.origin.vcs": "ext",
    "extensions.partialClone": "origin",
    "gc.recentObjectsHook": "CANARY",
    "future.key": "x",
}
SILENT_KEYS = {
    "core.fsmonitor": "CANARY",
    "core.hooksPath": "hooks",
    "core.sshCommand": "CANARY",
    "core.pager": "CANARY",
    "core.editor": "CANARY",
    "core.askPass": "CANARY",
    "credential.helper": "!CANARY",
    "gpg.program": "CANARY",
    "alias.status": "!CANARY",
    "alias.worktree": "!CANARY",
    "alias.rev-parse": "!CANARY",
}
HARMLESS_KEYS = {
    "remote.origin.url": "https://example.org/x",
    "remote.origin.fetch": "+refs/heads/*:refs/remotes/origin/*",
    "branch.main.remote": "origin",
    "branch.a.b.c.merge": "refs/heads/main",
    "user.email": "a@b",
    "core.autocrlf": "false",
    "submodule.lib.url": "https://example.org/y",
    "push.default": "simple",
    "pull.rebase": "true",
    "http.https://example.org/.extraheader": "x",
}


class Trap:
    """A repository whose every program writes the same canary."""

    def __init__(self, tmp_path: Path) -> None:
        self.place = Place(tmp_path)
        self.canary = tmp_path / "canary"
        self.script = tmp_path / "script"
        self.script.write_text(f"#!/bin/sh\necho $0 $* >> {self.canary}\ncat\n")
        self.script.chmod(0o755)
        repo = self.place.repo
        (repo / ".gitattributes").write_text("* filter=x diff=x merge=x\n")
        git(repo, "add", ".")
        git(repo, "commit", "-q", "-m", "attributes")

    def set(self, key: str, value: str) -> None:
        """Put `key` into the repository's configuration."""
        git(self.place.repo, "config", key, value.replace("CANARY", str(self.script)))

    def hook(self, directory: Path) -> None:
        """Put every hook that any verb of ours could run."""
        directory.mkdir(exist_ok=True)
        for name in ("post-checkout", "reference-transaction", "post-index-change", "pre-commit", "fsmonitor-watchman"):
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(self.script)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    """One that has not been set yet."""
    return Trap(tmp_path)


@pytest.mark.parametrize("key", REFUSED_KEYS)
async def test_a_repository_that_could_run_something_is_refused(trap: Trap, key: str) -> None:
    """The refusal names the key and never its value, and nothing has run."""
    trap.set(key, REFUSED_KEYS[key])
    with pytest.raises(Refused) as caught:
        await trap.place.trees.create(trap.place.plan())
    assert caught.value.reason is Reason.REPO_HOSTILE
    assert key.lower() in caught.value.detail.lower()
    assert str(trap.script) not in caught.value.detail
    assert not trap.canary.exists()
    assert not trap.place.managed().exists()


async def test_keys_that_we_silence_run_nothing(trap: Trap) -> None:
    """All of them at once, with hooks in both places, through a whole life of a worktree."""
    place = trap.place
    trap.hook(place.repo / ".git" / "hooks")
    trap.hook(place.repo / "hooks")
    for key, value in SILENT_KEYS.items():
        trap.set(key, value.replace("hooks", str(place.repo / "hooks")))
    made = await place.trees.create(place.plan())
    Path(made.path, "new").write_text("x")
    with pytest.raises(Refused) as caught:
        await place.trees.remove(place.removal())
    assert caught.value.reason is Reason.WORKTREE_DIRTY
    await place.trees.remove(place.removal(force=True))
    assert not trap.canary.exists()


async def test_the_trap_works(trap: Trap) -> None:
    """A git without our care does run these things; else the tests here would prove nothing."""
    trap.hook(trap.place.repo / ".git" / "hooks")
    git(trap.place.repo, "worktree", "add", "-q", "-b", "y", str(trap.place.root / "y"))
    assert "post-checkout" in trap.canary.read_text()
    trap.canary.unlink()
    trap.set("filter.x.smudge", "CANARY")
    trap.hook(trap.place.root.parent / "none")
    trap.set("core.hooksPath", str(trap.place.root))
    git(trap.place.repo, "worktree", "add", "-q", "-b", "z", str(trap.place.root / "z"))
    assert trap.canary.exists()


async def test_a_worktree_that_turned_hostile_is_not_looked_at(trap: Trap) -> None:
    """An agent set a filter in the shared configuration: without force it stays, with force nothing runs either."""
    place = trap.place
    made = await place.trees.create(place.plan())
    git(made.path, "config", "filter.x.clean", str(trap.script))
    git(made.path, "config", "core.fsmonitor", str(trap.script))
    Path(made.path, "second").write_text("touched")
    trap.canary.unlink(missing_ok=True)
    with pytest.raises(Refused) as caught:
        await place.trees.remove(place.removal())
    assert caught.value.reason is Reason.REPO_HOSTILE
    assert (await place.trees.remove(place.removal(force=True))).was_dirty
    assert not trap.canary.exists()


async def test_a_worktree_configuration_is_scanned_too(trap: Trap) -> None:
    """With extensions.worktreeConfig each worktree has keys of its own."""
    place = trap.place
    git(place.repo, "config", "extensions.worktreeConfig", "true")
    made = await place.trees.create(place.plan())
    git(made.path, "config", "--worktree", "filter.x.clean", str(trap.script))
    with pytest.raises(Refused) as caught:
        await place.trees.remove(place.removal())
    assert caught.value.reason is Reason.REPO_HOSTILE
    assert not trap.canary.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a repository to another user takes root")
async def test_a_repository_of_another_user_is_refused(trap: Trap) -> None:
    """Whoever owns it could make us run things as ourselves."""
    for path in (trap.place.repo, trap.place.repo / ".git"):
        os.chown(path, 65534, 65534)
    with pytest.raises(Refused, match="another user") as caught:
        await trap.place.trees.create(trap.place.plan())
    assert caught.value.reason is Reason.REPO_INVALID


async def test_an_owner_may_vouch_for_a_filter(trap: Trap) -> None:
    """By name; the checkout then obeys it, and no other."""
    trap.set("filter.x.smudge", "cat")
    trap.set("filter.x.clean", "cat")
    trees = trap.place.daemon(git=Git(allow_filters=("x",)))
    await trees.create(trap.place.plan())
    trap.set("filter.y.smudge", "CANARY")
    with pytest.raises(Refused):
        await trees.create(trap.place.plan("w2", "c2", branch="y"))


async def test_everyday_configuration_is_harmless(trap: Trap) -> None:
    """What git, forges and editors write into repositories."""
    for key, value in HARMLESS_KEYS.items():
        trap.set(key, value)
    assert await trap.place.trees.create(trap.place.plan())


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz.", max_size=40))
def test_a_key_that_nobody_knows_is_hostile(name: str) -> None:
    """An allow-list: invented sections never pass."""
    assert first_hostile([f"x{name}.y"]) == f"x{name}.y"


async def test_an_included_file_that_never_ends_is_not_waited_for(trap: Trap, tmp_path: Path) -> None:
    """A named pipe: git hangs on it wherever it follows includes, and the time it gets is bounded."""
    os.mkfifo(tmp_path / "pipe")
    trap.set("include.path", str(tmp_path / "pipe"))
    trees = trap.place.daemon(git=Git(read_timeout_ms=300))
    with pytest.raises(RunnerError) as caught:
        await trees.create(trap.place.plan())
    assert caught.value.reason in (Reason.GIT_FAILED, Reason.REPO_HOSTILE)
    assert not trap.place.managed().exists()


async def test_a_git_that_floods_or_is_missing_is_our_failure(trap: Trap, tmp_path: Path) -> None:
    """Bounded memory, and words for a person."""
    flood = tmp_path / "flood"
    flood.write_text("#!/bin/sh\nexec yes\n")
    flood.chmod(0o755)
    for program in (str(flood), str(tmp_path / "none")):
        with pytest.raises(Broken) as caught:
            await Git(program=program).version()
        assert caught.value.reason is Reason.GIT_FAILED


async def test_our_environment_does_not_reach_git(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory, nor a configuration, nor a program that somebody exported."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_WORK_TREE", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(trap.script))
    monkeypatch.setenv("GIT_TRACE", str(trap.canary))
    place = trap.place
    await place.trees.create(place.plan())
    await place.trees.remove(place.removal())
    assert not trap.canary.exists()
    assert not any(name.startswith(("LD_", "HOME", "XDG")) for name in ENVIRONMENT)


@pytest.mark.slow
@pytest.mark.skipif(not BLNS.exists(), reason=f"no naughty strings at {BLNS}")
async def test_naughty_names_never_leave_the_managed_directory(trap: Trap) -> None:
    """515 strings as id, and by turns as branch or base: what is made lies where it belongs, all else is a refusal."""
    place = trap.place
    outside = set(place.root.parent.iterdir())
    for number, name in enumerate(json.loads(BLNS.read_text())):
        plans = [
            place.plan(name, f"a{number}", branch=None),
            place.plan(f"b{number}", f"b{number}", branch=name)
            if number % 2
            else place.plan(f"c{number}", f"c{number}", base=name, branch=None),
        ]
        for plan in plans:
            try:
                made = await place.trees.create(plan)
            except Refused:
                continue
            assert Path(made.path) == place.managed(plan.worktree_id) / "repo"
            await place.trees.remove(place.removal(plan.worktree_id, f"r{plan.cmd_id}"))
    assert set(place.root.parent.iterdir()) == outside
    assert os.listdir(place.state / "worktrees") == []
