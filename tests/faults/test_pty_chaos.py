"""Twenty terminals that are typed into while daemon, network and viewers die at random: everything once, in order, byte for byte.

What was typed is known from who typed, what arrived from a file that the program of each terminal writes, what was printed from what
arrived: the system under test is asked for none of it. FAULTS_LONG=1 goes on for two minutes.

Hand mutants, each tried, and each red: a shim that takes what it has once more; a control plane that does not send again what a broken
session had; a viewer that goes on at the end instead of where it was; a frame of output that comes twice; a piece that loses a byte.
"""

import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.support.proxy import Proxy
from tests.support.pty_screen import Person, opened, person, pty_log
from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

LONG: Final = os.environ.get("FAULTS_LONG") == "1"
SEED: Final = 20261122
CHAOS_S: Final = 120.0 if LONG else 10.0
PTYS: Final = 20
PAIRS: Final = 4
"""Terminals that two type into."""
ONLOOKERS: Final = 4
"""Terminals that somebody only looks at beside."""
DROPPED: Final = 6
"""Viewers whose connections break at a time."""
PROGRAM: Final = """
import hashlib, os, sys, tty
tty.setraw(0)
file = open(sys.argv[1], "ab", buffering=0)
def say(data):
    while data:
        data = data[os.write(1, data):]
say(b"ready\\r\\n")
line = b""
while data := os.read(0, 65536):
    file.write(data)
    *whole, line = (line + data).split(b"\\n")
    for each in whole:
        say(hashlib.sha256(each).hexdigest().encode() + b"\\n")
"""


def printed(arrived: bytes) -> bytes:
    """What the program prints when this arrives."""
    return b"ready\r\n" + b"".join(
        hashlib.sha256(line).hexdigest().encode() + b"\n" for line in arrived.split(b"\n")[:-1]
    )


@dataclass
class Terminal:
    """One of them, and who is at it."""

    number: int
    pty: str
    file: Path
    writers: list[Person] = field(default_factory=list)
    onlookers: list[Person] = field(default_factory=list)

    @property
    def arrived(self) -> bytes:
        """What its program read."""
        return self.file.read_bytes()

    @property
    def people(self) -> list[Person]:
        """All of them."""
        return [*self.writers, *self.onlookers]

    async def proves(self, system: Stand) -> None:
        """Everything typed arrived once and in order, everything printed was shown to each once and in order."""
        for who in self.writers:
            await who.is_taken()
        typed = sum(len(who.typed) for who in self.writers)

        async def all_of_it() -> bool:
            return len(self.arrived) >= typed

        await poll(all_of_it, f"{typed} bytes at the program of {self.pty}")
        arrived = self.arrived
        for name, who in enumerate(self.writers):
            mine = b"".join(line for line in arrived.splitlines(keepends=True) if line.startswith(b"%d " % name))
            assert mine == bytes(who.typed), f"{self.pty}: what {name} typed"
        assert len(arrived) == typed
        shown = printed(arrived)
        for who in self.people:
            await who.until(lambda who=who: len(who.shown) >= len(shown), "all of the output")  # type: ignore[misc]
            assert bytes(who.shown) == shown
            assert who.skips == 0
        assert await pty_log(system, self.pty) == shown


class Chaos:
    """What dies, drawn from decks that are shuffled with a fixed seed: everything comes, and as often."""

    def __init__(self, system: Stand, proxy: Proxy, people: list[Person]) -> None:
        self.did: Counter[str] = Counter()
        self._system = system
        self._proxy = proxy
        self._people = people
        self._random = random.Random(SEED)

    async def run(self, seconds: float) -> None:
        """For so long, and at least one deck."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        deeds: list[Callable[[], Awaitable[None]]] = [
            self._daemon, self._drop, self._reset, self._stall, self._viewers, self._viewers, self._both,
        ]  # fmt: skip
        for deck in itertools.count():
            self._random.shuffle(deeds)
            for deed in deeds:
                if deck and loop.time() >= ends:
                    self._proxy.heal()
                    return
                await deed()
                self.did[deed.__name__.strip("_")] += 1
                await self._pause(0.4)

    async def _pause(self, most_s: float) -> None:
        await asyncio.sleep(self._random.uniform(0.0, most_s))

    async def _daemon(self) -> None:
        await self._system.kill("daemon")
        await self._pause(0.2)
        await self._system.start_daemon(log_level="warning")
        await self._system.online()

    async def _drop(self) -> None:
        await self._proxy.drop()

    async def _reset(self) -> None:
        await self._proxy.reset()

    async def _stall(self) -> None:
        self._proxy.stall()
        await self._pause(0.8)
        self._proxy.flow()

    async def _viewers(self) -> None:
        for who in self._random.sample(self._people, DROPPED):
            who.drop()

    async def _both(self) -> None:
        """The network goes while its viewers do, and the daemon before it is back."""
        self._proxy.refuse()
        await self._proxy.reset()
        await self._viewers()
        await self._pause(0.3)
        await self._daemon_behind_a_cut()

    async def _daemon_behind_a_cut(self) -> None:
        await self._system.kill("daemon")
        await self._system.start_daemon(log_level="warning")
        self._proxy.accept()
        await self._system.online()


async def types(who: Person, name: int, chance: random.Random, over: asyncio.Event) -> None:
    """Lines of any length, at any pace, until it is over."""
    number = 0
    while not over.is_set():
        await who.type(f"{name} {number} {chance.randbytes(chance.choice((1, 3, 20, 200))).hex()}\n")
        number += 1
        await asyncio.sleep(chance.choice((0.005, 0.05, 0.2)))


@dataclass
class World:
    """A runner behind a network, and its terminals."""

    system: Stand
    proxy: Proxy
    terminals: list[Terminal]

    def processes(self) -> dict[str, tuple[int, int]]:
        """Shim and child of each attempt that there is on the machine."""
        found = {}
        for path in (self.system.state / "x").glob("*/meta.json"):
            meta: dict[str, Any] = json.loads(path.read_text())
            found[path.parent.name] = meta["shim"]["pid"], meta["child"]["pid"]
        return found

    @property
    def people(self) -> list[Person]:
        """Everybody."""
        return [who for terminal in self.terminals for who in terminal.people]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """Twenty terminals whose programs are there, and everybody at them."""
    async with AsyncExitStack() as stack:
        system = await stack.enter_async_context(stand(enrolled=False))
        proxy = await stack.enter_async_context(Proxy(system.port, seed=SEED))
        await system.enroll(port=proxy.port)
        policy = system.home / "policy.toml"
        policy.write_text(re.sub(r"(?m)^concurrent = \d+", f"concurrent = {2 * PTYS}", policy.read_text()))
        await system.start_daemon(log_level="warning")
        await system.online()
        # The plane lets go of connections that rest, and a request may meet that.
        system.http.headers["Connection"] = "close"
        found = World(system, proxy, [])

        async def one(number: int) -> Terminal:
            file = system.home / f"typed-{number}"
            pty = await opened(system, sys.executable, "-I", "-S", "-c", PROGRAM, str(file))
            terminal = Terminal(number, pty, file)
            for name in ("one", "two")[: 2 if number < PAIRS else 1]:
                terminal.writers.append(await stack.enter_async_context(person(system, pty, name, start=0)))
            if PAIRS <= number < PAIRS + ONLOOKERS:
                looks = person(system, pty, "three", start=0, mode="ro")
                terminal.onlookers.append(await stack.enter_async_context(looks))
            for who in terminal.people:
                await who.sees("ready")
            return terminal

        found.terminals += await asyncio.gather(*(one(number) for number in range(PTYS)))
        yield found


async def test_nothing_is_lost_or_doubled_whoever_dies(world: World) -> None:
    """1. All type while everything dies. 2. It rests: all of it is there. 3. The same processes. 4. They are closed: nothing is left."""
    system, over = world.system, asyncio.Event()
    before = world.processes()
    chaos = Chaos(system, world.proxy, world.people)
    async with asyncio.TaskGroup() as tasks:
        for terminal in world.terminals:
            for name, who in enumerate(terminal.writers):
                chance = random.Random(f"{SEED} {terminal.number} {name}")
                tasks.create_task(types(who, name, chance, over))
        try:
            await chaos.run(CHAOS_S)
        finally:
            over.set()
    await system.online()
    for terminal in world.terminals:
        await terminal.proves(system)
    typed = sum(len(who.typed) for who in world.people)
    connections = sum(who.connections for who in world.people)
    print(f"{dict(chaos.did)}; {typed} bytes typed, {connections} connections of {len(world.people)} viewers")
    assert len(chaos.did) == 6 and connections > len(world.people) + DROPPED
    assert len(before) == PTYS and world.processes() == before, "each is held by the shim that began it"
    await asyncio.gather(*(system.post(f"/ptys/{each.pty}/close", {"grace_ms": 500}) for each in world.terminals))
    for who in world.people:
        assert (await who.leaves_with())["settlement"]["verdict"] == "stopped"

    async def nothing_is_left() -> bool:
        living = {pid for both in before.values() for pid in both if Path(f"/proc/{pid}").exists()}
        return not living and system.carriers() == []

    await poll(nothing_is_left, "the end of all shims and programs")
