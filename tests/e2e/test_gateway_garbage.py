"""Peers that talk garbage, to a real control plane: closed with a code that says why; it lives, and the next honest runner is served."""

import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from protocol.errors import Reason
from protocol.frames import DataFrame, encode_data
from protocol.ids import GENESIS
from protocol.limits import FRAME_BYTES_MAX
from protocol.messages import (
    Ack,
    Answer,
    Beat,
    Challenge,
    Gap,
    Hello,
    ItemKind,
    LogClosed,
    LogOpen,
    Need,
    Proof,
    Refused,
    Reported,
    ReportItem,
    encode,
)
from tests.support.builders import a_nonce
from tests.support.fake_runner import FakeRunner, closing_of, dial
from tests.support.stand import Stand, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

WAIT_S = 20.0


@dataclass
class Attacked:
    """A control plane as a process, and a runner that is enrolled with it."""

    stand: Stand
    runner: FakeRunner
    pid: int

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.stand.port

    async def lives(self) -> None:
        """The same process answers users, and an honest session is served."""
        assert self.stand.pid("plane") == self.pid
        assert (await self.stand.get("/health"))["status"] == "ok"
        async with self.runner.connect(self.port) as line:
            assert (await line.beat()).n == 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane() -> AsyncIterator[Attacked]:
    """One control plane for all."""
    async with stand(enrolled=False) as system:
        join = (await system.post("/join-tokens", {}))["join"]
        attacked = Attacked(system, await FakeRunner.enrol(join), system.pid("plane"))
        await attacked.lives()
        yield attacked


HELLO = Hello(org="org_1", runner="rn_nobody", nonce=a_nonce())
BEGINNINGS: dict[str, tuple[list[str | bytes], int]] = {
    "nothing": ([""], 4400),
    "noise": ([os.urandom(100).hex()], 4400),
    "bytes": ([os.urandom(100)], 4400),
    "data of a log": ([encode_data(DataFrame(1, 0, b"x" * 40))], 4400),
    "bottomless nesting": (["[" * 100_000], 4400),
    "a beat": ([encode(Beat(n=1, hw=0))], 4400),
    "a message of a plane": ([encode(Challenge(nonce=a_nonce(), now_ms=1))], 4400),
    "a proof of nothing": ([encode(Proof(env="{}"))], 4400),
    "two hellos": ([encode(HELLO), encode(HELLO)], 4400),
    "hello and bytes": ([encode(HELLO), os.urandom(40)], 4400),
    "hello and a forged proof": ([encode(HELLO), encode(Proof(env="{}"))], 4404),
    "another version": ([encode(HELLO.model_copy(update={"v_min": 8, "v_max": 9}))], 4406),
    "an enrolment that is none": (['{"t":"enroll","env":"{}"}'], 4401),
    "a huge text": (["x" * (FRAME_BYTES_MAX + 1)], 1009),
    "huge bytes": ([bytes(FRAME_BYTES_MAX + 1)], 1009),
}


@pytest.mark.parametrize("name", BEGINNINGS)
async def test_garbage_instead_of_a_handshake_costs_its_own_connection(plane: Attacked, name: str) -> None:
    """With the code that says why."""
    frames, code = BEGINNINGS[name]
    async with dial(plane.port) as line:
        for frame in frames:
            await line.send(frame)
        closed = await closing_of(line)
    assert closed.code == code
    await plane.lives()


@pytest.mark.parametrize("said", [0, 1])
async def test_half_a_handshake_leaves_nothing_behind(plane: Attacked, said: int) -> None:
    """A peer that is gone after its first or second word."""
    for _ in range(20):
        async with dial(plane.port) as line:
            if said:
                await line.send(encode(HELLO))
            line.transport.abort()
    await plane.lives()


ATTEMPT = "ex_nobody.1"
INSIDE: dict[str, tuple[list[str | bytes], int, Reason | None]] = {
    "noise": ([os.urandom(100).hex()], 4400, Reason.BAD_FRAME),
    "bytes": ([os.urandom(100)], 4400, Reason.BAD_FRAME),
    "a cut data frame": ([encode_data(DataFrame(1, 0, b"x"))[:-1]], 4400, Reason.BAD_FRAME),
    "data on a channel that nobody opened": ([encode_data(DataFrame(1, 0, b"x" * 40))], 4400, Reason.BAD_FRAME),
    "data on a channel beyond all": ([b"\x01\x01\x00\x00" + b"\xff" * 12 + b"x"], 4400, Reason.BAD_FRAME),
    "a hole in a log that nobody opened": ([encode(Gap(channel=1, start=0, end=9))], 4400, Reason.BAD_FRAME),
    "the end of a log that nobody opened": ([encode(LogClosed(channel=1, end=9))], 4400, Reason.BAD_FRAME),
    "data from far beyond": (
        [encode(LogOpen(channel=1, attempt=ATTEMPT, first=0)), encode_data(DataFrame(1, 2**50, b"x" * 64))],
        4400,
        Reason.BAD_FRAME,
    ),
    "a second hello": ([encode(HELLO)], 4400, Reason.UNEXPECTED_MESSAGE),
    "a message of a plane": ([encode(Ack(channel=1, offset=0, credit=0))], 4400, Reason.BAD_FRAME),
    "an answer of a plane": (
        [encode(Reported(answers=[Answer(out_seq=1, stored=True)]))],
        4400,
        Reason.BAD_FRAME,
    ),
    "a number from the future": ([encode(Need(seq=10**6))], 4400, Reason.SEQ_GAP),
    "a mark from the future": ([encode(Beat(n=1, hw=10**6))], 4400, Reason.SEQ_GAP),
    "a float": (['{"t":"beat","n":1.5,"hw":0}'], 4400, Reason.BAD_FRAME),
    "a huge text": (["x" * (FRAME_BYTES_MAX + 1)], 1009, None),
}


@pytest.mark.parametrize("name", INSIDE)
async def test_garbage_in_a_session_costs_that_session(plane: Attacked, name: str) -> None:
    """With code and reason; the runner may dial again at once."""
    frames, code, reason = INSIDE[name]
    async with plane.runner.connect(plane.port) as line:
        for frame in frames:
            await line.socket.send(frame)
        closed = await line.closed()
    assert closed.code == code
    assert reason is None or [bye.reason for bye in closed.goodbyes] == [reason]
    await plane.lives()


async def test_a_log_of_noise_is_kept_as_it_came_and_disturbs_nobody(plane: Attacked) -> None:
    """Bytes of a log are evidence: they are stored, acked and closed like any other, and prove nothing."""
    async with plane.runner.connect(plane.port) as line:
        await line.open_log(ATTEMPT)
        await line.data(0, b"\xff" * 64)
        await line.send(LogClosed(channel=1, end=64))
        assert (await line.expect(Ack)).offset == 64
        assert (await line.beat()).n == 1
    await plane.lives()


async def test_an_item_that_is_none_is_refused_for_good_and_blocks_nobody(plane: Attacked) -> None:
    """Each has its final answer; the session goes on, and every refusal is kept as an event."""
    bodies = {ItemKind.RECEIPT: "{}", ItemKind.SETTLEMENT: '{"payload":"AAAA"}', ItemKind.EVENT: "no JSON"}
    items = [ReportItem(out_seq=n, kind=kind, body=body) for n, (kind, body) in enumerate(bodies.items(), 1)]
    async with plane.runner.connect(plane.port) as line:
        answers = (await line.report(*items)).answers
        assert [(answer.out_seq, answer.stored) for answer in answers] == [(1, False), (2, False), (3, False)]
        assert all(answer.reason is not None for answer in answers)
        again = (await line.report(*items)).answers
        assert again == answers
        assert (await line.beat()).n == 1
    plane.runner.outbox.extend(items)
    kinds = [event["kind"] for event in (await plane.stand.get("/events"))["events"]]
    assert {"receipt.refused", "settlement.refused", "event.refused"} <= set(kinds)
    await plane.lives()


async def test_a_flood_of_refusals_is_kept_within_bounds(plane: Attacked) -> None:
    """A runner that refuses what nobody sent fills neither memory nor disk, and disturbs no one."""
    async with plane.runner.connect(plane.port) as line:
        for _ in range(300):
            await line.send(Refused(digest=GENESIS, reason=Reason.BAD_SIG, detail="x" * 500))
        assert (await line.beat()).n == 1
    await plane.lives()


RAW: dict[str, bytes] = {
    "noise": os.urandom(4096),
    "zeros": bytes(65536),
    "half a request": b"GET /v1/health HTTP/1.1\r\nHost: ",
    "half an upgrade": b"GET /v1/runner HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "an endless header": b"GET / HTTP/1.1\r\nx-long: " + b"y" * 1_000_000,
    "a body that never comes": b"POST /v1/join-tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n",
    "two lengths": b"POST /v1/join-tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
}


@pytest.mark.parametrize("name", RAW)
async def test_who_speaks_no_http_disturbs_nobody(plane: Attacked, name: str) -> None:
    """Several at a time, that stay on the line while others are served."""
    peers = [socket.create_connection(("127.0.0.1", plane.port), WAIT_S) for _ in range(8)]
    try:
        for peer in peers:
            peer.settimeout(WAIT_S)
            try:
                peer.sendall(RAW[name])
            except ConnectionError:
                # It heard enough and hung up.
                continue
        await plane.lives()
    finally:
        for peer in peers:
            peer.close()
    await plane.lives()
