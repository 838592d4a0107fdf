"""Peers that talk garbage, to a real daemon: closed with a code that says why; it lives, and the next honest connection works."""

import asyncio
import json
import os
import socket as sockets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from websockets.asyncio.server import ServerConnection

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.frames import DataFrame, encode_data
from protocol.identity import HelloClaims
from protocol.limits import FRAME_BYTES_MAX
from protocol.messages import (
    Ack,
    Answer,
    Beaten,
    Challenge,
    CommandFrame,
    Hello,
    LogOpen,
    Reported,
    Resume,
    encode,
)
from runner.adapters.control import CONNECTIONS_MAX
from runner.adapters.control_client import REQUEST_BYTES_MAX
from tests.support.builders import a_nonce
from tests.support.hostile_plane import HostilePlane, now_ms, welcome
from tests.support.siege import Siege, siege

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

WAIT_S = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Siege]:
    """One daemon for all."""
    async with siege() as besieged:
        yield besieged


# --- inside a session ------------------------------------------------------------------------------------------------

CLOSED: dict[str, tuple[str | bytes, int, str]] = {
    "nothing": ("", 4400, Reason.BAD_FRAME),
    "noise in text": (os.urandom(300).hex(), 4400, Reason.BAD_FRAME),
    "noise in bytes": (os.urandom(300), 4400, Reason.BAD_FRAME),
    "data of a log": (encode_data(DataFrame(7, 0, b"x" * 40)), 4400, Reason.BAD_FRAME),
    "no bytes": (b"", 4400, Reason.BAD_FRAME),
    "an array": ("[]", 4400, Reason.BAD_FRAME),
    "an empty object": ("{}", 4400, Reason.BAD_FRAME),
    "an unknown message": ('{"t":"shutdown"}', 4400, Reason.BAD_FRAME),
    "a message of a runner": ('{"t":"beat","n":1,"hw":0}', 4400, Reason.BAD_FRAME),
    "a duplicate key": ('{"t":"command","env":"{}","env":"[]"}', 4400, Reason.BAD_FRAME),
    "a float": ('{"t":"ack","channel":1.0,"offset":0,"credit":0}', 4400, Reason.BAD_FRAME),
    "a number below zero": ('{"t":"ack","channel":1,"offset":-1,"credit":0}', 4400, Reason.BAD_FRAME),
    "bottomless nesting": ("[" * 100_000, 4400, Reason.BAD_FRAME),
    "a lone surrogate": ('{"t":"bye","reason":"GOING_AWAY","detail":"\\ud800"}', 4400, Reason.BAD_FRAME),
    "a second challenge": (
        encode(Challenge(nonce=a_nonce("plane"), now_ms=now_ms())),
        4400,
        Reason.UNEXPECTED_MESSAGE,
    ),
    "a huge text": ("x" * (FRAME_BYTES_MAX + 1), 1009, ""),
    "huge bytes": (bytes(1024 * 1024), 1009, ""),
}


@pytest.mark.parametrize("name", CLOSED)
async def test_garbage_in_a_session_ends_the_connection_and_nothing_else(system: Siege, name: str) -> None:
    """With its code and reason; the daemon dials again and works on."""
    frame, code, reason = CLOSED[name]
    sessions, before = system.plane.sessions, system.stand.effects()
    closing = await system.plane.closing(lambda: system.plane.say(frame))
    assert closing.code == code
    assert closing.reason == reason or not reason
    await system.plane.online(sessions)
    assert system.stand.effects() == before
    await system.lives()


@pytest.mark.parametrize(
    "frame",
    [
        encode(Ack(channel=4000, offset=10, credit=10)),
        encode(Resume(channel=4000, offset=2**50, credit=2**50)),
        encode(Reported(answers=[Answer(out_seq=10**9, stored=True)])),
        encode(Reported(answers=[Answer(out_seq=10**9, stored=False, reason=Reason.BAD_SIG)])),
        encode(Beaten(n=10**9, now_ms=1, beat_ms=1000)),
        encode(CommandFrame(env="{}")),
    ],
)
async def test_a_word_about_what_never_was_is_passed_over(system: Siege, frame: str) -> None:
    """It may have been about a log that is done with, or be an answer that came twice."""
    sessions = system.plane.sessions
    await system.plane.say(frame)
    await system.lives()
    assert system.plane.sessions == sessions


@pytest.mark.parametrize("offset", [1, 17, 2**40])
async def test_a_wrong_place_in_a_living_log_hurts_only_the_connection(system: Siege, offset: int) -> None:
    """In the middle of a record, or far beyond the end; the attempt ends as if nobody had asked."""
    plane = system.plane
    execution_id = system.new_execution()
    script = "while [ ! -e go ]; do echo line; sleep 0.05; done"
    await plane.fate(system.start({"execution_id": execution_id, "argv": ["sh", "-c", script]}))
    await plane.until(lambda: channel_of(plane, execution_id) is not None, "the log")
    channel = channel_of(plane, execution_id)
    assert channel is not None
    await plane.say(encode(Resume(channel=channel, offset=offset, credit=2**45)))
    await system.lives()
    (system.stand.home / "go").touch()
    assert (await plane.end(execution_id)).code == 0
    (system.stand.home / "go").unlink()
    await plane.online()
    await system.lives()


async def test_a_program_that_spoils_its_own_log_spoils_nothing_else(system: Siege) -> None:
    """It may: the files are its user's. The daemon says so, goes on, and can be started again on top of it."""
    plane, stand = system.plane, system.stand
    execution_id, sessions = system.new_execution(), plane.sessions
    logs = stand.state / "x" / f"{execution_id}.1" / "log"
    script = f"echo said; cd {logs}; for f in *; do cp {stand.home}/noise $f; done; cp {stand.home}/noise gggggggggggggggg.seg"
    (stand.home / "noise").write_bytes(bytes(range(1, 255)) * 20)
    await plane.fate(system.start({"execution_id": execution_id, "argv": ["sh", "-c", script]}))
    await plane.end(execution_id)
    await system.lives()
    await stand.kill("daemon")
    await stand.start_daemon()
    await plane.online(sessions)
    await stand.logged('"event":"log.failed"')
    await system.lives()


def channel_of(plane: HostilePlane, execution_id: str) -> int | None:
    """The channel of an execution's log, once it was opened."""
    found = [m.channel for m in plane.heard if isinstance(m, LogOpen) and m.attempt == f"{execution_id}.1"]
    return found[-1] if found else None


# --- before there is one ---------------------------------------------------------------------------------------------

Attack = Callable[[ServerConnection], Awaitable[None]]


def says(*frames: str | bytes) -> Attack:
    """A peer that says this at once."""

    async def attack(socket: ServerConnection) -> None:
        for frame in frames:
            await socket.send(frame)

    return attack


async def hangs_up(socket: ServerConnection) -> None:
    """A peer that is gone in the middle of the handshake."""
    await socket.recv()
    await socket.send(encode(Challenge(nonce=a_nonce("plane"), now_ms=now_ms())))
    await socket.recv()
    socket.transport.abort()


CHALLENGE = encode(Challenge(nonce=a_nonce("plane"), now_ms=now_ms()))
BEGINNINGS: dict[str, tuple[Attack, int]] = {
    "noise": (says(os.urandom(100).hex()), 4400),
    "bytes": (says(os.urandom(100)), 4400),
    "a command before anything": (says(encode(CommandFrame(env="{}"))), 4400),
    "a challenge and noise": (says(CHALLENGE, "noise"), 4400),
    "two challenges": (says(CHALLENGE, CHALLENGE), 4400),
    "a command after the challenge": (says(CHALLENGE, encode(CommandFrame(env="{}"))), 4400),
    "another version": (says(encode(Challenge(v=9, nonce=a_nonce("plane"), now_ms=now_ms()))), 4406),
    "half a handshake": (hangs_up, 1006),
}


@pytest.mark.parametrize("name", BEGINNINGS)
async def test_garbage_instead_of_a_handshake_is_left(system: Siege, name: str) -> None:
    """With a code; the true plane is welcome a moment later."""
    attack, code = BEGINNINGS[name]
    plane, sessions = system.plane, system.plane.sessions
    plane.intercept = attack
    try:
        await plane.closing(plane.hang_up)
        closing = await plane.closing(nothing)
    finally:
        plane.intercept = None
    assert closing.code == code
    await plane.online(sessions)
    await system.lives()


async def nothing() -> None:
    """The runner dials by itself."""


async def test_a_good_command_before_the_welcome_is_not_heard(system: Siege) -> None:
    """Whoever has not proved itself orders nothing, even with a true signature."""
    plane, sessions, before = system.plane, system.plane.sessions, system.stand.effects()
    env = system.start()

    async def eager(plane: HostilePlane, socket: ServerConnection, hello: Hello, claims: HelloClaims) -> bool:
        await socket.send(encode(CommandFrame(env=env.decode())))
        return await welcome(plane, socket, hello, claims)

    plane.greet = eager
    try:
        await plane.closing(plane.hang_up)
        closing = await plane.closing(nothing)
    finally:
        plane.greet = welcome
    assert (closing.code, closing.reason) == (4400, Reason.UNEXPECTED_MESSAGE)
    await plane.online(sessions)
    assert system.stand.effects() == before
    await system.lives()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        os.urandom(4096),
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-long: " + b"y" * 1_000_000,
    ],
    ids=["silence", "noise", "a web page", "half an upgrade", "an endless header"],
)
async def test_who_speaks_no_websocket_is_left(system: Siege, answer: bytes) -> None:
    """Another program has the port for a while."""
    plane, sessions = system.plane, system.plane.sessions
    met = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            met.set()

    await plane.deafen()
    async with await asyncio.start_server(serve, "127.0.0.1", plane.port):
        async with asyncio.timeout(WAIT_S):
            await met.wait()
    await plane.listen()
    await plane.online(sessions)
    await system.lives()


# --- the local socket ------------------------------------------------------------------------------------------------

LINES: dict[str, tuple[bytes, str]] = {
    "noise": (os.urandom(64).replace(b"\n", b" ") + b"\n", "BAD_FRAME"),
    "an empty line": (b"\n", "BAD_FRAME"),
    "no line": (b'{"verb":"status","args":{}}', "BAD_FRAME"),
    "nothing": (b"", "BAD_FRAME"),
    "a long line": (b"x" * (REQUEST_BYTES_MAX + 1) + b"\n", "BAD_FRAME"),
    "a line without end": (b"x" * (4 * REQUEST_BYTES_MAX), "BAD_FRAME"),
    "bottomless nesting": (b"[" * 60_000 + b"\n", "BAD_FRAME"),
    "an array": (b"[]\n", "BAD_FRAME"),
    "more than a request": (b'{"verb":"status","args":{},"more":1}\n', "BAD_FRAME"),
    "a number for a verb": (b'{"verb":1,"args":{}}\n', "BAD_FRAME"),
    "an unknown verb": (b'{"verb":"dance","args":{}}\n', "UNSUPPORTED_KIND"),
    "a stop of nobody": (b'{"verb":"stop","args":{"execution_id":"../x"}}\n', "UNKNOWN_TARGET"),
    "a stop without a name": (b'{"verb":"stop","args":{"execution_id":7}}\n', "BAD_ARGS"),
}


def dialled(system: Siege) -> sockets.socket:
    """A connection to the daemon's local socket."""
    line = sockets.socket(sockets.AF_UNIX)
    line.settimeout(WAIT_S)
    line.connect(str(system.stand.home / "run" / "control.sock"))
    return line


def answered(line: sockets.socket, said: bytes) -> Any:
    """Say something and nothing more; what comes back."""
    try:
        line.sendall(said)
        line.shutdown(sockets.SHUT_WR)
    except BrokenPipeError:
        # It had read enough.
        pass
    heard = bytearray()
    while not heard.endswith(b"\n"):
        try:
            data = line.recv(65536)
        except ConnectionResetError:
            # It went without reading all of it; what it had said is still there, behind the error.
            continue
        if not data:
            break
        heard += data
    return json.loads(heard)


@pytest.mark.parametrize("name", LINES)
async def test_garbage_on_the_local_socket_is_refused(system: Siege, name: str) -> None:
    """With a reason; the next question is answered."""
    said, reason = LINES[name]
    with dialled(system) as line:
        answer = await asyncio.to_thread(answered, line, said)
    assert answer["error"]["reason"] == reason
    assert (await system.stand.json("runner", "status"))["session"]["state"] == "up"


async def test_those_who_only_listen_leave_room_when_they_go(system: Siege) -> None:
    """Beyond the bound of askers CAPACITY is the answer, and the daemon goes on with its work."""
    silent = [dialled(system) for _ in range(CONNECTIONS_MAX)]
    try:
        with dialled(system) as line:
            refused = await asyncio.to_thread(answered, line, b"")
        assert refused["error"]["reason"] == "CAPACITY"
        await system.lives()
    finally:
        for line in silent:
            line.close()
    assert (await system.stand.json("runner", "status"))["running"]


async def test_a_stop_for_an_attempt_is_not_lost_in_the_noise(system: Siege) -> None:
    """Garbage before and after a signed stop: it ends what it names."""
    plane = system.plane
    execution_id = system.new_execution()
    await plane.fate(system.start({"execution_id": execution_id, "argv": ["sleep", "600"]}))
    sessions = plane.sessions
    await plane.closing(lambda: plane.say("noise"))
    await plane.online(sessions)
    target = {"type": "attempt", "execution_id": execution_id, "start_token": 1}
    stop = await plane.fate(plane.command(Kind.EXECUTION_STOP, {"target": target, "grace_ms": 500}))
    assert stop.result["state"] == "stopping"
    assert (await plane.end(execution_id)).verdict == "stopped"
