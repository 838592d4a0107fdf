"""What a shim does at each word of a daemon, and the words that answer it (docs/shim.md §4)."""

from __future__ import annotations

import posix as os

from runner.shim import lease, machine, process, records, spec, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.child import Child
    from runner.shim.guard import Guard
    from runner.shim.links import Link

_GREETED_ONLY: Final = (
    wire.RELEASE, wire.LEASE, wire.STOP, wire.COLLECTED, wire.ARM, wire.TRIM, wire.INPUT, wire.SIGNAL, wire.LIMIT,
)  # fmt: skip
# What a viewer may say, and whoever speaks for one.
_OF_VIEWERS: Final = (wire.TYPE, wire.RESIZE, wire.SEEN, wire.LEAVE)
# Signals that are remembered by their id: a daemon says again only what had no answer before it died.
SIGNALS_MAX: Final = 256
_PHASES: Final = {
    machine.READY: wire.PHASE_READY,
    machine.RELEASED: wire.PHASE_RELEASED,
    machine.EXITED: wire.PHASE_EXITED,
}


def obey(guard: Guard, link: Link, kind: int, body: bytes) -> None:
    """Do what one message of `link` says. Raises WireError when its connection has to go."""
    if kind == wire.VIEW:
        _let_in(guard, link)
    elif link.viewer and kind in (wire.HELLO, wire.RENEW, *_GREETED_ONLY) and kind != wire.ARM:
        raise wire.WireError("not for a viewer to say")
    elif kind in _OF_VIEWERS:
        _look_on(guard, link, kind, body)
    elif kind == wire.HELLO:
        wire.unpack_hello(body)
        _greet(guard, link)
    elif kind == wire.RENEW:
        guard.step(machine.LEASE, lease=lease.Lease(*wire.unpack_lease(body)))
    elif not (link.greeted or link.viewer):
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
    elif kind == wire.LIMIT and guard.log is not None:
        guard.log.limit(wire.unpack_offset(body))
    elif kind == wire.INPUT:
        _feed(guard, link, body)
    elif kind == wire.SIGNAL:
        _signal(guard, link, body)


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


def fed(guard: Guard) -> bytes:
    """The FED frame as things stand."""
    stdin = guard.pipes.stdin
    return wire.pack_fed(stdin.received, stdin.credit, closed=stdin.closed)


def tell_taken(guard: Guard, viewers: list[bytes]) -> None:
    """Tell everybody how much of these viewers' typing was taken."""
    for viewer in viewers:
        guard.links.tell(_taken(guard, viewer))


def _taken(guard: Guard, viewer: bytes) -> bytes:
    terminal = guard.pipes.terminal
    received, credit = (0, 0) if terminal is None else terminal.counted(viewer)
    closed = guard.machine.state == machine.EXITED or (terminal is not None and terminal.fd < 0)
    return wire.pack_taken(viewer, received, credit, closed=closed)


def _greet(guard: Guard, link: Link) -> None:
    link.greeted = True
    guard.links.displace(link, keep_controller=guard.machine.state == machine.READY)
    _introduce(guard, link)


def _let_in(guard: Guard, link: Link) -> None:
    if link.greeted or guard.spec is None or guard.spec.tty is None:
        raise wire.WireError("a daemon is no viewer, and there is no terminal")
    if not link.viewer:
        guard.links.admit(link)
        _introduce(guard, link)


def _introduce(guard: Guard, link: Link) -> None:
    guard.links.send(link, welcome(guard))
    if guard.child is not None:
        guard.links.send(link, started(guard.child))
        if guard.spec is not None and guard.spec.stdin:
            guard.links.send(link, fed(guard))
    if guard.exit_frame:
        guard.links.send(link, guard.exit_frame)


def _look_on(guard: Guard, link: Link, kind: int, body: bytes) -> None:
    if not (link.greeted or link.viewer):
        raise wire.WireError("who looks on says so first")
    terminal, log = guard.pipes.terminal, guard.log
    if kind == wire.SEEN:
        link.seen = wire.unpack_seen(body)
    elif kind == wire.TYPE:
        viewer, offset, data = wire.unpack_type(body)
        if terminal is not None:
            terminal.take(viewer, offset, data)
            terminal.write()
            guard.pipes.watch()
        guard.links.send(link, _taken(guard, viewer))
    elif terminal is not None and log is not None:
        now_ns, now_ms = system.wall_ns(), system.boottime_ms()
        if kind == wire.LEAVE:
            changed, redraw = terminal.leave(wire.unpack_leave(body)), False
        else:
            viewer, gen, rows, cols, redraw = wire.unpack_resize(body)
            changed = terminal.resize(viewer, gen, rows, cols)
        if changed:
            log.note(records.resize_record(terminal.rows, terminal.cols, now_ns), now_ns, now_ms)
        elif redraw:
            terminal.redraw(now_ms)


def _feed(guard: Guard, link: Link, body: bytes) -> None:
    offset, data, end = wire.unpack_input(body)
    stdin = guard.pipes.stdin
    stdin.take(offset, data, end=end)
    guard.pipes.feed()
    guard.links.send(link, fed(guard))


def _signal(guard: Guard, link: Link, body: bytes) -> None:
    """To the child or to its whole tree, once for each id; CONT is not sent along, as it is with a stop."""
    name, number, to = wire.unpack_signal(body)
    if name not in guard.signalled:
        guard.signalled[name] = _reached(guard, number, tree=to == wire.TO_TREE)
        if len(guard.signalled) > SIGNALS_MAX:
            del guard.signalled[next(iter(guard.signalled))]
    guard.links.send(link, wire.pack_signalled(name, guard.signalled[name]))


def _reached(guard: Guard, number: int, *, tree: bool) -> int:
    child = guard.child
    if guard.tree is None or child is None or guard.machine.state == machine.EXITED:
        return 0
    if tree:
        return sum(process.send(each, number, alone=True) for each in guard.tree.find())
    if guard.story.status is not None:
        return 0
    # Not reaped yet, so the pid is still the child's.
    os.kill(child.pid, number)
    return 1


def _release(guard: Guard, body: bytes) -> None:
    assert guard.spec is not None
    try:
        guard.env = spec.environment(guard.spec, body)
    except spec.SpecError as exc:
        guard.step(machine.FAULT, detail=str(exc))
        return
    guard.step(machine.GO)
