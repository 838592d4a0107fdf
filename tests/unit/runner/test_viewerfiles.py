"""Who is let in to a PTY: written once, durably, under one key and mode; whatever else lies there lets nobody in."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from protocol.commands import ViewerMode
from protocol.errors import Reason
from protocol.limits import VIEWERS_MAX
from runner.adapters.viewerfiles import VIEWERS_DIR, admit_viewer, admitted_names, admitted_viewer
from runner.errors import Refused
from tests.support.builders import a_key

KEY = a_key("viewer").public
OTHER = a_key("other").public


@pytest.fixture
def pty(tmp_path: Path) -> Path:
    """The directory of a PTY that nobody was let in to."""
    directory = tmp_path / "ex_1.1"
    directory.mkdir()
    return directory


def refused(directory: Path, viewer: str, key: str, mode: ViewerMode) -> Reason:
    """Why it is not let in."""
    with pytest.raises(Refused) as caught:
        admit_viewer(directory, viewer, key, mode)
    return caught.value.reason


def test_a_viewer_is_known_by_its_key_and_mode(pty: Path) -> None:
    """The same again changes nothing."""
    assert admitted_viewer(pty, "v_1") is None and admitted_names(pty) == []
    for _ in range(2):
        admit_viewer(pty, "v_1", KEY.x, ViewerMode.READ)
    admit_viewer(pty, "v_2", OTHER.x, ViewerMode.WRITE)
    found = admitted_viewer(pty, "v_1")
    assert found is not None and (found.key, found.mode) == (KEY, ViewerMode.READ)
    assert admitted_names(pty) == ["v_1", "v_2"]
    assert (pty / VIEWERS_DIR / "v_1").stat().st_mode & 0o777 == 0o600


def test_a_name_belongs_to_whoever_had_it_first(pty: Path) -> None:
    """Another key, or more rights, under the same name is refused, and nothing changes."""
    admit_viewer(pty, "v_1", KEY.x, ViewerMode.READ)
    assert refused(pty, "v_1", OTHER.x, ViewerMode.READ) is Reason.DUPLICATE_VIEWER
    assert refused(pty, "v_1", KEY.x, ViewerMode.WRITE) is Reason.DUPLICATE_VIEWER
    found = admitted_viewer(pty, "v_1")
    assert found is not None and (found.key, found.mode) == (KEY, ViewerMode.READ)


def test_of_two_that_come_at_once_one_has_the_name(pty: Path) -> None:
    """In threads, as the daemon lets them in: who comes second is told so."""
    outcomes: list[Reason | None] = []

    def come(key: str) -> None:
        try:
            admit_viewer(pty, "v_1", key, ViewerMode.WRITE)
            outcomes.append(None)
        except Refused as exc:
            outcomes.append(exc.reason)

    both = [threading.Thread(target=come, args=(key.x,)) for key in (KEY, OTHER)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(map(str, outcomes)) == ["DUPLICATE_VIEWER", "None"]


def test_so_many_are_let_in_and_no_more(pty: Path) -> None:
    """Those that are in stay in; a draft that a crash left counts for nobody."""
    (pty / VIEWERS_DIR).mkdir()
    for number in range(VIEWERS_MAX - 1):
        (pty / VIEWERS_DIR / f"v_{number}").touch()
    (pty / VIEWERS_DIR / ".v_x").write_text("half")
    admit_viewer(pty, "last", KEY.x, ViewerMode.READ)
    admit_viewer(pty, "last", KEY.x, ViewerMode.READ)
    assert refused(pty, "more", KEY.x, ViewerMode.READ) is Reason.CAPACITY


def test_a_key_that_is_none_lets_nobody_in(pty: Path) -> None:
    """Its form alone is not enough."""
    assert refused(pty, "v_1", "A" * 43, ViewerMode.READ) is Reason.WEAK_KEY
    assert not (pty / VIEWERS_DIR).exists()


def test_a_pty_whose_files_are_gone_has_no_viewers(tmp_path: Path) -> None:
    """Nothing is made anew."""
    assert refused(tmp_path / "gone", "v_1", KEY.x, ViewerMode.READ) is Reason.NOT_RUNNING
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        json.dumps({"v": 2, "key": KEY.x, "mode": "rw"}),
        json.dumps({"v": 1, "key": "A" * 43, "mode": "rw"}),
        json.dumps({"v": 1, "key": KEY.x, "mode": "root"}),
        json.dumps({"v": 1, "key": [KEY.x], "mode": None}),
        json.dumps({"v": 1, "key": KEY.x, "mode": "rw", "more": "x" * 2000}),
    ],
)
def test_what_is_no_viewers_file_lets_nobody_in(pty: Path, content: str) -> None:
    """The child is of the same user, and may have written there."""
    (pty / VIEWERS_DIR).mkdir()
    (pty / VIEWERS_DIR / "v_1").write_text(content)
    assert admitted_viewer(pty, "v_1") is None


def test_a_disk_that_fails_lets_nobody_in(pty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half written stays, and it may come again."""

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            admit_viewer(pty, "v_1", KEY.x, ViewerMode.READ)
    assert admitted_viewer(pty, "v_1") is None
    admit_viewer(pty, "v_1", KEY.x, ViewerMode.READ)
    assert admitted_viewer(pty, "v_1") is not None
