"""What the engine remembers of commands: the mark, the digests that were judged, their receipts, and the tombstones of early stops."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from protocol.ids import CommandId, Digest
from protocol.limits import CLOCK_SKEW_MS, SAFETY_TTL_MS_MAX
from protocol.replay import Mark, Seen
from runner.core.plans import CommandRow

COMMANDS_REMEMBERED_MAX: Final = 20_000
"""Receipted commands kept for same-digest answers. Forgetting opens no hole: `ctl` has its mark, `safety` its expiry."""
TOMBSTONES_MAX: Final = 4096
"""Early stops kept at a time; beyond it a stop of something unknown is refused instead of forgotten."""
TOMBSTONE_MS: Final = SAFETY_TTL_MS_MAX + 2 * CLOCK_SKEW_MS
"""A start that was signed before the stop is dead by then."""


@dataclass(slots=True)
class Ledger:
    """Commands by digest in the order of arrival, the first digest of each id, and tombstones by target."""

    ctl: Mark = field(default_factory=Mark)
    commands: dict[Digest, CommandRow] = field(default_factory=dict)
    first: dict[CommandId, Digest] = field(default_factory=dict)
    tombstones: dict[str, tuple[CommandId, int]] = field(default_factory=dict)

    def seen(self) -> Seen:
        """The view that `replay.judge` wants; not a copy."""
        digests: Mapping[CommandId, Digest] = self.first
        return Seen(ctl=self.ctl, digests=digests, receipted=self.commands)

    def add(self, row: CommandRow, ctl: Mark) -> None:
        """Remember a consumed command."""
        self.ctl = ctl
        self.commands[row.digest] = row
        self.first.setdefault(row.cmd_id, row.digest)

    def receipted(self, digest: Digest, out_seq: int) -> None:
        """Its one receipt has this number; the envelope is not needed any more."""
        row = self.commands[digest]
        assert row.receipt_seq is None, "a command has one receipt"
        self.commands[digest] = replace(row, receipt_seq=out_seq, envelope=b"")

    def bury(self, target: str, cmd_id: CommandId, plane_ms: int) -> int | None:
        """Leave a tombstone; returns when it may be forgotten, or None when there is no room."""
        if len(self.tombstones) >= TOMBSTONES_MAX:
            self.tombstones = {name: kept for name, kept in self.tombstones.items() if kept[1] > plane_ms}
            if len(self.tombstones) >= TOMBSTONES_MAX:
                return None
        expires_ms = plane_ms + TOMBSTONE_MS
        self.tombstones[target] = (cmd_id, expires_ms)
        return expires_ms

    def forget(self, living: Container[Digest]) -> None:
        """Down to the bound again: the oldest that have their receipt and are not of `living` attempts, which will be settled."""
        over = len(self.commands) - COMMANDS_REMEMBERED_MAX
        done = (row for row in self.commands.values() if row.receipt_seq is not None and row.digest not in living)
        for row in list(islice(done, max(over, 0))):
            del self.commands[row.digest]
            if self.first.get(row.cmd_id) == row.digest:
                del self.first[row.cmd_id]
