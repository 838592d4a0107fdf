"""The daemon's side of an attempt's directory: laid out, waited for, connected to and cleared (docs/shim.md §1). Blocking."""

import contextlib
import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from protocol.limits import HEAD_BYTES, KILL_WAIT_MS, PTY_RING_BYTES, PTY_SEGMENT_BYTES
from runner import failpoints
from runner.adapters import cgroups
from runner.adapters.account import Account, own_account
from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories, is_alive, read_attempt
from runner.adapters.exitrecord import parse_exit
from runner.core.plans import AttemptPlan, ExitRecord, TerminalPlan
from runner.errors import Broken, Refused, RunnerError

UNRELEASED_WAIT_S: Final = 2.0
"""A shim whose daemon died behind the barrier exits at once; longer than this it is taken for living."""
LOCK_POLL_S: Final = 0.01
FENCES_DIR: Final = "fences"
FENCE_BYTES_MAX: Final = 21
"""The digits of a u64 and the line's end (docs/shim.md §1)."""
_RLIMITS: Final = {
    number: resource.getrlimit(number)
    for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK)
}
"""As the daemon was started with, before it raised any for itself: what children get back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where attempts of one runner are on this machine, and what marks them."""

    state_dir: Path
    runner: str
    boot_id: str
    cgroups: Path | None = None
    """Below which payloads have cgroups of their own; None: they have none."""

    @property
    def root(self) -> Path:
        """Where the directories of attempts are."""
        return self.state_dir / ATTEMPTS_DIR

    def leaf(self, name: str) -> Path | None:
        """The cgroup of an attempt's payload."""
        return None if self.cgroups is None else cgroups.leaf(self.cgroups, name)

    def cookie(self, name: str) -> str:
        """The mark in the environment of everything an attempt starts."""
        return f"{self.runner}:{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimSettings(Place):
    """What goes into every spec beside the plan."""

    epoch: int
    """Rises with every daemon: the newest controller of a shim wins."""
    umask: int
    segment_bytes: int
    spool_bytes: int
    head_bytes: int = HEAD_BYTES
    """What a log keeps from its beginning when its middle has to go."""
    floor_bytes: int = 0
    """A spool stops growing when its file system has less free than this."""


def spec_of(settings: ShimSettings, plan: AttemptPlan, cwd: str, account: Account | None = None) -> dict[str, Any]:
    """The spec of an attempt that runs in `cwd`. `account`: whose a PTY is."""
    execution = {"LOCAL_RUNNER_EXECUTION_ID": plan.attempt.execution_id}
    leaf = settings.leaf(plan.attempt.name)
    return {
        **_common(settings, plan.attempt.name, plan.argv, cwd, {**plan.env, **execution}),
        "cmd_id": plan.cmd_id,
        "secret_names": sorted(plan.secrets),
        "timeout_ms": plan.timeout_ms,
        "grace_ms": plan.grace_ms,
        "execution": plan.attempt.execution_id,
        "token": plan.token,
        "outlive": list(plan.outlive),
        "idle_ms": plan.idle_ms,
        "overflow": plan.overflow,
        "head_bytes": settings.head_bytes,
        "stdin": plan.input_key is not None,
        "input_key": plan.input_key,
        "events": plan.events,
        "cgroup": None if leaf is None else str(leaf),
        "fail": failpoints.for_shim() or None,
        **({} if plan.terminal is None else _of_terminal(settings, plan, plan.terminal, account or own_account())),
    }


def _of_terminal(settings: ShimSettings, plan: AttemptPlan, terminal: TerminalPlan, account: Account) -> dict[str, Any]:
    """What the spec of a PTY has otherwise. Its log is a ring, and its environment names its user."""
    execution = {"LOCAL_RUNNER_EXECUTION_ID": plan.attempt.execution_id}
    return {
        "argv": list(plan.argv) or account.login_argv,
        "program": None if plan.argv else account.shell,
        "env": {**account.env, **plan.env, **execution},
        "tty": {
            "rows": terminal.rows,
            "cols": terminal.cols,
            "size_policy": terminal.size_policy.value,
            "background": terminal.background.value,
        },
        "segment_bytes": min(settings.segment_bytes, PTY_SEGMENT_BYTES),
        "spool_bytes": min(settings.spool_bytes, PTY_RING_BYTES),
        "head_bytes": 0,
    }


def tool_spec(
    settings: ShimSettings,
    name: str,
    argv: Sequence[str],
    cwd: str,
    env: Mapping[str, str],
    timeout_ms: int,
    grace_ms: int,
) -> dict[str, Any]:
    """The spec of a tool of ours."""
    return {**_common(settings, name, argv, cwd, env), "timeout_ms": timeout_ms, "grace_ms": grace_ms}


def _common(settings: ShimSettings, name: str, argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> dict[str, Any]:
    return {
        "v": 1,
        "attempt": name,
        "cmd_id": name,
        "argv": list(argv),
        "cwd": cwd,
        "env": dict(env),
        "secret_names": [],
        "cookie": settings.cookie(name),
        "timeout_ms": None,
        "grace_ms": 0,
        "kill_wait_ms": KILL_WAIT_MS,
        "umask": settings.umask,
        "rlimits": {str(number): list(limits) for number, limits in _RLIMITS.items()},
        "segment_bytes": settings.segment_bytes,
        "spool_bytes": settings.spool_bytes,
        "floor_bytes": settings.floor_bytes,
        "boot_id": settings.boot_id,
        "lease": None,
    }


def raise_fence(state_dir: Path, execution_id: str, token: int) -> None:
    """Make it durable that no attempt of the execution under a lower token starts any more. A fence is never lowered.

    Raises:
        Broken: what stands there is no fence; who could tell what it was meant to hold back.
        OSError: the disk. Then the old fence stands.
    """
    directory = state_dir / FENCES_DIR
    make_durable_directory(directory)
    path = directory / execution_id
    standing = _fence(path)
    if standing is not None and standing >= token:
        return
    prepared = path.with_name(f".{path.name}")
    try:
        write_new(prepared, b"%d\n" % token, exclusive=False)
        os.replace(prepared, path)
    except OSError:
        prepared.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    failpoints.hit("fence.raised")


def _fence(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        content = file.read(FENCE_BYTES_MAX + 1)
    if len(content) > FENCE_BYTES_MAX or content[-1:] != b"\n" or not content[:-1].isdigit():
        raise Broken(Reason.INFRA, f"{path} is no fence; remove it when no attempt of the execution lives")
    return int(content)


def lay_out(path: Path, spec: dict[str, Any], roots: Sequence[str]) -> int:
    """Judge the working directory as it really is, make the directory and its durable spec; returns the open directory.

    Raises, and then leaves nothing behind:
        Refused: CWD_OUTSIDE_ROOTS, CWD_MISSING, or DUPLICATE_ATTEMPT when the directory is there.
        OSError: the disk.
    """
    _judge_cwd(spec["cwd"], roots)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError as exc:
        raise Refused(Reason.DUPLICATE_ATTEMPT, "its directory is there already") from exc
    try:
        failpoints.hit("attempt.dir_made")
        write_new(path / "spec.json", json.dumps(spec).encode("utf-8"))
        failpoints.hit("attempt.spec_written")
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, RunnerError):
        # Nobody was told of it yet: a half-made one would be taken for an attempt by the next daemon.
        shutil.rmtree(path, ignore_errors=True)
        raise


def write_new(path: Path, content: bytes, *, exclusive: bool = True) -> None:
    """A durable file; its directory entry is the caller's to make durable. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else os.O_TRUNC)
    fd = os.open(path, flags, 0o600)
    try:
        written = os.write(fd, content)
        if written != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)


def make_durable_directory(directory: Path) -> None:
    """Make it, with its entry, unless it is there. Raises OSError."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _judge_cwd(cwd: str, roots: Sequence[str]) -> None:
    """Where `cwd` really leads must be a directory inside one of `roots` (none given: ours, anywhere). Raises Refused."""
    real = os.path.realpath(cwd)
    if roots and not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
        raise Refused(Reason.CWD_OUTSIDE_ROOTS, "the working directory leads outside the managed roots")
    if not os.path.isdir(real):
        raise Refused(Reason.CWD_MISSING, "the working directory is not there")


def still_held(directory: Path, seconds: float) -> bool:
    """Wait until nobody holds the lock; True when somebody still does after `seconds`."""
    ends = time.monotonic() + seconds
    while is_alive(directory):
        if time.monotonic() >= ends:
            return True
        time.sleep(LOCK_POLL_S)
    return False


def exit_of(directory: Path) -> ExitRecord | None:
    """What the shim left in `exit.json`, if that is a record."""
    found = read_attempt(directory).exit
    return None if found is None else parse_exit(directory.name, found)


def clear(directory: Path) -> None:
    """Remove the directory of something that is over or never ran."""
    still_held(directory, UNRELEASED_WAIT_S)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def expire_fences(state_dir: Path, before_ms: int) -> None:
    """A fence is for shims of earlier attempts: when none of them has a directory any more, nobody reads it."""
    executions = {directory.name.rpartition(".")[0] for directory in attempt_directories(state_dir)}
    with contextlib.suppress(OSError), os.scandir(state_dir / FENCES_DIR) as entries:
        for entry in entries:
            if entry.name not in executions and entry.stat(follow_symlinks=False).st_mtime * 1000 < before_ms:
                os.unlink(entry.path)
