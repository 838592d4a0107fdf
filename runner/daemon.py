"""The composition root: the only file that joins ports to adapters, and the order in which a daemon comes up and goes.

Up: lock, identity, policy, journal, shims; recovery; then the socket and the network. Down: nothing that runs is touched.
"""

import asyncio
import contextlib
import functools
import os
import platform
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import anyio
import structlog
from anyio.abc import TaskGroup

from protocol.execution import AttemptState
from protocol.groups import ungrouped
from protocol.handshake import Standing
from protocol.keys import b64url
from protocol.messages import InputFed, Taken
from protocol.session import BeatAnswered
from protocol.version import VERSION
from runner import failpoints
from runner.adapters import cgroups
from runner.adapters.attemptdir import ShimSettings, exit_of
from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories
from runner.adapters.control import serve_control
from runner.adapters.git import Git
from runner.adapters.headroom import Gauge
from runner.adapters.inlet import Inlet
from runner.adapters.journal import SqliteJournal
from runner.adapters.keeper import Keeper
from runner.adapters.keystore import Identity, Keystore
from runner.adapters.policyfile import load_policy
from runner.adapters.redactor import Redactor
from runner.adapters.retention import Kept, Retention
from runner.adapters.shims import ShimAdapter
from runner.adapters.succession import IDENTITY, JOURNAL, carry_through
from runner.adapters.system import StateLock, SystemClock, make_private, raise_fd_limit, sd_notify
from runner.adapters.tools import ShimTools
from runner.adapters.typist import Typist
from runner.adapters.uplink import Uplink, read_ack
from runner.adapters.wake import WakeWatch
from runner.adapters.worktrees import GitWorktrees
from runner.config import Settings
from runner.core.engine import Engine, EngineIdentity
from runner.core.environment import inherited
from runner.core.gate import disk_wanted
from runner.core.inputs import Now, SessionDown
from runner.core.policy import Policy
from runner.core.takeback import sealed_secrets
from runner.desk import Desk
from runner.ending import Ending
from runner.errors import JournalBroken
from runner.hands import DaemonHands
from runner.link import Link
from runner.logdesk import LogDesk
from runner.logsink import Sink
from runner.pump import Footing, Pump
from runner.strays import StrayDesk

PRIVATE_UMASK: Final = 0o077
INSTANCE_BYTES: Final = 16
"""What tells this daemon from any other that holds its key: as much as an id has."""
FENCES_KEPT_MS: Final = 7 * 24 * 60 * 60 * 1000
"""Longer than an attempt is between its fence and its directory, by far."""
HOUSEKEEPING_S: Final = 3600.0
"""Pruning is for weeks-old things: once an hour is plenty, and wakes an idle laptop rarely."""


async def run_daemon(settings: Settings, sink: Sink, *, ready: Callable[[], None] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. `sink` is where its log goes.

    Raises:
        AnotherDaemon, NotEnrolled, ConfigError: before anything was admitted.
    """
    umask = os.umask(PRIVATE_UMASK)
    for directory in (settings.state_dir, settings.runtime_dir):
        make_private(directory)
    log = structlog.get_logger()
    status = 0
    try:
        with ungrouped(), StateLock(settings.state_dir / "runner.lock"):
            carry_through(settings.state_dir)
            daemon = Daemon(settings, umask, sink)
            await daemon.run(ready or (lambda: None))
    except* JournalBroken as broken:
        log.error("journal.broken", detail=str(broken.exceptions[0]))
        status = 1
    return status


class Daemon:
    """One daemon's life."""

    def __init__(self, settings: Settings, umask: int, sink: Sink) -> None:
        self._settings = settings
        self._umask = umask
        self._sink = sink
        self._clock = SystemClock()
        self._instance = b64url(self._clock.entropy(INSTANCE_BYTES))
        self._log = structlog.get_logger()
        self._keystore = Keystore(settings.state_dir / IDENTITY)
        self._identity: Identity = self._keystore.load()
        self._policy: Policy = self._read_policy()

    async def run(self, ready: Callable[[], None]) -> None:
        """Come up, pump, go."""
        raise_fd_limit()
        async with AsyncExitStack() as stack:
            journal = await stack.enter_async_context(SqliteJournal(self._settings.state_dir / JOURNAL))
            engine = Engine(self._engine_identity(), self._policy, inherited(os.environ), await journal.load())
            shims = self._shims(engine)
            stack.callback(shims.close)
            shims.start()
            redactor = self._redactor(engine)
            uplink = self._uplink(shims, redactor, lambda: link.wake())
            stack.callback(uplink.close)
            inlet, typist = self._downward(shims, lambda said: link.say(said))
            link = Link(
                url=self._identity.url,
                proxy=self._settings.proxy,
                standing=lambda: self._standing(engine, pump.footing),
                journal=journal,
                clock=self._clock,
                uplink=uplink,
                inlet=inlet,
                typist=typist,
                note=lambda event, fields: hands.note(event, fields),
            )
            keeper = self._keeper(
                lambda: self._standing(engine, pump.footing), lambda kept, at: pump.put_first(kept, at)
            )
            stack.callback(keeper.close)
            async with anyio.create_task_group() as tasks:
                worktrees = self._worktrees(shims)
                hands = DaemonHands(
                    tasks=tasks,
                    put=lambda happened: pump.put(happened),
                    shims=shims,
                    worktrees=worktrees,
                    link=link,
                    uplink=uplink,
                    keeper=keeper,
                    keystore=self._keystore,
                    redactor=redactor,
                )
                gauge = self._gauge()
                pump = Pump(engine, journal, self._clock, hands, gauge.measure, WakeWatch().look)
                keeper.start()
                await self._recover(engine, pump, shims, uplink, hands, redactor)
                retention = self._retention(journal, engine, shims)
                desk, ending = self._owners_side(engine, pump, shims, uplink, link, gauge, hands, retention)
                await tasks.start(serve_control, self._settings.runtime_dir / "control.sock", desk.answer)
                tasks.start_soon(pump.run)
                tasks.start_soon(link.run, pump)
                self._begin_upkeep(tasks, journal, shims, worktrees, retention)
                self._log.info("daemon.started", pid=os.getpid(), runner=engine.me.runner, inc=engine.me.inc)
                sd_notify("READY=1")
                ready()
                await ending.told()
                await ending.carry_out()
                tasks.cancel_scope.cancel()
            # What was answered since the last commit is remembered, so that a clean end owes nobody anything.
            await pump.perform(engine.step(SessionDown(), self._clock.now()))
        self._log.info("daemon.stopped", pid=os.getpid())

    # --- parts --------------------------------------------------------------------------------------------------

    def _read_policy(self) -> Policy:
        policy: Policy
        policy, problem = load_policy(self._settings.policy_file, [str(self._settings.state_dir / "worktrees")])
        if problem is None:
            self._log.info("policy.loaded", policy_digest=policy.digest)
        else:
            # Nothing but stops is admitted: the owner's word is missing, and ours is no substitute.
            self._log.error("policy.refused", detail=problem)
        return policy

    def _engine_identity(self) -> EngineIdentity:
        return EngineIdentity(
            key=self._identity.key,
            certificate=self._identity.certificate.value,
            keyset=self._identity.keyset,
            boot_id=self._clock.boot_id,
        )

    def _keeper(self, standing: Callable[[], Standing], put_first: Callable[[BeatAnswered, Now], None]) -> Keeper:
        """Renewals beside the event loop; what comes of them is handed to the loop, for when that goes on."""
        loop = asyncio.get_running_loop()

        def hand_over(answered: BeatAnswered, got: Now) -> None:
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(put_first, answered, got)

        return Keeper(
            url=self._identity.url,
            proxy=self._settings.proxy,
            state_dir=self._settings.state_dir,
            standing=standing,
            clock=self._clock,
            answered=hand_over,
            note=lambda event, fields: self._log.warning(event, **fields),
        )

    def _shims(self, engine: Engine) -> ShimAdapter:
        certificate = self._identity.certificate.value
        return ShimAdapter(
            ShimSettings(
                state_dir=self._settings.state_dir,
                runner=certificate.runner,
                boot_id=self._clock.boot_id,
                epoch=self._clock.now().boot_ms,
                umask=self._umask,
                segment_bytes=self._settings.segment_bytes,
                spool_bytes=self._settings.spool_bytes,
                floor_bytes=self._settings.floor_bytes,
                cgroups=cgroups.base(self._settings.cgroup),
            ),
            outlive=lambda: engine.policy.outlive,
            on_loss=lambda why: self._log.warning("forkserver.lost", detail=why),
        )

    def _redactor(self, engine: Engine) -> Redactor:
        return Redactor(
            self._settings.state_dir / ATTEMPTS_DIR,
            runner=engine.me.runner,
            seal_seed=self._identity.seal_seed,
            sealed=functools.partial(sealed_secrets, engine),
            note=lambda event, fields: self._log.warning(event, **fields),
            spare_bytes=self._settings.spool_bytes - 2 * self._settings.segment_bytes,
        )

    def _uplink(self, shims: ShimAdapter, redactor: Redactor, wake: Callable[[], None]) -> Uplink:
        uplink = Uplink(
            wake=wake,
            arm=lambda name, end: shims.arm(name, redactor.looked(name, end)),
            trim=lambda name, acked: shims.trim(name, redactor.kept_from(name, acked)),
            failed=self._complain_of_log,
        )
        shims.on_growth = uplink.grew
        return uplink

    def _downward(self, shims: ShimAdapter, say: Callable[[InputFed | Taken], None]) -> tuple[Inlet, Typist]:
        """What goes to shims from the session: bytes for stdin, and what viewers of PTYs type."""
        inlet = Inlet(
            self._settings.state_dir,
            feed=lambda name, offset, data, end: shims.input(name, offset, data, end=end),
            say=say,
        )
        typist = Typist(self._settings.state_dir, shims, say)
        shims.on_fed, shims.on_taken, shims.on_adopted = inlet.fed, typist.taken, typist.adopted
        return inlet, typist

    def _owners_side(
        self,
        engine: Engine,
        pump: Pump,
        shims: ShimAdapter,
        uplink: Uplink,
        link: Link,
        gauge: Gauge,
        hands: DaemonHands,
        retention: Retention,
    ) -> tuple[Desk, Ending]:
        ending = Ending(
            engine=engine,
            pump=pump,
            clock=self._clock,
            owing=lambda: link.status.up and (link.unanswered or uplink.backlog_bytes > 0),
        )
        desk = Desk(
            version=VERSION,
            name=self._identity.certificate.value.name,
            engine=engine,
            shims=shims,
            uplink=uplink,
            link=link,
            clock=self._clock,
            put=pump.put,
            settle=pump.put_and_wait,
            measure=gauge.measure,
            end=ending.ask,
            orphans=StrayDesk(engine=engine, shims=shims, settle=pump.put_and_wait, sweep_of=hands.sweep_of).answer,
            logs=LogDesk(self._sink),
            retention=retention,
        )
        return desk, ending

    def _retention(self, journal: SqliteJournal, engine: Engine, shims: ShimAdapter) -> Retention:
        disk = Gauge([self._settings.state_dir])

        def wanted() -> int:
            room = disk.measure()
            return 0 if room.disk_free is None else max(disk_wanted(room, engine.policy) - room.disk_free, 0)

        return Retention(
            state_dir=self._settings.state_dir,
            kept=Kept(keep_ms=self._settings.keep_ms, host_bytes=self._settings.host_bytes),
            clock=self._clock,
            settled=journal.settled,
            living=lambda: {attempt.name for attempt in engine.attempts.living_names()},
            limit=shims.limit,
            wanted=wanted,
            note=lambda event, fields: self._log.info(event, **fields),
        )

    def _gauge(self) -> Gauge:
        state_dir = self._settings.state_dir
        return Gauge(
            [state_dir, state_dir / "worktrees"], lambda fault: self._log.warning("headroom.failed", detail=fault)
        )

    def _worktrees(self, shims: ShimAdapter) -> GitWorktrees:
        certificate = self._identity.certificate.value
        return GitWorktrees(
            self._settings.state_dir,
            runner=certificate.runner,
            inc=certificate.inc,
            git=Git(self._settings.git),
            tools=ShimTools(shims),
            clock=self._clock,
        )

    def _standing(self, engine: Engine, footing: Footing) -> Standing:
        """What the runner brings to a handshake, as of now."""
        return Standing(
            key=self._identity.key,
            certificate=footing.certificate,
            root=self._identity.root,
            keyset=engine.keyset,
            ctl=footing.ctl,
            out_head=footing.out_head,
            boot_id=self._clock.boot_id,
            policy_digest=engine.policy.digest,
            version=VERSION,
            platform=platform.platform()[:200],
            hostname=socket.gethostname()[:200],
            attempts=engine.attempts.living,
            instance=self._instance,
        )

    # --- start and upkeep ---------------------------------------------------------------------------------------

    async def _recover(
        self,
        engine: Engine,
        pump: Pump,
        shims: ShimAdapter,
        uplink: Uplink,
        hands: DaemonHands,
        redactor: Redactor,
    ) -> None:
        """Bring every attempt and every pending command to where it belongs, before any new one is heard."""
        found = await hands.completed(await shims.observe(), engine.attempts.living_names())
        failpoints.hit("recovery.observed")
        effects = engine.recover(found, self._clock.now())
        failpoints.hit("recovery.decided")
        settled = {row.attempt.name for row in engine.attempts.rows.values() if row.state is AttemptState.SETTLED}
        for directory in attempt_directories(self._settings.state_dir):
            if directory.name in settled and read_ack(directory) is None:
                reader = functools.partial(redactor.reader, directory.name, directory, ended=True)
                record = exit_of(directory)
                end = 0 if record is None else record.log_end
                uplink.track(directory.name, directory, finished=True, end=end, reader=reader)
        await pump.perform(effects)
        failpoints.hit("recovery.performed")
        self._log.info("recovery.finished", found=len(found), living=engine.attempts.living)

    def _begin_upkeep(
        self,
        tasks: TaskGroup,
        journal: SqliteJournal,
        shims: ShimAdapter,
        worktrees: GitWorktrees,
        retention: Retention,
    ) -> None:
        tasks.start_soon(self._keep_house, journal, shims)
        tasks.start_soon(worktrees.keep_trash_empty, self._complain_of_trash)
        tasks.start_soon(retention.keep)

    def _complain_of_log(self, attempt: str, fault: str) -> None:
        self._log.warning("log.failed", attempt=attempt, detail=fault)

    def _complain_of_trash(self, fault: str) -> None:
        self._log.warning("worktree.failed", detail=fault)

    async def _keep_house(self, journal: SqliteJournal, shims: ShimAdapter) -> None:
        while True:
            now_ms = self._clock.now().wall_ms
            await journal.prune(now_ms)
            await shims.expire(now_ms - FENCES_KEPT_MS)
            await anyio.sleep(HOUSEKEEPING_S)
