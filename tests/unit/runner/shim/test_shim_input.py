"""A child's stdin through a real shim: each byte once, in order, with an end, whatever is sent twice, early or too much."""

from __future__ import annotations

import array
import fcntl
import hashlib
import os
import signal
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.shim import feed, wire
from tests.support.shim import Connection, Shim, wait_for
from tests.unit.runner.shim.conftest import StartShim


def give(connection: Connection, offset: int, data: bytes, *, end: bool = False) -> None:
    """Send one INPUT."""
    connection.send(wire.INPUT, wire.INPUT_BODY.pack(offset, wire.INPUT_END if end else 0) + data)


def fed(connection: Connection) -> tuple[int, int, int]:
    """`(received, credit, closed)` of the next FED."""
    return wire.FED_BODY.unpack_from(connection.wait(wire.FED))


def give_all(connection: Connection, data: bytes) -> None:
    """Everything, within the credit, and its end."""
    _, credit, _ = fed(connection)
    sent = 0
    while sent < len(data):
        piece = data[sent : min(credit, sent + 32_768)]
        give(connection, sent, piece, end=sent + len(piece) == len(data))
        sent += len(piece)
        while sent == credit and sent < len(data):
            _, credit, _ = fed(connection)


def started(start_shim: StartShim, *argv: str, **spec: Any) -> Shim:
    """A child that runs, with a stdin."""
    shim: Shim = start_shim(argv=list(argv), stdin=True, **spec)
    shim.start()
    return shim


def test_a_megabyte_arrives_byte_for_byte_and_ends(start_shim: StartShim) -> None:
    """More than the pipe and the queue hold: credit comes as the child reads."""
    data = os.urandom(1_000_000)
    shim = started(start_shim, "sh", "-c", "sha256sum; echo over")
    give_all(shim.controller, data)
    assert shim.exit()["code"] == 0
    assert shim.log().stdout.split() == [hashlib.sha256(data).hexdigest().encode(), b"-", b"over"]


def test_what_comes_twice_is_fed_once_and_what_comes_early_is_not_taken(start_shim: StartShim) -> None:
    """A daemon that does not know how far its predecessor came sends again, and asks from where."""
    shim = started(start_shim, "cat")
    assert fed(shim.controller) == (0, feed.WINDOW_BYTES, 0)
    give(shim.controller, 0, b"one")
    assert fed(shim.controller)[0] == 3
    give(shim.controller, 9, b"early")
    assert fed(shim.controller)[0] == 3
    give(shim.controller, 0, b"onetwo")
    assert fed(shim.controller)[0] == 6
    again = shim.connect()
    again.hello()
    assert fed(again)[0] == 6, "the next daemon is told how far it is"
    give(again, 3, b"two")
    give(again, 6, b"three", end=True)
    again.wait(wire.EXIT)
    again.close()
    assert shim.log().stdout == b"onetwothree"


def test_a_child_that_reads_nothing_holds_its_writer_back(start_shim: StartShim) -> None:
    """No more than the window is taken; the rest is not, and may be sent again."""
    shim = started(start_shim, "sleep", "60")
    give(shim.controller, 0, b"x" * 60_000)
    for at in range(1, 12):
        give(shim.controller, at * 60_000, b"x" * 60_000)
    received = credit = 0
    for _ in range(13):
        received, credit, closed = fed(shim.controller)
        assert received <= credit and not closed
    assert received == credit < 12 * 60_000
    shim.stop()
    shim.exit()


def test_a_child_that_closes_its_stdin_is_told_of_and_goes_on(start_shim: StartShim) -> None:
    """What still comes is dropped; the child's own end counts."""
    shim = started(start_shim, "sh", "-c", "head -c 3; exec <&-; while ! [ -e done ]; do sleep .01; done; exit 7")
    fed(shim.controller)
    give(shim.controller, 0, b"abc")
    closed, sent = 0, 3
    while not closed:
        _, credit, closed = fed(shim.controller)
        if not closed and credit - sent >= 4096:
            give(shim.controller, sent, b"y" * 4096)
            sent += 4096
    give(shim.controller, sent, b"more")
    while fed(shim.controller)[0] != sent + 4:
        pass
    shim.stop(grace_ms=0)
    assert shim.exit()["verdict"] == "stopped"
    assert shim.log().stdout == b"abc"


def test_without_stdin_there_is_none(start_shim: StartShim) -> None:
    """A spec that does not ask for it gives /dev/null, and INPUT is answered with `closed`."""
    shim = start_shim(argv=["sh", "-c", "wc -c; while ! [ -e /proc/self/none ]; do sleep 1; done"])
    shim.start()
    wait_for(lambda: shim.log().stdout == b"0\n", "an empty stdin")
    give(shim.controller, 0, b"abc")
    assert fed(shim.controller)[2] == 1
    shim.stop()
    shim.exit()


@pytest.mark.parametrize("body", [b"", b"1234567"])
def test_a_short_input_closes_its_connection(start_shim: StartShim, body: bytes) -> None:
    """And nothing else."""
    shim = started(start_shim, "cat")
    bad = shim.connect()
    bad.hello()
    bad.send(wire.INPUT, body)
    while bad.receive() is not None:
        pass
    bad.close()
    good = shim.connect()
    good.hello()
    give(good, 0, b"fine", end=True)
    good.wait(wire.EXIT)
    good.close()
    assert shim.log().stdout == b"fine"


@given(st.binary(max_size=600), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 200)), max_size=40))
def test_any_order_of_pieces_feeds_the_bytes_in_order(data: bytes, pieces: list[tuple[int, int]]) -> None:
    """Whatever is sent: what the pipe gets is a prefix, and everything once the rest is sent."""
    read, write = os.pipe2(os.O_NONBLOCK)
    stdin = feed.Feed()
    stdin.fd = write
    try:
        for start, length in pieces:
            stdin.take(start, data[start : start + length], end=start + length >= len(data) and start <= len(data))
            stdin.write()
        stdin.take(stdin.received, data[stdin.received :], end=True)
        stdin.write()
        assert stdin.received == len(data) and stdin.closed
        assert os.read(read, 1000) == data
    finally:
        os.close(read)
        stdin.close()


def test_a_tool_that_signals_by_id_is_obeyed_once(start_shim: StartShim) -> None:
    """The same id again has the same answer and no second signal; another id has."""
    script = "trap 'echo one' USR1; echo up; while :; do sleep .01; done"
    shim = start_shim(argv=["sh", "-c", script])
    shim.start()
    wait_for(lambda: b"up" in shim.log().stdout, "the trap")
    signal_body = wire.SIGNAL_BODY.pack(b"idididi1", 10, wire.TO_CHILD)
    for _ in range(3):
        shim.controller.send(wire.SIGNAL, signal_body)
        assert struct.unpack("<8sI", shim.controller.wait(wire.SIGNALLED)) == (b"idididi1", 1)
    wait_for(lambda: b"one" in shim.log().stdout, "the first")
    shim.controller.send(wire.SIGNAL, wire.SIGNAL_BODY.pack(b"idididi2", 10, wire.TO_CHILD))
    wait_for(lambda: shim.log().stdout.count(b"one") == 2, "the second")
    shim.stop(0)
    shim.exit()
    assert shim.log().stdout.count(b"one") == 2


def test_a_signal_to_the_tree_reaches_everybody(start_shim: StartShim) -> None:
    """The child's own children, too; and nobody when nobody is there."""
    script = "trap '' USR2; (trap 'echo inner; exit' USR2; echo up; while :; do sleep .01; done) & wait"
    shim = start_shim(argv=["sh", "-c", script])
    shim.controller.send(wire.SIGNAL, wire.SIGNAL_BODY.pack(b"tooearly", 12, wire.TO_TREE))
    assert struct.unpack("<8sI", shim.controller.wait(wire.SIGNALLED)) == (b"tooearly", 0)
    shim.start()
    wait_for(lambda: b"up" in shim.log().stdout, "the inner trap")
    shim.controller.send(wire.SIGNAL, wire.SIGNAL_BODY.pack(b"tothemal", 12, wire.TO_TREE))
    assert struct.unpack("<8sI", shim.controller.wait(wire.SIGNALLED))[1] >= 2
    assert shim.exit()["code"] == 0
    assert b"inner" in shim.log().stdout


def test_an_end_that_comes_as_the_pipe_takes_more_is_an_end(start_shim: StartShim, tmp_path: Path) -> None:
    """Both are heard of in one look: the last piece closes the pipe, of which the same look says that it takes more."""
    shim = started(start_shim, "sh", "-c", f"while [ ! -e {tmp_path}/read ]; do sleep 0.02; done; wc -c")
    give(shim.controller, 0, b"x" * 60_000)
    give(shim.controller, 60_000, b"x" * 40_000)
    while fed(shim.controller)[0] < 100_000:
        pass
    signal.pidfd_send_signal(shim.pidfd, signal.SIGSTOP)
    (tmp_path / "read").touch()
    wait_for(lambda: emptied(shim), "an empty pipe")
    give(shim.controller, 100_000, b"y", end=True)
    signal.pidfd_send_signal(shim.pidfd, signal.SIGCONT)
    told = shim.exit()
    assert (told["verdict"], told["code"], told["cause"]["kind"]) == ("exited", 0, "none")
    assert shim.log().stdout.split() == [b"100001"]


def emptied(shim: Shim) -> bool:
    """Whether the child has read what its pipe held."""
    pipe = os.open(f"/proc/{shim.meta()['child']['pid']}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        held = array.array("i", [0])
        fcntl.ioctl(pipe, termios.FIONREAD, held)
        return held[0] == 0
    finally:
        os.close(pipe)
