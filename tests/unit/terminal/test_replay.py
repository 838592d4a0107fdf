"""Replays and snapshots of what real programs write: an emulator that saw the whole log is the judge."""

import pytest

from protocol.limits import RECORD_HEADER_BYTES
from protocol.records import Record, RecordKind
from terminal import replay
from terminal.emulator import Emulator
from terminal.queries import Stripper
from terminal.replay import Replay, output_of, plan
from terminal.snapshot import draw
from tests.support.recordings import COLS, ROWS, as_log, record

PROGRAMS: dict[str, tuple[list[str], list[bytes]]] = {
    "vim": (
        ["vim", "-N", "-u", "NONE", "-c", "syntax on", "code.py"],
        [b"\x06", b"\x06", b"ihello\x1b", b":split\r", b"G", b"dd", b"\x02"],
    ),
    "less": (["less", "text.txt"], [b" ", b" ", b"j", b"b", b"/line 300\r", b"G"]),
    "top": (["top", "-d", "0.3"], [b"1", b"c"]),
    "bash": (
        ["bash", "--norc", "-i"],
        [b"ls --color=always /usr\r", b"clear\r", b"seq 40\r", b"printf '\\e[1;31mred\\e[0m\\n'\r"],
    ),
    "tmux": (["tmux", "-f", "/dev/null"], [b"ls /\r", b"\x02%", b"seq 30\r", b'\x02"']),
    "a shell that was in vim": (
        ["bash", "--norc", "-i"],
        [b"ls\r", b"vim -N -u NONE text.txt\r", b"\x06", b":q\r", b"echo done\r"],
    ),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a program wrote while somebody used it."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text("".join(f"line {number} with some words äöü 漢字\n" for number in range(500)))
    (home / "code.py").write_text("".join(f"def f{n}(x):\n    '''doc'''\n    return x + {n}\n\n" for n in range(100)))
    return record(*PROGRAMS[request.param], home)


def seen(log: list[Record], begun: Replay | None, end: int) -> Emulator:
    """What a terminal shows that was brought in as planned; without a plan, one that was there all the time."""
    emulator, stripper = Emulator(ROWS, COLS), Stripper()
    emulator.feed(b"" if begun is None else begun.preamble)
    for each in log:
        emulator.feed(stripper.feed(output_of(each, 0 if begun is None else begun.cut, end)))
    emulator.feed(stripper.flush())
    return emulator


def same(one: Emulator, other: Emulator) -> bool:
    """The same cells in the same colours, the cursor in the same place, the same modes."""
    assert one.lines == other.lines
    return (one.cells, one.cursor, one.modes.changed) == (other.cells, other.cursor, other.modes.changed)


@pytest.mark.slow
def test_a_replay_shows_what_the_whole_log_shows(recorded: bytes) -> None:
    """Wherever the log ends for now, and whichever records it is cut into."""
    for seed in (1, 2):
        log = as_log(recorded, seed)
        for end in {log[len(log) * part // 8 - 1].end for part in range(1, 9)}:
            begun = plan(log, end=end)
            # Where the cursor was when the screen was entered is not known; until something is drawn that is all there is.
            if not (begun.alternate and begun.cut == end):
                assert same(seen(log, begun, end), seen(log, None, end))


@pytest.mark.slow
def test_a_replay_from_a_line_shows_what_the_whole_log_shows(recorded: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough lines behind the cut fill the screen: what came before is not needed."""
    noise = b"".join(b"noise %d \x1b[3%dm%s\x1b[m\r\n" % (n, n % 8, b"x" * (n % 60)) for n in range(200))
    log = as_log(b"\x1b[?2004h\x1b[4;9r\x1b[r" + noise + (b"" if b"?1049h" in recorded else recorded))
    monkeypatch.setattr(replay, "LOOK_BACK_BYTES", log[-1].end // 2)
    begun = plan(log, end=log[-1].end)
    assert begun.cut > log[-1].end // 2 - 1
    assert same(seen(log, begun, log[-1].end), seen(log, None, log[-1].end))


@pytest.mark.slow
def test_a_snapshot_shows_what_the_whole_log_shows(recorded: bytes) -> None:
    """Drawn once, with nothing of how it came to be."""
    log = as_log(recorded)
    for part in (3, 8):
        some = log[: len(log) * part // 8]
        emulator = Emulator(ROWS, COLS)
        emulator.feed(draw(some, ROWS, COLS))
        assert same(emulator, seen(some, None, some[-1].end))


def test_colours_and_regions_from_before_the_cut_hold_behind_it() -> None:
    """A clear with a coloured background, a scrolling region and line drawing are set again before what is shown."""
    data = b"old\x1b[44;1m\x1b[2;5r\x1b(0\x1b[H\x1b[2Jlqk\x1b[5;1H\n\n\x1b[?25l"
    log = as_log(data)
    begun = plan(log, end=log[-1].end)
    assert b"".join(output_of(each, begun.cut) for each in log).startswith(b"lqk")
    assert same(seen(log, begun, log[-1].end), seen(log, None, log[-1].end))


def test_a_clear_of_the_other_screen_is_no_cut() -> None:
    """A shell that was in an editor shows what stood there before."""
    data = b"before\r\n\x1b[?1049h\x1b[H\x1b[2Jeditor\x1b[?1049lafter"
    log = as_log(data)
    begun = plan(log, end=log[-1].end)
    assert not begun.alternate
    assert "before" in seen(log, begun, log[-1].end).lines[0]
    inside = as_log(data.partition(b"\x1b[?1049l")[0])
    assert plan(inside, end=inside[-1].end).alternate
    assert "before" not in seen(inside, plan(inside, end=inside[-1].end), inside[-1].end).lines[0]


def test_modes_come_from_the_marker_and_what_is_behind_it() -> None:
    """The beginning of the log is gone, and with it what set them."""
    log = as_log(b"x" * 50 + b"\r\n\x1b[?1h\x1b[?1006lmore", start=10**9, modes={"1049": True, "1006": True})
    begun = plan(log, end=log[-1].end)
    assert begun.alternate
    assert b"\x1b[?1049h" in begun.preamble and b"\x1b[?1006h" in begun.preamble
    assert (begun.rows, begun.cols) == (ROWS, COLS)


def test_a_sequence_across_a_marker_counts() -> None:
    """The shim begins a segment where it is full."""
    log = as_log(b"one\r\ntwo\x1b[?200")
    log.append(Record(log[-1].end, RecordKind.MARKER, 0, b'{"modes":{},"keypad":false}'))
    log.append(Record(log[-1].end, RecordKind.PTY, 0, b"4h\r\n\x1b[H\x1b[2Jthree"))
    assert b"\x1b[?2004h" in plan(log, end=log[-1].end).preamble


def test_behind_a_hole_nothing_from_before_it_counts() -> None:
    """Nobody knows what stood there."""
    log = as_log(b"\x1b[?1049hlost")
    at = log[-1].end + 5000
    log.append(Record(at, RecordKind.PTY, 0, b"line\r\nnext"))
    begun = plan(log, end=log[-1].end)
    assert begun.cut == at + RECORD_HEADER_BYTES + len(b"line\r\n")
    assert not begun.alternate


def test_an_empty_log_has_an_empty_replay() -> None:
    """Nothing was written yet."""
    assert plan([], end=0).cut == 0
    assert (plan([], end=0).rows, plan([], end=0).cols) == (ROWS, COLS)


def test_a_picture_with_line_ends_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line's end within a string is none."""
    picture = b"\x1bPq" + b"#0~~\n" * 100 + b"\x1b\\"
    log = as_log(b"x" * 500 + b"\r\n" + picture + b"text\r\nlast")
    monkeypatch.setattr(replay, "LOOK_BACK_BYTES", log[-1].end - log[3].offset - 600)
    begun = plan(log, end=log[-1].end)
    assert b"".join(output_of(each, begun.cut) for each in log) == b"last"


def test_the_emulator_shows_what_the_library_does_not() -> None:
    """Repeated characters, scrolled regions, characters without room, pictures, and colours with colons."""
    emulator = Emulator(4, 20)
    emulator.feed(
        b"a\x1b[3bX\x1bPq#0;1\x1b\\Y\xe2\x9d\xa4\xef\xb8\x8fZ\x1b[>4;2m\x1b[38:2::1:2:3mR\r\n2\r\n3\x1b[S\x1b[4:3m"
    )
    assert [line.rstrip() for line in emulator.lines] == ["2", "3", "", ""]
    again = Emulator(4, 20)
    again.feed(b"a\x1b[3bX\x1bPq#0;1\x1b\\Y\xe2\x9d\xa4\xef\xb8\x8fZ\x1b[>4;2m\x1b[38:2::1:2:3mR")
    assert again.lines[0].startswith("aaaaXY❤Z")
    assert again.cells[0][8].fg == "010203" and not again.cells[0][8].underscore
