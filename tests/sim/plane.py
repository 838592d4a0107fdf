"""The control plane: all of the shipped one but its socket and its file. Each start is another process on the same database.

The database is in memory and commits as the shipped writer does (groups, savepoints, consequences behind the commit), in an event of
its own some milliseconds after it was asked: the process may die in between, before or behind a commit. A backup is the bytes of the
database; keys are not in it.
"""

import asyncio
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import anyio

from controlplane import enrolment, tables
from controlplane.database import SCHEMA_VERSION, Database, _Change, _deliver
from controlplane.errors import RequestRefused, StoreFailed
from controlplane.keys import Keys
from controlplane.ledger import Ledger
from controlplane.limits import EXPIRY_SWEEP_MS, LAST_SEEN_FLUSH_MS
from controlplane.plane import ControlPlane
from controlplane.rows import RunnerRow
from protocol.envelope import PayloadType, Verified, seal
from protocol.keys import PrivateKey
from protocol.keyset import KeyEntry, Keyset, Role, open_keyset
from protocol.limits import BEAT_INTERVAL_MS
from tests.sim.disk import PAGE_BYTES
from tests.sim.link import Line
from tests.sim.story import Story
from tests.sim.timeline import MS_US, Owner, Task, Timeline

ORG = "org_1"
NOW_MS = 1_795_000_000_000
KEYSET_LIFE_MS = 60 * 24 * 60 * 60 * 1000
BOOT_MS = 10_000_000
"""The plane's own clock at the beginning of a world."""


@lru_cache
def _empty() -> bytes:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    db.executescript((files("controlplane") / "schema.sql").read_text("utf-8"))
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    blob: bytes = db.serialize()
    db.close()
    return blob


@lru_cache
def _logs() -> Path:
    """Where no log is ever written."""
    return Path(tempfile.mkdtemp(prefix="sim-logs-"))


def open_database(blob: bytes) -> sqlite3.Connection:
    """A database with this content."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.row_factory = sqlite3.Row
    db.deserialize(blob)
    return db


@lru_cache
def make_keys() -> Keys:
    """Root, command key and keyset of every world."""
    root, command = PrivateKey(b"r" * 32), PrivateKey(b"c" * 32)
    roles = [Role.COMMAND, Role.SAFETY, Role.ENROL]
    entry = KeyEntry(x=command.public.x, roles=roles, nbf=NOW_MS - KEYSET_LIFE_MS, naf=NOW_MS + KEYSET_LIFE_MS)
    keyset = Keyset(org=ORG, version=1, iat=NOW_MS - MS_US, exp=NOW_MS + KEYSET_LIFE_MS, keys=[entry])
    keys = Keys(_logs(), root, command, b"j" * 32, "admin", _UNSET, first_start=False)
    envelope = seal(keyset.dump(), PayloadType.KEYSET, [root])
    return Keys(
        keys.directory, root, command, keys.join_seed, keys.admin_token, open_keyset(envelope, keys.root), False
    )


_UNSET: Verified[Keyset] = None  # type: ignore[assignment]


class SimDatabase(Database):
    """The shipped writer without its thread and file."""

    def __init__(self, plane: "Plane") -> None:
        self._plane = plane
        self._writer = self.reader = plane.db  # type: ignore[misc]
        self._loop = asyncio.get_running_loop()
        self._queue = self  # type: ignore[assignment]
        self._closed = False
        self.commits = 0
        self._waiting: list[_Change] = []

    def put(self, change: _Change) -> None:
        """What the shipped queue does, and the thread behind it."""
        if not self._waiting:
            self._plane.timeline.after(self._plane.owner, self._plane.disk_us(), self._flush)
        self._waiting.append(change)

    def _flush(self) -> None:
        group, self._waiting = self._waiting, []
        plane = self._plane
        if plane.burns("before a commit"):
            return
        if plane.full:
            for change in group:
                change.error = StoreFailed("OperationalError")
        else:
            self._commit(group)
        if plane.burns("behind a commit"):
            return
        _deliver(group)


class Plane:
    """The machine that control planes run on, one after the other."""

    def __init__(
        self, timeline: Timeline, rng: Random, story: Story, keys: Keys, runners: list[tuple[str, PrivateKey, str]]
    ) -> None:
        self.timeline = timeline
        self.rng = rng
        self.story = story
        self.keys = keys
        self.db = open_database(_empty())
        self.owner = Owner("plane")
        self.owner.die()
        self.up: ControlPlane | None = None
        self.full = False
        self.disk_ms = 2
        self.wall_offset_ms = NOW_MS
        self.fuse: int | None = None
        """How many sites it passes before it dies."""
        self.died: Callable[[], None] = lambda: None
        self.restored = 0
        """How often it came back from a backup."""
        self.lines: list[Line] = []
        self._enrol(runners)

    def _enrol(self, runners: list[tuple[str, PrivateKey, str]]) -> None:
        for runner_id, key, seal_x in runners:
            row = RunnerRow(
                id=runner_id,
                name=runner_id,
                x=key.public.x,
                seal_x=seal_x,
                labels={},
                living=True,
                inc=1,
                certificate="",
            )
            certificate = enrolment.certify(row, 1, org=ORG, key=self.keys.command, now_ms=NOW_MS)
            tables.put_runner(self.db, replace(row, certificate=certificate))

    # --- clocks -------------------------------------------------------------------------------------------------

    def wall_ms(self) -> int:
        """Unix time."""
        return self.timeline.now_us // MS_US + self.wall_offset_ms

    def boot_clock_ms(self) -> int:
        """Its own clock."""
        return self.timeline.now_us // MS_US + BOOT_MS

    def disk_us(self) -> int:
        """How long a commit takes."""
        return self.rng.randrange(100, self.disk_ms * MS_US)

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Another process."""
        if self.owner.alive:
            return
        self.story.say("plane", "starts")
        self.owner = Owner("plane")
        self.timeline.start(self.owner, self._main(), "plane").add_done_callback(self._over)

    async def _main(self) -> None:
        ledger = Ledger(
            self.keys, SimDatabase(self), self.wall_ms, self.boot_clock_ms, self.rng.randbytes, BEAT_INTERVAL_MS
        )
        ledger.load(_logs())
        up = self.up = ControlPlane(ledger)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(up._every, LAST_SEEN_FLUSH_MS, up._flush_seen)
            tasks.start_soon(up._every, EXPIRY_SWEEP_MS, up._expire)

    def _over(self, task: "Task[None]") -> None:
        if self.owner.alive and not task.cancelled() and task.exception() is not None:
            self.story.fail("the plane crashed: %r", task.exception())

    def burns(self, site: str) -> bool:
        """Whether it dies at this site."""
        if self.fuse is None or not self.owner.alive:
            return False
        self.fuse -= 1
        if self.fuse > 0:
            return False
        self.die(site)
        return True

    def die(self, why: str) -> None:
        """Now, and without a word."""
        if not self.owner.alive:
            return
        self.fuse = None
        self.story.say("plane", "dies: %s", why)
        self.owner.die()
        self.up = None
        for line in self.lines:
            line.server_vanished()
        self.lines.clear()
        self.died()

    def listen(self, line: Line) -> Owner | None:
        """Take a connection."""
        if not self.owner.alive or self.up is None:
            return None
        self.lines = [other for other in self.lines if other.server.closed is None]
        self.lines.append(line)
        line.server.owner = self.owner
        task = self.timeline.start(self.owner, self.up.gateway.serve(line.server), "gateway")  # type: ignore[arg-type]
        task.add_done_callback(self._over)
        return self.owner

    # --- backups ------------------------------------------------------------------------------------------------

    def backup(self) -> bytes:
        """Everything that is committed."""
        self.story.say("plane", "is backed up")
        blob: bytes = self.db.serialize()
        return blob

    def restore(self, blob: bytes) -> None:
        """Come back from a backup."""
        self.die("is restored from a backup")
        self.db.close()
        self.db = open_database(blob)
        self.restored += 1

    # --- users --------------------------------------------------------------------------------------------------

    def ask(self, make: Callable[[ControlPlane], Any], answered: Callable[[Any], None]) -> None:
        """A request; `answered` hears the answer, or the refusal, unless the plane dies before."""
        if self.up is None or not self.owner.alive:
            return
        up = self.up

        async def serve() -> None:
            answer: Any
            try:
                answer = await make(up)
            except RequestRefused as exc:
                answer = exc
            self.timeline.after(None, MS_US, answered, answer)

        self.timeline.start(self.owner, serve(), "request").add_done_callback(self._over)

    # --- facts --------------------------------------------------------------------------------------------------

    def rows(self, sql: str, *args: Any) -> list[sqlite3.Row]:
        """Committed rows."""
        return self.db.execute(sql, args).fetchall()
