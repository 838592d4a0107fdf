"""Repositories on this machine as the worktrees need them: opened inside the allowed roots, and read without running anything of theirs."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread

from protocol.errors import Reason
from runner.adapters.git import Git
from runner.errors import Broken, Refused

REGISTRATIONS_MAX: Final = 10_000
"""Worktrees of one repository that are looked through; git itself grows slow long before."""
POINTER_BYTES_MAX: Final = 8 * 1024
"""A `gitdir` file: one path."""
REFLOG_LINE_BYTES_MAX: Final = 4 * 1024


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository inside the roots; both paths are real."""

    path: str
    git_dir: str
    """Shared by all its worktrees."""


async def open_repository(git: Git, repo: str, roots: Sequence[str]) -> Repository:
    """Find the repository at exactly `repo`.

    Raises:
        Refused: REPO_OUTSIDE_ROOTS when it, or the git directory it points to, really lies elsewhere; REPO_INVALID.
    """
    path = await anyio.to_thread.run_sync(_inside, repo, roots)
    if not await anyio.to_thread.run_sync(_looks_like_one, path):
        raise Refused(Reason.REPO_INVALID, "not the top of a git repository")
    git_dir = await git.common_dir(path)
    return Repository(path, await anyio.to_thread.run_sync(_inside, git_dir, roots))


def registration(git_dir: str, checkout: str) -> Path | None:
    """The directory in which a repository keeps its side of the worktree at `checkout`; None when it knows of none."""
    home = Path(git_dir, "worktrees")
    wanted = os.path.join(checkout, ".git")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(home) as entries:
        for _, entry in zip(range(REGISTRATIONS_MAX), entries, strict=False):
            pointer = _first_bytes(os.path.join(entry.path, "gitdir"), POINTER_BYTES_MAX)
            # Newer versions may write it relative to the directory it is in.
            if pointer and os.path.normpath(os.path.join(entry.path, os.fsdecode(pointer.rstrip(b"\n")))) == wanted:
                return Path(entry.path)
    return None


def is_locked(admin: Path) -> bool:
    """Whether somebody said `git worktree lock`, or git was killed before it had finished the checkout."""
    return os.path.lexists(admin / "locked")


def has_submodules(admin: Path) -> bool:
    """Whether submodules were checked out in a worktree: their work shows in no status that leaves them closed."""
    with contextlib.suppress(FileNotFoundError), os.scandir(admin / "modules") as entries:
        return next(entries, None) is not None
    return False


def was_born_as(git_dir: str, branch: str, why: str) -> bool:
    """Whether the reflog says that `branch` began with the entry `why`: the proof of who made it."""
    line = _first_bytes(os.path.join(git_dir, "logs", "refs", "heads", branch), REFLOG_LINE_BYTES_MAX)
    return bool(line) and line.partition(b"\n")[0].endswith(b"\t" + why.encode())


def read_head(checkout: str) -> tuple[str, str | None]:
    """Commit and branch (None: detached) of a checkout that nobody has worked in yet. Raises Broken(GIT_FAILED)."""
    # Late: it costs 140 ms and 10 MiB that a runner without worktrees never pays.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import git

    try:
        # Only reference files are read: looking an object up would start a git of its own, with our environment.
        with git.Repo(checkout, expand_vars=False) as repo:
            sha = git.SymbolicReference.dereference_recursive(repo, "HEAD")
            head = repo.head
            return sha, None if head.is_detached else head.reference.name
    except (git.GitError, ValueError, TypeError, OSError) as exc:
        raise Broken(Reason.GIT_FAILED, f"HEAD of the new worktree cannot be read: {type(exc).__name__}") from exc


def _inside(path: str, roots: Sequence[str]) -> str:
    """The real path of `path`, which lies in a root. Raises Refused(REPO_OUTSIDE_ROOTS | REPO_INVALID)."""
    if not path.isprintable():
        raise Refused(Reason.REPO_INVALID, "the path has characters that do not print")
    real = os.path.realpath(path)
    if not any(_holds(os.path.realpath(root), real) for root in roots):
        raise Refused(Reason.REPO_OUTSIDE_ROOTS, "the repository is in none of the allowed directories")
    return real


def _holds(root: str, path: str) -> bool:
    return os.path.commonpath([root, path]) == root


def _looks_like_one(path: str) -> bool:
    """Whether git, standing in `path`, would find a repository there and not search further up."""
    exists = os.path.lexists
    return exists(os.path.join(path, ".git")) or all(exists(os.path.join(path, part)) for part in ("HEAD", "objects"))


def _first_bytes(path: str, size_max: int) -> bytes:
    """The beginning of a small file; empty when it cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(size_max)
    except OSError:
        return b""
