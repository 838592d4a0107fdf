"""What viewers type and say at the runner: by whoever was let in, as far as its mode goes, and answered when it is not taken."""

import json
from pathlib import Path

import pytest

from protocol.commands import ViewerMode
from protocol.errors import Reason
from protocol.keys import PrivateKey
from protocol.messages import Resized, Taken, Typed, Viewers
from protocol.terminals import sign_resized, sign_typed
from runner.adapters import typist as typing
from runner.adapters.typist import Typist
from runner.adapters.viewerfiles import VIEWERS_DIR, admit_viewer

KEY = PrivateKey(b"k" * 32)
OTHER = PrivateKey(b"o" * 32)
NAME = "ex_1.1"


class Terminals:
    """Shims that are connected or not, and what they were told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.over: object | None = "first"
        self.ended = False

    def settled(self, _name: str) -> bool:
        """See the port."""
        return self.ended

    def type(self, name: str, viewer: str, offset: int, data: bytes) -> object | None:
        """See the port."""
        if self.over is not None:
            self.told.append(("type", name, viewer, offset, data))
        return self.over

    def resize(self, name: str, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool) -> bool:
        """See the port."""
        if self.over is not None:
            self.told.append(("resize", name, viewer, gen, rows, cols, redraw))
        return self.over is not None

    def seen(self, name: str, offset: int | None) -> None:
        """See the port."""
        self.told.append(("seen", name, offset))

    def leave(self, name: str, viewer: str) -> None:
        """See the port."""
        self.told.append(("leave", name, viewer))


class Desk:
    """A typist over a directory, its shims, and what was said to the plane."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / "x" / NAME
        self.directory.mkdir(parents=True)
        self.shims = Terminals()
        self.said: list[Taken] = []
        self.typist = Typist(state_dir, self.shims, self.said.append)

    def admit(self, viewer: str = "v", key: PrivateKey = KEY, mode: ViewerMode = ViewerMode.WRITE) -> None:
        """A viewer is let in."""
        admit_viewer(self.directory, viewer, key.public.x, mode)

    def types(self, offset: int = 0, data: bytes = b"ls\n", viewer: str = "v", key: PrivateKey = KEY) -> None:
        """A piece comes."""
        self.typist.take(sign_typed(key, NAME, viewer, offset, data))

    def resizes(self, gen: int = 1, rows: int = 24, cols: int = 80, viewer: str = "v", key: PrivateKey = KEY) -> None:
        """A size comes."""
        self.typist.take(sign_resized(key, NAME, viewer, gen, rows, cols))

    def looks(self, *viewers: str, seen: int | None = None) -> None:
        """The plane says who looks on."""
        self.typist.take(Viewers(attempt=NAME, viewers=list(viewers), seen=seen))

    @property
    def reasons(self) -> list[Reason | None]:
        """Why what was said was not taken."""
        return [taken.reason for taken in self.said]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A PTY that nobody was let in to."""
    return Desk(tmp_path)


def test_what_a_viewer_types_goes_to_the_shim(desk: Desk) -> None:
    """As it is; the shim's answer goes back."""
    desk.admit()
    desk.types()
    desk.types(3, b"\x00\xff")
    assert desk.shims.told == [("type", NAME, "v", 0, b"ls\n"), ("type", NAME, "v", 3, b"\x00\xff")]
    desk.typist.taken(NAME, "v", 3, 99, False)
    desk.typist.taken(NAME, "v", 5, 99, True)
    assert [(taken.received, taken.credit, taken.closed, taken.reason) for taken in desk.said] == [
        (3, 99, False, None),
        (5, 99, True, None),
    ]


@pytest.mark.parametrize(
    ("mode", "key", "reason"),
    [
        (None, KEY, Reason.UNKNOWN_VIEWER),
        (ViewerMode.READ, KEY, Reason.READ_ONLY),
        (ViewerMode.WRITE, OTHER, Reason.BAD_SIG),
    ],
)
def test_who_may_not_is_told_why(desk: Desk, mode: ViewerMode | None, key: PrivateKey, reason: Reason) -> None:
    """Neither its bytes nor its size come to the shim; the PTY goes on."""
    if mode is not None:
        desk.admit(mode=mode)
    desk.types(key=key)
    desk.resizes(key=key)
    assert desk.reasons == [reason, reason] and desk.shims.told == []
    assert not any(taken.closed for taken in desk.said)


def test_a_piece_is_bound_to_its_place_its_viewer_and_its_pty(desk: Desk) -> None:
    """Whoever carries it can make nothing else of it."""
    desk.admit("v")
    desk.admit("w", KEY)
    typed = sign_typed(KEY, NAME, "v", 0, b"rm")
    sized = sign_resized(KEY, NAME, "v", 1, 24, 80)
    forged: list[Typed | Resized] = [typed.model_copy(update=over) for over in ({"offset": 2}, {"viewer": "w"})]
    forged += [sized.model_copy(update=over) for over in ({"gen": 2}, {"rows": 25}, {"viewer": "w"}, {"redraw": True})]
    for each in forged:
        desk.typist.take(each)
    assert desk.reasons == [Reason.BAD_SIG] * len(forged) and desk.shims.told == []


def test_what_is_no_base64_is_refused(desk: Desk) -> None:
    """And the session goes on."""
    desk.admit()
    desk.typist.take(sign_typed(KEY, NAME, "v", 0, b"x").model_copy(update={"data": "=!"}))
    assert desk.reasons == [Reason.BAD_FRAME]


def test_a_gap_is_told_as_one(desk: Desk) -> None:
    """What begins beyond what was taken was not taken; what follows in order has no reason."""
    desk.admit()
    desk.types(0, b"a")
    desk.types(5, b"b")
    desk.types(1, b"c")
    for received in (1, 1, 2):
        desk.typist.taken(NAME, "v", received, 99, False)
    assert desk.reasons == [None, Reason.OUT_OF_ORDER, None]


def test_pieces_that_follow_each_other_closely_are_no_gap(desk: Desk) -> None:
    """The first answer comes when the last piece has long been sent; one more that tells of room changes nothing."""
    desk.admit()
    for offset in range(4):
        desk.types(offset, b"x")
    desk.typist.taken(NAME, "v", 0, 99, False)
    for received in (1, 2, 3, 4):
        desk.typist.taken(NAME, "v", received, 99, False)
    assert desk.reasons == [None] * 5


def test_answers_of_another_connection_are_not_waited_for(desk: Desk) -> None:
    """What was on its way to a connection that broke has none; the next piece is judged by its own."""
    desk.admit()
    desk.types(0, b"a")
    desk.shims.over = "second"
    desk.types(1, b"b")
    desk.typist.taken(NAME, "v", 0, 99, False)
    assert desk.reasons == [Reason.OUT_OF_ORDER]


def test_without_a_shim_a_piece_is_taken_by_nobody(desk: Desk) -> None:
    """It comes again; when the PTY has ended it never will be."""
    desk.admit()
    desk.shims.over = None
    (desk.directory / "exit.json").write_text(json.dumps({"v": 1}))
    desk.types()
    assert [(taken.closed, taken.reason) for taken in desk.said] == [(True, Reason.NOT_RUNNING)]


def test_an_answer_that_nobody_asked_for_here_goes_nowhere(desk: Desk) -> None:
    """Of a viewer on this machine, or of the session before."""
    desk.admit()
    desk.typist.taken(NAME, "local", 3, 99, False)
    desk.types()
    desk.typist.disconnected()
    desk.typist.taken(NAME, "v", 3, 99, False)
    assert desk.said == []


def test_a_size_waits_for_a_connection(desk: Desk) -> None:
    """Its viewer says it once; the newest is said to the next connection, and only there."""
    desk.admit()
    desk.shims.over = None
    desk.resizes(1)
    desk.resizes(2, 30, 100)
    desk.shims.over = "second"
    desk.typist.adopted("ex_2.1")
    assert desk.shims.told == []
    desk.typist.adopted(NAME)
    desk.typist.adopted(NAME)
    assert desk.shims.told == [("resize", NAME, "v", 2, 30, 100, False)]


def test_how_far_they_followed_is_said_once_and_to_each_connection(desk: Desk) -> None:
    """It belongs to the connection; what did not change is not said again."""
    desk.looks("v", seen=10)
    desk.looks("v", seen=10)
    desk.looks("v", seen=20)
    desk.typist.adopted(NAME)
    desk.looks("v", seen=None)
    assert desk.shims.told == [("seen", NAME, offset) for offset in (10, 20, 20, None)]


def test_who_is_gone_leaves(desk: Desk) -> None:
    """Who said a size and is not on the list any more, and nobody twice."""
    for viewer in ("v", "w", "x"):
        desk.admit(viewer)
    desk.looks("v", "w", "x")
    desk.resizes(viewer="v")
    desk.shims.told.clear()
    desk.looks("w", "x")
    desk.looks("x")
    desk.looks("x")
    assert desk.shims.told == [("leave", NAME, "v"), ("leave", NAME, "w")]


def test_who_left_while_nobody_heard_leaves_with_the_first_list(desk: Desk) -> None:
    """An earlier daemon, or session, may have told the shim its size."""
    desk.admit("gone")
    desk.admit("here")
    desk.looks("here")
    assert desk.shims.told == [("leave", NAME, "gone")]


def test_with_the_session_everybody_leaves(desk: Desk) -> None:
    """Nobody holds the PTY back, and no size counts, until somebody comes again."""
    desk.admit()
    desk.looks("v", seen=7)
    desk.resizes()
    desk.shims.told.clear()
    desk.typist.disconnected()
    desk.typist.disconnected()
    assert desk.shims.told == [("seen", NAME, None), ("leave", NAME, "v")]


def test_a_key_is_read_once(desk: Desk) -> None:
    """A keystroke costs no file: what stands there later is not looked at until the next session."""
    desk.admit()
    desk.types()
    (desk.directory / VIEWERS_DIR / "v").unlink()
    desk.types(3, b"x")
    assert len(desk.shims.told) == 2 and desk.said == []
    desk.typist.disconnected()
    desk.types(4, b"y")
    assert desk.reasons == [Reason.UNKNOWN_VIEWER]


def test_what_is_remembered_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The viewer that was heard longest ago is read again, and the PTY that was spoken of longest ago counts as left."""
    monkeypatch.setattr(typing, "SEATS_MAX", 2)
    monkeypatch.setattr(typing, "AUDIENCES_MAX", 1)
    for viewer in ("v", "w", "x"):
        desk.admit(viewer)
        desk.types(viewer=viewer)
    desk.typist.taken(NAME, "v", 3, 99, False)
    assert desk.said == [], "the first of three was forgotten"
    desk.looks("v", seen=1)
    desk.shims.told.clear()
    desk.typist.take(Viewers(attempt="ex_2.1", viewers=[], seen=5))
    assert desk.shims.told == [("seen", NAME, None), ("leave", NAME, "v"), ("seen", "ex_2.1", 5)]


def test_without_descriptors_nothing_is_taken_and_nothing_breaks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and may come again."""

    def full(*_: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(typing, "admitted_viewer", full)
    desk.types()
    assert desk.reasons == [Reason.INFRA]


def test_typing_to_what_is_settled_is_answered_by_us(desk: Desk) -> None:
    """Its shim was told to leave, and may be gone before it reads another word."""
    desk.admit()
    desk.shims.ended = True
    desk.types()
    assert [(taken.closed, taken.reason) for taken in desk.said] == [(True, Reason.NOT_RUNNING)]
    assert not desk.shims.told
