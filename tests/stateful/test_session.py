"""Both session machines, the judge and `reconcile`, against a world that loses, doubles, reorders, forgets and goes back in time.

What is checked is stated from the world's own record: what was ever signed, what the runner did, what the plane stores.
Then the world heals, and everything must come to its end within a bound.

Hand mutants, each tried, with what went red:
1. `replay._numbered` without the `prev` check: test_a_command_of_a_forgotten_history_is_not_taken.
2. `replay.judge` without the Duplicate branch: teardown (a stop that comes twice has two receipts).
3. `replay.judge` answers Duplicate by `cmd_id` alone: teardown (a second payload never has a receipt).
4. `reconcile` without the `acked_hw` check: test_a_runner_that_is_older_than_its_own_word_begins_anew.
5. `reconcile` without the `out_head` check: connect ("two histories went on as one").
6. `reconcile` without comparing the digest at the mark: test_two_histories_under_one_number_end_in_a_new_incarnation.
7. `PlaneSession.outgoing` goes back to `first.seq + 1`: test_what_is_lost_is_sent_again_within_a_session.
8. `PlaneSession.receipted` does nothing for `seq is None`: quiet (a stop goes out for ever).
9. `PlaneSession.consumed` takes `hw + 1`: acked_is_consumed.
10. `RunnerSession.receive` forgets all that waits at any answer: teardown (an item is never stored).
11. `RunnerSession.outgoing` never repeats: test_what_is_lost_is_sent_again_within_a_session.
12. `replay.after` forgets the digests of ids: each_command_once (a second payload has a second effect).
13. `reconcile` adopts over an unanswered number: test_a_mark_above_an_unanswered_command_is_not_adopted.
14. `Established.report_above` trusts `out_hw`: test_a_number_that_was_used_again_hides_no_item.
15. `PlaneSession.receive` measures the future by `_next` instead of `_furthest`: plane_hears_need ("what was never sent").
"""

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.errors import Reason
from protocol.limits import RETRY_MS
from protocol.messages import ItemKind, decode_from_runner
from tests.stateful.world import EVENT_BODY, REFUSED_BODY, Intent, World

HEAL_ROUNDS_MAX = 40
"""Far more than a healed world needs: each round is a retry interval with everything delivered."""
ANY = st.integers(0, 1_000_000)
SELDOM = st.integers(0, 5).map(lambda roll: roll == 5)
"""Catastrophes are rare enough for a session to grow old between two."""


class Sessions(RuleBasedStateMachine):
    """The rules: what may happen to the two sides and to the link."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.connect()

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self.world.plane_session is not None

    @rule(safety=st.booleans(), count=st.integers(1, 4))
    def ask(self, safety: bool, count: int) -> None:
        """Somebody wants something done."""
        for _ in range(count):
            self.world.ids += 1
            self.world.plane.intents.append(Intent(f"cmd_{self.world.ids}", safety))

    @precondition(lambda self: self.world.ids > 0)
    @rule(which=ANY, safety=st.booleans())
    def ask_under_a_taken_id(self, which: int, safety: bool) -> None:
        """A product reuses an id for something else."""
        self.world.plane.intents.append(
            Intent(f"cmd_{which % self.world.ids + 1}", safety, again=len(self.world.signed) + 1)
        )

    @rule(bad=st.booleans())
    def something_happens_on_the_runner(self, bad: bool) -> None:
        """An event; some the plane will not take."""
        self.world.runner_tells(REFUSED_BODY if bad else EVENT_BODY)

    @rule()
    def plane_sends(self) -> None:
        """The plane's turn."""
        self.world.plane_sends()

    @rule(beat=st.booleans())
    def runner_sends(self, beat: bool) -> None:
        """The runner's turn."""
        self.world.runner_sends(beat=beat)

    @precondition(lambda self: self.world.to_runner)
    @rule(which=ANY, double=st.booleans())
    def a_frame_reaches_the_runner(self, which: int, double: bool) -> None:
        """Any of those under way; it may come again."""
        at = which % len(self.world.to_runner)
        text = self.world.to_runner[at] if double else self.world.to_runner.pop(at)
        self.world.to_the_runner(text)

    @precondition(lambda self: self.world.to_plane)
    @rule(which=ANY, double=st.booleans())
    def a_frame_reaches_the_plane(self, which: int, double: bool) -> None:
        """Any of those under way; it may come again."""
        at = which % len(self.world.to_plane)
        text = self.world.to_plane[at] if double else self.world.to_plane.pop(at)
        self.world.to_the_plane(text)

    @rule()
    def everything_arrives(self) -> None:
        """In order, and so do the answers; then the plane knows how far the runner is."""
        if self.connected:
            deliver(self.world)

    @precondition(lambda self: self.world.to_runner or self.world.to_plane)
    @rule(which=ANY, down=st.booleans())
    def a_frame_is_lost(self, which: int, down: bool) -> None:
        """In either direction."""
        links = [link for link in (self.world.to_runner, self.world.to_plane) if link]
        link = links[0] if down else links[-1]
        link.pop(which % len(link))

    @precondition(lambda self: self.connected and self.world.recorded)
    @rule(which=ANY, seldom=SELDOM)
    def an_old_command_is_replayed(self, which: int, seldom: bool) -> None:
        """Anything that was ever on the wire."""
        if not seldom:
            return
        self.world.replayed = True
        self.world.to_runner.append(self.world.recorded[which % len(self.world.recorded)])

    @rule(ms=st.sampled_from([1, RETRY_MS // 2, RETRY_MS]))
    def time_goes_on(self, ms: int) -> None:
        """A little, or until something counts as silent."""
        self.world.now_ms += ms

    @rule(keep=st.booleans(), seldom=SELDOM)
    def the_connection_breaks(self, keep: bool, seldom: bool) -> None:
        """Or a side restarts; the plane may or may not have written down the last mark."""
        if not seldom:
            return
        if keep:
            self.world.persist_acked()
        self.world.disconnect()

    @precondition(lambda self: not self.connected)
    @rule()
    def a_handshake_succeeds(self) -> None:
        """Both sides go on."""
        self.world.connect()

    @rule()
    def copies_are_made(self) -> None:
        """Of both sides."""
        self.world.keep_backup()
        self.world.keep_snapshot()

    @rule(seldom=SELDOM)
    def the_plane_comes_back_from_a_backup(self, seldom: bool) -> None:
        """It forgets what it signed and stored since."""
        if not seldom:
            return
        self.world.disconnect()
        self.world.plane = copy.deepcopy(self.world.backup)
        self.world.now_ms += 1

    @rule(seldom=SELDOM)
    def the_runner_comes_back_from_a_snapshot(self, seldom: bool) -> None:
        """The whole machine does: what it did since is undone."""
        if not seldom:
            return
        self.world.disconnect()
        self.world.runner = copy.deepcopy(self.world.snapshot)

    @invariant()
    def each_command_once(self) -> None:
        """No id has two effects in one history of the runner."""
        assert len(set(self.world.runner.effects)) == len(self.world.runner.effects)

    @invariant()
    def consumed_in_order(self) -> None:
        """The runner's numbers are those the plane gave, without gap, each on the head before it."""
        for seq, digest in enumerate(self.world.runner.chain, 1):
            signed = self.world.signed[digest]
            assert (signed.inc, signed.seq, signed.prev) == (self.world.runner.inc, seq, self.world.prev_of(seq))
        assert self.world.runner.seen.ctl.hw == len(self.world.runner.chain)

    @invariant()
    def acked_is_consumed(self) -> None:
        """The plane never believes the runner to be further than it is."""
        if self.world.plane_session is not None:
            assert self.world.plane_session.acked_hw <= len(self.world.runner.chain)

    @invariant()
    def one_receipt_for_one_payload(self) -> None:
        """Whatever comes twice."""
        assert all(len(bodies) == 1 for bodies in self.world.plane.receipts.values())

    def teardown(self) -> None:
        """Heal the world: from now on nothing is lost. Everything comes to its end, and then it is quiet.

        The connection that is there must do, unless somebody replayed a forgotten history: that takes a new handshake.
        """
        world = self.world
        if not self.connected or world.replayed:
            world.disconnect()
            world.connect()
        for _ in range(HEAL_ROUNDS_MAX):
            world.plane_sends()
            world.runner_sends(beat=True)
            deliver(world)
            world.now_ms += RETRY_MS
        asked = {intent.cmd_id for intent in world.plane.origin.values()}
        assert asked <= world.plane.receipted_ids, "a command without a receipt"
        for command in [*world.plane.ctl.values(), *world.plane.safety.values()]:
            if command.cmd_digest in world.plane.origin:
                assert len(world.plane.receipts[command.cmd_digest]) == 1, "a payload without its receipt"
        for item in world.runner.outbox:
            assert (item.out_seq, item.body) in world.plane.items, "an item that was lost"
        self.quiet()
        self.each_command_once()
        self.consumed_in_order()
        self.one_receipt_for_one_payload()

    def quiet(self) -> None:
        """Nobody has anything left to say."""
        world = self.world
        assert not world.plane.intents, "an intent that was never signed"
        world.plane_sends()
        world.runner_sends(beat=False)
        assert not world.to_runner, "commands that go out for ever"
        assert not world.to_plane, "items that go out for ever"
        told = [item for item in world.runner.outbox if item.kind is ItemKind.RECEIPT]
        assert len(told) == len(world.runner.receipt_of)


Sessions.TestCase.settings = settings(
    max_examples=max(150, settings().max_examples), stateful_step_count=max(60, settings().stateful_step_count)
)
TestSessions = pytest.mark.slow(Sessions.TestCase)


def deliver(world: World) -> None:
    """All frames in order, and what they cause."""
    while world.to_runner or world.to_plane:
        while world.to_runner:
            world.to_the_runner(world.to_runner.pop(0))
        while world.to_plane:
            world.to_the_plane(world.to_plane.pop(0))


def settle(world: World) -> None:
    """Both sides take turns and everything arrives."""
    for _ in range(3):
        world.plane_sends()
        world.runner_sends(beat=True)
        deliver(world)


def a_world(count: int) -> World:
    """A connected world in which this many commands are consumed and receipted."""
    world = World()
    world.connect()
    world.plane.intents += [Intent(f"cmd_{n}", safety=False) for n in range(1, count + 1)]
    settle(world)
    return world


def test_a_command_of_a_forgotten_history_is_not_taken() -> None:
    """1. The plane signs 2 and 3; both are lost. 2. It comes back from before and signs another 2. 3. Somebody replays the old 3."""
    world = a_world(1)
    world.keep_backup()
    world.plane.intents += [Intent("old_2", safety=False), Intent("old_3", safety=False)]
    world.plane_sends()
    old_third = world.recorded[-1]
    world.disconnect()
    world.plane, world.now_ms = copy.deepcopy(world.backup), 1
    world.connect()
    world.plane.intents.append(Intent("new_2", safety=False))
    settle(world)
    assert world.runner.effects == ["cmd_1", "new_2"]
    world.to_the_runner(old_third)
    assert world.runner.effects == ["cmd_1", "new_2"]
    assert decode_from_runner(world.to_plane[-1]).reason is Reason.CHAIN_FORK  # type: ignore[union-attr]


def test_a_runner_that_is_older_than_its_own_word_begins_anew() -> None:
    """1. It consumes 2 and a beat says so; the receipt is lost. 2. It comes back from before. 3. The old number is not used again."""
    world = a_world(1)
    world.keep_snapshot()
    world.plane.intents.append(Intent("cmd_2", safety=False))
    world.plane_sends()
    world.to_the_runner(world.to_runner.pop(0))
    world.runner_sends(beat=True)
    world.to_the_plane(world.to_plane[-1])
    world.persist_acked()
    world.disconnect()
    world.runner = copy.deepcopy(world.snapshot)
    world.connect()
    assert world.runner.inc == 2
    settle(world)
    assert world.runner.effects == ["cmd_1", "cmd_2"]


def test_a_plane_that_forgot_receipts_hears_them_before_it_signs() -> None:
    """1. The plane forgets that 2 was signed; its intent is there again. 2. The receipt comes before it could be sent twice."""
    world = a_world(1)
    world.plane.intents.append(Intent("cmd_2", safety=False))
    world.keep_backup()
    settle(world)
    world.disconnect()
    world.plane = copy.deepcopy(world.backup)
    world.connect()
    settle(world)
    assert world.runner.effects == ["cmd_1", "cmd_2"]
    assert len(world.signed) == 2
    assert world.plane.receipted_ids == {"cmd_1", "cmd_2"}


def test_two_histories_under_one_number_end_in_a_new_incarnation() -> None:
    """1. The plane forgets that it signed 2. 2. Somebody replays it. 3. Another 2 is refused. 4. The handshake begins anew."""
    world = a_world(1)
    world.keep_backup()
    world.plane.intents.append(Intent("old_2", safety=False))
    world.plane_sends()
    old_second = world.recorded[-1]
    world.disconnect()
    world.plane, world.now_ms = copy.deepcopy(world.backup), 1
    world.connect()
    world.to_the_runner(old_second)
    world.plane.intents.append(Intent("new_2", safety=False))
    settle(world)
    assert world.runner.effects == ["cmd_1", "old_2"]
    world.disconnect()
    world.connect()
    assert (world.runner.inc, world.runner.chain) == (2, [])
    settle(world)
    assert world.runner.effects == ["cmd_1", "old_2", "new_2"]


def test_a_mark_above_an_unanswered_command_is_not_adopted() -> None:
    """1. The plane forgets 2 and 3 and signs another 2. 2. Somebody replays the old ones first. 3. The new 2 is not left to nobody."""
    world = a_world(1)
    world.keep_backup()
    world.plane.intents += [Intent("old_2", safety=False), Intent("old_3", safety=False)]
    world.plane_sends()
    old = world.recorded[-2:]
    world.disconnect()
    world.plane, world.now_ms = copy.deepcopy(world.backup), 1
    world.connect()
    for frame in old:
        world.to_the_runner(frame)
    world.to_plane.clear()
    world.plane.intents.append(Intent("new_2", safety=False))
    world.plane_sends()
    world.disconnect()
    world.connect()
    assert world.runner.inc == 2
    settle(world)
    assert world.runner.effects == ["cmd_1", "old_2", "old_3", "new_2"]


def test_a_number_that_was_used_again_hides_no_item() -> None:
    """1. An item is stored. 2. The machine is set back; another one gets its number. 3. It comes, whatever the mark covers."""
    world = a_world(1)
    world.keep_snapshot()
    world.runner_tells(EVENT_BODY)
    settle(world)
    world.disconnect()
    world.runner = copy.deepcopy(world.snapshot)
    world.runner_tells(EVENT_BODY)
    other = world.runner.outbox[-1]
    world.connect()
    assert world.runner.inc == 1
    settle(world)
    assert (other.out_seq, other.body) in world.plane.items


def test_what_is_lost_is_sent_again_within_a_session() -> None:
    """1. A command is lost on the way, and then its receipt. 2. Nothing else happens. 3. After a silence each goes again, once."""
    world = a_world(1)
    world.plane.intents.append(Intent("cmd_2", safety=False))
    world.plane_sends()
    world.to_runner.clear()
    world.now_ms += RETRY_MS
    world.plane_sends()
    world.to_the_runner(world.to_runner.pop())
    world.runner_sends(beat=False)
    world.to_plane.clear()
    world.now_ms += RETRY_MS
    settle(world)
    assert world.runner.effects == ["cmd_1", "cmd_2"]
    assert world.plane.receipted_ids == {"cmd_1", "cmd_2"}
