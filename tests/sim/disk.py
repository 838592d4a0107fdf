"""The disk of a journal: the shipped tables and writes in a database in memory, of which only commits survive anything.

`SimJournal` is one daemon's way to it, with the time a commit takes and the points where the daemon may die in it.
"""

import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from protocol.errors import Reason
from protocol.messages import ReportItem
from runner.adapters import journal_rows, journal_schema
from runner.core.journaling import Image, Write
from runner.errors import JournalBroken

if TYPE_CHECKING:
    from tests.sim.host import Host

PAGE_BYTES = 4096
"""Each world begins with a copy of an empty database: larger pages are more to copy, smaller ones more to walk."""


@lru_cache
def _empty() -> bytes:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    journal_schema.migrate(db)
    blob: bytes = db.serialize()
    db.close()
    return blob


class JournalDisk:
    """What survives."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.deserialize(_empty())
        self.commits = 0

    def commit(self, writes: Sequence[Write]) -> None:
        """All of it, or nothing. Raises RuleBroken or sqlite3.Error for a write that must not be."""
        self.db.execute("BEGIN")
        try:
            for write in writes:
                journal_rows.apply(self.db, write)
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
        self.commits += 1


class SimJournal:
    """The port Journal of one daemon. `site` is where it may die; `told` hears of each commit."""

    def __init__(self, host: "Host", site: Callable[[str], None], told: Callable[[Sequence[Write]], None]) -> None:
        self._host = host
        self._site = site
        self._told = told

    async def commit(self, writes: Sequence[Write]) -> None:
        """See the port."""
        self._site("before a commit")
        await self._host.timeline.sleep(self._host.disk_us())
        if self._host.broken:
            raise JournalBroken(Reason.INFRA, "the disk answers with an error")
        try:
            self._host.journal.commit(writes)
        except (AssertionError, sqlite3.Error) as exc:
            self._host.story.fail("the journal was asked for what must not be: %s", exc)
        self._told(writes)
        self._site("behind a commit")

    async def load(self) -> Image:
        """See the port."""
        return journal_rows.read_image(self._host.journal.db)

    async def outbox(self, above: int, limit: int) -> list[ReportItem]:
        """See the port."""
        return journal_rows.read_outbox(self._host.journal.db, above, limit)

    async def oldest_unanswered(self) -> int | None:
        """See the port."""
        return journal_rows.read_oldest_unanswered(self._host.journal.db)

    async def items(self, out_seqs: Sequence[int]) -> list[ReportItem]:
        """See the port."""
        return journal_rows.read_items(self._host.journal.db, out_seqs)
