"""Pieces of stdin at the runner: verified against the spec, fed in whatever order they come, and answered when they are not."""

import json
from pathlib import Path

import pytest

from protocol.errors import Reason
from protocol.ids import Attempt
from protocol.keys import PrivateKey
from protocol.messages import Input, InputFed
from protocol.stdin import sign_piece
from runner.adapters.inlet import Inlet

KEY = PrivateKey(b"k" * 32)
NAME = "ex_1.1"


class Line:
    """An inlet over a directory, a shim that is connected or not, and what was said."""

    def __init__(self, state_dir: Path) -> None:
        self.fed: list[tuple[str, int, bytes, bool]] = []
        self.said: list[InputFed] = []
        self.connected = True
        self.state_dir = state_dir
        self.inlet = Inlet(state_dir, feed=self._feed, say=self.said.append)

    def _feed(self, name: str, offset: int, data: bytes, end: bool) -> bool:
        if self.connected:
            self.fed.append((name, offset, data, end))
        return self.connected

    def spec(self, **over: object) -> None:
        """The attempt was started with this."""
        directory = self.state_dir / "x" / NAME
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "spec.json").write_text(json.dumps({"v": 1, "input_key": KEY.public.x} | over))

    def take(self, offset: int = 0, data: bytes = b"abc", key: PrivateKey = KEY, *, end: bool = False) -> None:
        """A piece comes."""
        self.inlet.take(piece(offset, data, key, end=end))


def piece(offset: int, data: bytes, key: PrivateKey = KEY, *, end: bool = False) -> Input:
    """A signed one."""
    return sign_piece(key, Attempt.parse(NAME), offset, data, end=end)


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """Nothing was said yet."""
    return Line(tmp_path)


def test_a_piece_of_the_right_key_is_fed(line: Line) -> None:
    """As it is."""
    line.spec()
    line.take()
    line.take(3, b"", end=True)
    assert line.fed == [(NAME, 0, b"abc", False), (NAME, 3, b"", True)] and line.said == []


@pytest.mark.parametrize(
    ("spec", "key", "reason"),
    [
        ({}, PrivateKey(b"o" * 32), Reason.BAD_SIG),
        ({"input_key": None}, KEY, Reason.UNKNOWN_KEY),
        ({"input_key": "A" * 43}, KEY, Reason.WEAK_KEY),
        (None, KEY, Reason.UNKNOWN_TARGET),
    ],
)
def test_what_nobody_may_feed_is_answered(
    line: Line, spec: dict[str, object] | None, key: PrivateKey, reason: Reason
) -> None:
    """With the reason, and nothing is fed."""
    if spec is not None:
        line.spec(**spec)
    line.take(key=key)
    assert [(each.closed, each.reason) for each in line.said] == [(True, reason)] and line.fed == []


def test_an_attempt_that_is_over_is_answered(line: Line) -> None:
    """Its shim is gone for good."""
    line.spec()
    line.connected = False
    (line.state_dir / "x" / NAME / "exit.json").write_text('{"v": 1}')
    line.take()
    assert [(each.closed, each.reason) for each in line.said] == [(True, Reason.NOT_RUNNING)]


def test_what_a_shim_tells_goes_to_who_asked(line: Line) -> None:
    """An attempt that nobody wrote to, and a session that has asked for nothing yet, are told nothing."""
    line.spec()
    line.inlet.fed(NAME, 0, 100, False)
    assert line.said == []
    line.take()
    line.inlet.fed(NAME, 3, 103, False)
    assert line.said == [InputFed(attempt=NAME, received=3, credit=103, closed=False)]
    line.inlet.disconnected()
    line.inlet.fed(NAME, 3, 103, False)
    assert len(line.said) == 1
