"""A real daemon that is made to die at a named point while it does a command, and what must be true once it is back.

Each order knows how to ask for its effect and how to count it on the machine itself: lines in a file, worktrees that git lists,
living processes. The control plane here is honest and patient: what has no receipt it sends again.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.commands import Kind
from protocol.envelope import digest_of
from protocol.ids import Digest
from protocol.receipt import Outcome, Receipt, Settlement, Verdict
from protocol.replay import Mark
from tests.support.builders import a_key
from tests.support.hostile_plane import WAIT_S, payload_of
from tests.support.repositories import git, make_repository
from tests.support.siege import Siege, siege
from tests.support.stand import poll

ASLEEP: Final = ["sh", "-c", "sleep 600"]
SIZE: Final = {"rows": 24, "cols": 80}
LEASE_TTL_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Order:
    """A command on its way: its envelope, and the question whether its effect is there exactly once."""

    env: bytes
    proven: Callable[[Receipt], Awaitable[None]]
    over: Callable[[], Awaitable[None]] | None = None
    """Ends what would else live on, or die at the point of the next case."""

    @property
    def digest(self) -> Digest:
        """Of its payload."""
        return digest_of(payload_of(self.env))


@dataclass(slots=True)
class Crash:
    """One daemon after another on one state directory."""

    system: Siege
    repository: Path
    _serial: int = field(default=0)
    _quiet: bool = field(default=False)
    """Whether the daemon that runs has no points armed."""

    # --- dying --------------------------------------------------------------------------------------------------

    async def armed(self, failpoints: str) -> None:
        """Another daemon, with these points armed."""
        await self.stopped()
        before = self.system.plane.sessions
        await self.system.stand.start_daemon(LOCAL_RUNNER_FAILPOINTS=failpoints)
        await self.system.plane.online(before)

    async def stopped(self) -> None:
        """No daemon, however the last one ended."""
        self._quiet = False
        running = self.system.stand._running
        if "daemon" in running and running["daemon"].returncode is None:
            await self.system.stand.kill("daemon")
        running.pop("daemon", None)

    async def dies(self) -> None:
        """Wait until the daemon has died of its own point."""
        process = self.system.stand._running.pop("daemon")
        status = await asyncio.wait_for(process.wait(), WAIT_S)
        assert status == -signal.SIGKILL, f"it ended with {status}, and was to be killed at its point"

    async def killed_while(self, order: Order, failpoints: str) -> None:
        """Send the command to a daemon that dies at the point."""
        await self.armed(failpoints)
        await self.system.plane.send(order.env)
        await self.dies()

    async def survives(self, order: Order) -> Receipt:
        """A daemon without points comes back: one receipt, whatever has to be sent again; the effect is there once."""
        plane, before = self.system.plane, self.system.plane.sessions
        await self.system.stand.start_daemon()
        await plane.online(before)
        self._quiet = True
        if order.digest not in plane.receipts:
            await plane.send(order.env)
            await plane.until(lambda: order.digest in plane.receipts, "a receipt")
        receipt = plane.receipts[order.digest]
        if receipt.seq is not None:
            plane.mark = Mark(receipt.seq, order.digest)
        await order.proven(receipt)
        # The same once more has the same answer and no second effect.
        told = len(plane.told)
        await plane.send(order.env)
        await plane.until(lambda: len(plane.told) > told, "the stored receipt")
        await order.proven(receipt)
        assert len(self._bodies("cmd_digest", order.digest, "outcome")) == 1, "one command, one receipt"
        if order.over is not None:
            await order.over()
        return receipt

    def _bodies(self, name: str, value: str, kind: str) -> set[str]:
        """Distinct statements of a kind about something."""
        payloads = [
            (body, json.loads(payload_of(body.encode()))) for body in self.system.plane.told if '"payload"' in body
        ]
        return {body for body, said in payloads if said.get(name) == value and kind in said}

    # --- orders -------------------------------------------------------------------------------------------------

    async def start(self) -> Order:
        """A program that leaves a line each time it runs."""
        execution, lines = self.system.new_execution(), self.fresh("lines")
        env = self.system.start({"execution_id": execution, "argv": ["sh", "-c", f"echo ran >> {lines}"]})

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.ACCEPTED, receipt
            ended = await self.settled(execution)
            assert (ended.verdict, ended.code) == (Verdict.EXITED, 0)
            assert lines.read_text() == "ran\n", "it ran once"

        return Order(env, proven)

    async def stop(self) -> Order:
        """The end of something that sleeps."""
        execution, _ = await self._asleep()
        env = self.system.plane.command(Kind.EXECUTION_STOP, {"target": _attempt(execution), "grace_ms": 1000})

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert (await self.settled(execution)).verdict is Verdict.STOPPED
            assert self.alive(execution) == []

        return Order(env, proven)

    async def pty(self) -> Order:
        """A PTY whose program leaves a line each time it runs."""
        execution, lines = self.system.new_execution(), self.fresh("lines")
        args = {"execution_id": execution, "argv": ["sh", "-c", f"tty -s && echo ran >> {lines}"], "size": SIZE}
        env = self.system.start(args, kind=Kind.PTY_OPEN)

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.ACCEPTED, receipt
            ended = await self.settled(execution)
            assert (ended.verdict, ended.code, list(ended.streams)) == (Verdict.EXITED, 0, ["pty"])
            assert lines.read_text() == "ran\n", "it ran once"

        return Order(env, proven)

    async def attach(self) -> Order:
        """A viewer is let in to a PTY."""
        execution = await self._shown()
        key = a_key("viewer").public.x
        args = {"execution_id": execution, "start_token": 1, "viewer": "v_1", "key": key, "mode": "rw"}
        env = self.system.plane.command(Kind.PTY_ATTACH, args)

        async def proven(receipt: Receipt) -> None:
            assert (receipt.outcome, receipt.result) == (Outcome.DONE, {"viewer": "v_1", "mode": "rw"}), receipt
            viewers = self.system.stand.state / "x" / f"{execution}.1" / "viewers"
            assert [each.name for each in viewers.iterdir()] == ["v_1"], "one file, and no draft"
            other = self.system.plane.command(Kind.PTY_ATTACH, args | {"key": a_key("other").public.x})
            assert (await self.system.plane.fate(other)).reason == "DUPLICATE_VIEWER"

        async def ended() -> None:
            await self.system.plane.fate(self._closing(execution))
            await self.settled(execution)

        return Order(env, proven, ended)

    async def close(self) -> Order:
        """A PTY is closed."""
        execution = await self._shown()

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert (await self.settled(execution)).verdict is Verdict.STOPPED
            assert self.alive(execution) == []

        return Order(self._closing(execution), proven)

    async def early_stop(self) -> Order:
        """The end of something that has not come; when it comes, it does not run."""
        execution, lines = self.system.new_execution(), self.fresh("lines")
        env = self.system.plane.command(Kind.EXECUTION_STOP, {"target": _attempt(execution)})

        async def proven(receipt: Receipt) -> None:
            assert (receipt.outcome, receipt.result.get("state")) == (Outcome.DONE, "tombstone")
            late = self.system.start({"execution_id": execution, "argv": ["sh", "-c", f"echo ran >> {lines}"]})
            assert (await self.system.plane.fate(late)).outcome is Outcome.REFUSED
            assert not lines.exists()

        return Order(env, proven)

    async def release(self) -> Order:
        """The lease of something that sleeps is taken away; it said it would stop then."""
        execution, lease = await self._asleep(on_loss="stop")
        env = self.system.plane.command(Kind.LEASE_RELEASE, {"res": lease["res"], "token": lease["token"]})

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert (await self.settled(execution)).verdict is Verdict.STOPPED
            assert self.alive(execution) == []

        return Order(env, proven)

    async def acquire(self) -> Order:
        """Something that sleeps gets its lease anew, under a higher token; a lower one is refused from then on."""
        execution, lease = await self._asleep(on_loss="stop")
        args = {"execution_id": execution, "start_token": 1}
        higher = lease | {"token": lease["token"] + 5}
        env = self.system.plane.command(Kind.LEASE_ACQUIRE, args, lease=higher)

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert len(self.alive(execution)) > 0, "it goes on"
            lower = self.system.plane.command(Kind.LEASE_ACQUIRE, args, lease=lease | {"token": lease["token"] + 1})
            refused = await self.system.plane.fate(lower)
            assert (refused.outcome, refused.reason) == (Outcome.REFUSED, "FENCED")

        async def ended() -> None:
            stop = self.system.plane.command(Kind.EXECUTION_STOP, {"target": _attempt(execution), "grace_ms": 0})
            await self.system.plane.fate(stop)
            await self.settled(execution)

        return Order(env, proven, ended)

    async def create(self) -> Order:
        """A worktree with a branch of its own."""
        env, worktree = self._creation()

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert self._worktrees().count(worktree) == 1
            assert Path(str(receipt.result["path"]), "second").exists()

        return Order(env, proven)

    async def remove(self) -> Order:
        """A worktree that is there goes; its branch stays."""
        made, worktree = self._creation()
        receipt = await self._done_by_a_quiet_daemon(made)
        path = Path(str(receipt.result["path"]))
        env = self.system.plane.command(Kind.WORKTREE_REMOVE, {"worktree_id": worktree})

        async def proven(receipt: Receipt) -> None:
            assert receipt.outcome is Outcome.DONE, receipt
            assert not path.exists() and worktree not in self._worktrees()
            assert git(self.repository, "branch", "--list", worktree).split()[-1:] == [worktree]

        return Order(env, proven)

    # --- what they share ----------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> Path:
        """A file that is not there."""
        self._serial += 1
        return self.system.stand.home / f"{stem}{self._serial}"

    def _creation(self) -> tuple[bytes, str]:
        self._serial += 1
        worktree = f"wt-{self._serial}"
        args = {"worktree_id": worktree, "repo": str(self.repository), "base": "main", "branch": worktree}
        return self.system.plane.command(Kind.WORKTREE_CREATE, args), worktree

    def _worktrees(self) -> list[str]:
        """Branches of the worktrees that git itself lists."""
        listed = git(self.repository, "worktree", "list", "--porcelain").splitlines()
        return [line.removeprefix("branch refs/heads/") for line in listed if line.startswith("branch ")]

    async def _asleep(self, on_loss: str = "continue") -> tuple[str, dict[str, Any]]:
        execution = self.system.new_execution()
        lease = {"res": f"exec:{execution}", "token": 1, "ttl_ms": LEASE_TTL_MS, "on_loss": on_loss}
        env = self.system.start({"execution_id": execution, "argv": ASLEEP}, lease=lease)
        receipt = await self._done_by_a_quiet_daemon(env)
        assert receipt.outcome is Outcome.ACCEPTED

        async def sleeps() -> bool:
            return len(self.alive(execution)) > 0

        await poll(sleeps, "its child")
        return execution, lease

    async def _shown(self) -> str:
        """A PTY whose program waits."""
        execution = self.system.new_execution()
        args = {"execution_id": execution, "argv": ASLEEP, "size": SIZE}
        receipt = await self._done_by_a_quiet_daemon(self.system.start(args, kind=Kind.PTY_OPEN))
        assert receipt.outcome is Outcome.ACCEPTED

        async def sleeps() -> bool:
            return len(self.alive(execution)) > 0

        await poll(sleeps, "its child")
        return execution

    def _closing(self, execution: str) -> bytes:
        return self.system.plane.command(Kind.PTY_CLOSE, {"target": _attempt(execution), "grace_ms": 1000})

    async def _done_by_a_quiet_daemon(self, env: bytes) -> Receipt:
        """Done before anything is armed."""
        if not self._quiet:
            await self.armed("")
        return await self.system.plane.fate(env)

    async def settled(self, execution: str) -> Settlement:
        """The one settlement of an execution's first attempt."""
        ended = await self.system.plane.end(execution)
        assert len(self._bodies("execution_id", execution, "verdict")) == 1, "one attempt, one settlement"
        return ended

    def alive(self, execution: str) -> list[int]:
        """Its processes."""
        mark = f"LOCAL_RUNNER_EXECUTION_ID={execution}\0".encode()
        return [pid for pid in self.system.stand.carriers() if mark in _environ(pid)]

    def kill_shim(self, execution: str) -> None:
        """KILL the shim of an execution's first attempt, by what its own file says."""
        meta = self.system.stand.state / "x" / f"{execution}.1" / "meta.json"
        os.kill(json.loads(meta.read_bytes())["shim"]["pid"], signal.SIGKILL)


@asynccontextmanager
async def crash() -> AsyncIterator[Crash]:
    """A daemon that is enrolled with an honest plane, and a repository inside its roots."""
    async with siege() as besieged:
        repository = make_repository(besieged.stand.home / "repository")
        yield Crash(besieged, repository)


def _attempt(execution: str) -> dict[str, Any]:
    return {"type": "attempt", "execution_id": execution, "start_token": 1}


def _environ(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:
        return b""
