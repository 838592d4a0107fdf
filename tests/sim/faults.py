"""What goes wrong in a world: each fault is one act upon it, and a world has only some kinds of them, so that they meet in many ways."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.commands import OnLoss
from runner.core.inputs import EnvelopeReceived
from tests.sim.host import Host
from tests.sim.link import DOWN, UP, Line, Weather
from tests.sim.story import short
from tests.sim.timeline import SECOND_US

if TYPE_CHECKING:
    from tests.sim.world import World

Fault = Callable[["World", Host], None]


def _for_a_while(world: "World", most_s: float, undo: Callable[[], None]) -> None:
    world.timeline.after(None, int(world.rng.random() * most_s * SECOND_US), undo)


# --- the network -------------------------------------------------------------------------------------------------


def cut(world: "World", host: Host) -> None:
    """Every connection breaks."""
    world.story.say("net", "of %s is cut", host.name)
    host.network.cut()


def stall(world: "World", host: Host) -> None:
    """Nothing gets through, one way or both, for a moment or for minutes."""
    ways = world.rng.choice([(UP,), (DOWN,), (UP, DOWN)])
    most_s = world.rng.choice([2, 20, 90])
    world.story.say("net", "of %s stalls: %s", host.name, ways)
    host.network.stall(*ways)

    def clear() -> None:
        if host.awake:
            world.story.say("net", "of %s is clear", host.name)
        host.network.clear()

    _for_a_while(world, most_s, clear)


def whisper(world: "World", host: Host) -> None:
    """One beat is answered late, and none after it: long enough for leases to run out that were counted from the wrong moment."""
    on_loss = world.rng.choice([OnLoss.STOP, OnLoss.FREEZE])
    world.users.start_on(host, on_loss=on_loss, run_ms=400_000, plain=True)
    late_us = world.rng.randrange(6, 23) * SECOND_US
    begin_us = world.rng.randrange(2, 15) * SECOND_US
    heard: list[str] = []

    def one_beat(_line: Line, way: str, frame: str) -> str:
        if way == UP and frame.startswith('{"t":"beat"') and '"res"' in frame:
            heard.append(frame)
            return frame if len(heard) == 1 else ""
        return frame

    def late() -> None:
        if not world.healing:
            world.story.say("net", "of %s is heard late by %d s, and then not at all", host.name, late_us // SECOND_US)
            host.network.taps.append(one_beat)
            host.network.stall(DOWN)

    def silent() -> None:
        host.network.clear()
        # What was held back arrives; nothing that is said from now on does.
        world.timeline.after(None, SECOND_US, lambda: None if world.healing else host.network.stall(UP, DOWN))

    world.timeline.after(None, begin_us, late)
    world.timeline.after(None, begin_us + late_us, lambda: None if world.healing else silent())
    world.linger((begin_us + late_us) / SECOND_US + 90)


def strand(world: "World", host: Host) -> None:
    """A machine is cut off while something movable runs on it, which is then wanted elsewhere."""
    other = world.rng.choice(world.hosts)
    on_loss = world.rng.choice([OnLoss.STOP, OnLoss.FREEZE])

    def gone(answer: dict[str, object]) -> None:
        after_us = world.rng.randrange(1, 30) * SECOND_US
        world.timeline.after(None, after_us, lambda: None if world.healing else host.network.stall(UP, DOWN))
        wanted_us = after_us + world.rng.randrange(60) * SECOND_US
        world.timeline.after(None, wanted_us, world.users.rerun_on, str(answer["id"]), other)

    world.users.start_on(host, on_loss=on_loss, run_ms=400_000, plain=True, then=gone)
    world.linger(170)


def absent(world: "World", host: Host) -> None:
    """A machine is out of reach, or asleep, for about as long as a lease lasts, and comes back while its attempt is still there."""
    for on_loss in (OnLoss.FREEZE, OnLoss.STOP):
        world.users.start_on(host, on_loss=on_loss, run_ms=400_000, plain=True)
    away_us = world.rng.choice([world.rng.randrange(40, 110), world.rng.randrange(56, 74)]) * SECOND_US
    begin_us = world.rng.randrange(2, 10) * SECOND_US
    asleep = world.rng.random() < 0.5

    def leave() -> None:
        if world.healing:
            return
        world.story.say(host.name, "is absent for %d s", away_us // SECOND_US)
        if asleep:
            host.suspend()
        else:
            host.network.stall(UP, DOWN)

    def come_back() -> None:
        world.wake(host)
        host.network.clear()

    world.timeline.after(None, begin_us, leave)
    world.timeline.after(None, begin_us + away_us, come_back)
    world.linger((begin_us + away_us) / SECOND_US + 40)


def relapse(world: "World", host: Host) -> None:
    """A daemon dies while it begins something, the next one begins it again, and the plane is out of reach by then."""
    daemon = world.daemons.get(host.name)
    if daemon is None or not host.awake:
        return
    on_loss = world.rng.choice([OnLoss.STOP, OnLoss.FREEZE])
    world.users.start_on(host, on_loss=on_loss, run_ms=400_000, plain=True)

    def stumble(happened: object) -> None:
        if isinstance(happened, EnvelopeReceived) and not world.healing:
            daemon.fuse = daemon.fuse or world.rng.randint(1, 4)
            host.network.stall(UP, DOWN)

    daemon.hearing = stumble
    world.linger(130)


def drowse(world: "World", host: Host) -> None:
    """The lid is closed at the moment of a welcome: it is heard when it has long ceased to be true, with commands behind it."""
    on_loss = world.rng.choice([OnLoss.STOP, OnLoss.FREEZE])
    most_s = world.rng.choice([70, 300])
    host.network.cut()
    world.users.start_on(host, on_loss=on_loss, run_ms=400_000, plain=True)

    def close_lid(_line: Line, way: str, frame: str) -> str:
        if way == DOWN and frame.startswith('{"t":"welcome"') and host.awake and not world.healing:
            host.network.taps.remove(close_lid)
            world.timeline.after(None, 0, host.suspend)
            _for_a_while(world, most_s, lambda: world.wake(host))
        return frame

    host.network.taps.append(close_lid)
    world.linger(most_s + 50)


def storm(world: "World", host: Host) -> None:
    """Frames are slow; on a lossy network they are lost, doubled and overtaken, too."""
    rng, calm = world.rng, host.network.weather
    host.network.weather = Weather(
        latency_ms=rng.choice([1, 30, 300]),
        jitter_ms=rng.choice([1, 100, 2_000]),
        slow_percent=rng.choice([0, 5, 30]),
        slow_ms=rng.choice([1_000, 15_000]),
        loss_percent=rng.choice([0, 5, 30]),
        double_percent=rng.choice([0, 5, 30]),
        lossy=calm.lossy,
    )
    world.story.say("net", "of %s is stormy: %s", host.name, host.network.weather)

    def calmed() -> None:
        if not world.healing:
            host.network.weather = calm

    _for_a_while(world, 60, calmed)


def hole(world: "World", host: Host) -> None:
    """Numbered commands are swallowed, safety ones are not."""
    world.story.say("net", "of %s swallows ctl", host.name)

    def swallow(_line: Line, way: str, frame: str) -> str:
        if way == DOWN and frame.startswith('{"t":"command"') and '"stream":"ctl"' in world.header_text(frame):
            return ""
        return frame

    host.network.taps.append(swallow)

    def mended() -> None:
        if swallow in host.network.taps:
            host.network.taps.remove(swallow)

    _for_a_while(world, 40, mended)


def replay(world: "World", host: Host) -> None:
    """A frame of a command from any time comes once more, from nobody."""
    recorded = world.recorded.get(host.name, [])
    for line in host.network.lines:
        if recorded and line.client.closed is None:
            line.client.arrive(world.rng.choice(recorded))
            world.story.say("net", "a command is replayed to %s", host.name)


def forge(world: "World", host: Host) -> None:
    """A command of another key, or with another payload, or a hint that names nothing."""
    recorded = world.recorded.get(host.name, [])
    for line in host.network.lines:
        if recorded and line.client.closed is None:
            frame = json.loads(world.rng.choice(recorded))
            envelope = json.loads(frame["env"])
            if world.rng.random() < 0.5:
                envelope["signatures"][0]["sig"] = envelope["signatures"][0]["sig"][::-1]
            else:
                envelope["signatures"][0]["keyid"] = "A" * 43
            frame["env"] = json.dumps(envelope, separators=(",", ":"))
            line.client.arrive(json.dumps(frame, separators=(",", ":")))
            world.story.say("net", "a command is forged for %s", host.name)


def lie(world: "World", host: Host) -> None:
    """From now on answers to beats hint at stops that nobody has signed."""
    world.story.say("net", "of %s lies in hints", host.name)

    def lying(_line: Line, way: str, frame: str) -> str:
        if way != DOWN or not frame.startswith('{"t":"beaten"'):
            return frame
        said = json.loads(frame)
        living = [attempt.name for attempt in host.directories][-3:]
        said["hints"] = [
            *said.get("hints", []),
            *({"attempt": name, "want": "stop", "cmd_id": "cm_lie"} for name in living),
        ]
        return json.dumps(said, separators=(",", ":"))

    host.network.taps.append(lying)

    def honest() -> None:
        if lying in host.network.taps:
            host.network.taps.remove(lying)

    _for_a_while(world, 60, honest)


# --- the daemon --------------------------------------------------------------------------------------------------


def kill_daemon(world: "World", host: Host) -> None:
    """kill -9, and a supervisor who takes his time."""
    daemon = world.daemons.get(host.name)
    if daemon is not None:
        daemon.die("is killed")


def burn_daemon(world: "World", host: Host) -> None:
    """It dies at one of its next sites."""
    daemon = world.daemons.get(host.name)
    if daemon is not None and daemon.fuse is None:
        daemon.fuse = world.rng.choice([1, 2, 3, 5, 8, 13, 21])


def stop_daemon(world: "World", host: Host) -> None:
    """SIGTERM."""
    daemon = world.daemons.get(host.name)
    if daemon is not None and host.awake:
        world.timeline.start(daemon.owner, daemon.stop(), "stop")


def hold_daemon(world: "World", host: Host) -> None:
    """SIGSTOP: starved, swapped out, in a debugger."""
    daemon = world.daemons.get(host.name)
    if daemon is None or not host.awake:
        return
    world.story.say(host.name, "the daemon is held up")
    world.timeline.hold(daemon.owner)

    def go_on() -> None:
        if host.awake:
            world.story.say(host.name, "the daemon goes on")
            world.timeline.go_on(daemon.owner)
        else:
            world.timeline.after(None, SECOND_US, go_on)

    _for_a_while(world, world.rng.choice([1, 20, 90]), go_on)


# --- the machine -------------------------------------------------------------------------------------------------


def suspend(world: "World", host: Host) -> None:
    """The lid is closed for seconds or half an hour."""
    if not host.awake:
        return
    host.suspend()
    _for_a_while(world, world.rng.choice([3, 30, 100, 1800]), lambda: world.wake(host))


def cut_power(world: "World", host: Host) -> None:
    """The machine loses power, and comes back."""
    world.lose_power(host)


def set_clock(world: "World", host: Host) -> None:
    """Somebody, or NTP, sets the wall clock."""
    host.wall_offset_ms += world.rng.choice([-1, 1]) * world.rng.choice([500, 30_000, 3_600_000])
    world.story.say(host.name, "its wall clock is set")


def fill_disk(world: "World", host: Host) -> None:
    """No room but what is reserved."""
    world.story.say(host.name, "its disk is full")
    host.full = True
    _for_a_while(world, 60, lambda: setattr(host, "full", False))


def break_disk(world: "World", host: Host) -> None:
    """Errors, for a moment: the journal cannot be trusted then."""
    world.story.say(host.name, "its disk breaks")
    host.broken = True
    _for_a_while(world, 15, lambda: setattr(host, "broken", False))


def slow_disk(world: "World", host: Host) -> None:
    """A commit takes seconds."""
    host.disk_ms = world.rng.choice([50, 500, 5_000])
    _for_a_while(world, 30, lambda: setattr(host, "disk_ms", 2))


# --- shims -------------------------------------------------------------------------------------------------------


def kill_shim(world: "World", host: Host) -> None:
    """The kernel wants memory."""
    shims = [d.shim for d in host.directories.values() if d.shim is not None]
    if shims and host.awake:
        shim = world.rng.choice(shims)
        world.story.say(host.name, "%s: its shim is killed", short(shim.attempt))
        world.witness.unguarded.add(shim.attempt)
        shim.end()


def hang_shim(world: "World", host: Host) -> None:
    """It does nothing, for a while or for ever."""
    shims = [d.shim for d in host.directories.values() if d.shim is not None and not d.shim.hung]
    if not shims or not host.awake:
        return
    shim = world.rng.choice(shims)
    world.story.say(host.name, "%s: its shim hangs", short(shim.attempt))
    shim.hang()
    if world.rng.random() < 0.7:
        _for_a_while(world, world.rng.choice([3, 60]), lambda: world.unhang(shim))


def fail_forks(world: "World", host: Host) -> None:
    """The fork server is gone, and its replacement does not come at once; or shims hang from birth."""
    world.witness.odds.fork_fails = world.rng.choice([0.0, 0.5])
    world.witness.odds.born_hung = world.rng.choice([0.0, 0.2])

    def mended() -> None:
        world.witness.odds.fork_fails = world.witness.odds.born_hung = 0.0

    _for_a_while(world, 30, mended)


# --- the control plane -------------------------------------------------------------------------------------------


def kill_plane(world: "World", _host: Host) -> None:
    """kill -9."""
    world.plane.die("is killed")


def burn_plane(world: "World", _host: Host) -> None:
    """It dies at one of its next sites."""
    if world.plane.fuse is None:
        world.plane.fuse = world.rng.choice([1, 2, 3, 5, 8])


def hold_plane(world: "World", _host: Host) -> None:
    """It is starved."""
    owner = world.plane.owner
    world.story.say("plane", "is held up")
    world.timeline.hold(owner)
    _for_a_while(world, world.rng.choice([2, 30]), lambda: world.timeline.go_on(owner))


def fill_plane(world: "World", _host: Host) -> None:
    """Its disk takes nothing."""
    world.story.say("plane", "its disk is full")
    world.plane.full = True
    _for_a_while(world, 30, lambda: setattr(world.plane, "full", False))


def slow_plane(world: "World", _host: Host) -> None:
    """Its commits take seconds."""
    world.plane.disk_ms = world.rng.choice([50, 3_000])
    _for_a_while(world, 30, lambda: setattr(world.plane, "disk_ms", 2))


def back_up(world: "World", _host: Host) -> None:
    """A backup is made, and some time later somebody comes back from it."""
    world.backup = world.plane.backup()

    def restore() -> None:
        if world.backup is not None and not world.healing:
            world.plane.restore(world.backup)

    if world.rng.random() < 0.7:
        _for_a_while(world, 60, restore)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        cut,
        stall,
        whisper,
        strand,
        absent,
        relapse,
        drowse,
        storm,
        hole,
        replay,
        forge,
        lie,
        kill_daemon,
        burn_daemon,
        stop_daemon,
        hold_daemon,
        suspend,
        cut_power,
        set_clock,
        fill_disk,
        break_disk,
        slow_disk,
        kill_shim,
        hang_shim,
        fail_forks,
        kill_plane,
        burn_plane,
        hold_plane,
        fill_plane,
        slow_plane,
        back_up,
    )
}
SCENES = frozenset({"whisper", "strand", "absent", "relapse", "drowse"})
"""These play once in a world: they begin with work of their own, and take their time."""
