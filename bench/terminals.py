"""Terminals beside their peers, in one run: keystroke echo idle and beside a flood, time to a prompt, reattach, memory.

Usage: .venv/bin/python bench/terminals.py [--quick] [--json]

Ours is the whole way: a WebSocket viewer that signs each key, control plane, daemon, shim, terminal, and back through the log on disk.
Peers: a terminal of this process (`raw`), `ssh -tt` through a warm connection to a private sshd, a client attached to tmux, terminado's
WebSocket server. Each has a terminal in raw mode whose program writes back what it reads; the flood is `yes` in a second terminal of the
same server, whose output is taken as it comes. A peer that is not installed is left out, and said so.
"""

import argparse
import asyncio
import json
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from websockets.asyncio.client import connect

from bench.peers import PeerMissing, Sshd, wait_for
from examples.demo.stage import free_port
from tests.support.stand import Stand, stand
from tests.support.viewers import Key, admit, seated

ECHO: Final = "stty raw -echo; echo ready; exec cat"
FLOOD: Final = "echo ready; read -r _; exec yes abcdefghijklmnopqrstuvwxyz0123456789"
PROMPT: Final = "prompt> "
SHELL: Final = f"PS1='{PROMPT}' exec sh -i"
WAIT_S: Final = 20.0
PAUSE_S: Final = 0.004
"""Between two keys: nobody types faster, and nothing of the last one is left."""
IDLE_PTYS: Final = 20
Type = Callable[[bytes], Awaitable[None]]
Until = Callable[[bytes], Awaitable[None]]
Opener = Callable[[str], Any]


class Master:
    """The near end of a local terminal, with a program on the other: how ssh and tmux are typed into."""

    def __init__(self, argv: list[str]) -> None:
        self.fd, slave = pty.openpty()
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        os.set_blocking(self.fd, False)
        self._got = b""
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 65_536)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.fd)
        self._got = (self._got + data)[-65_536:]
        self._more.set()

    async def type(self, data: bytes) -> None:
        """Press keys."""
        self._got = b""
        os.write(self.fd, data)

    async def until(self, text: bytes) -> None:
        """Wait until it is shown."""
        async with asyncio.timeout(WAIT_S):
            while text not in self._got:
                self._more.clear()
                await self._more.wait()

    def close(self) -> None:
        """End the program."""
        asyncio.get_running_loop().remove_reader(self.fd)
        self.process.terminate()
        os.close(self.fd)
        self.process.wait()


@asynccontextmanager
async def local(argv: list[str]) -> AsyncIterator[tuple[Type, Until]]:
    """A program on a terminal of ours."""
    master = Master(argv)
    try:
        yield master.type, master.until
    finally:
        master.close()


# --- who is measured --------------------------------------------------------------------------------------------------


def ours(system: Stand) -> Opener:
    """A PTY of a runner, looked at through the control plane."""

    @asynccontextmanager
    async def open_one(command: str) -> AsyncIterator[tuple[Type, Until]]:
        pty_id = await opened(system, command)
        key = Key()
        ticket = await admit(system.http, pty_id, key)
        async with seated(system.port, pty_id, ticket, key) as seat:
            await seat.begin()

            async def type_(data: bytes) -> None:
                seat.screen = b""
                await seat.type(data)

            async def until(text: bytes) -> None:
                said = 0
                async with asyncio.timeout(WAIT_S):
                    while text not in seat.screen:
                        await seat.hear()
                        seat.screen = seat.screen[-65_536:]
                        if seat.offset - said >= 32_768:
                            said = seat.offset
                            await seat.seen()

            yield type_, until
        await system.post(f"/ptys/{pty_id}/close", {})

    return open_one


async def opened(system: Stand, command: str) -> str:
    """A PTY that was ordered."""
    body = {"runner": "stand", "argv": ["sh", "-c", command], "cwd": str(system.home), "size": {"rows": 24, "cols": 80}}
    return str((await system.post("/ptys", body))["id"])


def by_ssh(sshd: Sshd) -> Opener:
    """`ssh -tt` through a warm connection."""
    return lambda command: local([*sshd.argv()[:3], "-tt", "bench", f"sh -c {json.dumps(command)}"])


def by_tmux(home: Path) -> Opener:
    """A client attached to a server of its own, without a status line."""
    base = ["tmux", "-f", "/dev/null", "-S", str(home / "tmux")]
    made = iter(range(1000))
    # A server without sessions ends, perhaps while the next one is asked for.
    subprocess.run([*base, "new-session", "-d", "-s", "keep", "sleep 100000"], check=True)

    @asynccontextmanager
    async def open_one(command: str) -> AsyncIterator[tuple[Type, Until]]:
        name = f"s{next(made)}"
        start = [*base, "new-session", "-d", "-s", name, "-x", "80", "-y", "24", f"sh -c {json.dumps(command)}"]
        subprocess.run(start, check=True, env=os.environ | {"TERM": "xterm-256color"})
        subprocess.run([*base, "set-option", "-g", "status", "off"], check=True)
        subprocess.run([*base, "set-option", "-s", "escape-time", "0"], check=True)
        os.environ["TERM"] = "xterm-256color"
        async with local([*base, "attach-session", "-t", name]) as ways:
            yield ways
        subprocess.run([*base, "kill-session", "-t", name], check=False)

    return open_one


def by_terminado(port: int) -> Opener:
    """Its WebSocket server; each path is a terminal that its own shell begins."""

    @asynccontextmanager
    async def open_one(command: str) -> AsyncIterator[tuple[Type, Until]]:
        async with connect(f"ws://127.0.0.1:{port}/ws", compression=None, max_queue=None, proxy=None) as socket:
            got = b""

            async def type_(data: bytes) -> None:
                nonlocal got
                got = b""
                await socket.send(json.dumps(["stdin", data.decode()]))

            async def until(text: bytes) -> None:
                nonlocal got
                async with asyncio.timeout(WAIT_S):
                    while text not in got:
                        kind, *said = json.loads(await socket.recv())
                        if kind == "stdout":
                            got = (got + said[0].encode())[-65_536:]

            await socket.send(json.dumps(["set_size", 24, 80, 480, 640]))
            # `''` keeps the echo of what is typed from being taken for what it prints.
            quoted = json.dumps(command.replace("ready", "re''ady").replace(PROMPT, PROMPT[:1] + "''" + PROMPT[1:]))
            await type_(f"exec sh -c {quoted}\r".encode())
            yield type_, until

    return open_one


TERMINADO: Final = """
import asyncio, sys, tornado.web
from terminado import TermSocket, UniqueTermManager
async def main():
    manager = UniqueTermManager(shell_command=["sh"])
    tornado.web.Application([(r"/ws", TermSocket, {"term_manager": manager})]).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def peers(home: Path, missing: dict[str, str]) -> AsyncIterator[dict[str, Opener]]:
    """Everybody who is installed; who is not is in `missing`, with the reason."""
    found: dict[str, Opener] = {"raw": lambda command: local(["sh", "-c", command])}
    sshd, server = Sshd(home / "ssh", free_port()), None
    try:
        try:
            sshd.start()
            found["ssh -tt"] = by_ssh(sshd)
        except PeerMissing as exc:
            missing["ssh -tt"] = str(exc)
        if shutil.which("tmux"):
            found["tmux"] = by_tmux(home)
        else:
            missing["tmux"] = "it is not installed"
        if find_spec("terminado") is not None:
            port = free_port()
            server = subprocess.Popen([sys.executable, "-c", TERMINADO, str(port)], stderr=subprocess.DEVNULL)
            wait_for(lambda: listens(port), "terminado")
            found["terminado"] = by_terminado(port)
        else:
            missing["terminado"] = "it is not installed (make bench installs lock/peers.txt)"
        yield found
    finally:
        sshd.close()
        if server is not None:
            server.terminate()
            server.wait()
        if shutil.which("tmux"):
            subprocess.run(["tmux", "-S", str(home / "tmux"), "kill-server"], stderr=subprocess.DEVNULL, check=False)


def listens(port: int) -> bool:
    """Whether something answers there."""
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- what is measured -------------------------------------------------------------------------------------------------


async def echo(open_one: Opener, keys: int, *, flood: bool) -> dict[str, float]:
    """From a key to its echo, in ms."""
    async with AsyncExitStack() as stack:
        flooding: asyncio.Task[None] | None = None
        if flood:
            begin, drain = await stack.enter_async_context(open_one(FLOOD))
            await drain(b"ready")
            await begin(b"\r")
            flooding = asyncio.create_task(endless(drain))
        type_, until = await stack.enter_async_context(open_one(ECHO))
        await until(b"ready")
        took = []
        for number in range(keys):
            letter = bytes([97 + number % 26])
            began = time.perf_counter()
            await type_(letter)
            await until(letter)
            took.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(PAUSE_S)
        if flooding is not None:
            assert not flooding.done(), "it flowed all the while"
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
    took.sort()
    return {"p50": statistics.median(took), "p99": took[int(0.99 * (len(took) - 1))]}


async def endless(until: Until) -> None:
    """Take what comes for as long as it comes."""
    while True:
        try:
            await until(b"what is never printed")
        except TimeoutError:
            continue


async def prompt(open_one: Opener, rounds: int) -> float:
    """From asking for a terminal to its shell's prompt, median in ms."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        async with open_one(SHELL) as (_, until):
            await until(PROMPT.encode())
            took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


async def reattach(system: Stand, rounds: int) -> dict[str, float]:
    """To a PTY that has printed more than its ring holds: from the request for a ticket to the last byte of the replay, in ms."""
    pty_id = await opened(
        system, "yes 'the quick brown fox jumps over the lazy dog' | head -c 9000000; echo done; exec cat"
    )
    key = Key()
    ticket = await admit(system.http, pty_id, key)
    async with seated(system.port, pty_id, ticket, key) as seat:
        await seat.begin()
        while b"done" not in seat.screen:
            await seat.hear()
            seat.screen = seat.screen[-4096:]
            await seat.seen()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        ticket = await admit(system.http, pty_id, key, viewer=ticket["viewer"])
        async with seated(system.port, pty_id, ticket, key) as seat:
            await seat.begin()
            await seat.expect("live")
            took.append(1000 * (time.perf_counter() - began))
            assert b"done" in seat.screen
    await system.post(f"/ptys/{pty_id}/close", {})
    return {"p50": statistics.median(took), "max": max(took)}


async def idle_memory(system: Stand) -> float:
    """PSS of the shim of a PTY at rest, mean of many, MiB; its child's is its own."""
    ids = [await opened(system, "echo ready; exec sleep 600") for _ in range(IDLE_PTYS)]
    for each in ids:
        while (await system.get(f"/executions/{each}"))["log"]["end"] == 0:
            await asyncio.sleep(0.05)
    shims = [json.loads(path.read_text())["shim"]["pid"] for path in (system.state / "x").glob("*/meta.json")]
    living = [pid for pid in shims if Path(f"/proc/{pid}").exists()]
    mean = statistics.mean(pss_kib(pid) for pid in living) / 1024
    for each in ids:
        await system.post(f"/ptys/{each}/close", {})
    return mean


def pss_kib(pid: int) -> int:
    """Of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


async def run(keys: int, rounds: int) -> dict[str, Any]:
    """All of it."""
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="terminals-") as name:
        async with stand() as system, peers(Path(name), missing) as others:
            everybody = {"ours": ours(system), **others}
            found: dict[str, Any] = {each: {} for each in everybody}
            for each, open_one in everybody.items():
                found[each]["prompt_ms"] = await prompt(open_one, rounds)
                found[each]["echo_ms"] = await echo(open_one, keys, flood=False)
                found[each]["echo_beside_flood_ms"] = await echo(open_one, keys, flood=True)
            found["ours"]["reattach_ms"] = await reattach(system, rounds)
            found["ours"]["idle_pss_mib"] = await idle_memory(system)
    return {"who": found, "missing": missing}


def shown(told: dict[str, Any]) -> str:
    """As a table."""
    rows = ["| | echo p50 / p99, ms | beside a flood | open to prompt, ms |", "|---|---|---|---|"]
    for name, of in told["who"].items():
        idle, flood = of["echo_ms"], of["echo_beside_flood_ms"]
        rows.append(
            f"| {name} | {idle['p50']:.2f} / {idle['p99']:.2f} | {flood['p50']:.2f} / {flood['p99']:.2f} | {of['prompt_ms']:.0f} |"
        )
    mine = told["who"]["ours"]
    rows.append("")
    rows.append(
        f"reattach behind 9 MB of output: {mine['reattach_ms']['p50']:.0f} ms (at most {mine['reattach_ms']['max']:.0f})"
    )
    rows.append(f"shim of an idle PTY: {mine['idle_pss_mib']:.2f} MiB PSS, mean of {IDLE_PTYS}")
    rows += [f"left out: {name}: {why}" for name, why in told["missing"].items()]
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer keys and rounds")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    told = asyncio.run(run(200 if wanted.quick else 1000, 5 if wanted.quick else 20))
    print(json.dumps(told, indent=1) if wanted.json else shown(told))


if __name__ == "__main__":
    main()
