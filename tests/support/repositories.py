"""Real git repositories to make worktrees of."""

import os
import subprocess
from pathlib import Path

ENV = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(where: Path | str, *words: str) -> str:
    """Run git in `where` as a person would, and give what it says."""
    done = subprocess.run(["git", *words], cwd=where, env=ENV, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_repository(path: Path, *, files: int = 3) -> Path:
    """A repository with two commits on `main`, the first tagged `v1`."""
    path.mkdir(parents=True)
    git(path, "init", "-q", "-b", "main")
    for number in range(files):
        file = path / f"d{number // 100}" / f"f{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{number}\n" * 20)
    (path / ".gitignore").write_text("*.log\n")
    git(path, "add", ".")
    git(path, "commit", "-q", "-m", "first")
    git(path, "tag", "v1")
    (path / "second").write_text("2\n")
    git(path, "add", ".")
    git(path, "commit", "-q", "-m", "second")
    return path


def snapshot(git_dir: Path) -> tuple[str, ...]:
    """What a failed command must leave as it was: branches and registered worktrees."""
    here = f"--git-dir={git_dir}"
    return git(git_dir, here, "for-each-ref"), git(git_dir, here, "worktree", "list", "--porcelain")
