"""A viewer over lines that break anywhere: what was typed is taken once and in order, whatever was lost on the way.

The world beside it is the shim's own rule, by offsets, and lines that lose everything under way when they break; a message may also be
doubled, as a control plane does that says it again. Mutants that die: no sending anew at `begun`, nothing dropped there that was
taken, pieces said before `live`, `taken` that rewinds past what was taken.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.limits import TYPED_BYTES_MAX
from terminal.viewing import Begun, Effect, Live, Output, Resizing, Seen, Show, Skipped, Taken, Typing, Viewing

ROOM = 3 * TYPED_BYTES_MAX // 2
"""Of the queue before the program: a large piece may find no room."""


class Viewers(RuleBasedStateMachine):
    """One viewer, one PTY, and what is under way between them."""

    def __init__(self) -> None:
        super().__init__()
        self.viewing = Viewing("replay", 24, 80, gen=1)
        self.typed = bytearray()
        self.taken = bytearray()
        self.queued = 0
        self.down: list[Any] = []
        self.up: list[Effect] = []
        self.connected = False
        self.end = 0
        self.shown = 0
        self.replaying = False

    # --- the person -------------------------------------------------------------------------------------------------
    @rule(length=st.one_of(st.integers(1, 5), st.sampled_from([TYPED_BYTES_MAX, TYPED_BYTES_MAX + 1, 40_000])))
    def type(self, length: int) -> None:
        """Keys, or a paste."""
        data = bytes((len(self.typed) + at) % 251 for at in range(length))
        self.typed += data
        self.obey(self.viewing.typed(data))

    @rule()
    def resize(self) -> None:
        """The window changes."""
        self.obey(self.viewing.resized(30, 100))

    @rule()
    def wait(self) -> None:
        """Nothing happened for long."""
        self.obey(self.viewing.resend())

    # --- the line ---------------------------------------------------------------------------------------------------
    @precondition(lambda self: not self.connected)
    @rule(forgets=st.booleans(), gone=st.booleans())
    def dial(self, forgets: bool, gone: bool) -> None:
        """A new line; who carries it may not know what was taken, and what was missed may be gone."""
        begin = self.viewing.begin()
        assert not self.viewing.live
        self.connected = True
        if begin.offset is not None and not gone:
            offset = begin.offset
        else:
            offset, self.shown = self.end, self.end
        self.down.append(Begun("ex_1.1", True, offset, 0 if forgets else len(self.taken)))
        self.down += [Output(self.end, b"x"), Live(self.end)]
        self.replaying = True

    @precondition(lambda self: self.connected)
    @rule()
    def lose(self) -> None:
        """All that is under way is gone."""
        self.connected = False
        self.up.clear()
        self.down.clear()
        self.viewing.lost("cut")

    @precondition(lambda self: self.down)
    @rule()
    def deliver_down(self) -> None:
        """The viewer hears the next message."""
        heard = self.down.pop(0)
        if isinstance(heard, Live):
            self.replaying = False
        elif isinstance(heard, Skipped):
            self.replaying = True
        self.obey(self.viewing.hear(heard))

    @precondition(lambda self: self.up)
    @rule(double=st.booleans())
    def deliver_up(self, double: bool) -> None:
        """The PTY hears the next message, perhaps twice, and answers each."""
        said = self.up.pop(0)
        for _ in range(2 if double else 1):
            if isinstance(said, Typing):
                self.take(said)

    def take(self, said: Typing) -> None:
        """As the shim takes: from what it has, whole, where there is room."""
        received = len(self.taken)
        fresh = said.data[received - said.offset :] if said.offset <= received else b""
        reason = "OUT_OF_ORDER" if said.offset > received else None
        if fresh and self.queued + len(fresh) <= ROOM:
            self.taken += fresh
            self.queued += len(fresh)
        self.down.append(Taken(len(self.taken), len(self.taken) + ROOM - self.queued, reason=reason))

    # --- the PTY ----------------------------------------------------------------------------------------------------
    @rule()
    def read(self) -> None:
        """The program reads what waits, and who was short of room hears of it."""
        self.queued = 0
        if self.connected:
            self.down.append(Taken(len(self.taken), len(self.taken) + ROOM))

    @rule(length=st.sampled_from([1, 70_000]))
    def write(self, length: int) -> None:
        """The program writes."""
        self.end += length
        if self.connected:
            self.down.append(Output(self.end, b"y"))

    @precondition(lambda self: self.connected)
    @rule()
    def skip(self) -> None:
        """The viewer was too far behind."""
        self.down += [Skipped(), Output(self.end, b"z"), Live(self.end)]

    # --- what holds -------------------------------------------------------------------------------------------------
    def obey(self, effects: list[Effect]) -> None:
        """What the viewer wants done."""
        for effect in effects:
            if isinstance(effect, Typing):
                assert len(effect.data) <= TYPED_BYTES_MAX
            if isinstance(effect, (Typing, Resizing)):
                assert self.connected and not self.replaying, "nothing is said before the replay is through"
            if isinstance(effect, Seen):
                assert effect.offset <= self.end
            if isinstance(effect, (Typing, Resizing, Seen)) and self.connected:
                self.up.append(effect)
            assert isinstance(effect, (Typing, Resizing, Seen, Show))

    @invariant()
    def taken_is_typed(self) -> None:
        """In order, once."""
        assert self.typed.startswith(self.taken)

    def teardown(self) -> None:
        """The world heals: everything typed is taken."""
        if not self.connected:
            self.dial(False, False)
        for _ in range(1000):
            while self.up or self.down:
                self.deliver_down() if self.down else self.deliver_up(False)
            if len(self.taken) == len(self.typed) and not self.viewing.unanswered:
                break
            self.read()
            self.wait()
        assert self.taken == self.typed
        assert self.viewing.unanswered == 0


Viewers.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestViewers = pytest.mark.slow(Viewers.TestCase)
