"""The composition root: the only file that joins ports to adapters, and the order in which a daemon comes up and goes.

Up: lock, identity, policy, journal, shims; recovery; then the socket and the network. Down: nothing that runs is touched.
"""

import os
import platform
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import anyio
import structlog

from protocol.execution import AttemptState
from protocol.groups import ungrouped
from protocol.handshake import Standing
from protocol.version import VERSION
from runner.adapters.attemptdir import ShimSettings
from runner.adapters.attemptfiles import attempt_directories
from runner.adapters.control import serve_control
from runner.adapters.git import Git
from runner.adapters.journal import SqliteJournal
from runner.adapters.keystore import Identity, Keystore
from runner.adapters.policyfile import load_policy
from runner.adapters.shims import ShimAdapter
from runner.adapters.succession import IDENTITY, JOURNAL, carry_through
from runner.adapters.system import StateLock, SystemClock, make_private, raise_fd_limit, sd_notify
from runner.adapters.tools import ShimTools
from runner.adapters.uplink import Uplink, read_ack
from runner.adapters.worktrees import GitWorktrees
from runner.config import Settings
from runner.core.engine import Engine, EngineIdentity
from runner.core.environment import inherited
from runner.core.inputs import SessionDown
from runner.core.policy import Policy
from runner.desk import Desk
from runner.errors import JournalBroken
from runner.hands import DaemonHands
from runner.link import Link
from runner.pump import Footing, Pump

PRIVATE_UMASK: Final = 0o077
HOUSEKEEPING_S: Final = 3600.0
"""Pruning is for weeks-old things: once an hour is plenty, and wakes an idle laptop rarely."""
RETENTION_MS: Final = 7 * 24 * 60 * 60 * 1000
"""Attempts whose log is durable at the plane are kept this long for their owner."""


async def run_daemon(settings: Settings, *, ready: Callable[[], None] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code.

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
            daemon = Daemon(settings, umask)
            await daemon.run(ready or (lambda: None))
    except* JournalBroken as broken:
        log.error("journal.broken", detail=str(broken.exceptions[0]))
        status = 1
    return status


class Daemon:
    """One daemon's life."""

    def __init__(self, settings: Settings, umask: int) -> None:
        self._settings = settings
        self._umask = umask
        self._clock = SystemClock()
        self._log = structlog.get_logger()
        self._keystore = Keystore(settings.state_dir / IDENTITY)
        self._identity: Identity = self._keystore.load()
        self._policy: Policy = self._read_policy()

    async def run(self, ready: Callable[[], None]) -> None:
        """Come up, pump, go."""
        raise_fd_limit()
        async with AsyncExitStack() as stack:
            journal = await stack.enter_async_context(SqliteJournal(self._settings.state_dir / JOURNAL))
            image = await journal.load()
            engine = Engine(self._engine_identity(), self._policy, inherited(os.environ), image)
            shims = self._shims()
            stack.callback(shims.close)
            shims.start()
            uplink = Uplink(wake=lambda: link.wake(), arm=shims.arm, trim=shims.trim, failed=self._complain_of_log)
            stack.callback(uplink.close)
            shims.on_growth = uplink.grew
            link = Link(
                url=self._identity.url,
                proxy=self._settings.proxy,
                standing=lambda: self._standing(engine, pump.footing),
                journal=journal,
                clock=self._clock,
                uplink=uplink,
                note=lambda event, fields: self._log.info(event, **fields),
            )
            async with anyio.create_task_group() as tasks:
                worktrees = self._worktrees(shims)
                hands = DaemonHands(
                    tasks=tasks,
                    put=lambda happened: pump.put(happened),
                    shims=shims,
                    worktrees=worktrees,
                    link=link,
                    uplink=uplink,
                    keystore=self._keystore,
                    runner=engine.me.runner,
                    seal_seed=self._identity.seal_seed,
                )
                pump = Pump(engine, journal, self._clock, hands)
                await self._recover(engine, pump, shims, uplink)
                desk = Desk(
                    version=VERSION,
                    name=self._identity.certificate.value.name,
                    engine=engine,
                    shims=shims,
                    uplink=uplink,
                    link=link,
                    clock=self._clock,
                    put=pump.put,
                )
                await tasks.start(serve_control, self._settings.runtime_dir / "control.sock", desk.answer)
                tasks.start_soon(pump.run)
                tasks.start_soon(link.run, pump)
                tasks.start_soon(self._keep_house, journal, engine, shims)
                tasks.start_soon(worktrees.keep_trash_empty, self._complain_of_trash)
                self._log.info("daemon.started", pid=os.getpid(), runner=engine.me.runner, inc=engine.me.inc)
                sd_notify("READY=1")
                ready()
                await _until_told_to_stop()
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

    def _shims(self) -> ShimAdapter:
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
            ),
            on_loss=lambda why: self._log.warning("forkserver.lost", detail=why),
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
        )

    # --- start and upkeep ---------------------------------------------------------------------------------------

    async def _recover(self, engine: Engine, pump: Pump, shims: ShimAdapter, uplink: Uplink) -> None:
        """Bring every attempt and every pending command to where it belongs, before any new one is heard."""
        found = await shims.observe()
        effects = engine.recover(found, self._clock.now())
        settled = {row.attempt.name for row in engine.attempts.rows.values() if row.state is AttemptState.SETTLED}
        for directory in attempt_directories(self._settings.state_dir):
            if directory.name in settled and read_ack(directory) is None:
                uplink.track(directory.name, directory, finished=True)
        await pump.perform(effects)
        self._log.info("recovery.finished", found=len(found), living=engine.attempts.living)

    def _complain_of_log(self, attempt: str, fault: str) -> None:
        self._log.warning("log.failed", attempt=attempt, detail=fault)

    def _complain_of_trash(self, fault: str) -> None:
        self._log.warning("worktree.failed", detail=fault)

    async def _keep_house(self, journal: SqliteJournal, engine: Engine, shims: ShimAdapter) -> None:
        while True:
            now_ms = self._clock.now().wall_ms
            await journal.prune(now_ms)
            living = {attempt.name for attempt in engine.attempts.living_names()}
            await shims.expire(now_ms - RETENTION_MS, living)
            await anyio.sleep(HOUSEKEEPING_S)


async def _until_told_to_stop() -> None:
    """Wait for the first SIGTERM or SIGINT; the second ends the process at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _number in signals:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            sd_notify("STOPPING=1")
            return
