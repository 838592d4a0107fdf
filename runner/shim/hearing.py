"""What a shim does at each word of a daemon, and the words that answer it (docs/shim.md §4)."""

from __future__ import annotations

from runner.shim import lease, machine, spec, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.child import Child
    from runner.shim.guard import Guard
    from runner.shim.links import Link

_GREETED_ONLY: Final = (wire.RELEASE, wire.LEASE, wire.STOP, wire.COLLECTED, wire.ARM, wire.TRIM)
_PHASES: Final = {
    machine.READY: wire.PHASE_READY,
    machine.RELEASED: wire.PHASE_RELEASED,
    machine.EXITED: wire.PHASE_EXITED,
}


def obey(guard: Guard, link: Link, kind: int, body: bytes) -> None:
    """Do what one message of `link` says. Raises WireError when its connection has to go."""
    if kind == wire.HELLO:
        wire.unpack_hello(body)
        _greet(guard, link)
    elif kind == wire.RENEW:
        guard.step(machine.LEASE, lease=lease.Lease(*wire.unpack_lease(body)))
    elif not link.greeted:
        if kind in _GREETED_ONLY:
            raise wire.WireError("a daemon speaks first")
    elif kind == wire.RELEASE:
        if link is guard.links.controller and guard.machine.state == machine.READY:
            _release(guard, body)
    elif kind == wire.LEASE:
        guard.step(machine.LEASE, lease=lease.Lease(*wire.unpack_lease(body)))
    elif kind == wire.STOP:
        grace_ms, who = wire.unpack_stop(body)
        guard.step(machine.STOP, number=grace_ms, text=who)
    elif kind == wire.COLLECTED:
        if guard.machine.state == machine.EXITED:
            guard.leave_ms = system.boottime_ms()
    elif kind == wire.ARM:
        link.armed = wire.unpack_offset(body)
    elif kind == wire.TRIM and guard.log is not None:
        guard.log.trim(wire.unpack_offset(body))


def welcome(guard: Guard) -> bytes:
    """The WELCOME frame as things stand."""
    held = guard.machine.tenure.lease
    return wire.pack_welcome(
        phase=_PHASES.get(guard.machine.state, wire.PHASE_RUNNING),
        first=guard.log.first if guard.log else 0,
        end=guard.log.end if guard.log else 0,
        lease_token=held.token if held else 0,
        pid=guard.story.pid,
        start=guard.story.start,
    )


def started(child: Child) -> bytes:
    """The STARTED frame."""
    return wire.pack_started(child.pid, child.start, child.started_ns)


def _greet(guard: Guard, link: Link) -> None:
    link.greeted = True
    guard.links.displace(link, keep_controller=guard.machine.state == machine.READY)
    guard.links.send(link, welcome(guard))
    if guard.child is not None:
        guard.links.send(link, started(guard.child))
    if guard.exit_frame:
        guard.links.send(link, guard.exit_frame)


def _release(guard: Guard, body: bytes) -> None:
    assert guard.spec is not None
    try:
        guard.env = spec.environment(guard.spec, body)
    except spec.SpecError as exc:
        guard.step(machine.FAULT, detail=str(exc))
        return
    guard.step(machine.GO)
