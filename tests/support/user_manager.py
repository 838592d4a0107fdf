"""A systemd user manager of a test's own: really systemd, in namespaces and a control group that end with the test."""

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path("/usr/lib/systemd/systemd")
CANNOT = 77
"""Exit status of a machine on which no manager can be had; what it printed says why."""
_OUTER = r"""
cannot() { echo "$1" >&2; exit 77; }
mount -t tmpfs user-manager /run && mkdir -p /run/systemd/system /run/cgroup || cannot "no file system can be mounted"
mount -t cgroup2 user-manager /run/cgroup || cannot "control groups of version 2 cannot be mounted"
leaf=/run/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/user-manager-$$
mkdir "$leaf" || cannot "no control group can be made"
sh -c 'echo $$ > "$0/cgroup.procs" && exec unshare --cgroup --mount --pid --fork --kill-child --mount-proc sh -c "$@"' \
  "$leaf" "$@"
status=$?
for _ in $(seq 50); do find "$leaf" -depth -type d -exec rmdir {} + 2>/dev/null; [ -d "$leaf" ] || break; sleep 0.1; done
exit $status
"""
_INNER = r"""
mount -t cgroup2 user-manager /sys/fs/cgroup || exit 77
mkdir -m 700 /run/user-manager
export XDG_RUNTIME_DIR=/run/user-manager
"$0" --user --log-target=console --show-status=no 2>&1 &
for _ in $(seq 100); do [ -S $XDG_RUNTIME_DIR/systemd/private ] && break; sleep 0.1; done
[ -S $XDG_RUNTIME_DIR/systemd/private ] || { echo "systemd --user does not start here" >&2; exit 77; }
"$@"
"""


@dataclass(frozen=True)
class Ended:
    """How a command under a manager ended."""

    status: int
    said: str


def why_not() -> str:
    """Why no manager can be had here, as far as can be said without trying; empty when it is worth a try."""
    if not SYSTEMD.exists():
        return "systemd is not installed"
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    return "" if os.geteuid() == 0 else "only root makes control groups"


def under_manager(*argv: str, env: dict[str, str], timeout_s: float) -> Ended:
    """Run `argv` where `systemctl --user` reaches a manager of its own. Whatever it started ends with it."""
    command = ["unshare", "--mount", "sh", "-c", _OUTER, "user-manager", _INNER, str(SYSTEMD), *argv]
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return Ended(-signal.SIGKILL, said)
    return Ended(process.returncode, said)
