"""Cgroups (version 2) of attempts, seen from the daemon: where they may be made, and how one is swept whose shim is dead.

A leaf holds the payload of one attempt and is its shim's to make and to remove (docs/shim.md §2.2). The daemon only names it,
lists what is there, and ends what a dead shim left behind. It makes no cgroup but the one it probes with.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from runner.shim import cgroup

AUTO: Final = "auto"
OFF: Final = "off"
LEAF_PREFIX: Final = "runner-"
SWEEP_WAIT_S: Final = 5.0
"""A process in the kernel's hands takes no KILL before it comes back; after this it is one that remains."""
SWEEP_POLL_S: Final = 0.01
_DELEGATED: Final = ("user.delegate", "trusted.delegate")
"""What systemd writes on a cgroup it has handed over; the second is readable for root only."""
TOLD: Final = "LOCAL_RUNNER_DELEGATED"
"""Managers of users write neither (systemd 252): there our own unit says by this that it has `Delegate=`."""
_NEEDED: Final = ("cgroup.procs", "cgroup.kill", "cgroup.freeze", "cgroup.events")
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


def base(configured: str) -> Path | None:
    """The cgroup below which attempts may have theirs, or None: no such tier.

    Args:
        configured: `auto` takes what systemd delegated to this process, `off` nothing, an absolute path is taken as it is.
    """
    if configured == OFF:
        return None
    if configured != AUTO:
        place = Path(configured)
        return place if place.is_absolute() and usable(place) else None
    # With DelegateSubgroup= the daemon itself lives one below what was delegated.
    return next((place for place in _our_places() if _delegated(place) and usable(place)), None)


def usable(place: Path) -> bool:
    """Whether a leaf can be made below `place`, entered, killed and frozen as a whole; asked by making one."""
    if not os.access(place / "cgroup.procs", os.W_OK):
        return False
    probe = place / f"{LEAF_PREFIX}probe-{os.getpid()}"
    try:
        probe.mkdir(mode=0o755, exist_ok=True)
    except OSError:
        return False
    try:
        return all((probe / name).exists() for name in _NEEDED)
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def leaf(place: Path, attempt_name: str) -> Path:
    """Where the payload of an attempt goes: beside whoever lives below `place`."""
    return place / f"{LEAF_PREFIX}{attempt_name}"


def leaves(place: Path) -> dict[str, Path]:
    """The leaves below `place` by the name of their attempt, living or not; none when it cannot be read."""
    try:
        names = sorted(os.listdir(place))
    except OSError:
        return {}
    wanted = (name for name in names if name.startswith(LEAF_PREFIX) and not name.startswith(f"{LEAF_PREFIX}probe-"))
    return {name.removeprefix(LEAF_PREFIX): place / name for name in wanted}


def populated(path: Path) -> bool:
    """Whether anybody is in the leaf or below it, as the kernel counts; False when it is gone."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text("ascii")
    except OSError:
        return False


def sweep_leaf(path: Path, wait_s: float = SWEEP_WAIT_S) -> bool:
    """Kill everybody in the leaf of an attempt whose shim is dead and remove it; False when somebody remains. Blocking."""
    ends = time.monotonic() + wait_s
    with contextlib.suppress(OSError):
        (path / "cgroup.kill").write_text("1")
    while populated(path):
        if time.monotonic() >= ends:
            return False
        time.sleep(SWEEP_POLL_S)
    return cgroup.remove(os.fsencode(path))


def _our_places() -> Iterator[Path]:
    """The directory of our own cgroup, then the one above it; nothing where version 2 is not mounted."""
    try:
        ours = next(
            line[3:] for line in Path("/proc/self/cgroup").read_bytes().splitlines() if line.startswith(b"0::/")
        )
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except (OSError, StopIteration):
        return
    for line in mounts:
        fields, _, kind = line.partition(b" - ")
        if not kind.startswith(b"cgroup2 "):
            continue
        root, point = (_OCTAL.sub(lambda found: bytes((int(found[1], 8),)), each) for each in fields.split()[3:5])
        # A mount that shows only a part of the tree names us by what is above it, too.
        inside = ours.removeprefix(root.rstrip(b"/"))
        if not ours.startswith(root.rstrip(b"/")) or not inside.startswith(b"/"):
            continue
        here = Path(os.fsdecode(point + inside))
        yield here
        if inside != b"/":
            yield here.parent


def _delegated(place: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(place, name) == b"1":
                return True
    return os.environ.get(TOLD) == "1"
