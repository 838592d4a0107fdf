"""One life of a daemon: the shipped engine, pump and link on the modelled machine, until it dies.

It may die at any site: a commit, an effect, a frame, a step of its hands. What was only in its memory is gone; connections close.
"""

import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from websockets.frames import Close

from protocol.handshake import Standing
from protocol.keys import PrivateKey, b64url
from protocol.keyset import Root
from protocol.messages import Message
from runner.adapters.inlet import Inlet
from runner.adapters.typist import Typist
from runner.adapters.wake import WakeWatch
from runner.core.effects import Effect
from runner.core.engine import Engine, EngineIdentity
from runner.core.inputs import Input, Now, SessionDown
from runner.core.plans import Observed, Phase
from runner.core.policy import Policy
from runner.errors import JournalBroken
from runner.link import Link
from runner.pump import Footing, Pump
from tests.sim.disk import SimJournal
from tests.sim.hands import Hands
from tests.sim.host import Host
from tests.sim.timeline import MS_US, SECOND_US

if TYPE_CHECKING:
    from tests.sim.timeline import Task

INSTANCE_BYTES = 16
UNRELEASED_WAIT_S = 2.0
LOCK_POLL_US = 50 * MS_US


DAEMON: ContextVar["Daemon"] = ContextVar("daemon")
"""Whose task it is."""


class Died(BaseException):
    """This daemon is dead: unwinds what was running."""


class WatchedEngine(Engine):
    """The engine, with somebody who watches what goes in and out."""

    watch: Callable[[Input, Sequence[Effect]], None] = staticmethod(lambda _input, _effects: None)

    def step(self, happened: Input, now: Now) -> list[Effect]:
        """As the engine."""
        effects = super().step(happened, now)
        self.watch(happened, effects)
        return effects


class NoLogs:
    """The uplink: a simulation has no output."""

    def messages(self) -> list[Message]:
        """None."""
        return []

    def next_frame(self) -> None:
        """None."""

    def connected(self) -> None:
        """Nothing to do."""

    disconnected = connected

    def heard(self, _message: Message) -> None:
        """Nothing to do."""


class Daemon:
    """`down` is called once it is dead; its argument says whether by its own will."""

    def __init__(self, host: Host, policy: Policy, key: PrivateKey, root: Root, down: Callable[[str], None]) -> None:
        self.host = host
        self.owner = host.owner("daemon")
        self.owner.context.run(DAEMON.set, self)
        self.fuse: int | None = None
        """How many sites it passes before it dies."""
        self.engine: WatchedEngine | None = None
        self.link: Link
        self.pump: Pump | None = None
        self.hearing: Callable[[Input], None] = lambda _happened: None
        """Is shown every input of the engine."""
        self.hands = Hands(self)
        self._policy = policy
        self._key = key
        self._root = root
        self._down = down
        self._instance = b64url(host.rng.randbytes(INSTANCE_BYTES))
        self._lines: list[Any] = []
        self._tasks: list[Task[Any]] = []

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Come up."""
        self.host.story.say(self.host.name, "a daemon starts")
        self.begin(self._main())

    def begin(self, work: Any) -> None:
        """A task of this daemon."""
        task = self.host.timeline.start(self.owner, work, "daemon")
        self._tasks.append(task)
        task.add_done_callback(self._over)
        if len(self._tasks) > 64:
            self._tasks = [task for task in self._tasks if not task.done()]

    def guarded(self, do: Callable[..., None], *args: Any) -> None:
        """A callback in which it may die."""
        try:
            do(*args)
        except Died:
            return

    def site(self, name: str) -> None:
        """A point where it may die. Raises Died."""
        if self.fuse is None or not self.owner.alive:
            return
        self.fuse -= 1
        if self.fuse <= 0:
            self.die(f"dies: {name}")
            raise Died

    def die(self, why: str) -> None:
        """Now, and without a word."""
        if not self.owner.alive:
            return
        self.host.story.say(self.host.name, "the daemon %s", why)
        self.owner.die()
        self.host.owners.discard(self.owner)
        for hold in self.hands.holds.values():
            hold.close()
        for line in self._lines:
            line.client_vanished()
        self._down(why)

    def vanish(self) -> None:
        """Its machine has lost power: nobody is told, until somebody asks the machine that is up again."""
        self.owner.die()
        timeline = self.host.timeline
        for line in self._lines:
            line.client.over(Close(1006, ""))
            timeline.after(None, self.host.rng.randrange(40 * SECOND_US), line.server_gives_up)

    def _over(self, task: Any) -> None:
        if task.cancelled() or task.exception() is None or not self.owner.alive:
            return
        failure = task.exception()
        causes = [*_leaves(failure)]
        if any(isinstance(cause, JournalBroken) for cause in causes):
            self.die("exits: the journal is broken")
        elif not any(isinstance(cause, Died) for cause in causes):
            self.host.story.fail("the daemon crashed: %s", "".join(traceback.format_exception(failure)))

    async def _main(self) -> None:
        host = self.host
        journal = SimJournal(host, self.site, lambda writes: host.witness.committed(host, self, writes))
        image = await journal.load()
        identity = EngineIdentity(key=self._key, certificate=host.certificate, keyset=host.keyset, boot_id=host.boot_id)
        engine = self.engine = WatchedEngine(identity, self._policy, {"PATH": "/bin"}, image)
        engine.watch = self._stepped
        self.link = Link(
            inlet=Inlet(Path("/nowhere"), feed=lambda *_: False, say=lambda _fed: None),
            typist=Typist(Path("/nowhere"), NoLogs(), lambda _taken: None),  # type: ignore[arg-type]
            url="ws://plane",
            proxy=None,
            standing=self._standing,
            journal=journal,
            clock=self,
            uplink=NoLogs(),  # type: ignore[arg-type]
            note=self._note,
        )
        pump = self.pump = Pump(engine, journal, self, self.hands, host.headroom, WakeWatch(lambda: host.slept_ms).look)
        found = await self._observe()
        effects = engine.recover(found, self.now())
        host.witness.recovered(host, found, effects)
        await pump.perform(effects)
        self.begin(pump.run())
        self.begin(self.link.run(pump))

    async def _observe(self) -> list[Observed]:
        """As the adapter: shims behind their barrier are given a moment to go."""
        host = self.host
        with anyio.move_on_after(UNRELEASED_WAIT_S):
            while any(d.shim is not None and d.phase in (Phase.NONE, Phase.READY) for d in host.directories.values()):
                await host.timeline.sleep(LOCK_POLL_US)
        return [
            Observed(
                attempt=attempt,
                same_boot=directory.boot_id == host.boot_id,
                phase=directory.phase,
                lock_held=directory.shim is not None,
                exit=directory.exit,
                spec=directory.spec,
                shim_answers=directory.shim is None or not directory.shim.hung,
                child_alive=bool(host.seen(attempt)),
            )
            for attempt, directory in host.directories.items()
        ]

    def _stepped(self, happened: Input, effects: Sequence[Effect]) -> None:
        self.host.witness.stepped(self.host, happened, effects)
        self.hearing(happened)

    # --- what it is asked ---------------------------------------------------------------------------------------

    def put(self, happened: Input) -> None:
        """Something happened."""
        if self.pump is not None and self.owner.alive:
            self.pump.put(happened)

    def connected(self, line: Any) -> None:
        """A line of ours."""
        self._lines = [other for other in self._lines if other.client.closed is None]
        self._lines.append(line)

    async def stop(self) -> None:
        """SIGTERM: what was answered is remembered, nothing that runs is touched."""
        for task in self._tasks:
            task.cancel()
        await self.host.timeline.sleep(MS_US)
        if self.pump is not None and self.engine is not None:
            await self.pump.perform(self.engine.step(SessionDown(), self.now()))
        self.die("stops")

    # --- the port Clock -----------------------------------------------------------------------------------------

    def now(self) -> Now:
        """See the port."""
        return self.host.now()

    def entropy(self, count: int) -> bytes:
        """See the port."""
        return self.host.rng.randbytes(count)

    @property
    def boot_id(self) -> str:
        """See the port."""
        return self.host.boot_id

    # --- the link -----------------------------------------------------------------------------------------------

    def _standing(self) -> Standing:
        assert self.pump is not None and self.engine is not None, "it dials when it is up"
        footing: Footing = self.pump.footing
        return Standing(
            key=self._key,
            certificate=footing.certificate,
            root=self._root,
            keyset=self.engine.keyset,
            ctl=footing.ctl,
            out_head=footing.out_head,
            boot_id=self.boot_id,
            policy_digest=self.engine.policy.digest,
            version="0",
            platform="sim",
            hostname=self.host.name,
            attempts=self.engine.attempts.living,
            instance=self._instance,
        )

    def _note(self, event: str, fields: dict[str, str | int | None]) -> None:
        self.host.story.say(self.host.name, "%s %s", event, fields.get("reason", ""))


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]
    return [exc]
