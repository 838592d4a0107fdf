"""Enrolment over a real socket: what is sent, what is believed, and what is said when it fails."""

import asyncio
import base64
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from protocol.envelope import PayloadType, open_envelope
from protocol.errors import CloseCode, Reason
from protocol.identity import EnrollClaims, JoinString, join_token
from protocol.keys import PublicKey
from protocol.messages import SUBPROTOCOL, Beaten, Bye, Challenge, Enroll, Enrolled, decode_from_runner, encode
from runner.adapters import enrolment
from runner.adapters.enrolment import MachineFacts, PlaneUnreachable, enroll
from runner.adapters.keystore import Keystore
from runner.errors import Broken, ConfigError, Refused
from tests.unit.runner.planekeys import ORG, PlaneKeys, key

PLANE = PlaneKeys()
TOKEN = join_token(b"sixteen bytes ok")
FACTS = MachineFacts(boot_id="boot-1", hostname="host", platform="linux", version="0.1.0")
Answer = Callable[[ServerConnection, EnrollClaims], Awaitable[None]]


def opened(text: str) -> EnrollClaims:
    """What the runner signed, opened with the key it claims."""
    message = decode_from_runner(text)
    assert isinstance(message, Enroll)
    # Proof of possession: the key is inside, so it is read first and then verified.
    payload = base64.b64decode(json.loads(message.env)["payload"])
    public = PublicKey.from_b64url(EnrollClaims.parse(payload).x)
    return open_envelope(message.env.encode(), PayloadType.ENROLL, {public.key_id: public}, EnrollClaims.parse).value


def enrolled(claims: EnrollClaims, plane: PlaneKeys = PLANE, **changes: Any) -> Enrolled:
    """The plane's yes; `changes` are of the certificate."""
    named = {"name": claims.name, "x": claims.x, "seal_x": claims.seal_x, "labels": claims.labels, **changes}
    certificate = plane.certificate(key(7), b"s" * 32, **named)
    return Enrolled(root=plane.root, keyset=plane.keyset().decode(), certificate=certificate.decode())


async def says_yes(connection: ServerConnection, claims: EnrollClaims) -> None:
    """A good plane."""
    await connection.send(encode(enrolled(claims)))


@asynccontextmanager
async def plane(answer: Answer, subprotocol: str = SUBPROTOCOL) -> AsyncIterator[JoinString]:
    """A plane on loopback that answers the first message so, and its join string."""

    async def serve_one(connection: ServerConnection) -> None:
        text = await connection.recv()
        assert isinstance(text, str)
        await answer(connection, opened(text))

    async with serve(serve_one, "127.0.0.1", 0, subprotocols=[Subprotocol(subprotocol)]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield JoinString("127.0.0.1", port, TOKEN, PLANE.root.fingerprint)


async def try_it(join: JoinString, store: Keystore, **changes: Any) -> Any:
    """Enrol with the usual facts."""
    named: dict[str, Any] = {"name": "laptop", "labels": {"os": "linux"}, "facts": FACTS, "proxy": None}
    return await enroll(join, store, **{**named, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Keystore:
    """An empty store."""
    return Keystore(tmp_path / "identity")


async def test_a_machine_becomes_a_runner(store: Keystore) -> None:
    """It signs the token with its new keys, and keeps what it was given."""
    heard: list[EnrollClaims] = []

    async def answer(connection: ServerConnection, claims: EnrollClaims) -> None:
        heard.append(claims)
        await says_yes(connection, claims)

    async with plane(answer) as join:
        certificate = await try_it(join, store)
    found = store.load()
    assert heard[0].token == TOKEN
    assert (heard[0].name, heard[0].labels, heard[0].boot_id) == ("laptop", {"os": "linux"}, "boot-1")
    assert (heard[0].x, certificate) == (found.key.public.x, found.certificate.value)
    assert found.url == join.url


async def test_a_second_try_uses_the_same_keys(store: Keystore) -> None:
    """A plane that was lost after it stored us finds the same runner again."""
    heard: list[str] = []

    async def answer(connection: ServerConnection, claims: EnrollClaims) -> None:
        heard.append(claims.x)
        if len(heard) > 1:
            await says_yes(connection, claims)

    async with plane(answer) as join:
        with pytest.raises(PlaneUnreachable):
            await try_it(join, store)
        assert not store.enrolled
        await try_it(join, store)
    assert heard[0] == heard[1]


OTHER = PlaneKeys(2)


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(lambda claims: enrolled(claims, OTHER), id="another root"),
        pytest.param(
            lambda claims: enrolled(claims).model_copy(update={"keyset": OTHER.keyset().decode()}), id="another keyset"
        ),
        pytest.param(
            lambda claims: enrolled(claims).model_copy(update={"certificate": enrolled(claims, OTHER).certificate}),
            id="a certificate by another key",
        ),
        pytest.param(lambda claims: enrolled(claims, x=key(9).public.x), id="another runner's key"),
        pytest.param(lambda claims: enrolled(claims, seal_x=key(9).public.x), id="another seal key"),
        pytest.param(lambda claims: enrolled(claims, name="server"), id="another name"),
        pytest.param(lambda claims: enrolled(claims, org=ORG + "x"), id="another organisation"),
    ],
)
async def test_a_plane_that_cannot_prove_itself_gets_no_runner(
    store: Keystore, forged: Callable[[EnrollClaims], Enrolled]
) -> None:
    """Nothing but our own keys is written."""

    async def answer(connection: ServerConnection, claims: EnrollClaims) -> None:
        await connection.send(encode(forged(claims)))

    async with plane(answer) as join:
        with pytest.raises(Broken, match="cannot prove itself") as caught:
            await try_it(join, store)
    assert caught.value.reason is Reason.BAD_PROOF
    assert not store.enrolled


def bye(reason: Reason) -> Answer:
    """Say no."""

    async def answer(connection: ServerConnection, _claims: EnrollClaims) -> None:
        await connection.send(encode(Bye(reason=reason, detail="\x1b[31mterminal")))

    return answer


def close(code: int) -> Answer:
    """Hang up."""

    async def answer(connection: ServerConnection, _claims: EnrollClaims) -> None:
        await connection.close(code)

    return answer


def send(frame: str | bytes) -> Answer:
    """Say something."""

    async def answer(connection: ServerConnection, _claims: EnrollClaims) -> None:
        await connection.send(frame)

    return answer


@pytest.mark.parametrize(
    ("answer", "error", "reason", "said"),
    [
        (bye(Reason.BAD_JOIN_TOKEN), Refused, Reason.BAD_JOIN_TOKEN, "unknown, used or expired"),
        (bye(Reason.CAPACITY), Refused, Reason.CAPACITY, "refused the enrolment"),
        (close(CloseCode.UNKNOWN_RUNNER), Refused, Reason.BAD_JOIN_TOKEN, "unknown, used or expired"),
        (close(CloseCode.UNSUPPORTED_VERSION), Refused, Reason.UNSUPPORTED_VERSION, "no version in common"),
        (close(CloseCode.INTERNAL), PlaneUnreachable, Reason.INFRA, "without an answer"),
        (close(CloseCode.NORMAL), PlaneUnreachable, Reason.INFRA, "without an answer"),
        (send(encode(Challenge(nonce="n" * 43, now_ms=1))), Broken, Reason.UNEXPECTED_MESSAGE, "something else"),
        (send(encode(Beaten(n=1, now_ms=1, beat_ms=1000))), Broken, Reason.UNEXPECTED_MESSAGE, "something else"),
        (send("{}"), Broken, Reason.BAD_FRAME, "cannot be read"),
        (send(b"\0" * 99), Broken, Reason.BAD_FRAME, "with data"),
        (send("x" * 200_000), PlaneUnreachable, Reason.INFRA, "without an answer"),
    ],
)
async def test_a_no_becomes_a_sentence(
    store: Keystore, caplog: pytest.LogCaptureFixture, answer: Answer, error: type[Exception], reason: Reason, said: str
) -> None:
    """With a stable reason, without a byte of the peer's and without the token."""
    caplog.set_level(logging.INFO)
    async with plane(answer) as join:
        with pytest.raises(error, match=said) as caught:
            await try_it(join, store)
    assert isinstance(caught.value, Refused | Broken)
    assert caught.value.reason is reason
    assert str(caught.value).isprintable()
    assert TOKEN not in f"{caught.value} {caught.value.__cause__!r} {caplog.text}"
    assert not store.enrolled


async def test_a_plane_that_is_not_there_is_unreachable(store: Keystore) -> None:
    """Address in the sentence, token not; the environment's proxy is not asked."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(PlaneUnreachable, match=f"127.0.0.1:{port} cannot be reached") as caught:
        await try_it(JoinString("127.0.0.1", port, TOKEN, PLANE.root.fingerprint), store)
    assert TOKEN not in repr(caught.value)


async def test_a_proxy_is_used_only_when_it_is_given(store: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the environment lead nowhere; an explicit proxy is dialled."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    dialled = asyncio.Event()

    async def deny(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"CONNECT 127.0.0.1:")
        dialled.set()
        writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with plane(says_yes) as join:
        await try_it(join, store)
        async with await asyncio.start_server(deny, "127.0.0.1", 0) as proxy:
            url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
            with pytest.raises(PlaneUnreachable):
                await try_it(join, store, proxy=url)
    assert dialled.is_set()


async def test_silence_has_an_end(store: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plane that never answers is unreachable."""
    monkeypatch.setattr(enrolment, "ANSWER_TIMEOUT_S", 0.05)
    over = asyncio.Event()

    async def answer(_connection: ServerConnection, _claims: EnrollClaims) -> None:
        await over.wait()

    async with plane(answer) as join:
        with pytest.raises(PlaneUnreachable, match="in time"):
            await try_it(join, store)
        over.set()


async def test_another_kind_of_server_is_no_plane(store: Keystore) -> None:
    """It must speak our subprotocol."""
    async with plane(says_yes, subprotocol="chat") as join:
        with pytest.raises(PlaneUnreachable):
            await try_it(join, store)


@pytest.mark.parametrize("changes", [{"name": "my laptop"}, {"name": ""}, {"labels": {"k": "x" * 201}}])
async def test_a_wrong_name_is_found_before_anything_happens(store: Keystore, tmp_path: Path, changes: Any) -> None:
    """No keys are made and nothing is dialled."""
    with pytest.raises(ConfigError):
        await try_it(JoinString("127.0.0.1", 9, TOKEN, PLANE.root.fingerprint), store, **changes)
    assert list(tmp_path.iterdir()) == []
