"""Our own small git: one argv template per verb, an environment built from empty, bounded output and time.

Rule 1: no value becomes an option: values stand behind `--end-of-options`, `--` or `=`, and paths are absolute.
Rule 2: git learns nothing from our environment, the user's or the system's configuration; what is left is the repository's own, and
that is scanned (`hostile_key`) before any verb that could obey it, and overridden on every call.
Rule 3: what writes is only built here (`*_argv`): it runs under a shim that holds the repository's lock.
"""

import contextlib
import os
import re
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import anyio
from anyio.abc import ByteReceiveStream, Process

from protocol.errors import Reason
from runner.core import gitkeys
from runner.core.refnames import is_object_id
from runner.errors import Broken, Refused, RunnerError

READ_TIMEOUT_MS: Final = 30_000
"""One reading verb; `status` of 100,000 files on a cold disk takes some seconds."""
WRITE_TIMEOUT_MS: Final = 600_000
"""One writing verb: a checkout of a million files on a slow disk."""
OUTPUT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Answers are ids and key names; a longer one is an attack on our memory."""
ERROR_BYTES_MAX: Final = 16 * 1024
DETAIL_CHARS_MAX: Final = 300
"""What of git's own words goes into a receipt."""
VERSION_FLOOR: Final = (2, 36)
"""First with `safe.directory`, `--path-format`, `safe.bareRepository`'s groundwork and a worktree configuration that is copied."""
CHECKOUT_WORKERS: Final = 2
"""Measured: 0.7 to 0.8 of the time of a serial checkout; more of them starve the executions that run beside it."""
CHECKOUT_PARALLEL_FROM: Final = 50
"""Files below which starting the workers costs more than they save."""
NO_OBJECT: Final = "0" * 40

ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LC_ALL": "C",  # its words are matched below, and end in receipts
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "/bin/false",
        "SSH_ASKPASS": "/bin/false",
        "GIT_EDITOR": "/bin/false",
        "GIT_PAGER": "cat",
        "GIT_COMMITTER_NAME": "runner",  # of reflog entries; git would guess one from the host and may fail
        "GIT_COMMITTER_EMAIL": "runner@localhost",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",  # an object id names these bytes and no others
        "GIT_ALLOW_PROTOCOL": "none",  # a list of one protocol that does not exist: no verb of ours has a network
    }
)
_OVERRIDES: Final = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.untrackedCache=false",
    "core.attributesFile=/dev/null",
    "core.excludesFile=/dev/null",
    "core.pager=cat",
    "core.editor=/bin/false",
    "core.askPass=/bin/false",
    "core.sshCommand=/bin/false",
    "credential.helper=",
    "protocol.allow=never",
    "submodule.recurse=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "advice.detachedHead=false",
    "safe.bareRepository=explicit",
)
_FOREIGN_OWNER: Final = "dubious ownership"
_TAKEN: Final = re.compile(r"exists; cannot create|reference already exists")
"""Also `a` against `a/b`: a branch cannot be a directory of branches."""
_NO_SPACE: Final = re.compile(r"No space left on device|Disk quota exceeded")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a reading verb ended."""

    status: int
    stdout: bytes
    stderr: str


@dataclass(frozen=True, slots=True)
class Git:
    """The verbs. `allow_filters` are content filters (`filter.<name>.*`) that the machine's owner vouches for."""

    program: str = "git"
    allow_filters: Collection[str] = ()
    read_timeout_ms: int = READ_TIMEOUT_MS

    async def version(self) -> tuple[int, int]:
        """Major and minor number. Raises Broken(GIT_FAILED) when there is no git here."""
        answer = await self._read(["--version"])
        found = re.match(rb"git version (\d+)\.(\d+)", answer.stdout)
        if answer.status or not found:
            raise Broken(Reason.GIT_FAILED, "git does not say its version")
        return int(found[1]), int(found[2])

    async def common_dir(self, repo: str) -> str:
        """The git directory that all worktrees of the repository at exactly `repo` share, as git names it.

        Raises:
            Refused: REPO_INVALID when there is no repository, or one that belongs to another user.
        """
        # No override here: safe.bareRepository would hide the bare repositories that this verb is to find. The ceiling keeps git
        # from finding one further up, outside what the caller has checked; the prefix says so once more.
        ceiling = {"GIT_CEILING_DIRECTORIES": os.path.dirname(repo)}
        argv = ["-C", repo, "rev-parse", "--path-format=absolute", "--git-common-dir", "--show-prefix"]
        answer = await self._read(argv, extra=ceiling)
        if _FOREIGN_OWNER in answer.stderr:
            raise Refused(Reason.REPO_INVALID, "the repository belongs to another user")
        lines = os.fsdecode(answer.stdout).split("\n")
        if answer.status or len(lines) != 3 or lines[1] or not lines[0].startswith("/"):
            raise Refused(Reason.REPO_INVALID, "not the top of a git repository")
        return lines[0]

    async def hostile_key(self, git_dir: str) -> str | None:
        """The first key of the repository's own configuration that may not be there; reading it executes nothing."""
        # --no-includes: an included file might never end; that it is included at all shows as `include.path`.
        argv = self._in(git_dir, "config", "--list", "--null", "--name-only", "--no-includes", overrides=False)
        answer = await self._read(argv)
        if answer.status:
            raise Refused(Reason.REPO_INVALID, f"its configuration cannot be read: {said(answer.stderr)}")
        names = answer.stdout.decode("utf-8", "backslashreplace").split("\0")
        return gitkeys.first_hostile(filter(None, names), self.allow_filters)

    async def commit(self, git_dir: str, revision: str) -> str | None:
        """The commit that `revision` names; None when there is none."""
        wanted = f"{revision}^{{commit}}"
        answer = await self._read(self._in(git_dir, "rev-parse", "--verify", "--quiet", "--end-of-options", wanted))
        sha = answer.stdout.decode("ascii", "replace").strip()
        return sha if answer.status == 0 and is_object_id(sha) else None

    async def branch(self, git_dir: str, branch: str) -> str | None:
        """The commit that a local branch points at; None when there is no such branch."""
        answer = await self._read(self._in(git_dir, "show-ref", "--verify", "--hash", "--", f"refs/heads/{branch}"))
        sha = answer.stdout.decode("ascii", "replace").strip()
        if answer.status == 0 and is_object_id(sha):
            return sha
        if "not a valid ref" in answer.stderr:
            return None
        raise self.failed("show-ref", answer.status, answer.stderr)

    async def current_branch(self, admin_dir: str) -> str | None:
        """The branch that a worktree is on; None when its HEAD is detached."""
        answer = await self._read(self._in(admin_dir, "symbolic-ref", "--quiet", "HEAD"))
        name = os.fsdecode(answer.stdout).strip()
        return name.removeprefix("refs/heads/") if answer.status == 0 and name.startswith("refs/heads/") else None

    async def is_on_a_ref(self, git_dir: str, sha: str) -> bool:
        """Whether some branch, tag or remote branch contains the commit."""
        answer = await self._read(self._in(git_dir, "for-each-ref", "--count=1", "--format=x", f"--contains={sha}"))
        if answer.status:
            raise self.failed("for-each-ref", answer.status, answer.stderr)
        return bool(answer.stdout)

    async def is_dirty(self, admin_dir: str, checkout: str) -> bool:
        """Whether a checkout has changes or untracked files that are not ignored. Call `hostile_key` before."""
        # Submodules are not entered: each has a configuration of its own that nobody scanned.
        options = ["--porcelain=v1", "--null", "--untracked-files=normal", "--ignore-submodules=all"]
        argv = self._in(admin_dir, f"--work-tree={checkout}", "status", *options)
        answer = await self._read(argv, enough=1)
        if answer.status and not answer.stdout:
            raise self.failed("status", answer.status, answer.stderr)
        return bool(answer.stdout)

    def make_branch_argv(self, git_dir: str, branch: str, sha: str, why: str) -> list[str]:
        """Make a branch that must not exist yet, by compare-and-set."""
        options = ["--create-reflog", "-m", why]
        return [self.program, *self._in(git_dir, "update-ref", *options, "--", f"refs/heads/{branch}", sha, NO_OBJECT)]

    def drop_branch_argv(self, git_dir: str, branch: str, sha: str) -> list[str]:
        """Delete a branch that must still point at `sha`."""
        return [self.program, *self._in(git_dir, "update-ref", "-d", "--", f"refs/heads/{branch}", sha)]

    def add_argv(self, git_dir: str, checkout: str, sha: str, branch: str | None) -> list[str]:
        """Check `branch` out, or `sha` with a detached HEAD, in a new worktree."""
        parallel = [
            f"checkout.workers={CHECKOUT_WORKERS}",
            f"checkout.thresholdForParallelism={CHECKOUT_PARALLEL_FROM}",
        ]
        settings = [word for setting in parallel for word in ("-c", setting)]
        where = ["--detach", "--", checkout, sha] if branch is None else ["--", checkout, branch]
        return [self.program, *settings, *self._in(git_dir, "worktree", "add", "--quiet", *where)]

    def forget_argv(self, git_dir: str, checkout: str) -> list[str]:
        """Drop the registration of a worktree whose checkout is gone, also one that says it is locked."""
        # Not `prune`: that drops every registration whose directory is away, such as those on a disk that is not mounted now.
        return [self.program, *self._in(git_dir, "worktree", "remove", "--force", "--force", "--", checkout)]

    def failed(self, verb: str, status: int, stderr: str) -> RunnerError:
        """A verb that should have worked did not: Refused(BRANCH_EXISTS) where a branch is in the way, else Broken."""
        if verb == "update-ref" and _TAKEN.search(stderr):
            return Refused(Reason.BRANCH_EXISTS, "there is a branch of that name, or one that is a directory of it")
        reason = Reason.DISK_FULL if _NO_SPACE.search(stderr) else Reason.GIT_FAILED
        return Broken(reason, f"git {verb} ended with {status}: {said(stderr)}")

    def _in(self, git_dir: str, *words: str, overrides: bool = True) -> list[str]:
        settings = [word for setting in _OVERRIDES for word in ("-c", setting)] if overrides else []
        return [*settings, "--no-pager", f"--git-dir={git_dir}", *words]

    async def _read(
        self, words: list[str], *, extra: Mapping[str, str] = MappingProxyType({}), enough: int | None = None
    ) -> Answer:
        """Run a verb that only reads; `enough` bytes of output are all that is wanted, then it may be killed."""
        argv = [self.program, *words]
        try:
            process = await anyio.open_process(argv, cwd="/", env={**ENVIRONMENT, **extra}, start_new_session=True)
        except OSError as exc:
            raise Broken(Reason.GIT_FAILED, f"git cannot be started: {exc.strerror}") from exc
        try:
            with anyio.fail_after(self.read_timeout_ms / 1000):
                return await _drain(process, enough)
        except TimeoutError as exc:
            raise Broken(Reason.GIT_FAILED, f"git took longer than {self.read_timeout_ms} ms") from exc
        finally:
            with anyio.CancelScope(shield=True):
                _kill(process)
                await process.aclose()


def said(stderr: str) -> str:
    """git's last words, fit for a receipt."""
    words = " ".join("".join(char if char.isprintable() else " " for char in stderr).split())
    return words[-DETAIL_CHARS_MAX:]


async def _drain(process: Process, enough: int | None) -> Answer:
    assert process.stdout is not None and process.stderr is not None and process.stdin is not None
    await process.stdin.aclose()
    kept: dict[str, bytes] = {}

    async def keep_errors(stream: ByteReceiveStream) -> None:
        kept["stderr"] = await _take(stream, ERROR_BYTES_MAX)
        async for _more in stream:
            pass  # or the writer would wait for us for ever

    limit = enough or OUTPUT_BYTES_MAX + 1
    async with anyio.create_task_group() as readers:
        readers.start_soon(keep_errors, process.stderr)
        stdout = await _take(process.stdout, limit)
        if len(stdout) >= limit:
            _kill(process)
    if enough is None and len(stdout) > OUTPUT_BYTES_MAX:
        raise Broken(Reason.GIT_FAILED, f"git answered more than {OUTPUT_BYTES_MAX} bytes")
    status = await process.wait()
    return Answer(status, stdout, kept["stderr"].decode("utf-8", "replace"))


async def _take(stream: ByteReceiveStream, size_max: int) -> bytes:
    """The first `size_max` bytes of a stream, or all of it."""
    taken = bytearray()
    async for chunk in stream:
        taken += chunk[: size_max - len(taken)]
        if len(taken) >= size_max:
            break
    return bytes(taken)


def _kill(process: Process) -> None:
    """End it and what it started, while its pid is still ours to name."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
