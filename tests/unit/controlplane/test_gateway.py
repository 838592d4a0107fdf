"""Connections: handshakes, garbage, replacement, and what a session may say."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import anyio
import pytest
from websockets.asyncio.client import ClientConnection

from controlplane import gateway
from protocol.errors import Reason
from protocol.ids import GENESIS
from protocol.messages import Beat, Bye, Hello, Need, Refused, encode
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Closed, closing_of, dial

pytestmark = pytest.mark.slow


async def lives(cp: Running) -> None:
    """The plane still serves."""
    assert (await cp.http.get("/v1/health")).status_code == 200


async def test_a_runner_is_online_while_it_has_a_session(tmp_path: Path) -> None:
    """And no longer."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            assert line.established.beat_ms == 1000
            await line.beat()
            (shown,) = (await cp.get("/v1/runners"))["runners"]
            assert (shown["online"], shown["hostname"]) == (True, "box")
        with anyio.fail_after(5):
            while (await cp.get("/v1/runners"))["runners"][0]["online"]:
                await anyio.sleep(0.01)


async def test_another_key_proves_nothing(tmp_path: Path) -> None:
    """4401, with BAD_PROOF."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        with pytest.raises(Closed) as closed:
            async with runner.connect(cp.port, seed=b"x" * 32):
                pass
        assert (closed.value.code, closed.value.goodbyes[0].reason) == (4401, Reason.BAD_PROOF)
        await lives(cp)


@pytest.mark.parametrize("field", ["runner", "org"])
async def test_a_stranger_is_told_so_after_its_proof(tmp_path: Path, field: str) -> None:
    """4404: not enrolled here, in this organisation."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        runner.certificate = runner.certificate.model_copy(update={field: "somebody"})
        with pytest.raises(Closed) as closed:
            async with runner.connect(cp.port):
                pass
        assert (closed.value.code, closed.value.goodbyes[0].reason) == (4404, Reason.UNKNOWN_RUNNER)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("garbage", 4400),
        ("{}", 4400),
        ('{"t":"hello"}', 4400),
        ('{"t":"beat","n":1,"hw":0}', 4400),
        (b"\x01\x01" + bytes(40), 4400),
        (json.dumps({"t": "hello", "v_min": 7, "v_max": 9, "org": "o", "runner": "r", "nonce": "n" * 43}), 4406),
        ("x" * (128 * 1024 + 1), 1009),
    ],
)
async def test_a_broken_first_frame_costs_only_its_connection(tmp_path: Path, frame: str | bytes, code: int) -> None:
    """The right close code, and the plane lives."""
    async with running(tmp_path) as cp:
        async with dial(cp.port) as socket:
            await socket.send(frame)
            assert (await closing_of(socket)).code == code
        await lives(cp)


async def test_random_bytes_never_hurt_the_plane(tmp_path: Path) -> None:
    """Fifty connections of noise inside a session and outside."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        for size in range(1, 50, 3):
            async with dial(cp.port) as socket:
                await socket.send(os.urandom(size * 7))
                assert (await closing_of(socket)).code == 4400
            async with runner.connect(cp.port) as line:
                await line.socket.send(os.urandom(size * 7) if size % 2 else os.urandom(size).hex())
                assert (await line.closed()).code == 4400
        await lives(cp)


async def test_a_client_of_another_protocol_is_told(tmp_path: Path) -> None:
    """4406 without the subprotocol."""
    async with running(tmp_path) as cp, dial(cp.port, "something.else") as socket:
        assert (await closing_of(socket)).code == 4406


async def test_a_silent_handshake_times_out(tmp_path: Path) -> None:
    """4508: try again with backoff."""
    with patch.object(gateway, "HANDSHAKE_TIMEOUT_MS", 50):
        async with running(tmp_path) as cp, dial(cp.port) as socket:
            assert (await closing_of(socket)).code == 4508


async def test_a_second_connection_replaces_the_first(tmp_path: Path) -> None:
    """4409 to the old one; the new one works."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as old, runner.connect(cp.port) as new:
            closed = await old.closed()
            assert (closed.code, closed.goodbyes[0].reason) == (4409, Reason.SESSION_REPLACED)
            assert (await new.beat()).n == 1
            assert (await cp.get("/v1/runners"))["runners"][0]["online"]


async def test_a_proof_answers_one_challenge_only(tmp_path: Path) -> None:
    """A recorded proof is worth nothing on another connection."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        sent: list[str] = []

        class Recording:
            def __init__(self, socket: ClientConnection) -> None:
                self.socket = socket

            async def send(self, text: str) -> None:
                sent.append(text)
                await self.socket.send(text)

            async def recv(self) -> str | bytes:
                return await self.socket.recv()

        async with dial(cp.port) as socket:
            await runner.shake(Recording(socket))  # type: ignore[arg-type]
        async with dial(cp.port) as socket:
            await socket.send(sent[0])
            await socket.recv()
            await socket.send(sent[1])
            assert (await closing_of(socket)).code == 4401


async def test_a_number_from_the_future_is_refused(tmp_path: Path) -> None:
    """Neither asked for nor told to be consumed."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        for message in (Need(seq=9), Beat(n=1, hw=9)):
            async with runner.connect(cp.port) as line:
                await line.send(message)
                closed = await line.closed()
                assert (closed.code, closed.goodbyes[0].reason) == (4400, Reason.SEQ_GAP)


async def test_a_handshake_message_inside_a_session_is_refused(tmp_path: Path) -> None:
    """The table has no row for it."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.send(Hello(org="o", runner="r", nonce="n" * 43))
            assert (await line.closed()).goodbyes[0].reason == Reason.UNEXPECTED_MESSAGE


async def test_bye_ends_it_normally(tmp_path: Path) -> None:
    """1000."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.socket.send(encode(Bye(reason=Reason.GOING_AWAY)))
            assert (await line.closed()).code == 1000


async def test_a_refused_envelope_is_kept_as_an_event(tmp_path: Path) -> None:
    """With reason and digest; a fork of something we sent leads to a new meeting."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await cp.start()
            command = await line.command()
            await line.send(Refused(digest=GENESIS, reason=Reason.CHAIN_FORK, detail="told", cmd_id="cm_other"))
            await line.beat()
            await line.send(Refused(digest=command.digest, reason=Reason.CHAIN_FORK, cmd_id=command.value.cmd_id))
            closed = await line.closed()
        assert (closed.code, closed.goodbyes[0].reason) == (1001, Reason.GOING_AWAY)
        newest, first = (await cp.get("/v1/events", runner="laptop"))["events"]
        assert (newest["kind"], newest["reason"], newest["digest"]) == (
            "envelope.refused",
            "CHAIN_FORK",
            command.digest,
        )
        assert first["detail"] == "told"


async def test_the_plane_says_goodbye_when_it_ends(tmp_path: Path) -> None:
    """1001 to whoever is on the line."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with dial(cp.port) as socket:
            await runner.shake(socket)
            cp.plane.end_sessions()
            closed = await closing_of(socket)
            assert (closed.code, closed.goodbyes[0].reason) == (1001, Reason.GOING_AWAY)


async def test_a_stale_keyset_is_renewed_by_meeting_again(tmp_path: Path) -> None:
    """After a renewal sessions are asked to come back, and the welcome carries the new keyset."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            cp.clock.ahead_ms = 25 * 24 * 60 * 60 * 1000
            await cp.plane.renew_keyset()
            assert (await line.closed()).code == 1001
        async with runner.connect(cp.port):
            assert runner.keyset.value.version == 2


async def test_a_plane_with_a_restored_keyset_outdoes_what_runners_have(tmp_path: Path) -> None:
    """The runner has seen version 2; the plane that only has 1 goes on with 3."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        runner.keyset = cp.plane.keys.renewed(cp.plane.now_ms).keyset
        async with runner.connect(cp.port) as line:
            assert runner.keyset.value.version == 3
            await cp.start()
            assert (await line.command()).value.keyset_min == 3
