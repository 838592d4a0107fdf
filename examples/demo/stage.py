"""What the demo stands on: a temporary home, the processes it starts and ends, and lines with the time on them."""

import asyncio
import base64
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from protocol.text import visible
from runner.adapters.policyfile import write_default

BIN: Final = Path(sys.executable).parent
STEP_S: Final = 30.0
"""No step of the demo takes longer than this on a machine that can run it at all."""
SWEEP_S: Final = 10.0
"""Processes that were killed are gone by then; a machine that needs longer is told of."""
PORTS: Final = range(20_000, 32_000)
"""Below the ports that the kernel gives to outgoing connections: nobody takes ours while a program is started again."""
_SHIM: Final = b"/shim/__main__.py"
_COOKIE: Final = "LOCAL_RUNNER_COOKIE"
_POLL_S: Final = 0.05


class Failure(Exception):
    """Something the demo promises did not hold."""


class Stage:
    """A temporary home with a control plane and a runner in it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.home = Path(tempfile.mkdtemp(prefix="runner-demo-"))
        self.port = free_port()
        self.checks = 0
        self._start = time.monotonic()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_RUNNER_", "XDG_", "GIT_"))},
            "LOCAL_RUNNER_STATE_DIR": str(self.home / "state"),
            "LOCAL_RUNNER_RUNTIME_DIR": str(self.home / "run"),
            "LOCAL_RUNNER_POLICY_FILE": str(self.home / "policy.toml"),
            "LOCAL_RUNNER_CONFIG": str(self.home / "config.toml"),
            "LOCAL_RUNNER_CONTROL_URL": f"http://127.0.0.1:{self.port}",
            "LOCAL_RUNNER_CONTROL_TOKEN_FILE": str(self.home / "plane" / "admin.token"),
            "XDG_STATE_HOME": str(self.home / "xdg"),
        }  # fmt: skip
        (self.home / "plane").mkdir()
        (self.home / "config.toml").touch(mode=0o600)
        # Where this runs the disk may be nearly full: nothing is refused for that.
        write_default(self.home / "policy.toml", [str(self.home)], minimums=False)

    # --- words --------------------------------------------------------------------------------------------------
    # Texts, never markup: a test's name may hold brackets, and a program's output anything at all.

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def title(self, text: str) -> None:
        """Begin a part of the story."""
        self.console.print()
        self._line(text, "bold cyan", clock="bold cyan")

    def say(self, text: str, style: str = "") -> None:
        """One line of the story."""
        self._line(text, style)

    def quote(self, line: str) -> None:
        """One line that somebody's program printed."""
        self._line(f"│ {line.rstrip()[:110]}")

    def check(self, holds: bool, text: str) -> None:
        """A promise: shown with a tick, or the end of the demo."""
        if not holds:
            raise Failure(text)
        self.checks += 1
        self._line(text, mark="✓ ")

    def _line(self, text: str, style: str = "", *, clock: str = "dim", mark: str = "") -> None:
        self.console.print(
            Text.assemble((f"{self.elapsed_s:6.2f}s  ", clock), (mark, "green"), (visible(text, keep="\t"), style))
        )

    # --- processes ----------------------------------------------------------------------------------------------

    async def start(self, name: str, *argv: str) -> asyncio.subprocess.Process:
        """Start one of our programs in the background; what it logs goes to a file of its name."""
        with open(self.home / f"{name}.log", "ab") as log:
            process = await self._spawn(argv, stdout=log, stderr=log)
        self._running[name] = process
        return process

    async def pipe(self, name: str, *argv: str) -> asyncio.subprocess.Process:
        """Start one of our programs whose output is read while it runs."""
        process = await self._spawn(argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        self._running[name] = process
        return process

    async def run(self, *argv: str, status: int | None = 0) -> str:
        """Run one of our programs to its end and return what it printed. Raises Failure."""
        ended, out, err = await self.finished(*argv)
        if status is not None and ended != status:
            raise Failure(f"{' '.join(argv[:3])} ended with {ended}: {err[-600:]}")
        return out

    async def finished(self, *argv: str) -> tuple[int, str, str]:
        """Run one of our programs to its end, whatever that is: status, stdout, stderr. Raises Failure."""
        process = await self._spawn(argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        try:
            out, err = await asyncio.wait_for(process.communicate(), STEP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Failure(f"{' '.join(argv[:3])} did not end within {STEP_S:.0f} s") from None
        assert process.returncode is not None, "it was waited for"
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    async def json(self, *argv: str) -> Any:
        """Run one of our programs with --json and read what it printed."""
        return json.loads(await self.run(*argv, "--json"))

    async def kill(self, name: str) -> int:
        """`kill -9`, and wait until it is gone."""
        process = self._running.pop(name)
        process.kill()
        if await process.wait() != -signal.SIGKILL:
            raise Failure(f"{name} had ended before it was killed")
        return process.pid

    async def end(self, name: str) -> int:
        """SIGTERM, and its exit status."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(process.wait(), STEP_S)

    def log_tail(self, name: str) -> str:
        """The last lines of a program's log."""
        path = self.home / f"{name}.log"
        return path.read_text(errors="replace")[-1500:] if path.exists() else ""

    def carriers(self) -> list[int]:
        """Processes of attempts of this stage, by the cookie in their environment."""
        mark = self._mark()
        return [] if mark is None else [pid for pid in _processes() if mark in _proc(pid, "environ")]

    def belongings(self) -> list[int]:
        """Every process of this stage: programs with its places in their environment, its shims, and what those started."""
        home, carriers = str(self.home), set(self.carriers())
        return [
            pid
            for pid in _processes()
            if pid in carriers or home.encode() in _proc(pid, "environ") or _is_shim(pid, home)
        ]

    def _mark(self) -> bytes | None:
        """How the cookies of this stage begin: with the id of the runner, which is nobody else's. None before it is enrolled."""
        try:
            envelope = json.loads((self.home / "state" / "identity" / "certificate.json").read_bytes())
        except OSError:
            return None
        return f"{_COOKIE}={json.loads(base64.b64decode(envelope['payload']))['runner']}:".encode()

    async def _spawn(self, argv: tuple[str, ...], *, stdout: Any, stderr: Any) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            str(BIN / argv[0]),
            *argv[1:],
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # A ^C is ours: we end what we started, in our order.
            start_new_session=True,
        )

    async def close(self) -> list[int]:
        """End whatever still runs and remove the home. Returns what could not be ended."""
        left = self._sweep()
        for name in list(self._running):
            process = self._running.pop(name)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    await pipe.read()
            await process.wait()
        shutil.rmtree(self.home, ignore_errors=True)
        return left

    def _sweep(self) -> list[int]:
        """Kill until two scans in a row find nothing: what was forked during the first is in the second."""
        ends, clean = time.monotonic() + SWEEP_S, 0
        left: list[int] = []
        while clean < 2 and time.monotonic() < ends:
            left = self.belongings()
            clean = 0 if left else clean + 1
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(_POLL_S)
        return left


async def until(holds: Callable[[], Awaitable[Any]], what: str, seconds: float = STEP_S) -> Any:
    """Ask again and again until `holds()` is true; a demo may poll. Raises Failure."""
    ends = time.monotonic() + seconds
    while True:
        value = await holds()
        if value:
            return value
        if time.monotonic() > ends:
            raise Failure(f"{what} did not happen within {seconds:.0f} s")
        await asyncio.sleep(_POLL_S)


def free_port() -> int:
    """A loopback port that nobody has."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Failure("no free port")


def _processes() -> list[int]:
    """All processes but this one and zombies."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    return [pid for pid in pids if _proc(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])]


def _proc(pid: int, name: str) -> bytes:
    """A file of /proc, empty when the process is gone or somebody else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _is_shim(pid: int, home: str) -> bool:
    """Whether it is a shim of `home`: forked with an environment of its own, it holds its attempt's directory open."""
    if _SHIM not in _proc(pid, "cmdline"):
        return False
    try:
        return any(os.readlink(entry).startswith(home) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
