"""The daemon's side of an attempt's directory: laid out, waited for, connected to and cleared (docs/shim.md §1). Blocking."""

import contextlib
import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from protocol.limits import KILL_WAIT_MS
from runner import failpoints
from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories, is_alive, read_attempt
from runner.adapters.exitrecord import parse_exit
from runner.adapters.uplink import ACK_NAME
from runner.core.plans import AttemptPlan, ExitRecord
from runner.errors import Refused

UNRELEASED_WAIT_S: Final = 2.0
"""A shim whose daemon died behind the barrier exits at once; longer than this it is taken for living."""
LOCK_POLL_S: Final = 0.01
_RLIMITS: Final = {
    number: resource.getrlimit(number)
    for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK)
}
"""As the daemon was started with, before it raised any for itself: what children get back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimSettings:
    """What goes into every spec beside the plan."""

    state_dir: Path
    runner: str
    boot_id: str
    epoch: int
    """Rises with every daemon: the newest controller of a shim wins."""
    umask: int
    segment_bytes: int
    spool_bytes: int

    @property
    def root(self) -> Path:
        """Where the directories of attempts are."""
        return self.state_dir / ATTEMPTS_DIR

    def cookie(self, name: str) -> str:
        """The mark in the environment of everything an attempt starts."""
        return f"{self.runner}:{name}"


def spec_of(settings: ShimSettings, plan: AttemptPlan, cwd: str) -> dict[str, Any]:
    """The spec of an attempt that runs in `cwd`."""
    execution = {"LOCAL_RUNNER_EXECUTION_ID": plan.attempt.execution_id}
    return {
        **_common(settings, plan.attempt.name, plan.argv, cwd, {**plan.env, **execution}),
        "cmd_id": plan.cmd_id,
        "secret_names": sorted(plan.secrets),
        "timeout_ms": plan.timeout_ms,
        "grace_ms": plan.grace_ms,
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
        "boot_id": settings.boot_id,
        "lease": None,
    }


def lay_out(path: Path, spec: dict[str, Any], roots: Sequence[str]) -> int:
    """Judge the working directory as it really is, make the directory and its durable spec; returns the open directory.

    Raises:
        Refused: CWD_OUTSIDE_ROOTS, CWD_MISSING, or DUPLICATE_ATTEMPT when the directory is there.
        OSError: the disk.
    """
    _judge_cwd(spec["cwd"], roots)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError as exc:
        raise Refused(Reason.DUPLICATE_ATTEMPT, "its directory is there already") from exc
    failpoints.hit("attempt.dir_made")
    fd = os.open(path / "spec.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(spec).encode("utf-8"))
        os.fsync(fd)
    finally:
        os.close(fd)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


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


def dial(directory: Path) -> socket.socket:
    """Connect to the socket of an attempt, however long the path is. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"/proc/self/fd/{fd}/s")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock


def clear(directory: Path) -> None:
    """Remove the directory of something that is over or never ran."""
    still_held(directory, UNRELEASED_WAIT_S)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def expire(state_dir: Path, before_ms: int, living: Collection[str]) -> int:
    """Remove directories of attempts that ended before `before_ms` (wall) and are durable at the plane; returns how many."""
    removed = 0
    for directory in attempt_directories(state_dir):
        acked = directory / ACK_NAME
        with contextlib.suppress(OSError):
            if directory.name in living or acked.stat().st_mtime * 1000 >= before_ms or is_alive(directory):
                continue
            shutil.rmtree(directory)
            removed += 1
    return removed
