"""The journal against a model: any order of writes, prunings and reopenings."""

import asyncio
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from protocol.execution import AttemptState
from protocol.ids import CommandId, Digest, WorktreeId
from protocol.lease import LeaseState
from protocol.messages import ItemKind, ReportItem
from protocol.replay import Mark
from runner.adapters.journal import KEPT_MS, SqliteJournal
from runner.core.journaling import (
    AttemptRow,
    DropWorktree,
    Image,
    PutAnswered,
    PutAttempt,
    PutCommand,
    PutMark,
    PutReceipt,
    PutSettlement,
    PutTombstone,
    PutWorktree,
    WorktreeRow,
    Write,
)
from runner.core.plans import CommandRow, WorktreeMade
from tests.unit.runner.journalrows import LEASE, POLICY, SHIM, attempt, command, item


class JournalModel(RuleBasedStateMachine):
    """Any order of writes, prunings and reopenings, compared with plain dicts that follow the rules of `journaling.py`.

    Mutants that must die: PutAttempt that forgets the lease, DropWorktree that does nothing, load that leaves out a
    pending command, a prune of a living attempt's envelope,
    PutAnswered that overwrites, a prune of unanswered bodies, a commit that answers before COMMIT.
    """

    commands = Bundle("commands")
    begun = Bundle("begun")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "journal.db"
        self.runner = asyncio.Runner()
        self.marks: dict[int, Mark] = {}
        self.rows: dict[Digest, CommandRow] = {}
        self.attempts: dict[str, AttemptRow] = {}
        self.tombstones: dict[str, tuple[CommandId, int]] = {}
        self.worktrees: dict[str, WorktreeRow] = {}
        self.bodies: dict[int, ReportItem] = {}
        self.answered: dict[int, int] = {}
        self.numbers = 0
        self.out_head = 0
        self.now_ms = 0
        self.journal = SqliteJournal(self.path)
        self.run(self.journal.open())

    def run(self, doing: Coroutine[Any, Any, Any]) -> Any:
        """Do it in the machine's own loop."""
        return self.runner.run(doing)

    def teardown(self) -> None:
        """Give back files and threads."""
        self.run(self.journal.close())
        self.runner.close()
        self.directory.cleanup()

    def commit(self, writes: Sequence[Write]) -> None:
        """Commit in the loop."""
        self.run(self.journal.commit(writes))

    def next_item(self, kind: ItemKind) -> ReportItem:
        """The next report item."""
        self.out_head += 1
        self.bodies[self.out_head] = item(self.out_head, kind)
        return self.bodies[self.out_head]

    @rule(target=commands, inc=st.integers(1, 2), safety=st.booleans())
    def receive(self, inc: int, safety: bool) -> int:
        """A new command, with its mark in the same commit unless it is on the safety stream."""
        self.numbers += 1
        row = command(self.numbers, seq=None if safety else self.numbers)
        writes: list[Write] = [PutCommand(row, self.now_ms)]
        if not safety:
            self.marks[inc] = Mark(self.numbers, row.digest)
            writes.append(PutMark(inc, self.marks[inc]))
        self.commit(writes)
        self.rows[row.digest] = row
        return self.numbers

    @rule(number=consumes(commands), target=begun)
    def receipt(self, number: int) -> int:
        """Its one receipt, and the intent of its attempt."""
        made = self.next_item(ItemKind.RECEIPT)
        row = attempt(number)
        self.commit([PutReceipt(row.digest, made, self.now_ms), PutAttempt(row, self.now_ms)])
        self.rows[row.digest] = replace(self.rows[row.digest], receipt_seq=made.out_seq)
        self.attempts[row.attempt.name] = row
        return number

    @rule(
        number=begun,
        state=st.sampled_from([state for state in AttemptState if state is not AttemptState.SETTLED]),
        shim=st.sampled_from([None, SHIM]),
        lease=st.sampled_from([None, LEASE, replace(LEASE, token=4, state=LeaseState.HELD)]),
        stop_grace_ms=st.none() | st.integers(0, 9),
    )
    def change(self, number: int, state: AttemptState, shim: Any, lease: Any, stop_grace_ms: int | None) -> None:
        """The attempt goes on."""
        row = attempt(number, state=state, shim=shim, lease=lease, stop_grace_ms=stop_grace_ms)
        self.commit([PutAttempt(row, self.now_ms)])
        self.attempts[row.attempt.name] = row

    @rule(number=consumes(begun))
    def settle(self, number: int) -> None:
        """Its one settlement."""
        made = self.next_item(ItemKind.SETTLEMENT)
        name = attempt(number).attempt
        self.commit([PutSettlement(name, made, self.now_ms)])
        settled = replace(self.attempts[name.name], state=AttemptState.SETTLED, settled_seq=made.out_seq)
        self.attempts[name.name] = settled

    @rule(target_name=st.sampled_from(["ex_1.1", "cmd_1"]), cmd=st.integers(1, 3), lives_ms=st.integers(0, KEPT_MS))
    def bury(self, target_name: str, cmd: int, lives_ms: int) -> None:
        """A stop before its start."""
        cmd_id, expires_ms = CommandId(f"cmd_{cmd}"), self.now_ms + lives_ms
        self.commit([PutTombstone(target_name, cmd_id, expires_ms)])
        self.tombstones[target_name] = (cmd_id, expires_ms)

    @rule(name=st.sampled_from(["wt_1", "wt_2"]), made=st.booleans(), branch=st.none() | st.just("topic"))
    def worktree(self, name: str, made: bool, branch: str | None) -> None:
        """A worktree begins or is there."""
        there = WorktreeMade(path=f"/w/{name}", head="b" * 40, branch=branch) if made else None
        row = WorktreeRow(worktree_id=WorktreeId(name), digest=POLICY, repo="/r", made=there)
        self.commit([PutWorktree(row)])
        self.worktrees[name] = row

    @rule(name=st.sampled_from(["wt_1", "wt_2"]))
    def drop(self, name: str) -> None:
        """A worktree goes, or was never there."""
        self.commit([DropWorktree(WorktreeId(name))])
        self.worktrees.pop(name, None)

    @rule(data=st.data())
    @precondition(lambda self: self.out_head)
    def answer(self, data: st.DataObject) -> None:
        """Some items are answered, some of them again; the first time counts."""
        numbers = data.draw(st.lists(st.integers(1, self.out_head + 1), max_size=4))
        self.commit([PutAnswered(tuple(numbers), self.now_ms)])
        for number in numbers:
            if number <= self.out_head:
                self.answered.setdefault(number, self.now_ms)

    @rule(passed_ms=st.sampled_from([1, KEPT_MS // 2, KEPT_MS]))
    def prune(self, passed_ms: int) -> None:
        """Time passes and the old is forgotten."""
        self.now_ms += passed_ms
        self.run(self.journal.prune(self.now_ms))
        for number, at_ms in self.answered.items():
            if at_ms < self.now_ms - KEPT_MS:
                self.bodies.pop(number, None)
        self.tombstones = {key: value for key, value in self.tombstones.items() if value[1] >= self.now_ms}

    @rule()
    def reopen(self) -> None:
        """The daemon starts again."""
        self.run(self.journal.close())
        self.journal = SqliteJournal(self.path)
        self.run(self.journal.open())

    @invariant()
    def agrees(self) -> None:
        """The image and the outbox are what the model says."""
        oldest = self.run(self.journal.oldest_unanswered())
        assert oldest == min(self.bodies.keys() - self.answered.keys(), default=None)
        image = self.run(self.journal.load())
        living = {row.digest for row in self.attempts.values() if row.settled_seq is None}
        shown = [
            row if row.receipt_seq is None or row.digest in living else replace(row, envelope=b"")
            for row in self.rows.values()
        ]
        assert image == Image(
            marks=self.marks,
            commands=shown,
            attempts=list(self.attempts.values()),
            tombstones=self.tombstones,
            worktrees=[self.worktrees[name] for name in sorted(self.worktrees)],
            out_head=self.out_head,
        )
        assert self.run(self.journal.outbox(0, 10_000)) == [self.bodies[n] for n in sorted(self.bodies)]


TestJournalModel = pytest.mark.slow(JournalModel.TestCase)
TestJournalModel.settings = settings(
    # Every step is an fsync or two: a quarter of the profile's examples.
    max_examples=settings().max_examples // 4,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
