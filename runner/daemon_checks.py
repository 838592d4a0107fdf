"""Checks of what a running daemon says of itself: admission, headroom, control groups, who else has its keys, leases."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protocol.text import show_age, show_size
from runner.adapters.control_client import ControlUnavailable, call_control
from runner.doctor import Check, Measured, Scene, Verdict, ok, skip
from runner.render import show_admission
from runner.service import settings_of_unit, unit_path
from runner.verbs.options import CALL_TIMEOUT_S, socket_of

if TYPE_CHECKING:
    from runner.core.plans import Headroom

_NO_DAEMON: Final = "the daemon is not running"
_INSTALL: Final = "runner service install --user --now"


def admission(scene: Scene) -> Measured:
    """R016: new work is taken."""
    said = _said(scene)
    if said is None:
        return skip(_NO_DAEMON)
    found = said.get("admission") or {}
    shown = show_admission(found)
    return ok(shown) if found.get("state", "open") == "open" else Measured(Verdict.WARN, shown, "runner resume")


def headroom(scene: Scene) -> Measured:
    """R017: the machine has as much left as its owner wants for new work."""
    from runner.adapters.headroom import Gauge
    from runner.adapters.policyfile import load_policy
    from runner.core.gate import shortage
    from runner.core.plans import Headroom

    said = (_said(scene) or {}).get("headroom")
    state_dir = scene.settings.state_dir
    if said is None:
        # Our own descriptors say nothing about a daemon's.
        place = next(place for place in (state_dir, *state_dir.parents) if place.exists())
        measured = replace(Gauge([place]).measure(), fds_free=None)
        short = shortage(measured, load_policy(scene.settings.policy_file, ())[0])
    else:
        measured = Headroom(**{name: said.get(name) for name in Headroom.__slots__})
        short = (said["short"], said.get("detail", "")) if said.get("short") else None
    if short is not None:
        fix = f"du -xh --max-depth=2 {state_dir} | sort -h | tail   # or lower [limits] in {scene.settings.policy_file}"
        return Measured(Verdict.WARN, f"new work is refused: {short[0]}, {short[1]}", fix)
    return ok(f"above the minimums of {scene.settings.policy_file.name}: {_shown(measured)}")


def _shown(measured: "Headroom") -> str:
    sizes = [("disk", measured.disk_free), ("memory", measured.memory_available)]
    counts = [("inodes", measured.inodes_free), ("descriptors", measured.fds_free)]
    shown = [f"{name} {show_size(size)}" for name, size in sizes if size is not None]
    return ", ".join(shown + [f"{name} {count}" for name, count in counts if count is not None])


def control_groups(scene: Scene) -> Measured:
    """R018: by which ways the processes of an execution are found, frozen and ended."""
    from runner.adapters import cgroups

    wanted = scene.settings.cgroup
    if wanted == cgroups.OFF:
        return ok(f"off by its owner; by {_tiers(None)}")
    said = _said(scene)
    if said is None:
        return skip(_NO_DAEMON)
    place = said.get("cgroups")
    if place is None and wanted != cgroups.AUTO:
        fix = f"ls -ld {wanted} {wanted}/cgroup.procs"
        return Measured(Verdict.WARN, f"{wanted} cannot be used; by {_tiers(None)}", fix)
    if place is None and _undelegated(unit_path(scene.environ)):
        return Measured(Verdict.WARN, f"the service unit delegates none; by {_tiers(None)}", _INSTALL)
    return ok(f"by {_tiers(place)}")


def _tiers(place: object) -> str:
    return f"control groups below {place}, descendants, cookie" if place else "descendants, cookie"


def _undelegated(unit: Path) -> bool:
    try:
        return settings_of_unit(unit.read_text("utf-8", "replace")).get("Delegate") != "yes"
    except OSError:
        return False


def conflict(scene: Scene) -> Measured:
    """R019: no other machine has this one's keys."""
    from protocol.errors import Reason
    from runner.link import TWO_MACHINES

    said = _said(scene)
    if said is None:
        return skip(_NO_DAEMON)
    reason = str((said.get("session") or {}).get("reason") or "")
    if Reason.IDENTITY_CONFLICT in reason or TWO_MACHINES in reason:
        return Measured(Verdict.FAIL, reason, "runner enroll --replace JOIN-STRING   # on the one that is the copy")
    return ok("the control plane knows of none")


def leases(scene: Scene) -> Measured:
    """R020: the leases of what runs are renewed in time."""
    said = _said(scene)
    if said is None:
        return skip(_NO_DAEMON)
    found = said.get("leases") or {}
    held, lost, late, soonest_ms = (found.get(name) for name in ("held", "lost", "late", "soonest_ms"))
    if lost:
        return Measured(Verdict.WARN, f"{lost} lost, {held} held: each does as its start says", "runner ps")
    if late and isinstance(soonest_ms, int):
        value = f"{late} of {held} not renewed in time, the next is over in {show_age(max(soonest_ms, 0))}"
        return Measured(Verdict.WARN, value, "runner doctor --only R008")
    return ok(f"{held} held, renewed in time" if held else "none is held")


def _said(scene: Scene) -> dict[str, Any] | None:
    try:
        return call_control(socket_of(scene.settings), "status", {}, CALL_TIMEOUT_S)
    except ControlUnavailable:
        return None


CHECKS: Final = (
    Check("R016", "admission", admission),
    Check("R017", "headroom", headroom),
    Check("R018", "control groups", control_groups),
    Check("R019", "identity conflict", conflict),
    Check("R020", "leases", leases),
)
