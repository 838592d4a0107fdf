"""Attempts on this machine and their shims (docs/shim.md). What blocks goes to small pools of threads, the rest happens in the event loop.

Theory of operation. Between the release and the end, a shim is spoken to over one connection. What is to be said while there is none
waits for the next: the deadline that was said last, and stops. A connection that breaks before the end makes us ask the files; a
shim that holds its lock and does not answer is told of (`ShimSilent`), and ended only on the engine's word.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from protocol.errors import Reason
from protocol.ids import Attempt
from runner import failpoints
from runner.adapters.account import own_account
from runner.adapters.attemptdir import ShimSettings, clear, expire_fences, lay_out, raise_fence, spec_of
from runner.adapters.attemptfiles import LOG_DIR, is_alive
from runner.adapters.exitrecord import parse_exit
from runner.adapters.forkserver import ForkServer
from runner.adapters.remains import Remains, Stray
from runner.adapters.shimlink import ShimLink, Words, identity
from runner.adapters.shimsocket import dial
from runner.adapters.shimtalk import Held, ShimTalk
from runner.core.inputs import AttemptExited, AttemptLost, AttemptSignalled, ShimSilent
from runner.core.plans import AttemptPlan, ExitRecord, Observed, Orphan, ProcessIdentity, Swept
from runner.errors import Broken, RunnerError
from runner.ports import ShimEvent

WELCOME_TIMEOUT_S: Final = 10.0
"""A forked shim answers within milliseconds; a machine in deep swap gets this long."""
ADOPT_TIMEOUT_S: Final = 5.0
"""A living shim answers within milliseconds; the engine asks a silent one again."""
DIAL_PAUSE_S: Final = 0.05
"""Between two tries to connect to a shim whose backlog is full: it is stopped, or many of us were here before it."""
CUTS_MAX: Final = 3
"""Broken connections to one living shim that are made anew at once; after that, at the engine's pace."""
FILE_THREADS: Final = 4
"""Threads for files of attempts: as many fsyncs as a disk merges well."""
SWEEP_THREADS: Final = 2
"""Threads for looking at processes: one may wait for a hung shim, and nothing else has to wait for it."""

_T = TypeVar("_T")


@dataclass(slots=True)
class ShimAdapter(ShimTalk):
    """Implements the port Shims."""

    settings: ShimSettings
    outlive: Callable[[], Sequence[str]] = tuple
    """Names of processes that the owner lets live on now; what a spec says goes first."""
    on_growth: Callable[[str, int], None] = lambda _attempt, _end: None
    """Called when the log of an attempt (by name) has grown to an offset."""
    on_fed: Callable[[str, int, int, bool], None] = lambda _attempt, _received, _credit, _closed: None
    """Called when the stdin of an attempt (by name) was received up to an offset, with its credit and whether nobody reads it."""
    on_taken: Callable[[str, str, int, int, bool], None] = lambda _attempt, _viewer, _received, _credit, _closed: None
    """Called when a viewer of a PTY (by name) was taken up to an offset, with its credit and whether the PTY has ended."""
    on_adopted: Callable[[str], None] = lambda _attempt: None
    """Called when there is a new connection to the shim of an attempt (by name) that was let go before."""
    on_loss: Callable[[str], None] = lambda _why: None
    """Called when the fork server had to be replaced."""
    _server: ForkServer = field(init=False)
    _remains: Remains = field(init=False)
    _adopting: set[str] = field(default_factory=set)
    _hear: Callable[[ShimEvent], None] = lambda _event: None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FILE_THREADS, "attempt-files"))
    _sweepers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(SWEEP_THREADS, "attempt-sweeps"))

    def __post_init__(self) -> None:
        self._server = ForkServer(lambda why: self.on_loss(why))
        self._remains = Remains(self.settings, self.outlive)

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
        self._sweepers.shutdown(wait=False, cancel_futures=True)

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
        account = None if plan.terminal is None else await self.do(own_account)
        spec = spec_of(self.settings, plan, cwd, account)
        if plan.token > 1:
            await self.do(raise_fence, self.settings.state_dir, plan.attempt.execution_id, plan.token)
        directory = await self.do(lay_out, self.settings.root / name, spec, plan.roots)
        try:
            return await self._start(name, directory, ())
        except RunnerError:
            # Its barrier is closed: what is left of it would be taken for an attempt by the next daemon.
            await self.remove(plan.attempt)
            raise

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
        self._words.pop(attempt.name, None)
        self._drop(attempt.name)
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

    async def _connect(self, name: str, sock: socket.socket) -> Held:
        loop = asyncio.get_running_loop()
        held = Held(ShimLink(name, self), loop.create_future())
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
        if record is not None:
            self._remains.watch(link.attempt, record)
        if held.tool_exit is not None:
            if not held.tool_exit.done():
                held.tool_exit.set_result(record)
        elif record is not None:
            failpoints.hit("exit.heard")
            self._hear(AttemptExited(Attempt.parse(link.attempt), record))
        else:
            # It ended, and what its shim says of it is nonsense: that is not a success, and not a story either.
            self._hear(AttemptLost(Attempt.parse(link.attempt), Reason.SHIM_LOST, None))

    def shim_signalled(self, link: ShimLink, name: bytes, count: int) -> None:
        """A signal was passed on."""
        words = self._words.get(link.attempt)
        if words is not None and words.signals.pop(name, None) is not None:
            self._hear(AttemptSignalled(Attempt.parse(link.attempt), name, count))

    def shim_fed(self, link: ShimLink, received: int, credit: int, *, closed: bool) -> None:
        """Its stdin can take more."""
        self.on_fed(link.attempt, received, credit, closed)

    def shim_taken(self, link: ShimLink, viewer: str, received: int, credit: int, *, closed: bool) -> None:
        """What a viewer typed was taken."""
        self.on_taken(link.attempt, viewer, received, credit, closed)

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
        asking = asyncio.get_running_loop().run_in_executor(self._sweepers, self._remains.end_by_files, name)

        def answered(done: "asyncio.Future[AttemptExited | AttemptLost | None]") -> None:
            if not done.cancelled():
                self._found_out(Attempt.parse(name), None if done.exception() else done.result())

        asking.add_done_callback(answered)

    def _found_out(self, attempt: Attempt, end: AttemptExited | AttemptLost | None) -> None:
        if end is not None:
            self._hear(end)
            return
        # It lives: connect again, unless that never lasts.
        self._cuts[attempt.name] = self._cuts.get(attempt.name, 0) + 1
        if self._cuts[attempt.name] > CUTS_MAX:
            self._hear(ShimSilent(attempt))
        else:
            self.on_cut(attempt)

    # --- recovery -----------------------------------------------------------------------------------------------

    async def observe(self) -> list[Observed]:
        """See the port."""
        return await self._swept_by(self._remains.observe)

    async def adopt(self, attempt: Attempt) -> bool:
        """See the port."""
        name = attempt.name
        connected = self._held.get(name)
        if name in self._adopting or (connected is not None and not connected.abandoned):
            return False
        held: Held | None = None
        self._adopting.add(name)
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT_S):
                held = await self._connect(name, await self._dialled(name))
                held.link.hello(self.settings.epoch)
                self._words.setdefault(name, Words()).say(held.link)
                await asyncio.shield(held.welcomed)
                self.on_adopted(name)
                return True
        except TimeoutError:
            if held is not None:
                self._drop(name)
            if is_alive(self.settings.root / name):
                self._hear(ShimSilent(attempt))
                return False
        except OSError:
            pass
        finally:
            self._adopting.discard(name)
        self._investigate(name)
        return False

    async def _dialled(self, name: str) -> socket.socket:
        """A connection to the shim of an attempt, as soon as there is room for one. Raises OSError."""
        while True:
            try:
                return dial(self.settings.root / name)
            except BlockingIOError:
                await asyncio.sleep(DIAL_PAUSE_S)

    def _drop(self, name: str) -> None:
        """Whatever its shim still says is not heard any more."""
        held = self._held.get(name)
        if held is not None:
            held.abandoned = True
            held.link.close()

    async def end_hung(self, attempt: Attempt, shim: ProcessIdentity | None) -> ShimEvent:
        """See the port."""
        self._drop(attempt.name)
        return await self._swept_by(self._remains.end_hung, attempt.name, shim)

    async def lose(self, attempt: Attempt) -> ShimEvent:
        """See the port."""
        end = await self._swept_by(self._remains.end_by_files, attempt.name)
        return ShimSilent(attempt) if end is None else end

    async def sweep(self, name: str) -> Swept:
        """See the port."""
        return await self._swept_by(self._remains.sweep, name)

    async def scan(self) -> tuple[Orphan, ...]:
        """See the port."""
        return await self._swept_by(self._remains.scan)

    async def strays(self) -> list[Stray]:
        """Every living process of ours, by attempt and tool: for the owner."""
        return await self._swept_by(self._remains.strays)

    async def _swept_by(self, work: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._sweepers, work, *args)

    async def expire(self, before_ms: int) -> None:
        """Forget fences that were raised before `before_ms` (wall) and hold nobody back."""
        await self.do(expire_fences, self.settings.state_dir, before_ms)

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
