"""Attempts on this machine: their directories, their shims, and tools of ours that run the same way (docs/shim.md).

Blocking file work goes to a small pool of threads; everything else happens in the event loop.
"""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from protocol.ids import Attempt
from protocol.limits import KILL_WAIT_MS
from protocol.records import RecordKind, records
from runner import failpoints
from runner.adapters.attemptfiles import ATTEMPTS_DIR, attempt_directories, is_alive, read_attempt
from runner.adapters.exitrecord import parse_exit
from runner.adapters.forkserver import ForkServer
from runner.adapters.shimlink import ShimLink, identity
from runner.adapters.spool import Hole, SpoolReader
from runner.adapters.sweeper import end_remains
from runner.adapters.uplink import ACK_NAME
from runner.core.inputs import AttemptExited, AttemptLost
from runner.core.plans import AttemptPlan, ExitRecord, LeaseAction, Observed, Phase, ProcessIdentity, Swept
from runner.errors import Broken, Refused
from runner.ports import ShimEvent, ToolExit

WELCOME_TIMEOUT_S: Final = 10.0
"""A forked shim answers within milliseconds; a machine in deep swap gets this long."""
UNRELEASED_WAIT_S: Final = 2.0
"""A shim whose daemon died behind the barrier exits at once; longer than this it is taken for living."""
LOCK_POLL_S: Final = 0.01
TOOL_OUTPUT_BYTES_MAX: Final = 1024 * 1024
"""Of each stream of a tool: git's own messages; what is longer is cut and said to be."""
FILE_THREADS: Final = 4
"""Threads for files of attempts: as many fsyncs as a disk merges well."""
CHUNK_BYTES: Final = 65_552
_RLIMITS: Final = {
    number: resource.getrlimit(number)
    for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK)
}
"""As the daemon was started with, before it raised any for itself: what children get back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimSettings:
    """What goes into every spec beside the plan."""

    state_dir: Path
    runner: str
    boot_id: str
    epoch: int
    """Rises with every daemon: the newest controller of a shim wins."""
    umask: int
    segment_bytes: int
    spool_bytes: int


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
    """Implements the ports Shims and Tools."""

    settings: ShimSettings
    on_growth: Callable[[str, int], None] = lambda _attempt, _end: None
    """Called when the log of an attempt (by name) has grown to an offset."""
    _server: ForkServer = field(default_factory=ForkServer)
    _held: dict[str, _Held] = field(default_factory=dict)
    _hear: Callable[[ShimEvent], None] = lambda _event: None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FILE_THREADS, "attempt-files"))

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the fork server. Raises Broken."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
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
            await self._run(self._clear, name)
        spec = self._spec(plan, cwd)
        directory = await self._run(self._lay_out, name, spec, plan.roots)
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
        await self._run(self._clear, attempt.name)

    def _spec(self, plan: AttemptPlan, cwd: str) -> dict[str, Any]:
        execution = {"LOCAL_RUNNER_EXECUTION_ID": plan.attempt.execution_id}
        return {
            **self._common(plan.attempt.name, plan.argv, cwd, {**plan.env, **execution}),
            "cmd_id": plan.cmd_id,
            "secret_names": sorted(plan.secrets),
            "timeout_ms": plan.timeout_ms,
            "grace_ms": plan.grace_ms,
        }

    def _common(self, name: str, argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> dict[str, Any]:
        return {
            "v": 1,
            "attempt": name,
            "cmd_id": name,
            "argv": list(argv),
            "cwd": cwd,
            "env": dict(env),
            "secret_names": [],
            "cookie": f"{self.settings.runner}:{name}",
            "timeout_ms": None,
            "grace_ms": 0,
            "kill_wait_ms": KILL_WAIT_MS,
            "umask": self.settings.umask,
            "rlimits": {str(number): list(limits) for number, limits in _RLIMITS.items()},
            "segment_bytes": self.settings.segment_bytes,
            "spool_bytes": self.settings.spool_bytes,
            "boot_id": self.settings.boot_id,
            "lease": None,
        }

    def _lay_out(self, name: str, spec: dict[str, Any], roots: Sequence[str]) -> int:
        """Judge the working directory as it really is, make the attempt's directory and its durable spec. In a thread."""
        _judge_cwd(spec["cwd"], roots)
        path = self._root / name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError as exc:
            raise Refused(Reason.DUPLICATE_ATTEMPT, "its directory is there already") from exc
        failpoints.hit("attempt.dir_made")
        fd = os.open(path / "spec.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(spec).encode("utf-8"))
            os.fsync(fd)
        finally:
            os.close(fd)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

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
        directory = self._root / name
        attempt = Attempt.parse(name)
        if _still_held(directory, UNRELEASED_WAIT_S):
            return None
        record = _exit_of(directory)
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
        found: list[Observed] = await self._run(self._observe)
        return found

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
            _still_held(directory, UNRELEASED_WAIT_S)
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
            sock = await self._run(_dial, self._root / name)
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
        swept: Swept = await self._run(self._end_remains, attempt.name)
        return swept

    def _end_remains(self, name: str) -> Swept:
        seen = read_attempt(self._root / name)
        return end_remains(cookie=seen.cookie or f"{self.settings.runner}:{name}")

    async def expire(self, before_ms: int, living: Collection[str]) -> int:
        """Remove directories of attempts that ended before `before_ms` (wall) and are durable at the plane."""
        removed: int = await self._run(self._expire, before_ms, living)
        return removed

    def _expire(self, before_ms: int, living: Collection[str]) -> int:
        removed = 0
        for directory in attempt_directories(self.settings.state_dir):
            acked = directory / ACK_NAME
            with contextlib.suppress(OSError):
                if directory.name in living or acked.stat().st_mtime * 1000 >= before_ms or is_alive(directory):
                    continue
                shutil.rmtree(directory)
                removed += 1
        return removed

    # --- tools --------------------------------------------------------------------------------------------------

    async def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        locks: Sequence[int],
        timeout_ms: int,
    ) -> ToolExit:
        """See the port Tools."""
        if name in self._held:
            raise Broken(Reason.INFRA, "a tool of this name is running")
        await self._await_earlier(name, timeout_ms)
        spec = {**self._common(name, argv, cwd, env), "timeout_ms": timeout_ms, "grace_ms": 5000}
        directory = await self._run(self._lay_out, name, spec, ())
        await self._start(name, directory, locks)
        held = self._held[name]
        held.tool_exit = asyncio.get_running_loop().create_future()
        held.link.release({})
        record = await held.tool_exit
        ended: ToolExit = await self._run(_tool_exit, self._root / name, record)
        held.settled = True
        held.link.collected()
        await self._run(self._clear, name)
        return ended

    async def _await_earlier(self, name: str, timeout_ms: int) -> None:
        """A tool that an earlier daemon started under this name is left to finish; its result is found in the world."""
        if not (self._root / name).exists():
            return
        if await self._run(_still_held, self._root / name, timeout_ms / 1000):
            raise Broken(Reason.INFRA, "a tool of an earlier daemon does not end")
        await self._run(self._clear, name)

    # --- files --------------------------------------------------------------------------------------------------

    @property
    def _root(self) -> Path:
        return self.settings.state_dir / ATTEMPTS_DIR

    def log_dir(self, name: str) -> Path:
        """Where the log segments of an attempt are."""
        return self._root / name / "log"

    def _clear(self, name: str) -> None:
        """Remove the directory of something that is over or never ran. In a thread."""
        directory = self._root / name
        _still_held(directory, UNRELEASED_WAIT_S)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _judge_cwd(cwd: str, roots: Sequence[str]) -> None:
    """Where `cwd` really leads must be a directory inside one of `roots` (none given: ours, anywhere). Raises Refused."""
    real = os.path.realpath(cwd)
    if roots and not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
        raise Refused(Reason.CWD_OUTSIDE_ROOTS, "the working directory leads outside the managed roots")
    if not os.path.isdir(real):
        raise Refused(Reason.CWD_MISSING, "the working directory is not there")


def _still_held(directory: Path, seconds: float) -> bool:
    """Wait until nobody holds the lock; True when somebody still does after `seconds`. In a thread."""
    ends = time.monotonic() + seconds
    while is_alive(directory):
        if time.monotonic() >= ends:
            return True
        time.sleep(LOCK_POLL_S)
    return False


def _exit_of(directory: Path) -> ExitRecord | None:
    found = read_attempt(directory).exit
    return None if found is None else parse_exit(directory.name, found)


def _dial(directory: Path) -> socket.socket:
    """Connect to the socket of an attempt, however long the path is. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"/proc/self/fd/{fd}/s")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock


def _tool_exit(directory: Path, record: ExitRecord | None) -> ToolExit:
    """What a tool left in its log. Raises Broken when it did not come to an end of its own."""
    record = record if record is not None else _exit_of(directory)
    if record is None:
        raise Broken(Reason.SHIM_LOST, "the shim of a tool was lost")
    if record.verdict != "exited" or record.code is None:
        reason = Reason.GIT_FAILED if record.verdict != "never_started" else Reason.SPAWN_FAILED
        raise Broken(reason, f"a tool did not end by itself: {record.verdict} {record.cause_detail}"[:200])
    streams = {RecordKind.STDOUT: bytearray(), RecordKind.STDERR: bytearray()}
    truncated = False
    reader = SpoolReader(directory / "log")
    offset = 0
    try:
        while (found := reader.read(offset, CHUNK_BYTES)) is not None:
            if isinstance(found, Hole):
                truncated, offset = True, found.end
                continue
            for entry in records(found.data, found.offset):
                kept = streams.get(RecordKind(entry.kind)) if entry.kind in (1, 2) else None
                if kept is not None:
                    room = TOOL_OUTPUT_BYTES_MAX - len(kept)
                    truncated = truncated or len(entry.payload) > room
                    kept += entry.payload[: max(room, 0)]
            offset = found.end
    finally:
        reader.close()
    stdout, stderr = streams[RecordKind.STDOUT], streams[RecordKind.STDERR]
    return ToolExit(record.code, bytes(stdout), bytes(stderr), truncated)
