"""What the demo stands on: a temporary home, the processes it starts and ends, and lines with the time on them."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

BIN = Path(sys.executable).parent
STEP_S = 30.0
"""No step of the demo takes longer than this on a machine that can run it at all."""


class Failure(Exception):
    """Something the demo promises did not hold."""


class Stage:
    """A temporary home with a control plane and a runner in it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.home = Path(tempfile.mkdtemp(prefix="runner-demo-"))
        self.port = _free_port()
        self.checks = 0
        self._start = time.monotonic()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_RUNNER_", "XDG_"))},
            "LOCAL_RUNNER_STATE_DIR": str(self.home / "state"),
            "LOCAL_RUNNER_RUNTIME_DIR": str(self.home / "run"),
            "LOCAL_RUNNER_POLICY_FILE": str(self.home / "policy.toml"),
            "LOCAL_RUNNER_CONFIG": str(self.home / "config.toml"),
            "LOCAL_RUNNER_CONTROL_URL": f"http://127.0.0.1:{self.port}",
            "LOCAL_RUNNER_CONTROL_TOKEN_FILE": str(self.home / "plane" / "admin.token"),
            "XDG_STATE_HOME": str(self.home / "xdg"),
        }
        (self.home / "plane").mkdir()
        (self.home / "config.toml").touch(mode=0o600)

    # --- words --------------------------------------------------------------------------------------------------

    def title(self, text: str) -> None:
        """Begin a part of the story."""
        self.console.print(f"\n[bold cyan]{self._clock()}  {text}[/]")

    def say(self, text: str) -> None:
        """One line of the story."""
        self.console.print(f"[dim]{self._clock()}[/]  {text}")

    def check(self, holds: bool, text: str) -> None:
        """A promise: shown with a tick, or the end of the demo."""
        if not holds:
            raise Failure(text)
        self.checks += 1
        self.console.print(f"[dim]{self._clock()}[/]  [green]✓[/] {text}")

    def _clock(self) -> str:
        return f"{time.monotonic() - self._start:6.2f}s"

    # --- processes ----------------------------------------------------------------------------------------------

    async def start(self, name: str, *argv: str) -> asyncio.subprocess.Process:
        """Start one of our programs in the background; what it logs goes to a file of its name."""
        with open(self.home / f"{name}.log", "ab") as log:
            process = await asyncio.create_subprocess_exec(
                str(BIN / argv[0]), *argv[1:], env=self.env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._running[name] = process
        return process

    async def run(self, *argv: str, status: int | None = 0) -> str:
        """Run one of our programs to its end and return what it printed. Raises Failure."""
        process = await asyncio.create_subprocess_exec(
            str(BIN / argv[0]),
            *argv[1:],
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), STEP_S)
        if status is not None and process.returncode != status:
            raise Failure(
                f"{' '.join(argv[:3])} ended with {process.returncode}: {err.decode(errors='replace')[-600:]}"
            )
        return out.decode(errors="replace")

    async def json(self, *argv: str) -> Any:
        """Run one of our programs with --json and read what it printed."""
        return json.loads(await self.run(*argv, "--json"))

    async def kill(self, name: str) -> int:
        """`kill -9`, and wait until it is gone."""
        process = self._running.pop(name)
        process.kill()
        await process.wait()
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
        """Processes that belong to an attempt of this stage, by where their shim lives or what they carry."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid() and self._belongs(name):
                found.append(int(name))
        return found

    def _belongs(self, pid: str) -> bool:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z" and b"LOCAL_RUNNER_COOKIE=" in environ and str(self.home).encode() in environ

    async def close(self) -> None:
        """End whatever still runs, and remove the home."""
        for name in list(self._running):
            process = self._running.pop(name)
            if process.returncode is None:
                process.kill()
                await process.wait()
        for pid in self.carriers():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)


async def until(holds: Any, what: str, seconds: float = STEP_S) -> Any:
    """Ask again and again until `holds()` is true; a demo may poll. Raises Failure."""
    ends = time.monotonic() + seconds
    while True:
        value = await holds()
        if value:
            return value
        if time.monotonic() > ends:
            raise Failure(f"{what} did not happen within {seconds:.0f} s")
        await asyncio.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
