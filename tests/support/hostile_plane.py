"""A control plane with keys of its own that says whatever a test wants: honest in everything it was not told to do otherwise.

async with HostilePlane() as plane:
    ...                                    # a daemon enrols with plane.join and connects
    receipt = await plane.fate(plane.command("execution.start", args))
    refused = await plane.refusal(forged)
"""

import asyncio
import base64
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from protocol import strict_json
from protocol.commands import STREAM_OF, Stream
from protocol.envelope import PayloadType, digest_of, open_envelope, seal
from protocol.handshake import seal_welcome
from protocol.identity import Certificate, EnrollClaims, HelloClaims, JoinString, join_token
from protocol.ids import Digest
from protocol.keys import PrivateKey, PublicKey
from protocol.keyset import KeyEntry, Keyset, Role, Root
from protocol.limits import BEAT_INTERVAL_MS_MIN, LEASE_TTL_MS
from protocol.messages import (
    SUBPROTOCOL,
    Answer,
    Beat,
    Beaten,
    Bye,
    Challenge,
    CommandFrame,
    Enroll,
    Enrolled,
    FromRunner,
    Hello,
    ItemKind,
    LogOpen,
    Need,
    Proof,
    Refused,
    Renewal,
    Report,
    Reported,
    Resume,
    Welcome,
    decode_from_runner,
    encode,
)
from protocol.receipt import Receipt, Settlement, open_receipt, open_settlement
from protocol.replay import Mark
from tests.support.builders import DAY_MS, HOUR_MS, ORG, a_key, a_nonce, command_fields

WAIT_S = 20.0
"""How long a test waits for what must come: generous, since two cores run everything at once."""
CREDIT = 2**40
TOKEN = join_token(b"t" * 16)
T = TypeVar("T")
Greet = Callable[["HostilePlane", ServerConnection, Hello, HelloClaims], Awaitable[bool]]


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


async def welcome(plane: "HostilePlane", socket: ServerConnection, hello: Hello, claims: HelloClaims) -> bool:
    """The honest answer to a proof: go on from the runner's own mark. True: the session is up."""
    mark = Mark(claims.ctl.hw, Digest(claims.ctl.head))
    plane.mark = mark
    await socket.send(encode(Welcome(env=plane.welcome_for(claims, ctl=mark))))
    return True


@dataclass
class Closing:
    """How a runner closed a connection."""

    code: int | None
    reason: str


@dataclass
class HostilePlane:
    """Root, keyset and commands of its own; listens on a loopback port."""

    greet: Greet = welcome
    """What it does with a proof."""
    intercept: Callable[[ServerConnection], Awaitable[None]] | None = None
    """Has a connection from its beginning, instead of all that is honest."""
    port: int = 0
    runner: str = field(default_factory=lambda: f"rnr_{secrets.token_hex(8)}")
    """What it calls whoever enrols: processes are told apart by it, so it is nobody else's."""
    mark: Mark = field(default_factory=Mark)
    """Behind it the next command is numbered."""
    heard: list[FromRunner] = field(default_factory=list)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    """By the digest of the command's payload."""
    settlements: dict[str, Settlement] = field(default_factory=dict)
    """By the execution's id."""
    told: list[str] = field(default_factory=list)
    """Bodies of all items, as often as they came."""
    out_hw: int = 0
    closings: list[Closing] = field(default_factory=list)
    """Ends of connections, oldest first."""
    sessions: int = 0
    _count: int = 0
    _socket: ServerConnection | None = None
    _x: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> "HostilePlane":
        await self.listen()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.deafen()

    async def listen(self) -> None:
        """Take connections, where it has listened before."""
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            self.port,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            max_size=2**20,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def deafen(self) -> None:
        """End all connections and take no more: somebody else may have the port."""
        self._server.close()
        await self._server.wait_closed()

    # --- who it is ----------------------------------------------------------------------------------------------

    @property
    def root(self) -> Root:
        """The root that runners pin."""
        return Root(threshold=1, keys=[a_key("root").public.x])

    @property
    def join(self) -> str:
        """A join string that is good as often as one likes."""
        return str(JoinString("127.0.0.1", self.port, TOKEN, self.root.fingerprint))

    def keyset(self, version: int = 1, key: PrivateKey | None = None, **over: Any) -> str:
        """A keyset with one key for each role, named as the role."""
        entries = [
            KeyEntry(x=a_key(role).public.x, roles=[role], nbf=now_ms() - HOUR_MS, naf=now_ms() + DAY_MS)
            for role in Role
        ]
        fields: dict[str, Any] = {
            "org": ORG,
            "version": version,
            "iat": now_ms() - HOUR_MS,
            "exp": now_ms() + DAY_MS,
            "keys": entries,
        }
        return seal(Keyset(**(fields | over)).dump(), PayloadType.KEYSET, [key or a_key("root")]).decode()

    def welcome_for(
        self, claims: HelloClaims, *, ctl: Mark, key: PrivateKey | None = None, at_ms: int | None = None
    ) -> str:
        """A signed welcome."""
        return seal_welcome(
            claims,
            inc=claims.inc,
            session=f"se_{self.sessions}",
            now_ms=at_ms or now_ms(),
            beat_ms=BEAT_INTERVAL_MS_MIN,
            ctl=ctl,
            out_hw=min(self.out_hw, claims.out_head),
            key=key or a_key(Role.COMMAND),
        )

    # --- what it says -------------------------------------------------------------------------------------------

    def command(self, kind: str, args: dict[str, Any], *, key: PrivateKey | None = None, **over: Any) -> bytes:
        """A sealed command: the next of the stream, whether or not it is ever sent, unless `over` says otherwise."""
        self._count += 1
        numbered = over.get("stream", STREAM_OF.get(kind, Stream.CTL)) == Stream.CTL
        at_ms = now_ms()
        aud = {"org": ORG, "runner": self.runner, "inc": 1}
        fields: dict[str, Any] = {"aud": aud, "kind": kind, "cmd_id": f"cmd_{self._count}", "args": args, "iat": at_ms}
        fields |= (
            {"stream": "ctl", "seq": self.mark.hw + 1, "prev": self.mark.head} if numbered else {"stream": "safety"}
        )
        fields = command_fields(**(fields | over))
        return seal(strict_json.dumps(fields), PayloadType.COMMAND, [key or a_key(Role.COMMAND)])

    async def say(self, frame: str | bytes) -> None:
        """Send any frame to the runner. Waits for a session."""
        await self.until(lambda: self._socket is not None, "a session")
        assert self._socket is not None, "just waited for"
        await self._socket.send(frame)

    async def send(self, env: bytes) -> None:
        """Send an envelope in a command frame, as it is."""
        await self.say(encode(CommandFrame(env=env.decode("utf-8"))))

    async def hang_up(self) -> None:
        """Close the session, politely."""
        if self._socket is not None:
            await self._socket.close(1001)

    # --- what it hears ------------------------------------------------------------------------------------------

    async def fate(self, env: bytes) -> Receipt:
        """Send a command whose number is consumed, and wait for its receipt."""
        digest = digest_of(payload_of(env))
        await self.send(env)
        await self.until(lambda: digest in self.receipts, "a receipt")
        receipt = self.receipts[digest]
        if receipt.seq is not None:
            self.mark = Mark(receipt.seq, digest)
        return receipt

    async def refusal(self, env: bytes) -> Refused:
        """Send an envelope that consumes nothing, and wait for the word about it."""
        before = self._refusals(env)
        await self.send(env)
        await self.until(lambda: len(self._refusals(env)) > len(before), "a refusal")
        return self._refusals(env)[-1]

    async def need(self, env: bytes) -> int:
        """Send a command from the future, and wait for what is asked for instead."""
        before = self._count_of(Need)
        await self.send(env)
        await self.until(lambda: self._count_of(Need) > before, "a need")
        return [message.seq for message in self.heard if isinstance(message, Need)][-1]

    async def end(self, execution_id: str) -> Settlement:
        """Wait for an attempt's end."""
        await self.until(lambda: execution_id in self.settlements, "a settlement")
        return self.settlements[execution_id]

    async def closing(self, spoil: Callable[[], Awaitable[None]]) -> Closing:
        """Do what makes the runner close, and wait until it has."""
        before = len(self.closings)
        await spoil()
        await self.until(lambda: len(self.closings) > before, "the end of the connection")
        return self.closings[before]

    async def online(self, more_than: int = 0) -> None:
        """Wait for a session, after `more_than` earlier ones."""
        await self.until(lambda: self.sessions > more_than and self._socket is not None, "a session")

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something was heard."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{what} did not come within {WAIT_S:.0f} s; heard: {self.heard[-5:]}") from None

    def _refusals(self, env: bytes) -> list[Refused]:
        digest = digest_of(env)
        return [message for message in self.heard if isinstance(message, Refused) and message.digest == digest]

    def _count_of(self, kind: type[FromRunner]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)

    # --- connections --------------------------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        try:
            if self.intercept is not None:
                await self.intercept(socket)
                return
            first = decode_from_runner(str(await socket.recv()))
            if isinstance(first, Enroll):
                await self._enrol(socket, first)
            elif isinstance(first, Hello) and await self._meet(socket, first):
                await self._hold(socket)
        except ConnectionClosed:
            pass
        finally:
            self._socket = None if self._socket is socket else self._socket
            await socket.wait_closed()
            self.closings.append(Closing(socket.close_code, socket.close_reason or ""))
            self._changed.set()

    async def _enrol(self, socket: ServerConnection, message: Enroll) -> None:
        claims = EnrollClaims.parse(payload_of(message.env.encode()))
        self._x = claims.x
        certificate = Certificate(
            org=ORG, runner=self.runner, inc=1, name=claims.name, x=claims.x, seal_x=claims.seal_x, iat=now_ms()
        )
        sealed = seal(certificate.dump(), PayloadType.CERTIFICATE, [a_key(Role.ENROL)]).decode()
        await socket.send(encode(Enrolled(root=self.root, keyset=self.keyset(), certificate=sealed)))
        await socket.close(1000)

    async def _meet(self, socket: ServerConnection, hello: Hello) -> bool:
        await socket.send(encode(Challenge(nonce=a_nonce("plane"), now_ms=now_ms())))
        proof = decode_from_runner(str(await socket.recv()))
        assert isinstance(proof, Proof), f"a runner proves itself, and does not say {proof}"
        key = PublicKey.from_b64url(self._x)
        opened = open_envelope(proof.env.encode(), PayloadType.HELLO, {key.key_id: key}, HelloClaims.parse)
        if hello.purpose == "renew":
            await self._renew(socket, opened.value)
            return False
        return await self.greet(self, socket, hello, opened.value)

    async def _renew(self, socket: ServerConnection, claims: HelloClaims) -> None:
        """A connection beside the session: beats and nothing else."""
        mark = Mark(claims.ctl.hw, Digest(claims.ctl.head))
        await socket.send(encode(Welcome(env=self.welcome_for(claims, ctl=mark))))
        async for frame in socket:
            message = decode_from_runner(str(frame))
            assert isinstance(message, Beat), f"only beats renew, and not {message}"
            await self._beaten(socket, message)

    async def _beaten(self, socket: ServerConnection, beat: Beat) -> None:
        """Every lease is renewed: whoever held it once still does."""
        leases = [Renewal(res=held.res, token=held.token, ttl_ms=LEASE_TTL_MS) for held in beat.leases]
        answer = Beaten(n=beat.n, now_ms=now_ms(), beat_ms=BEAT_INTERVAL_MS_MIN, leases=leases)
        await socket.send(encode(answer))

    async def _hold(self, socket: ServerConnection) -> None:
        self._socket = socket
        self.sessions += 1
        self._changed.set()
        async for frame in socket:
            if isinstance(frame, str):
                await self._hear(socket, decode_from_runner(frame))
                self._changed.set()

    async def _hear(self, socket: ServerConnection, message: FromRunner) -> None:
        self.heard.append(message)
        match message:
            case Beat():
                await self._beaten(socket, message)
            case Report():
                self._keep(message)
                answers = [Answer(out_seq=item.out_seq, stored=True) for item in message.items]
                await socket.send(encode(Reported(answers=answers)))
            case LogOpen():
                await socket.send(encode(Resume(channel=message.channel, offset=0, credit=CREDIT)))
            case Bye():
                await socket.close(1000)
            case _:
                pass

    def _keep(self, report: Report) -> None:
        key = PublicKey.from_b64url(self._x)
        for item in report.items:
            self.told.append(item.body)
            self.out_hw = max(self.out_hw, item.out_seq)
            if item.kind is ItemKind.RECEIPT:
                receipt = open_receipt(item.body.encode(), {key.key_id: key}).value
                self.receipts[receipt.cmd_digest] = receipt
            elif item.kind is ItemKind.SETTLEMENT:
                settlement = open_settlement(item.body.encode(), {key.key_id: key}).value
                self.settlements[settlement.execution_id] = settlement


def payload_of(env: bytes) -> bytes:
    """What an envelope carries, whoever signed it."""
    return base64.b64decode(strict_json.loads_object(env, 2**20)["payload"])
