"""An attempt's log from its files: complete, in order, across rolls, holes and ends, with nobody's help."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.errors import RemoteError
from protocol.logselect import Selection, Wish
from protocol.records import Record, RecordKind, encode_record
from runner.adapters import logview
from runner.adapters.attemptfiles import attempt_directories, find_attempt, read_attempt
from runner.adapters.logview import Ended, Missing, Seen, find_start, view_log
from runner.errors import Refused
from tests.support.attempts import AttemptDir


def output(seen: list[Seen]) -> bytes:
    """What the child wrote, of what was seen."""
    return b"".join(one.payload for one in seen if isinstance(one, Record) and one.kind <= RecordKind.PTY)


def steps(*doings: Callable[[], None]) -> Callable[[float], None]:
    """Instead of resting: the next thing that happens meanwhile."""
    rest: Iterator[Callable[[], None]] = iter(doings)
    return lambda _seconds: next(rest)()


def test_a_finished_log_is_read_to_its_end(tmp_path: Path) -> None:
    """Both streams, and how it ended last."""
    made = AttemptDir(tmp_path)
    made.write(b"out")
    made.write(b"err", RecordKind.STDERR)
    made.finish()
    seen = list(view_log(made.path, follow=False))
    assert output(seen) == b"outerr"
    assert isinstance(seen[-1], Ended) and seen[-1].exit is not None and seen[-1].exit["verdict"] == "exited"


def test_a_living_log_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    """Without following there is no end to tell; half a record is not shown."""
    made = AttemptDir(tmp_path)
    with made.held():
        made.write(b"so far")
        made.append(encode_record(RecordKind.STDOUT, b"half", 1)[:18])
        seen = list(view_log(made.path, follow=False))
    assert output(seen) == b"so far"
    assert not isinstance(seen[-1], Ended)


def test_following_crosses_rolls_holes_and_the_end(tmp_path: Path) -> None:
    """Everything that comes meanwhile is seen once, in order."""
    made = AttemptDir(tmp_path)
    made.write(b"1")

    def roll() -> None:
        made.roll()
        made.write(b"2")

    def drop() -> None:
        made.roll(skip=500)
        made.write(b"3")

    def end() -> None:
        made.write(b"4")
        made.finish()

    with made.held():
        seen = list(view_log(made.path, follow=True, rest=steps(roll, lambda: None, drop, end)))
    assert output(seen) == b"1234"
    holes = [one for one in seen if isinstance(one, Missing)]
    assert [hole.end - hole.start for hole in holes] == [500]
    assert isinstance(seen[-1], Ended)


def test_what_is_written_as_it_ends_is_not_lost(tmp_path: Path) -> None:
    """The end is asked for before the log is read: an end that comes between the two is met at the next look."""
    made = AttemptDir(tmp_path)
    made.write(b"first")
    seen: list[Seen] = []
    with made.held():
        for one in view_log(made.path, follow=True, rest=steps(lambda: None)):
            seen.append(one)
            if output(seen) == b"first" and not (made.path / "exit.json").exists():
                made.write(b" last")
                made.finish()
    assert output(seen) == b"first last"


def test_a_lost_attempt_ends_too(tmp_path: Path) -> None:
    """No shim, no word: what there is is shown, and that nobody knows."""
    made = AttemptDir(tmp_path)
    made.write(b"then the power went")
    seen = list(view_log(made.path, follow=True, rest=steps()))
    assert output(seen) == b"then the power went"
    assert seen[-1] == Ended(None)


def test_an_attempt_without_a_shim_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be about to start; not for ever."""
    monkeypatch.setattr(logview, "START_WAIT_S", 1.0)
    made = AttemptDir(tmp_path)
    (made.path / "meta.json").unlink()
    rests: list[float] = []
    assert list(view_log(made.path, follow=True, rest=rests.append)) == [Ended(None)]
    assert 0.9 <= sum(rests) <= 1.1


def test_an_offset_begins_at_the_record_that_holds_it(tmp_path: Path) -> None:
    """Also in the middle of a record, of a later segment, or of a hole."""
    made = AttemptDir(tmp_path)
    made.write(b"aaaa")
    before = made.end
    made.write(b"bbbb")
    made.roll(skip=100)
    behind = made.end
    made.write(b"cccc")
    made.finish()
    assert output(list(view_log(made.path, before, follow=False))) == b"bbbbcccc"
    assert output(list(view_log(made.path, before + 3, follow=False))) == b"bbbbcccc"
    assert output(list(view_log(made.path, behind + 1, follow=False))) == b"cccc"
    assert output(list(view_log(made.path, made.end, follow=False))) == b""


def test_what_was_trimmed_is_a_hole(tmp_path: Path) -> None:
    """The first segment is gone."""
    made = AttemptDir(tmp_path)
    made.write(b"old")
    made.roll()
    made.write(b"new")
    made.finish()
    min((made.path / "log").iterdir()).unlink()
    seen = list(view_log(made.path, follow=False))
    assert isinstance(seen[0], Missing) and seen[0].start == 0
    assert output(seen) == b"new"


def test_a_damaged_log_is_said_to_be(tmp_path: Path) -> None:
    """A flipped bit in a header."""
    made = AttemptDir(tmp_path)
    made.write(b"fine")
    made.append(b"\xff" * 32)
    made.finish()
    with pytest.raises(RemoteError, match="damaged"):
        list(view_log(made.path, follow=False))


def test_an_execution_means_its_newest_attempt(tmp_path: Path) -> None:
    """By number, not by spelling; an attempt is found by its own name; a git verb's only by its own."""
    for name in ("ex_1.2", "ex_1.10", "ex_12.1", "g-cmd_1.1"):
        AttemptDir(tmp_path, name)
    (tmp_path / "x" / "not an attempt").mkdir()
    assert find_attempt(tmp_path, "ex_1").name == "ex_1.10"
    assert find_attempt(tmp_path, "ex_1.2").name == "ex_1.2"
    assert find_attempt(tmp_path, "g-cmd_1.1").name == "g-cmd_1.1"
    assert [one.name for one in attempt_directories(tmp_path)] == ["ex_1.10", "ex_1.2", "ex_12.1"]
    for unknown in ("ex_2", "../x/ex_1.2", ""):
        with pytest.raises(Refused):
            find_attempt(tmp_path, unknown)


def test_files_that_are_no_files_of_ours_tell_nothing(tmp_path: Path) -> None:
    """Another format, no JSON, too long, a link, wrong types: shown as unknown, never raised."""
    made = AttemptDir(tmp_path)
    made.put("spec.json", {"argv": ["ok", 1, None], "cwd": 5, "cookie": ["x"]})
    made.put("meta.json", {"phase": 3, "child": [1], "started_ns": "x"})
    (made.path / "exit.json").write_text('{"v": 2, "verdict": "exited"}')
    found = read_attempt(made.path)
    assert (found.argv, found.cwd, found.cookie, found.phase) == (("ok", "", ""), "", "", "none")
    assert (found.exit, found.child_pid, found.started_ms, found.state) == (None, None, None, "waiting")
    for content in ("{", "[]", '{"v": 1, "x": "' + "y" * 70_000 + '"}', "[" * 60_000):
        (made.path / "exit.json").write_text(content)
        assert read_attempt(made.path).exit is None
    (made.path / "exit.json").unlink()
    (made.path / "exit.json").symlink_to(made.path / "spec.json")
    assert read_attempt(made.path).exit is None


def test_the_state_comes_from_lock_phase_and_exit(tmp_path: Path) -> None:
    """Every combination that means something."""
    made = AttemptDir(tmp_path)
    assert read_attempt(made.path).state == "lost"
    with made.held():
        assert read_attempt(made.path).state == "running"
        made.put("meta.json", {"phase": "ready"})
        assert read_attempt(made.path).state == "waiting"
        made.finish()
        assert read_attempt(made.path).state == "ended"


def lines_of(made: AttemptDir, wish: Wish) -> bytes:
    """What `runner logs` would print to both streams."""
    start = find_start(made.path / "log", wish)
    selection = Selection(wish, start.cuts)
    seen = [one for one in view_log(made.path, start.offset, follow=False) if isinstance(one, Record)]
    return output([taken for taken in map(selection.take, seen) if taken is not None])


def test_the_last_lines_are_found_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across segments and holes, and no segment is opened that does not matter."""
    made = AttemptDir(tmp_path)
    for n in range(50):
        made.roll(skip=7 if n == 45 else 0)
        made.write(b"%d a\n%d " % (n, n))
    made.finish()
    opened: set[str] = set()
    open_file = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *more, **named: (opened.add(str(path)), open_file(path, *more, **named))[1]
    )
    log_dir = made.path / "log"
    assert find_start(log_dir, Wish(tail=2)).offset > 0
    assert len([path for path in opened if path.endswith(".seg")]) <= 3
    monkeypatch.undo()
    assert lines_of(made, Wish(tail=0)) == b""
    assert lines_of(made, Wish(tail=1)) == b"49 "
    assert lines_of(made, Wish(tail=3)) == b"47 48 a\n48 49 a\n49 "
    assert lines_of(made, Wish(tail=7)).startswith(b"43 44 a\n44 45 a\n")
    assert lines_of(made, Wish(tail=1000)) == lines_of(made, Wish())
    assert find_start(tmp_path / "nowhere", Wish(tail=5)).offset == 0


def test_the_look_back_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that never begins is shown from where looking ended, not searched for through everything."""
    monkeypatch.setattr(logview, "LOOK_BACK_BYTES", 400)
    made = AttemptDir(tmp_path)
    for _ in range(50):
        made.roll()
        made.write(b"x")
    made.finish()
    start = find_start(made.path / "log", Wish(tail=1))
    assert made.end - 500 <= start.offset < made.end - 300
    assert 0 < len(lines_of(made, Wish(tail=1))) < 10


def test_a_point_in_time_is_found_by_halves(tmp_path: Path) -> None:
    """The segment before the first that is newer is where to begin; the rest is left out."""
    made = AttemptDir(tmp_path)
    for n in range(20):
        made.roll(unix_ns=n * 100)
        made.add(RecordKind.STDOUT, b"%d " % n, n * 100 + 50)
    made.finish()
    bases = sorted(int(path.stem, 16) for path in (made.path / "log").iterdir())
    assert find_start(made.path / "log", Wish(since_ns=1020)).offset == bases[10]
    assert lines_of(made, Wish(since_ns=1020)) == b"".join(b"%d " % n for n in range(10, 20))
    assert lines_of(made, Wish(since_ns=0)) == lines_of(made, Wish())
    assert lines_of(made, Wish(since_ns=1951)) == b""
    assert lines_of(made, Wish(since_ns=1500, tail=1000)) == b"15 16 17 18 19 "
