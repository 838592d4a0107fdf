"""The engine against a machine: processes, directories and a journal that survive the daemon, in any order of events.

The daemon may die in every turn: before its commit, or after it with only some of its effects done. A new one is built from the
journal's image and from what the machine's directories show. Time goes on, leases are renewed, lost and granted anew, the machine
sleeps, its owner closes it, shims hang and are killed. What must hold is stated from the machine's and the plane's own record.

Hand mutants that were tried, each in the code as it is, and how each one fails:

1. `Attempts.accept` journals no PREPARED: "a process runs only behind PREPARED".
2. `Attempts.exited` looks up the newest attempt of the execution instead of the named one: "an attempt is settled once".
3. `Attempts.prepared` does not look at tombstones: "nothing runs after it was stopped".
4. `takeback._hold` claims nothing: "one process per execution".
5. `recovery._begun` takes a free lock for never released: "an attempt starts once".
6. `Engine._resume` judges nothing again: "every consumed command has its receipt".
7. `Attempts._bury` keeps its tombstone in memory only: "nothing runs after it was stopped", by a crash.
8. `Attempts.admit` fences no predecessor: "none begins behind a later one", or a_predecessor_is_told_to_end.
9. `Engine._session_up` keeps the old mark in a new incarnation: the_mark_never_falls.
10. `Attempts.end` forgets who stopped (no Persist): a_predecessor_is_told_to_end.
11. `Leases.acquire` takes any token: "no lease outlives its grant".
12. `Rhythm.answered` ends the waking by any answer: "an answer from before the sleep says nothing of after".
13. `Leases.tick` judges while the machine wakes: "no lease is lost before the plane was asked".
14. `Gate` opens at every start: "a closed machine takes no new work".
15. `Orphans.found` takes guarded processes for orphans: "what is guarded is never swept".
16. `Orphans.silent` ends a shim that does not answer: "a shim is ended only where its end was signed, or its lease is lost".
17. `Orphans._overdue` tells of a hung shim and leaves it: "it comes to rest".
18. `recovery._begun` does not ask for the boot: "what is guarded is never swept".
19. `Leases.granted` takes over a lease of another boot: "no lease outlives its grant".
20. `Attempts.prepared` does not look at the fence: "none begins behind a later one".
21. `takeback.adopt` says no lease: shims_know_what_the_journal_knows.
22. `Leases.acquire` does not tell a shim that it must enforce nothing any more: shims_know_what_the_journal_knows.
23. `Leases.beat_answered` counts from the answer: "no lease outlives its grant".
24. `Gate.tick` stops nothing at the deadline of a drain: "a drain ends what still runs".
25. `Leases.granted` grants anew at a restart: "nothing begins under a lease that was given up".
26. `Orphans._unguarded` takes everything for settled: "only what is settled is swept unasked".
27. `Leases.refusal` does not ask whether a lease is held: "nothing begins under a lease that was given up".
28. `Gate.refusal` lets starts through a pause: "a closed machine takes no new work".
29. `Gate.owner` keeps no word: "a closed machine takes no new work", by a crash.
30. `Orphans.tick` only connects to a shim that was silent: shims_know_what_the_journal_knows.
31. `Viewers._refusal` does not ask for a terminal: "only a PTY has viewers".
"""

import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.messages import Answer
from protocol.receipt import Outcome
from protocol.replay import Mark
from protocol.session import ItemsAnswered
from runner.core.effects import CreateWorktree, Effect
from runner.core.inputs import (
    AttemptNotPrepared,
    AttemptPrepared,
    EnvelopeReceived,
    OwnerAdmission,
    OwnerStop,
    PolicyChanged,
    SessionDown,
    Tick,
    ViewerAdmitted,
    ViewerNotAdmitted,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.plans import Admission, Phase, ProcessIdentity, WorktreeGone
from tests.stateful.machine import PTYS, Directory
from tests.stateful.passing import EXECUTIONS, ON_LOSS, SELDOM, PassingMachine
from tests.support.builders import a_key, an_attempt
from tests.support.engine import a_made, an_exit

VIEWER_KEY = a_key("viewer").public.x
WORKTREES = st.sampled_from(["wt_1", "wt_2"])
GONE = WorktreeGone(head=None, branch=None, was_dirty=False)
REST_TURNS_MAX = 400
"""Turns after which a machine that has not come to rest never will."""
LADDER_MS = 100_000
"""Longer than the longest ladder, and the time between two looks at all processes."""


class EngineMachine(PassingMachine):
    """What may happen to a machine, its plane and its owner."""

    @rule(left=st.integers(0, 3))
    def the_daemon_is_killed(self, left: int) -> None:
        """Between two turns."""
        self.die(left=left)

    @rule(left=st.integers(0, 3), seldom=SELDOM)
    def the_machine_reboots(self, left: int, seldom: bool) -> None:
        """Nothing is alive afterwards."""
        if seldom:
            self.die(reboot=True, left=left)

    @rule(after=st.integers(-1, 5))
    def the_daemon_will_die_in_its_next_turn(self, after: int) -> None:
        """Before its commit (-1) or after so many effects."""
        self.fuse = after

    # --- the plane ----------------------------------------------------------------------------------------------

    @rule(execution_id=EXECUTIONS, again=SELDOM, worktree=st.none() | WORKTREES, on_loss=ON_LOSS)
    def the_plane_signs_a_start(
        self, execution_id: str, again: bool, worktree: str | None, on_loss: str | None
    ) -> None:
        """Of the next attempt, or of one that was signed before; in a plain directory or a worktree; with a lease or without."""
        token = max(self.tokens[execution_id] + (not again), 1)
        self.tokens[execution_id] = token
        self.sign_start(execution_id, token, on_loss, worktree)

    @rule(execution_id=EXECUTIONS, on_loss=ON_LOSS, waits=st.booleans())
    def a_start_is_on_its_way(self, execution_id: str, on_loss: str | None, waits: bool) -> None:
        """Signed, received, and its shim waits, if it is its turn."""
        self.the_plane_signs_a_start(execution_id, False, None, on_loss)
        self.commands_arrive(len(self.ctl))
        if self.preparing and waits:
            self.a_shim_is_prepared(-1, False)

    @rule(execution_id=EXECUTIONS, on_loss=ON_LOSS, waits=st.booleans())
    def another_is_on_its_way(self, execution_id: str, on_loss: str | None, waits: bool) -> None:
        """The same: what a machine is for happens more often than what disturbs it."""
        self.a_start_is_on_its_way(execution_id, on_loss, waits)

    @rule(execution_id=EXECUTIONS, keep=st.booleans(), dies=st.booleans(), left=st.integers(0, 3))
    def a_closed_machine_is_asked(self, execution_id: str, keep: bool, dies: bool, left: int) -> None:
        """A start while it is paused, and, where that is for good, after a restart."""
        self.fuse = None
        self.turn(OwnerAdmission(Admission.PAUSED, "uid 1000", None, keep))
        self.admission, self.kept = Admission.PAUSED, Admission.PAUSED if keep else self.kept
        if dies:
            self.die(left=left)
        self.a_start_is_on_its_way(execution_id, None, True)
        self.fuse = None
        self.turn(OwnerAdmission(Admission.OPEN, "uid 1000"))
        self.admission = self.kept = Admission.OPEN

    @rule(execution_id=EXECUTIONS, on_loss=st.sampled_from(["stop", "freeze", "continue"]))
    def a_lease_comes_back(self, execution_id: str, on_loss: str) -> None:
        """Signed, and received."""
        self.the_plane_grants_a_lease_anew(execution_id, on_loss, False)
        self.commands_arrive(len(self.ctl))

    @precondition(lambda self: self.guarded)
    @rule(at=st.integers(0, 9), left=st.integers(0, 3), on_loss=st.sampled_from(["stop", "freeze", "continue"]))
    def a_silent_shim_comes_back(self, at: int, left: int, on_loss: str) -> None:
        """1. It hangs, the daemon restarts and is not answered. 2. Its lease is granted anew. 3. It answers, asked again."""
        self.fuse = None
        attempt = self.guarded[at % len(self.guarded)]
        self.directories[attempt].hung = True
        self.die(left=left)
        for _ in range(len(self.ends)):
            self.an_end_is_heard(0, False)
        self.a_lease_comes_back(attempt.execution_id, on_loss)
        self.directories[attempt].hung = False
        self.elapse(30_000)
        self.turn(Tick())

    @rule(execution_id=EXECUTIONS, viewer=st.sampled_from(["v_1", "v_2"]), early=SELDOM)
    def the_plane_signs_an_attach(self, execution_id: str, viewer: str, early: bool) -> None:
        """To the newest attempt, PTY or not, or to the one that has not been signed."""
        token = max(self.tokens[execution_id] + early, 1)
        args = {"execution_id": execution_id, "start_token": token, "viewer": viewer, "key": VIEWER_KEY}
        self.ctl.append(self.world.seal(self.world.fields(Kind.PTY_ATTACH, args)))

    @precondition(lambda self: self.viewers)
    @rule(at=st.integers(0, 9), fails=st.booleans())
    def a_viewer_is_let_in(self, at: int, fails: bool) -> None:
        """Or the disk is full."""
        digest = self.viewers.pop(at % len(self.viewers)).digest
        no = ViewerNotAdmitted(digest, Reason.DISK_FULL, "", refused=False)
        self.turn(no if fails else ViewerAdmitted(digest))

    @rule(worktree=WORKTREES, create=st.booleans())
    def the_plane_signs_a_worktree_command(self, worktree: str, create: bool) -> None:
        """One of each kind."""
        self.ctl.append(self.world.create(worktree) if create else self.world.remove(worktree))

    @rule(kind=st.sampled_from(["execution.teleport", "execution.stop"]))
    def the_plane_signs_what_is_refused(self, kind: str) -> None:
        """It consumes its number all the same."""
        self.ctl.append(self.world.start(kind=kind))

    @precondition(lambda self: self.consumed < len(self.ctl))
    @rule(count=st.integers(1, 3))
    def commands_arrive(self, count: int) -> None:
        """The next ones, in one turn."""
        at = self.consumed
        self.turn(*(EnvelopeReceived(env) for env in self.ctl[at : at + count]))

    @precondition(lambda self: self.ctl or self.stale)
    @rule(at=st.integers(0, 50))
    def a_command_arrives_out_of_order(self, at: int) -> None:
        """Doubled, too early, or of an incarnation that is over."""
        envelopes = self.ctl + self.stale
        self.turn(EnvelopeReceived(envelopes[at % len(envelopes)]))

    @rule(execution_id=EXECUTIONS, early=SELDOM)
    def a_stop_arrives(self, execution_id: str, early: bool) -> None:
        """Of the newest attempt, in time or late, or of the one that has not been signed."""
        token = max(self.tokens[execution_id] + early, 1)
        attempt = an_attempt(execution_id, token)
        unborn = attempt not in self.starts
        kind = Kind.PTY_CLOSE if execution_id == PTYS else Kind.EXECUTION_STOP
        if self.turn(EnvelopeReceived(self.world.stop(execution_id, token, kind=kind))) and unborn:
            self.stopped_unborn.add(attempt)

    @rule(execution_id=EXECUTIONS)
    def the_owner_stops(self, execution_id: str) -> None:
        """Everything of an execution."""
        unborn = {
            attempt
            for attempt, row in self.world.journal.attempts.items()
            if attempt.execution_id == execution_id and row.state is not AttemptState.SETTLED
        } - self.starts.keys()
        if self.turn(OwnerStop(execution_id, None, "uid 1000")):
            self.stopped_unborn |= unborn

    @rule(up=st.booleans())
    def the_session_changes(self, up: bool) -> None:
        """A welcome without news, or the connection is lost."""
        if up:
            self.fuse, self.beats = None, []
            self.carry_out(self.welcome(reborn=False))
        else:
            self.beats = []
            self.turn(SessionDown())

    def welcome(self, *, reborn: bool) -> list[Effect]:
        """The effects of a handshake; they write nothing, so `World` may take them already."""
        return list(self.world.session(reborn=reborn))

    @rule(seldom=SELDOM)
    def the_plane_begins_a_new_incarnation(self, seldom: bool) -> None:
        """Streams restart; what lives goes on."""
        if not seldom:
            return
        self.fuse, self.beats = None, []
        self.stale = self.ctl[-3:]
        self.ctl = []
        self.carry_out(self.welcome(reborn=True))

    @rule(locked=SELDOM)
    def the_owner_changes_the_policy(self, locked: bool) -> None:
        """To one that admits nothing, for a moment."""
        if locked:
            self.world.policy = self.policies[True]
            self.turn(PolicyChanged(self.world.policy))
            if self.consumed < len(self.ctl):
                self.commands_arrive(1)
        self.world.policy = self.policies[False]
        self.turn(PolicyChanged(self.world.policy))

    @rule()
    def items_are_answered(self) -> None:
        """The plane has stored everything."""
        answers = tuple(Answer(out_seq=number, stored=True) for number in self.world.journal.items)
        self.turn(ItemsAnswered(answers), Tick())

    # --- the machine --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.preparing)
    @rule(at=st.integers(0, 9), fails=st.booleans())
    def a_shim_is_prepared(self, at: int, fails: bool) -> None:
        """Or cannot be had."""
        wanted = self.preparing.pop(at % len(self.preparing))
        attempt = wanted.plan.attempt
        if wanted.again:
            left = self.directories.pop(attempt, None)
            assert left is None or not left.living, "what runs is never cleared"
        if attempt in self.directories or fails:
            self.turn(AttemptNotPrepared(attempt, Reason.SPAWN_FAILED, "", refused=fails))
            return
        self.directories[attempt] = Directory(phase=Phase.READY, lock_held=True)
        self.connected.add(attempt)
        self.turn(AttemptPrepared(attempt, ProcessIdentity(boot_id=self.world.boot_id, pid=4242, start=99)))

    @precondition(lambda self: self.heard)
    @rule(at=st.integers(0, 9), killed=st.booleans())
    def a_process_ends(self, at: int, killed: bool) -> None:
        """With a record in its file, or its shim is killed with it."""
        attempt = self.heard[at % len(self.heard)]
        found = self.directories[attempt]
        found.living, found.lock_held = False, not killed
        found.exit = None if killed else an_exit()
        self.tell_end(attempt)

    @precondition(lambda self: self.heard)
    @rule(at=st.integers(0, 9), left=st.integers(0, 3))
    def memory_runs_out(self, at: int, left: int) -> None:
        """A shim is killed, and the daemon before it could hear of it."""
        self.a_process_ends(at, True)
        self.die(left=left)

    @precondition(lambda self: self.ends)
    @rule(at=st.integers(0, 9), again=st.booleans())
    def an_end_is_heard(self, at: int, again: bool) -> None:
        """In any order, and now and then twice."""
        end = self.ends[at % len(self.ends)] if again else self.ends.pop(at % len(self.ends))
        self.turn(end)

    @precondition(lambda self: self.trees)
    @rule(at=st.integers(0, 9), fails=st.booleans())
    def a_worktree_command_is_through(self, at: int, fails: bool) -> None:
        """Done, or refused at the edge."""
        effect = self.trees.pop(at % len(self.trees))
        if fails:
            self.turn(WorktreeFailed(effect.digest, Reason.GIT_FAILED, "", refused=False))
        elif isinstance(effect, CreateWorktree):
            self.turn(WorktreeCreated(effect.digest, a_made(effect.plan.worktree_id)))
        else:
            self.turn(WorktreeRemoved(effect.digest, GONE))

    # --- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def at_most_one_process_of_an_execution_lives(self) -> None:
        """Whatever was superseded or lost."""
        if hasattr(self, "directories"):
            names = [attempt.execution_id for attempt in self.living]
            assert len(set(names)) == len(names)

    @invariant()
    def a_predecessor_is_told_to_end(self) -> None:
        """As soon as its successor is admitted, which waits for it."""
        if hasattr(self, "world"):
            journal = self.world.journal
            open_rows = [row for row in journal.attempts.values() if row.state is not AttemptState.SETTLED]
            for row in open_rows:
                others = [
                    other.attempt for other in open_rows if other.attempt.execution_id == row.attempt.execution_id
                ]
                if row.attempt != max(others, key=lambda attempt: attempt.start_token):
                    assert (
                        row.stop_by is not None or row.attempt.name in journal.tombstones or row.fenced_by is not None
                    )

    @invariant()
    def the_mark_never_falls(self) -> None:
        """Within an incarnation, in memory and on disk."""
        if hasattr(self, "world"):
            inc = self.world.engine.me.inc
            hw = self.world.engine.ledger.ctl.hw
            assert hw == self.world.journal.marks.get(inc, Mark()).hw >= self.highest.get(inc, 0)
            self.highest[inc] = hw

    @invariant()
    def nothing_is_said_twice(self) -> None:
        """One receipt per command, one settlement per attempt, and each settlement behind an accepted receipt."""
        if hasattr(self, "world"):
            self.statements()

    # --- rest ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let everything come to its end, and count."""
        if not hasattr(self, "world") or sys.exc_info()[1] is not None:
            # Nothing to heal, or a rule was broken already: that is what is to be told.
            return
        self.fuse = None
        for _ in range(REST_TURNS_MAX):
            if not self.one_more_thing():
                break
        assert not self.one_more_thing(), "it comes to rest"
        journal = self.world.journal
        outcomes, settled = self.statements()
        assert self.consumed == len(self.ctl), "everything that was signed is consumed"
        assert outcomes.keys() == journal.commands.keys(), "every consumed command has its receipt"
        accepted = {attempt for attempt, row in journal.attempts.items() if outcomes[row.digest] is Outcome.ACCEPTED}
        assert accepted == settled, "every accepted attempt has its settlement"
        assert self.starts.keys() <= accepted, "what ran was accepted"
        assert self.world.engine.attempts.living == 0 and len(self.world.engine.claims) == 0

    def one_more_thing(self) -> bool:
        """Something that still has to happen; False at rest."""
        if self.consumed < len(self.ctl):
            before = self.consumed
            self.turn(EnvelopeReceived(self.ctl[before]))
            assert self.consumed == before + 1, "the next command is always consumed"
        elif self.preparing:
            self.a_shim_is_prepared(0, False)
        elif self.trees:
            self.a_worktree_command_is_through(0, False)
        elif self.viewers:
            self.a_viewer_is_let_in(0, False)
        elif self.ends:
            self.an_end_is_heard(0, False)
        elif self.sweeps:
            self.a_sweep_is_through()
        elif self.heard:
            self.a_process_ends(0, False)
        elif self.living or self.world.engine.attempts.living:
            # Hung shims come back, but for those that are to end: they are ended. What nobody guards is found, and who was silent
            # is asked again.
            for attempt in self.guarded:
                self.directories[attempt].hung = attempt in self.told_to_end
            self.elapse(LADDER_MS)
            self.turn(Tick())
        else:
            return False
        return True


EngineMachine.TestCase.settings = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEngine = pytest.mark.slow(EngineMachine.TestCase)
