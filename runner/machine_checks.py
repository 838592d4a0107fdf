"""Checks of the machine the runner lives on: disk, limits, git, the kernel's process tools, terminals, the service unit."""

import ctypes
import os
import re
import resource
import subprocess
from pathlib import Path
from typing import Final

from protocol.text import show_size
from runner.doctor import Check, Measured, Scene, Verdict, ok, skip

DISK_BYTES_WARN: Final = 10 * 2**30
"""The host's spool limit: all of it may be wanted."""
DISK_BYTES_FAIL: Final = 256 * 2**20
"""Below this the journal and one execution's log meet the end of the disk within minutes."""
INODES_MIN: Final = 10_000
"""An attempt takes about a dozen, a worktree as many as its repository has files."""
FD_LIMIT_WARN: Final = 4096
FD_LIMIT_FAIL: Final = 256
"""The daemon keeps about two descriptors for an attempt, besides its own two dozen; the policy's default is 64 attempts."""
GIT_FLOOR: Final = (2, 36)
"""`worktree list --porcelain -z` came with 2.36: without it a path with a newline in it cannot be read back for sure."""
GIT_TIMEOUT_S: Final = 10.0
_PR_GET_CHILD_SUBREAPER: Final = 37


def disk(scene: Scene) -> Measured:
    """R010: there is room for journal, logs and worktrees."""
    place = next(path for path in (scene.settings.state_dir, *scene.settings.state_dir.parents) if path.exists())
    found = os.statvfs(place)
    free, inodes = found.f_bavail * found.f_frsize, found.f_favail
    # File systems without a fixed number of inodes (btrfs) say that they have none at all.
    few = found.f_files > 0 and inodes < INODES_MIN
    value = f"{show_size(free)} free" + (f", {inodes} inodes free" if found.f_files else "")
    fix = f"du -xh --max-depth=2 {scene.settings.state_dir} | sort -h | tail"
    if free < DISK_BYTES_FAIL or few:
        return Measured(Verdict.FAIL, value, fix)
    return Measured(Verdict.WARN, value, fix) if free < DISK_BYTES_WARN else ok(value)


def descriptors(_scene: Scene) -> Measured:
    """R011: the daemon may open enough files; it raises its soft limit to the hard one itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"soft {soft}, hard {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    fix = "systemctl --user edit runner   # [Service] LimitNOFILE=65536"
    if hard != resource.RLIM_INFINITY and hard < FD_LIMIT_WARN:
        return Measured(Verdict.FAIL if hard < FD_LIMIT_FAIL else Verdict.WARN, value, fix)
    return ok(value)


def git(scene: Scene) -> Measured:
    """R012: git is there and new enough for worktrees."""
    program, floor = scene.settings.git, ".".join(map(str, GIT_FLOOR))
    install = "sudo apt-get install git   # or your system's way"
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=GIT_TIMEOUT_S, check=False
        )
    except (FileNotFoundError, PermissionError):
        return Measured(Verdict.FAIL, f"{program} cannot be run", install)
    except subprocess.TimeoutExpired:
        return Measured(Verdict.FAIL, f"{program} --version does not end", install)
    match = re.match(r"git version (\d+)\.(\d+)", done.stdout)
    if match is None:
        return Measured(Verdict.FAIL, f"{program} does not say its version", install)
    version = (int(match[1]), int(match[2]))
    value = done.stdout.strip()
    return (
        ok(value) if version >= GIT_FLOOR else Measured(Verdict.FAIL, f"{value}, at least {floor} is needed", install)
    )


def kernel(_scene: Scene) -> Measured:
    """R013: subreaper, pidfd and posix_spawn work, on which adopting and stopping stand."""
    missing = []
    holder = ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(holder), 0, 0, 0) != 0:
        missing.append("subreaper")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        missing.append("pidfd")
    try:
        child = os.posix_spawn("/bin/true", ["true"], {}, setsid=True)
        os.waitpid(child, 0)
    except (NotImplementedError, OSError):
        missing.append("posix_spawn")
    if missing:
        return Measured(Verdict.FAIL, f"missing: {' '.join(missing)}", "uname -r   # Linux 5.3 or newer is needed")
    return ok(f"subreaper, pidfd, posix_spawn on Linux {os.uname().release}")


def terminal(_scene: Scene) -> Measured:
    """R014: a pseudo-terminal can be opened and a program run on it."""
    from ptyprocess import PtyProcess, PtyProcessError

    fix = "mount | grep devpts"
    try:
        probe = PtyProcess.spawn(["true"])
        try:
            status = probe.wait()
        finally:
            probe.close(force=True)
    except (OSError, PtyProcessError) as exc:
        return Measured(Verdict.FAIL, f"no terminal can be opened: {exc}", fix)
    return (
        ok("opened, used and closed one") if status == 0 else Measured(Verdict.FAIL, f"`true` ended with {status}", fix)
    )


def unit(scene: Scene) -> Measured:
    """R015: the service unit is there and leaves executions alone when the daemon is restarted."""
    from runner.service import settings_of_unit, unit_path

    install = "runner service install --user --now"
    path = unit_path(scene.environ)
    if not path.exists():
        if not Path("/run/systemd/system").is_dir():
            return skip("systemd does not run this machine")
        return Measured(Verdict.WARN, f"{path} is not there; the daemon ends with its terminal", install)
    found = settings_of_unit(path.read_text("utf-8", "replace"))
    mode = found.get("KillMode", "control-group")
    if mode != "process":
        return Measured(Verdict.FAIL, f"{path} has KillMode={mode}: a restart would end every execution", install)
    program = found.get("ExecStart", "").split(" ")[0].strip('"')
    if not os.access(program, os.X_OK):
        return Measured(Verdict.FAIL, f"{path} starts {program or 'nothing'}, which cannot be run", install)
    return ok(f"{path}, KillMode=process")


CHECKS: Final = (
    Check("R010", "disk", disk),
    Check("R011", "file descriptors", descriptors),
    Check("R012", "git", git),
    Check("R013", "process tools of the kernel", kernel),
    Check("R014", "terminals", terminal),
    Check("R015", "service unit", unit),
)
