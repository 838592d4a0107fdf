"""Any order of pieces, doubles, gaps, cuts and late answers: each byte of each viewer is typed once, and a gap is called a gap.

Mutants that died: judging an answer by the newest piece; keeping what was asked over a connection that broke; passing on before verifying.
"""

import tempfile
from collections import deque
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from protocol.commands import ViewerMode
from protocol.errors import Reason
from protocol.keys import PrivateKey
from protocol.messages import Taken
from protocol.terminals import sign_typed
from runner.adapters.typist import Typist
from runner.adapters.viewerfiles import admit_viewer

NAME = "ex_1.1"
VIEWERS = {name: PrivateKey(name.encode() * 32) for name in ("v", "w")}
SAID = {name: bytes(range(at, at + 24)) for name, at in (("v", 0), ("w", 100))}
"""What each types in the end."""
PLENTY = 1 << 20


class Shim:
    """Counts as a shim does, and answers when the test wants; a connection that breaks takes its answers with it."""

    def __init__(self) -> None:
        self.typed: dict[str, bytes] = dict.fromkeys(VIEWERS, b"")
        self.over: object | None = object()
        self.answers: deque[tuple[str, int, bool]] = deque()
        """Viewer, how much of it was taken, and whether the piece began beyond that."""

    def settled(self, _name: str) -> bool:
        """It lives."""
        return False

    def type(self, _name: str, viewer: str, offset: int, data: bytes) -> object | None:
        """See the port."""
        if self.over is None:
            return None
        early = offset > len(self.typed[viewer])
        if not early:
            self.typed[viewer] += data[len(self.typed[viewer]) - offset :]
        self.answers.append((viewer, len(self.typed[viewer]), early))
        return self.over

    def cut(self) -> None:
        """The connection breaks; for as long as nobody dials there is none."""
        self.over = None
        self.answers.clear()

    def resize(self, *_: object, redraw: bool) -> bool:
        """Not said here."""
        raise AssertionError

    def seen(self, *_: object) -> None:
        """Not said here."""
        raise AssertionError

    def leave(self, *_: object) -> None:
        """Not said here."""
        raise AssertionError


PIECES = st.tuples(st.just("type"), st.sampled_from(sorted(VIEWERS)), st.integers(0, 23), st.integers(1, 24))
FORGED = st.tuples(st.just("forge"), st.sampled_from(sorted(VIEWERS)), st.integers(0, 23), st.integers(1, 24))
EVENTS = st.tuples(st.sampled_from(["answer", "cut", "dial", "again"]), st.just(""), st.just(0), st.just(0))


@given(st.lists(st.one_of(PIECES, FORGED, EVENTS), max_size=40))
def test_whatever_comes_is_typed_once_in_order_and_answered_as_it_was(
    script: list[tuple[str, str, int, int]],
) -> None:
    """Then everything is sent once more, and all of it is there."""
    with tempfile.TemporaryDirectory() as state_dir:
        (directory := Path(state_dir) / "x" / NAME).mkdir(parents=True)
        for viewer, key in VIEWERS.items():
            admit_viewer(directory, viewer, key.public.x, ViewerMode.WRITE)
        shim, said = Shim(), list[Taken]()
        typist = Typist(Path(state_dir), shim, said.append)

        def answer() -> None:
            viewer, received, early = shim.answers.popleft()
            typist.taken(NAME, viewer, received, PLENTY, False)
            reason = Reason.OUT_OF_ORDER if early else None
            assert (said[-1].viewer, said[-1].received, said[-1].reason) == (viewer, received, reason)

        for event, viewer, offset, count in script:
            if event == "type":
                piece = SAID[viewer][offset : offset + count]
                typist.take(sign_typed(VIEWERS[viewer], NAME, viewer, offset, piece))
            elif event == "forge":
                other = next(name for name in VIEWERS if name != viewer)
                typist.take(sign_typed(VIEWERS[other], NAME, viewer, offset, b"!" * count))
                assert said.pop().reason is Reason.BAD_SIG
            elif event == "cut":
                shim.cut()
            elif event == "dial":
                shim.over = shim.over or object()
            elif event == "again":
                shim.cut()
                shim.over = object()
            elif shim.answers:
                answer()
            assert all(SAID[name].startswith(typed) for name, typed in shim.typed.items())
            said[:] = [taken for taken in said if taken.reason is not Reason.NOT_RUNNING]
        shim.over = shim.over or object()
        for viewer, key in VIEWERS.items():
            typist.take(sign_typed(key, NAME, viewer, 0, SAID[viewer]))
        while shim.answers:
            answer()
        assert shim.typed == SAID
