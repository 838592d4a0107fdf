"""A machine of a test's own: systemd booted as the first process over this machine's files, none of which it can change."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CANNOT = 77
"""Exit status where nothing can be booted; what was printed says why."""
_UNIT = """
[Unit]
After=basic.target
[Service]
Type=oneshot
Environment=HOME=/root PATH={path} PYTHONDONTWRITEBYTECODE=1
WorkingDirectory={project}
ExecStart=/bin/sh -c '{command} >/told/said 2>&1; echo $? >/told/status; systemctl poweroff --no-block'
"""
_BOOT = r"""
mount --bind / "$1/root" || exit 77
exec systemd-nspawn --quiet --register=no --keep-unit --directory="$1/root" --volatile=overlay --private-network \
  --console=pipe --bind="$1/told:/told" --bind="$2" --bind-ro="$1/story.service:/run/systemd/system/story.service" \
  --boot systemd.unit=multi-user.target systemd.wants=story.service
"""


def why_not() -> str:
    """Why nothing can be booted here, as far as can be said without trying; empty when it is worth a try."""
    if os.geteuid() != 0:
        return "only root boots a machine"
    missing = [name for name in ("systemd-nspawn", "unshare") if shutil.which(name) is None]
    return f"{missing[0]} is not installed" if missing else ""


def booted(*argv: str, place: Path, timeout_s: float) -> tuple[int, str]:
    """Run `argv` in the project's directory of a machine that is booted for it; its exit status, and what it said."""
    for name in ("root", "told"):
        (place / name).mkdir()
    (place / "story.service").write_text(
        _UNIT.format(path=os.environ["PATH"], project=PROJECT, command=shlex.join(argv)), "utf-8"
    )
    # The mount is in a namespace that ends with the machine: nothing is left to be taken away.
    command = ["unshare", "--mount", "sh", "-c", _BOOT, "boot", str(place), str(PROJECT)]
    env = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as exc:
        return CANNOT, f"it did not end within {timeout_s:.0f} s: {(exc.stdout or b'')[-500:]!r}"
    if not (place / "told" / "status").exists():
        return CANNOT, f"it did not boot: {done.stdout[-500:]!r}"
    return int((place / "told" / "status").read_text()), (place / "told" / "said").read_text(errors="replace")
