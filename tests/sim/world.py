"""One seeded world: machines, networks, a control plane, people, and what goes wrong; then everything heals, and all must come to its end.

`World(seed).run()` gives a Result. Everything is drawn from one `random.Random(seed)`; time is the timeline's; nothing else is read, so
the same seed tells the same story. Safety is held by `witness` at every step; here is the healing, and what must be true after it.
"""

import base64
import json
import os
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import anyio.to_thread

import controlplane.gateway
import runner.link
from protocol.commands import STREAM_OF, Stream
from protocol.handshake import open_certificate
from protocol.ids import Digest
from protocol.keys import PrivateKey, b64url
from runner.core.inputs import OwnerAdmission
from runner.core.plans import Admission
from runner.core.policy import Policy
from tests.sim.daemon import DAEMON, Daemon
from tests.sim.ends import final, open_ends
from tests.sim.faults import FAULTS, SCENES
from tests.sim.host import GIB, Host, Program, Tree
from tests.sim.keys import cheap_keys
from tests.sim.link import DOWN, Line, Network, Weather
from tests.sim.plane import NOW_MS, Plane, make_keys
from tests.sim.shims import Shim
from tests.sim.story import InvariantBroken, Story
from tests.sim.timeline import SECOND_US, Spinning, timeline
from tests.sim.users import OWNER, Users
from tests.sim.witness import Told, Witness

HEAL_S = 480
"""Everything has come to its end so long after everything is well. The longest chain: a lease runs out, is granted anew, its attempt is
thawed and runs on, then a stop with the longest grace; beside it a hung shim is found out."""
QUIET_S = 12
"""How long an idle world is watched for whether it is idle."""
LOOK_S = 2.0
STEPS_PER_S_MAX = 400
"""Handles per second of simulated time while everything heals."""
IDLE_STEPS_PER_S_MAX = 60
"""In an idle world: one beat in ten seconds, a look at the session each second."""
TICK_S = 3.0
"""How often sessions are looked at; the shipped second costs a tenth of a world's time."""
RESTART_US = 2 * SECOND_US
RECORDED_MAX = 60
SHORT = 0.7
"""So many worlds are over in seconds: most defects need few events, and a short story is read sooner."""
REAL_KEYS: Final = os.environ.get("SIM_KEYS") == "real"
"""Ed25519 instead of cheap keys: the same stories, told slower."""
POLICY = Policy(
    digest=Digest("sha256:" + "11" * 32),
    kinds=frozenset(kind for kind, stream in STREAM_OF.items() if stream is Stream.CTL),
    roots=("/srv/work", "/srv/repos"),
    concurrent_max=6,
    grace_ms_max=60_000,
    disk_free_min=2 * GIB,
)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a world."""

    seed: int
    broken: str | None
    digest: str | None
    steps: int
    """Handles that ran."""
    inputs: int
    """Inputs of engines."""
    simulated_s: float
    commands: int
    spawned: int
    settled: int
    faults: dict[str, int]
    reached: Counter[str]
    """What happened at all."""


class World:
    """One seed."""

    def __init__(
        self, seed: int, *, tell: bool = False, short: bool | None = None, only: list[str] | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.timeline = timeline(self._failed)
        self.story = Story(self.timeline)
        self.witness = Witness(self.timeline, self.story)
        self.programs: dict[str, Program] = {}
        self.hosts: list[Host] = []
        self.daemons: dict[str, Daemon] = {}
        self.recorded: dict[str, list[str]] = {}
        self.backup: bytes | None = None
        self.healing = False
        self._linger_s = 0.0
        self.faults: dict[str, int] = {}
        self._tell = tell
        self._short = short
        self._only = only
        self._keys: dict[str, PrivateKey] = {}
        self._looked_us = 0

    # --- the beginning ------------------------------------------------------------------------------------------

    def _make(self) -> None:
        rng = self.rng
        names = [f"rn_{number + 1}" for number in range(rng.choice([1, 1, 2]))]
        self._keys = {name: PrivateKey(name.encode().ljust(32, b"-")) for name in names}
        keys = make_keys()
        self.root = keys.root
        seal_x = b64url(b"s" * 32)
        runners = [(name, key, seal_x) for name, key in self._keys.items()]
        self.plane = Plane(self.timeline, rng, self.story, keys, runners)
        self.plane.died = lambda: self._later(RESTART_US, 20, self._start_plane)
        self.witness.plane = self.plane
        for name in names:
            self.hosts.append(self._host(name, keys))
        self.witness.hosts = self.hosts
        self.users = Users(self, rng)
        drawn_kinds = rng.sample(sorted(FAULTS), rng.randint(0, 8))
        self.kinds = drawn_kinds if self._only is None else [*self._only]
        drawn = rng.random() < SHORT
        self.short = drawn if self._short is None else self._short
        self.story.say("world", "seed %d: %s; %s; %s", self.seed, names, "short" if self.short else "long", self.kinds)
        self.plane.start()
        for host in self.hosts:
            self._start_daemon(host)

    def _host(self, name: str, keys: Any) -> Host:
        rng = self.rng
        lossy = rng.random() < 0.3
        loss, double = (rng.choice([0, 3, 15]), rng.choice([0, 3, 15])) if lossy else (0, 0)
        weather = Weather(
            latency_ms=rng.choice([1, 20, 150]),
            jitter_ms=rng.choice([1, 20, 400]),
            loss_percent=loss,
            double_percent=double,
            lossy=lossy,
        )
        network = Network(self.timeline, rng, self.story, weather, listen=self.plane.listen)
        sealed = self.plane.rows("SELECT certificate FROM runners WHERE id = ?", name)[0]["certificate"]
        certificate = open_certificate(sealed.encode(), keys.keyset.value).value
        host = Host(
            name,
            self.timeline,
            rng,
            self.story,
            self.witness,
            network,
            certificate,
            keys.keyset,
            self.programs,
            wall_offset_ms=NOW_MS + rng.choice([0, 0, 5_000, -300_000]),
            lossy=lossy,
            cgroup=rng.random() < 0.3,
        )
        network.reachable = lambda: host.awake
        network.taps += [self.witness.tap, lambda line, way, frame: self._record(host, line, way, frame)]
        self.witness.told[name] = Told()
        host.trees["wt_foreign"] = Tree("somebody", 0, half=False, foreign=True)
        return host

    def _record(self, host: Host, _line: Line, way: str, frame: str) -> str:
        if way == DOWN:
            if self.plane.burns("a frame is sent"):
                return ""
            if frame.startswith('{"t":"command"'):
                recorded = self.recorded.setdefault(host.name, [])
                recorded.append(frame)
                del recorded[:-RECORDED_MAX]
            return frame
        daemon = self.daemons.get(host.name)
        if daemon is not None:
            daemon.site("a frame is sent")
        return frame

    @staticmethod
    def header_text(frame: str) -> str:
        """The payload of a command's frame."""
        return base64.b64decode(json.loads(json.loads(frame)["env"])["payload"]).decode()

    # --- life and death -----------------------------------------------------------------------------------------

    def _later(self, least_us: int, most_s: int, do: Any, *args: Any) -> None:
        most_us = 0 if self.healing else self.rng.randrange(most_s * SECOND_US)
        self.timeline.after(None, least_us + most_us, do, *args)

    def _start_plane(self) -> None:
        self.plane.start()

    def _start_daemon(self, host: Host) -> None:
        if host.name in self.daemons:
            return
        if not host.awake:
            self.timeline.after(None, SECOND_US, self._start_daemon, host)
            return
        daemon = Daemon(host, POLICY, self._keys[host.name], self.root, lambda _why: self._daemon_down(host, daemon))
        host.network.connected = daemon.connected
        self.daemons[host.name] = daemon
        daemon.start()

    def _daemon_down(self, host: Host, daemon: Daemon) -> None:
        if self.daemons.get(host.name) is daemon:
            del self.daemons[host.name]
            self._later(RESTART_US, 40, self._start_daemon, host)

    def lose_power(self, host: Host) -> None:
        """All of a machine is gone at once."""
        self.story.say(host.name, "LOSES POWER")
        daemon = self.daemons.pop(host.name, None)
        host.lose_power()
        if daemon is not None:
            daemon.vanish()
        self._later(5 * SECOND_US, 40, self._start_daemon, host)

    def wake(self, host: Host) -> None:
        """A lid is opened."""
        host.resume()

    def linger(self, seconds: float) -> None:
        """For so long, at least, nothing heals."""
        self._linger_s = max(self._linger_s, self.timeline.now_us / SECOND_US + seconds)

    def unhang(self, shim: Shim) -> None:
        """It goes on."""
        if not shim.host.awake:
            self.timeline.after(None, SECOND_US, self.unhang, shim)
        elif shim.owner.alive:
            self.story.say(shim.host.name, "%s: its shim goes on", shim.attempt.name)
            self.timeline.go_on(shim.owner)

    # --- running ------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Chaos, healing, rest."""
        with _seams(self):
            try:
                self._make()
                self._chaos()
                self._heal()
            except InvariantBroken:
                pass
            except Spinning as exc:
                self.story.broken = self.story.broken or f"spins: {exc}"
            self.story.over = True
            self._bury()
        broken = self.story.broken
        return Result(
            self.seed,
            broken,
            self.story.digest() if self._tell or broken else None,
            self.timeline.steps,
            self.witness.steps,
            self.timeline.now_us / SECOND_US,
            len(self.witness.signed),
            len(self.witness.ran),
            sum(len(told.settlements) for told in self.witness.told.values()),
            self.faults,
            self.witness.reached,
        )

    def _bury(self) -> None:
        """Dead processes leave coroutines behind that were never closed: that is what a kill is."""
        with mock.patch.object(sys, "unraisablehook", mock.Mock(return_value=None)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.timeline.bury()

    def _go(self, seconds: float) -> None:
        self.timeline.run(self.timeline.now_us + int(seconds * SECOND_US))
        if self.story.broken is not None:
            raise InvariantBroken(self.story.broken)
        self.witness.look()

    def _chaos(self) -> None:
        rng = self.rng
        ends_us = int((rng.uniform(3, 20) if self.short else rng.uniform(20, 100)) * SECOND_US)
        ask_s = rng.choice([1, 3]) if self.short else rng.choice([3, 6, 15])
        fault_s = rng.choice([0.5, 3]) if self.short else rng.choice([1.5, 6, 20])
        next_ask = next_fault = 0.0
        self._go(rng.uniform(0, 3))
        now_s = self.timeline.now_us / SECOND_US
        next_ask, next_fault = now_s, now_s + rng.expovariate(1 / fault_s)
        while self.timeline.now_us < ends_us:
            if next_ask <= next_fault or not self.kinds:
                self._go(max(next_ask - self.timeline.now_us / SECOND_US, 0))
                self.users.act()
                next_ask += rng.expovariate(1 / ask_s)
            else:
                self._go(max(next_fault - self.timeline.now_us / SECOND_US, 0))
                kind = rng.choice(self.kinds)
                if kind in SCENES:
                    self.kinds.remove(kind)
                self.faults[kind] = self.faults.get(kind, 0) + 1
                FAULTS[kind](self, rng.choice(self.hosts))
                next_fault += rng.expovariate(1 / fault_s)
        self._go(max(self._linger_s - self.timeline.now_us / SECOND_US, 0))

    def _heal(self) -> None:
        """Everything is well from here on."""
        self.story.say("world", "everything heals")
        self.healing = True
        self.plane.full, self.plane.disk_ms, self.plane.fuse = False, 2, None
        self.witness.odds.fork_fails = self.witness.odds.born_hung = 0.0
        self.timeline.go_on(self.plane.owner)
        self._start_plane()
        for host in self.hosts:
            self._heal_host(host)
        if self.rng.random() < 0.5:
            for execution in self.users.executions:
                self.users.stop_one(execution)
        self._rest()

    def _rest(self) -> None:
        """Until everything has come to its end; then a while in which nothing happens."""
        begun_us, begun_steps = self.timeline.now_us, self.timeline.steps
        while (left := open_ends(self)) and self.timeline.now_us - begun_us < HEAL_S * SECOND_US:
            self._go(LOOK_S)
        seconds = max((self.timeline.now_us - begun_us) / SECOND_US, 1)
        if left:
            self.story.fail("not over %d s after everything was well: %s", HEAL_S, "; ".join(left[:4]))
        busy = (self.timeline.steps - begun_steps) / seconds
        self.story.must(busy <= STEPS_PER_S_MAX, "%d steps a second while it healed", busy)
        final(self)
        begun_steps = self.timeline.steps
        self._go(QUIET_S)
        busy = (self.timeline.steps - begun_steps) / QUIET_S
        self.story.must(busy <= IDLE_STEPS_PER_S_MAX, "%d steps a second in an idle world", busy)
        # Something may have been told a moment ago: of a process that was found and ended, say.
        self._go(QUIET_S if open_ends(self) else 0)
        self.story.must(not open_ends(self), "it came to rest, and began again: %s", open_ends(self))
        self.story.say("world", "is at rest")

    def _heal_host(self, host: Host) -> None:
        self.wake(host)
        host.full = host.broken = False
        host.disk_ms = 2
        host.network.weather = Weather(lossy=False)
        del host.network.taps[2:]
        host.network.clear()
        self._start_daemon(host)
        daemon = self.daemons[host.name]
        daemon.fuse = None
        self.timeline.go_on(daemon.owner)
        self.timeline.after(None, 3 * SECOND_US, self._open, host)
        for directory in host.directories.values():
            shim = directory.shim
            if shim is not None and shim.hung:
                if self.rng.random() < 0.5:
                    self.unhang(shim)
                else:
                    self.users.stop_one(shim.attempt.execution_id)

    def _open(self, host: Host) -> None:
        daemon = self.daemons.get(host.name)
        if daemon is None or daemon.pump is None:
            self.timeline.after(None, SECOND_US, self._open, host)
            return
        daemon.put(OwnerAdmission(Admission.OPEN, OWNER))

    def _failed(self, context: dict[str, Any]) -> None:
        """What nobody caught; tasks are looked at where they end."""


class _Quiet:
    """A logger of the control plane; what it calls an exception is one."""

    def __init__(self, world: World) -> None:
        self._world = world

    def info(self, *_args: Any, **_fields: Any) -> None:
        """Nobody reads it."""

    warning = error = debug = info

    def exception(self, event: str, **_fields: Any) -> None:
        """Something that should never be caught there."""
        self._world.story.fail("the plane: %s: %s", event, traceback.format_exc())


async def _inline(work: Any, *args: Any, **_options: Any) -> Any:
    """In the place of a worker thread."""
    return work(*args)


@contextmanager
def _seams(world: World) -> Iterator[None]:
    """What a world puts in the place of the outside: keys, the dialled connection, threads, and where logs go."""
    quiet = _Quiet(world)
    with ExitStack() as stack:
        stack.enter_context(cheap_keys(not REAL_KEYS))
        stack.enter_context(mock.patch.object(runner.link, "dial", _dial))
        stack.enter_context(mock.patch.object(anyio.to_thread, "run_sync", _inline))
        stack.enter_context(mock.patch.object(controlplane.gateway, "_TICK_S", TICK_S))
        for name, module in list(sys.modules.items()):
            if name.startswith("controlplane.") and hasattr(module, "_log"):
                stack.enter_context(mock.patch.object(module, "_log", quiet))
        yield


def _dial(url: str, proxy: str | None) -> Any:
    """To the network of the daemon that dials."""
    daemon = DAEMON.get()
    return daemon.host.network.dial(url, proxy)
