"""Attempts on this machine and their shims (docs/shim.md).

Blocking file work goes to a small pool of threads; everything else happens in the event loop.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from protocol.errors import Reason
from protocol.ids import Attempt
from runner import failpoints
from runner.adapters.attemptdir import (
    UNRELEASED_WAIT_S,
    ShimSettings,
    clear,
    dial,
    exit_of,
    expire,
    lay_out,
    spec_of,
    still_held,
)
from runner.adapters.attemptfiles import LOG_DIR, attempt_directories, read_attempt
from runner.adapters.exitrecord import parse_exit
from runner.adapters.forkserver import ForkServer
from runner.adapters.shimlink import ShimLink, identity
from runner.adapters.sweeper import end_remains
from runner.core.inputs import AttemptExited, AttemptLost
from runner.core.plans import AttemptPlan, ExitRecord, LeaseAction, Observed, Phase, ProcessIdentity, Swept
from runner.errors import Broken
from runner.ports import ShimEvent

WELCOME_TIMEOUT_S: Final = 10.0
"""A forked shim answers within milliseconds; a machine in deep swap gets this long."""
FILE_THREADS: Final = 4
"""Threads for files of attempts: as many fsyncs as a disk merges well."""

_T = TypeVar("_T")


@dataclass(slots=True)
class _Held:
    """A shim we are connected to."""

    link: ShimLink
    welcomed: "asyncio.Future[ProcessIdentity]"
    tool_exit: "asyncio.Future[ExitRecord | None] | None" = None
    """Set for tools: their end is for the caller alone."""
    abandoned: bool = False
    settled: bool = False
    heard: bool = False


@dataclass(slots=True)
class ShimAdapter:
    """Implements the port Shims."""

    settings: ShimSettings
    on_growth: Callable[[str, int], None] = lambda _attempt, _end: None
    """Called when the log of an attempt (by name) has grown to an offset."""
    on_loss: Callable[[str], None] = lambda _why: None
    """Called when the fork server had to be replaced."""
    _server: ForkServer = field(init=False)
    _held: dict[str, _Held] = field(default_factory=dict)
    _hear: Callable[[ShimEvent], None] = lambda _event: None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FILE_THREADS, "attempt-files"))

    def __post_init__(self) -> None:
        self._server = ForkServer(lambda why: self.on_loss(why))

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the fork server. Raises Broken."""
        self.settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._server.start()

    def close(self) -> None:
        """Let everything go; shims that were released live on."""
        for held in list(self._held.values()):
            held.settled = True
            held.link.close()
        self._held.clear()
        self._server.close()
        self._pool.shutdown(wait=False)

    @property
    def server_pid(self) -> int | None:
        """Process id of the fork server, for `runner status` and the benchmarks."""
        return self._server.pid

    def listen(self, hear: Callable[[ShimEvent], None]) -> None:
        """See the port."""
        self._hear = hear

    # --- start --------------------------------------------------------------------------------------------------

    async def prepare(self, plan: AttemptPlan, cwd: str, *, again: bool) -> ProcessIdentity:
        """See the port."""
        name = plan.attempt.name
        if again:
            await self.do(clear, self.settings.root / name)
        spec = spec_of(self.settings, plan, cwd)
        directory = await self.do(lay_out, self.settings.root / name, spec, plan.roots)
        return await self._start(name, directory, ())

    async def release(self, attempt: Attempt, secrets: Mapping[str, bytes]) -> None:
        """See the port."""
        held = self._held.get(attempt.name)
        if held is None:
            # It died behind its barrier; `shim_gone` tells how, and nothing ran.
            return
        held.link.release(secrets)
        failpoints.hit("attempt.released")

    async def abandon(self, attempt: Attempt) -> None:
        """See the port."""
        held = self._held.get(attempt.name)
        if held is not None:
            held.abandoned = True
            held.link.close()
        await self.remove(attempt)

    async def remove(self, attempt: Attempt) -> None:
        """See the port."""
        await self.do(clear, self.settings.root / attempt.name)

    async def _start(self, name: str, directory: int, locks: Sequence[int]) -> ProcessIdentity:
        """Fork the shim and wait until it is behind its barrier. `directory` is closed here."""
        ours, theirs = socket.socketpair()
        try:
            held = await self._connect(name, ours)
            await self._server.fork(directory, theirs.fileno(), locks)
        finally:
            theirs.close()
            os.close(directory)
        failpoints.hit("attempt.forked")
        try:
            return await asyncio.wait_for(asyncio.shield(held.welcomed), WELCOME_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as exc:
            held.abandoned = True
            held.link.close()
            raise Broken(Reason.INFRA, "the shim does not answer") from exc

    async def _connect(self, name: str, sock: socket.socket) -> _Held:
        loop = asyncio.get_running_loop()
        held = _Held(ShimLink(name, self), loop.create_future())
        previous = self._held.get(name)
        if previous is not None:
            previous.settled = True
        self._held[name] = held
        sock.setblocking(False)
        await loop.create_connection(lambda: held.link, sock=sock)
        return held

    # --- what shims say (ShimListener) --------------------------------------------------------------------------

    def shim_welcomed(self, link: ShimLink, shim_pid: int, shim_start: int) -> None:
        """The shim is there; ask it to ring when its log grows."""
        held = self._held.get(link.attempt)
        if held is not None and held.link is link and not held.welcomed.done():
            held.welcomed.set_result(identity(self.settings.boot_id, shim_pid, shim_start))
            if held.tool_exit is None:
                link.arm(0)

    def shim_rang(self, link: ShimLink, end: int) -> None:
        """The log has grown."""
        self.on_growth(link.attempt, end)

    def shim_exited(self, link: ShimLink, found: dict[str, Any]) -> None:
        """The attempt has ended."""
        held = self._held.get(link.attempt)
        if held is None or held.link is not link or held.abandoned or held.heard:
            return
        record = parse_exit(link.attempt, found)
        held.heard = record is not None
        if held.tool_exit is not None:
            if not held.tool_exit.done():
                held.tool_exit.set_result(record)
        elif record is not None:
            failpoints.hit("exit.heard")
            self._hear(AttemptExited(Attempt.parse(link.attempt), record))
        else:
            # It ended, and what its shim says of it is nonsense: that is not a success, and not a story either.
            self._hear(AttemptLost(Attempt.parse(link.attempt), Reason.SHIM_LOST, None))

    def shim_gone(self, link: ShimLink) -> None:
        """The connection is closed: after the end that is nothing; before it, the files say what happened."""
        held = self._held.get(link.attempt)
        if held is None or held.link is not link:
            return
        del self._held[link.attempt]
        if not held.welcomed.done():
            held.welcomed.set_exception(ConnectionError("the shim went before it said hello"))
            held.welcomed.exception()
        elif held.tool_exit is not None:
            if not held.tool_exit.done():
                held.tool_exit.set_result(None)
        elif not (held.abandoned or held.settled or held.heard):
            self._investigate(link.attempt)

    def _investigate(self, name: str) -> None:
        """A shim closed its connection before it told of an end. Ask its files, in a thread; the answer is heard."""
        loop = asyncio.get_running_loop()
        asking = loop.run_in_executor(self._pool, self._end_by_files, name)

        def answered(done: "asyncio.Future[ShimEvent | None]") -> None:
            if not done.cancelled() and done.exception() is None and (event := done.result()) is not None:
                self._hear(event)

        asking.add_done_callback(answered)

    def _end_by_files(self, name: str) -> ShimEvent | None:
        """The end of an attempt whose shim we lost; None when it lives on under another controller. In a thread."""
        directory = self.settings.root / name
        attempt = Attempt.parse(name)
        if still_held(directory, UNRELEASED_WAIT_S):
            return None
        record = exit_of(directory)
        if record is not None:
            return AttemptExited(attempt, record)
        return AttemptLost(attempt, Reason.SHIM_LOST, self._end_remains(name))

    # --- a living attempt ---------------------------------------------------------------------------------------

    def stop(self, attempt: Attempt, grace_ms: int | None, by: str) -> None:
        """See the port."""
        held = self._held.get(attempt.name)
        if held is not None:
            held.link.stop(grace_ms, by)

    def lease(self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction) -> None:
        """See the port."""
        held = self._held.get(attempt.name)
        if held is not None:
            held.link.lease(token, deadline_ms, action)

    def collect(self, attempt: Attempt) -> None:
        """See the port."""
        held = self._held.get(attempt.name)
        if held is not None:
            held.settled = True
            held.link.collected()

    def arm(self, name: str, seen_end: int) -> None:
        """Ask the shim of an attempt to ring when its log is longer than `seen_end`."""
        held = self._held.get(name)
        if held is not None:
            held.link.arm(seen_end)

    def trim(self, name: str, offset: int) -> None:
        """Tell the shim of an attempt what is safe at the control plane."""
        held = self._held.get(name)
        if held is not None:
            held.link.trim(offset)

    def child_of(self, name: str) -> tuple[int | None, int | None]:
        """Pid and start (wall ms) of an attempt's child, where its shim told."""
        held = self._held.get(name)
        if held is None or held.link.child is None:
            return None, None
        return held.link.child[0], held.link.started_ms

    # --- recovery -----------------------------------------------------------------------------------------------

    async def observe(self) -> list[Observed]:
        """See the port."""
        return await self.do(self._observe)

    def _observe(self) -> list[Observed]:
        found = []
        for directory in attempt_directories(self.settings.state_dir):
            with contextlib.suppress(ValueError):
                found.append(self._look_at(directory, Attempt.parse(directory.name)))
        return found

    def _look_at(self, directory: Path, attempt: Attempt) -> Observed:
        seen = read_attempt(directory)
        if seen.alive and seen.phase in ("none", "ready"):
            # Its daemon is dead, so it is on its way out; what it leaves is what counts.
            still_held(directory, UNRELEASED_WAIT_S)
            seen = read_attempt(directory)
        return Observed(
            attempt=attempt,
            same_boot=seen.boot_id == self.settings.boot_id,
            phase=Phase(seen.phase) if seen.phase in Phase.__members__.values() else Phase.NONE,
            lock_held=seen.alive,
            exit=None if seen.exit is None else parse_exit(attempt.name, seen.exit),
        )

    async def adopt(self, attempt: Attempt) -> None:
        """See the port."""
        name = attempt.name
        try:
            sock = await self.do(dial, self.settings.root / name)
        except OSError:
            self._investigate(name)
            return
        held = await self._connect(name, sock)
        held.link.hello(self.settings.epoch)
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(asyncio.shield(held.welcomed), WELCOME_TIMEOUT_S)
            return
        if self._held.get(name) is held:
            del self._held[name]
        held.link.close()
        self._investigate(name)

    async def sweep(self, attempt: Attempt) -> Swept:
        """See the port."""
        return await self.do(self._end_remains, attempt.name)

    def _end_remains(self, name: str) -> Swept:
        seen = read_attempt(self.settings.root / name)
        return end_remains(cookie=seen.cookie or self.settings.cookie(name))

    async def expire(self, before_ms: int, living: Collection[str]) -> int:
        """Remove directories of attempts that ended before `before_ms` (wall) and are durable at the plane."""
        return await self.do(expire, self.settings.state_dir, before_ms, living)

    # --- for tools ----------------------------------------------------------------------------------------------

    async def run_to_end(self, name: str, spec: dict[str, Any], locks: Sequence[int]) -> ExitRecord | None:
        """Run something of ours whose end is for the caller alone; None when its shim was lost. Raises Broken."""
        if name in self._held:
            raise Broken(Reason.INFRA, "a tool of this name is running")
        directory = await self.do(lay_out, self.settings.root / name, spec, ())
        await self._start(name, directory, locks)
        held = self._held[name]
        held.tool_exit = asyncio.get_running_loop().create_future()
        held.link.release({})
        return await held.tool_exit

    def let_go(self, name: str) -> None:
        """The caller has what it wants of a tool: its shim may go."""
        held = self._held.get(name)
        if held is not None:
            held.settled = True
            held.link.collected()

    async def do(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do blocking work with files of attempts, in one of our threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def log_dir(self, name: str) -> Path:
        """Where the log segments of an attempt are."""
        return self.settings.root / name / LOG_DIR
