"""What time, leases, sleep, the owner and broken shims do to the machine of machine.py, in any order."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Attempt
from protocol.lease import LeaseState
from protocol.messages import Hint, Renewal
from protocol.session import BeatAnswered
from runner.core.inputs import AttemptLost, EnvelopeReceived, OwnerAdmission, SessionDown, SessionUp, Tick, Woke
from runner.core.plans import Admission, LeaseAction
from tests.stateful.machine import PTYS, Machine
from tests.support.builders import an_attempt
from tests.support.engine import an_exit

EXECUTIONS = st.sampled_from(["ex_1", "ex_2"])
SELDOM = st.integers(0, 5).map(lambda roll: roll == 5)
"""What ends or empties everything is rare enough for a machine to get busy before."""
TTL_MS = 60_000
ON_LOSS = st.sampled_from([None, "stop", "freeze", "continue"])


class PassingMachine(Machine):
    """Time goes on."""

    # --- leases -------------------------------------------------------------------------------------------------

    def grant(self, execution_id: str, on_loss: str, token_min: int) -> dict[str, object]:
        """The next lease on an execution, as the plane remembers it."""
        token = max(self.lease_tokens[execution_id] + 1, token_min)
        self.lease_tokens[execution_id] = token
        self.granted[execution_id, token] = self.world.now.wall_ms + TTL_MS
        return {"res": f"exec:{execution_id}", "token": token, "ttl_ms": TTL_MS, "on_loss": on_loss}

    def sign_start(self, execution_id: str, token: int, on_loss: str | None, worktree: str | None) -> None:
        """A start of this attempt, with a lease or without; those of one execution are PTYs."""
        over: dict[str, Any] = {} if on_loss is None else {"lease": self.grant(execution_id, on_loss, token)}
        args: dict[str, Any] = {} if worktree is None else {"cwd": {"type": "worktree", "worktree_id": worktree}}
        if execution_id == PTYS:
            args |= {"argv": [], "size": {"rows": 24, "cols": 80}}
            over["kind"] = Kind.PTY_OPEN
        self.ctl.append(self.world.start(execution_id, token, args=args, **over))
        self.meant[self.world.mark.head] = an_attempt(execution_id, token)

    @rule(execution_id=EXECUTIONS, on_loss=st.sampled_from(["stop", "freeze", "continue"]), stale=SELDOM)
    def the_plane_grants_a_lease_anew(self, execution_id: str, on_loss: str, stale: bool) -> None:
        """To the newest attempt, under a higher token, or by mistake under the one it had."""
        token = self.tokens[execution_id]
        if token == 0:
            return
        if stale:
            row = self.world.journal.attempts.get(an_attempt(execution_id, token))
            if row is not None and row.lease is not None:
                over = {"ttl_ms": 10 * TTL_MS, "on_loss": on_loss}
                self.ctl.append(self.world.acquire(execution_id, row.lease.token, token, lease=over))
            return
        lease = self.grant(execution_id, on_loss, token)
        self.ctl.append(self.world.acquire(execution_id, self.lease_tokens[execution_id], token, lease=lease))

    @rule(execution_id=EXECUTIONS, dies=st.booleans(), left=st.integers(0, 3))
    def the_plane_releases_a_lease(self, execution_id: str, dies: bool, left: int) -> None:
        """Under the newest token: what has not begun never begins under it, what runs is treated as at its loss."""
        token = self.lease_tokens[execution_id]
        if token == 0:
            return
        rows = [row for row in self.world.journal.attempts.values() if row.attempt.execution_id == execution_id]
        if not self.turn(EnvelopeReceived(self.world.release_lease(f"exec:{execution_id}", token))):
            return
        for row in rows:
            if row.lease is not None and row.state is not AttemptState.SETTLED:
                self.told_to_end |= {row.attempt} if row.lease.on_loss == "stop" else set()
                if row.attempt not in self.starts and row.lease.token <= token:
                    self.given_up.add((execution_id, row.lease.token))
        if dies:
            self.die(left=left)

    @precondition(lambda self: self.beats)
    @rule(
        at=st.integers(0, 2),
        word=st.sampled_from(["renewed", "renewed", "refused", "silent"]),
        full=st.booleans(),
        late=st.booleans(),
    )
    def a_beat_is_answered(self, at: int, word: str, full: bool, late: bool) -> None:
        """At once or late, once or twice, with hints about everything or nothing."""
        self.elapse(3_000 if late else 0)
        self.answer(at % len(self.beats), word, full=full)

    def answer(self, at: int, word: str, *, full: bool) -> bool:
        """The plane's answer to a beat; what it renews it has granted, from when the beat was sent."""
        sent_ms, sent_wall_ms, asked = self.beats[at]
        renewed = word == "renewed"
        leases = tuple(
            Renewal(
                res=f"exec:{execution_id}",
                token=token,
                ttl_ms=TTL_MS if renewed else None,
                reason=None if renewed else Reason.FENCED,
            )
            for execution_id, token in asked
        )
        for grant in asked if renewed else ():
            self.granted[grant] = max(self.granted[grant], sent_wall_ms + TTL_MS)
        names = [attempt.name for attempt in self.meant.values()]
        hints = tuple(Hint(attempt=name, want="running", cmd_id="cmd_1") for name in names) if full else ()
        now = self.world.now.wall_ms
        return self.turn(
            BeatAnswered(sent_ms, now, 10_000, leases if word != "silent" else (), hints, full and bool(hints))
        )

    # --- time ---------------------------------------------------------------------------------------------------

    def elapse(self, ms: int) -> None:
        """Shims act at their deadlines, whoever lives."""
        self.world.pass_time(ms)
        for attempt, found in self.directories.items():
            if found.lease is None or not found.guarded or found.hung or found.exit is not None:
                continue
            _, deadline_ms, action = found.lease
            if action is LeaseAction.STOP and deadline_ms <= self.world.now.boot_ms and found.living:
                found.living = False
                found.exit = an_exit(verdict="stopped", code=None, signal=15, cause_kind="lease")
                self.tell_end(attempt)

    @rule(ms=st.sampled_from([1_000, 5_000, 15_000, 25_000, 70_000]))
    def time_passes(self, ms: int) -> None:
        """And the daemon wakes for it."""
        self.elapse(ms)
        self.turn(Tick())

    @rule(ms=st.sampled_from([10_000, 600_000]), renewed=st.booleans(), stale=st.booleans(), seldom=SELDOM)
    def the_machine_sleeps(self, ms: int, renewed: bool, stale: bool, seldom: bool) -> None:
        """Renewed first, judged after: what the plane still grants is held, whatever answer comes from before."""
        if not seldom:
            return
        self.fuse = None
        held = self.world.engine.leases.held()
        self.world.pass_time(ms)
        self.turn(Woke(ms), Tick())
        assert self.world.engine.leases.held() == held, "no lease is lost before the plane was asked"
        if stale and self.beats:
            self.answer(0, "silent", full=False)
            assert self.world.engine.leases.held() == held, "an answer from before the sleep says nothing of after"
        self.beats = []
        self.turn(SessionDown())
        self.come_up()
        self.answer(len(self.beats) - 1, "renewed" if renewed else "silent", full=False)
        if renewed:
            assert self.world.engine.leases.held() == held, "what is renewed after the sleep was never lost"
        self.turn(Tick())
        now_ms = self.world.now.boot_ms
        rows = self.world.engine.attempts.living_rows()
        leases = [row.lease for row in rows if row.lease is not None and row.lease.state is LeaseState.HELD]
        assert all(lease.deadline_ms > now_ms for lease in leases), "and then what is over is lost"

    @rule()
    def the_session_comes_up(self) -> None:
        """Again, with everything that is held in its first beat."""
        self.fuse = None
        self.come_up()

    def come_up(self) -> None:
        """A handshake without news."""
        self.beats = []
        self.turn(SessionUp(self.world.established()))

    # --- the owner ----------------------------------------------------------------------------------------------

    @rule(
        admission=st.sampled_from([Admission.PAUSED, Admission.DRAINING]),
        closes=SELDOM,
        deadline=st.booleans(),
        keep=st.booleans(),
    )
    def the_owner_opens_or_closes_it(self, admission: Admission, closes: bool, deadline: bool, keep: bool) -> None:
        """For good, or for this daemon only."""
        admission = admission if closes else Admission.OPEN
        drain = admission is Admission.DRAINING and deadline
        due_ms = self.world.now.boot_ms + 20_000 if drain else None
        deaths = self.deaths
        if self.turn(OwnerAdmission(admission, "uid 1000", due_ms, keep)) and keep:
            self.kept = admission
        self.admission = admission if deaths == self.deaths else self.kept

    @rule(seldom=SELDOM)
    def a_drain_comes_to_its_end(self, seldom: bool) -> None:
        """Everything that lives is told to end."""
        if not seldom:
            return
        self.fuse = None
        self.turn(OwnerAdmission(Admission.DRAINING, "uid 1000", self.world.now.boot_ms + 5_000))
        self.admission = self.kept = Admission.DRAINING
        self.elapse(5_000)
        self.turn(Tick())
        journal = self.world.journal
        for row in journal.attempts.values():
            told = row.stop_by is not None or row.attempt.name in journal.tombstones or row.fenced_by is not None
            assert told or row.state is AttemptState.SETTLED, "a drain ends what still runs"
        self.turn(OwnerAdmission(Admission.OPEN, "uid 1000"))
        self.admission = self.kept = Admission.OPEN

    # --- broken shims -------------------------------------------------------------------------------------------

    @property
    def guarded(self) -> list[Attempt]:
        """Attempts whose child runs under a living shim."""
        return [attempt for attempt, found in self.directories.items() if found.living and found.guarded]

    @precondition(lambda self: self.guarded)
    @rule(at=st.integers(0, 9))
    def a_shim_is_killed(self, at: int) -> None:
        """Its child lives on, until it is swept."""
        attempt = self.guarded[at % len(self.guarded)]
        found = self.directories[attempt]
        found.lock_held, found.hung = False, False
        self.tell_end(attempt)

    @precondition(lambda self: self.guarded)
    @rule(at=st.integers(0, 9))
    def a_shim_hangs_or_comes_back(self, at: int) -> None:
        """It holds its lock and does nothing; or it goes on as if nothing had been."""
        found = self.directories[self.guarded[at % len(self.guarded)]]
        found.hung = not found.hung
        if not found.hung and found.unheard is not None:
            found.lease, found.unheard = found.unheard, None

    @precondition(lambda self: self.guarded)
    @rule(at=st.integers(0, 9), left=st.integers(0, 3))
    def a_shim_hangs_while_the_daemon_is_away(self, at: int, left: int) -> None:
        """The next one finds its lock held, and nobody at home."""
        self.directories[self.guarded[at % len(self.guarded)]].hung = True
        self.die(left=left)

    @precondition(lambda self: self.sweeps)
    @rule()
    def a_sweep_is_through(self) -> None:
        """What is left of it was ended; a record that was left is the better witness."""
        attempt = self.sweeps.pop(0)
        found = self.directories.get(attempt)
        if found is not None and found.exit is not None:
            self.connected.add(attempt)
            self.tell_end(attempt)
            return
        self.turn(AttemptLost(attempt, Reason.SHIM_LOST, self.swept(attempt)))

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def shims_know_what_the_journal_knows(self) -> None:
        """Who hears us was told the lease that is held, as it is now; of one that is lost without harm, which it is."""
        if not hasattr(self, "directories"):
            return
        for attempt, found in self.directories.items():
            row = self.world.journal.attempts.get(attempt)
            if row is None or row.lease is None or row.state is AttemptState.SETTLED or attempt not in self.connected:
                continue
            lease, action = row.lease, LeaseAction.of(row.lease.on_loss)
            if not found.living or not found.guarded or found.hung or lease.state is not LeaseState.HELD:
                continue
            if action is LeaseAction.CONTINUE:
                assert found.lease is None or (found.lease[0], found.lease[2]) == (lease.token, action), attempt
            else:
                assert found.lease == (lease.token, lease.deadline_ms, action), attempt

    @invariant()
    def who_is_fenced_has_a_successor(self) -> None:
        """By the plane's own record."""
        if hasattr(self, "world"):
            for row in self.world.journal.attempts.values():
                later = [
                    each.start_token for each in self.meant.values() if each.execution_id == row.attempt.execution_id
                ]
                assert row.fenced_by is None or row.attempt.start_token < row.fenced_by <= max(later, default=0)
