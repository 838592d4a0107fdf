"""A whole system under fire: work that proves what became of it, and everything killed in an order drawn from a seed.

Each piece of work appends its name to a file when it runs (so that a second run shows), prints lines that follow from its name, and
ends with a status that follows from its name. What was not hit itself must end exactly as if nothing had happened; what was hit must
say so. Nothing here waits for luck: moments are drawn, ends are waited for.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import httpx

from tests.support.stand import RUNNER, Stand

PROGRAM: Final = """
import os, sys, time
name, lines, pace, code = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
fd = os.open(sys.argv[5], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(fd, f"{name}\\n".encode())
os.close(fd)
for i in range(lines):
    sys.stdout.write(f"{name} {i} {'x' * (i % 50)}\\n")
    sys.stdout.flush()
    time.sleep(pace)
sys.exit(code)
"""
ANSWER_S: Final = 120.0
"""Whatever is killed, the system is back and done with its work within this."""
POLL_S: Final = 0.05


class Victim(StrEnum):
    """What can be hit."""

    DAEMON = "daemon"
    FORK_SERVER = "fork server"
    PLANE = "control plane"
    SHIM = "shim"
    CHILD = "child"
    FROZEN = "daemon frozen"


WEIGHTS: Final = {
    Victim.DAEMON: 40,
    Victim.FORK_SERVER: 15,
    Victim.PLANE: 15,
    Victim.SHIM: 10,
    Victim.CHILD: 10,
    Victim.FROZEN: 10,
}
LISTED_MAX: Final = 200
"""More than are ever alive here."""
BREATH_S: Final = 0.6
FROZEN_S: Final = 0.5
"""SIGSTOP to SIGCONT of a daemon that is frozen and not killed."""


@dataclass(slots=True)
class Work:
    """One execution and what it must come to."""

    name: str
    lines: int
    pace_s: float
    code: int
    execution: str = ""
    hit: set[Victim] = field(default_factory=set)

    @property
    def output(self) -> bytes:
        """What it prints when nobody stops it."""
        return b"".join(f"{self.name} {i} {'x' * (i % 50)}\n".encode() for i in range(self.lines))


@dataclass(slots=True)
class Tally:
    """What happened, for a reader."""

    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    executions: int = 0
    bytes: int = 0
    doubled: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    orphans: int = 0

    @property
    def good(self) -> bool:
        """Whether every promise held."""
        return not (self.doubled or self.lost or self.wrong or self.orphans)

    def lines(self) -> list[str]:
        """The summary."""
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        verdicts = ", ".join(f"{name} {count}" for name, count in sorted(self.verdicts.items()))
        told = [
            f"time        {self.seconds:.0f} s",
            f"kills       {self.kills.total()} ({kills})",
            f"executions  {self.executions} ({verdicts})",
            f"output      {self.bytes} bytes, compared byte by byte",
            f"duplicates  {len(self.doubled)}",
            f"losses      {len(self.lost)}",
            f"wrong ends  {len(self.wrong)}",
            f"orphans     {self.orphans}",
        ]
        return told + [f"  {line}" for line in (*self.doubled, *self.lost, *self.wrong)]


class Rig:
    """A stand, its work, and the hand that hits it."""

    def __init__(self, system: Stand, seed: int) -> None:
        self._system = system
        self._chance = random.Random(seed)
        self._ran = system.home / "ran.txt"
        self.work: list[Work] = []
        self.tally = Tally()
        self._begun = time.monotonic()

    # --- work ---------------------------------------------------------------------------------------------------

    async def order(self, *, lines: int | None = None, pace_s: float | None = None) -> Work:
        """One more execution; the plane may be down meanwhile, and is asked again under the same key."""
        number = len(self.work)
        work = Work(
            name=f"w{number}",
            lines=self._chance.choice((0, 1, 20, 200)) if lines is None else lines,
            pace_s=self._chance.choice((0.0, 0.005, 0.02)) if pace_s is None else pace_s,
            code=self._chance.choice((0, 0, 0, 1, 7, 200)),
        )
        self.work.append(work)
        argv = [sys.executable, "-I", "-S", "-c", PROGRAM, work.name, work.lines, work.pace_s, work.code, self._ran]
        body = {"argv": [str(item) for item in argv], "cwd": str(self._system.home)}
        key = uuid.UUID(int=self._chance.getrandbits(128)).hex
        ends = time.monotonic() + ANSWER_S
        while True:
            try:
                answer = await self._system.http.post(
                    f"/runners/{RUNNER}/executions", json=body, headers={"Idempotency-Key": key}
                )
                answer.raise_for_status()
            except httpx.TransportError:
                assert time.monotonic() < ends, "the control plane does not come back"
                await asyncio.sleep(POLL_S)
                continue
            work.execution = answer.json()["id"]
            return work

    async def living(self) -> int:
        """How many executions have not ended, as the control plane sees it."""
        count = 0
        for state in ("queued", "sent", "running"):
            answer = await self._system.get("/executions", runner=RUNNER, state=state, limit=LISTED_MAX)
            count += len(answer["executions"])
        return count

    # --- fire ---------------------------------------------------------------------------------------------------

    async def strike(self, victim: Victim | None = None) -> Victim:
        """Hit something, and bring it back where nothing else would."""
        victim = victim or self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        match victim:
            case Victim.DAEMON:
                await self._system.kill("daemon")
                await self._system.start_daemon()
            case Victim.PLANE:
                await self._system.kill("plane")
                await self._system.start_plane()
            case Victim.FORK_SERVER:
                self._kill_fork_server()
            case Victim.FROZEN:
                pid = self._system.pid("daemon")
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(FROZEN_S)
                os.kill(pid, signal.SIGCONT)
            case Victim.SHIM | Victim.CHILD:
                self._kill_one(victim)
        self.tally.kills[victim.value] += 1
        return victim

    def _kill_fork_server(self) -> None:
        """The daemon's child that is no shim: where there was no fork server for a moment, shims are the daemon's children, too."""
        daemon = self._system.pid("daemon")
        for pid in map(int, Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()):
            if _command(pid).endswith(b"\0forkserver\0"):
                _kill(pid)

    def _kill_one(self, victim: Victim) -> None:
        """A shim or a child of a living attempt, drawn among those that are there."""
        found = []
        for work in self.work:
            meta = self._system.state / "x" / f"{work.execution}.1" / "meta.json"
            exit_record = meta.with_name("exit.json")
            if not work.execution or (exit_record.exists() and exit_record.stat().st_size):
                continue
            try:
                told = json.loads(meta.read_bytes())
            except (OSError, ValueError):
                continue
            who = told.get("shim" if victim is Victim.SHIM else "child")
            if who and _start(who["pid"]) == who["start"]:
                found.append((work, who["pid"]))
        if found:
            work, pid = self._chance.choice(found)
            work.hit.add(victim)
            _kill(pid)

    async def breathe(self, at_most_s: float = BREATH_S) -> None:
        """A moment between two strikes, drawn."""
        await asyncio.sleep(self._chance.uniform(0.0, at_most_s))

    # --- truth --------------------------------------------------------------------------------------------------

    async def judge(self) -> Tally:
        """Wait for every end, then hold each against what it must be."""
        for work in self.work:
            await self._judge_one(work)
        runs = Counter(self._ran.read_text().split()) if self._ran.exists() else Counter[str]()
        self.tally.doubled += [f"{name} ran {count} times" for name, count in sorted(runs.items()) if count > 1]
        self.tally.executions = len(self.work)
        self.tally.orphans = await self._orphans()
        self.tally.seconds = time.monotonic() - self._begun
        return self.tally

    async def _orphans(self) -> int:
        """Processes of attempts that are all over; one that was killed needs a moment to be gone."""
        ends = time.monotonic() + ANSWER_S
        while (left := self._system.carriers()) and time.monotonic() < ends:
            await asyncio.sleep(POLL_S)
        return len(left)

    async def _judge_one(self, work: Work) -> None:
        ended = await self._system.ended(work.execution)
        settlement = ended["settlement"] or {}
        verdict = settlement.get("verdict", ended["state"])
        self.tally.verdicts[verdict] += 1
        output = (await self._system.output(work.execution))["stdout"] if ended["settlement"] else b""
        self.tally.bytes += len(output)
        statements = (await self._system.get(f"/receipts/{work.execution}"))["statements"]
        kinds = Counter(statement["kind"] for statement in statements)
        if kinds["receipt"] != 1 or kinds["settlement"] > 1:
            self.tally.doubled.append(f"{work.name}: {dict(kinds)}")
        whole = output == work.output and ended["exit_status"] == work.code and verdict == "exited"
        if whole:
            self._compare_digest(work, settlement)
        elif not work.hit:
            self.tally.lost.append(
                f"{work.name}: {verdict} {ended['exit_status']}, {len(output)} bytes, {ended['reason']}"
            )
        elif not self._honest(work, verdict, settlement, output):
            self.tally.wrong.append(f"{work.name}: {sorted(work.hit)} and {verdict}, {len(output)} bytes")

    def _compare_digest(self, work: Work, settlement: dict[str, Any]) -> None:
        digest = hashlib.sha256(work.output).hexdigest()
        if settlement["streams"]["stdout"] != {"bytes": len(work.output), "sha256": digest}:
            self.tally.wrong.append(f"{work.name}: another digest was signed")

    def _honest(self, work: Work, verdict: str, settlement: dict[str, Any], output: bytes) -> bool:
        """Whether the end of something that was hit itself tells what happened, and its output is what there was so far."""
        told = (Victim.SHIM in work.hit and verdict == "lost") or (
            Victim.CHILD in work.hit and verdict == "signalled" and settlement.get("signal") == signal.SIGKILL
        )
        return told and work.output.startswith(output)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _start(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _command(pid: int) -> bytes:
    """Its command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
