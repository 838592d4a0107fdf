"""A runner that does what a test tells it to, over a real WebSocket, built from `protocol` alone.

runner = await FakeRunner.enrol(join)
async with runner.connect(port) as line:
    command = await line.command()
    await line.report(runner.accepted(command))
    await line.report(runner.ended(command, code=0))
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from protocol.commands import Audience, Command, ExecutionStart, PtyOpen, parse_args
from protocol.envelope import PayloadType, Verified, digest_of, open_envelope, seal
from protocol.errors import Reason
from protocol.frames import DataFrame, encode_data
from protocol.handshake import Established, RunnerHandshake, Standing, open_certificate
from protocol.identity import Certificate, EnrollClaims, JoinString, runner_url
from protocol.ids import Attempt
from protocol.keys import PrivateKey, b64url
from protocol.keyset import Keyset, Role, Root, open_keyset
from protocol.messages import (
    SUBPROTOCOL,
    Beat,
    Beaten,
    Bye,
    Challenge,
    CommandFrame,
    Enroll,
    Enrolled,
    HeldLease,
    ItemKind,
    LogClosed,
    LogOpen,
    Message,
    Purpose,
    Refused,
    Report,
    Reported,
    ReportItem,
    Resume,
    Welcome,
    decode_from_plane,
    encode,
)
from protocol.receipt import Cause, LogEnd, Outcome, Receipt, Settlement, Verdict
from protocol.replay import Advance, Mark, NotConsumed, Seen, after, judge
from protocol.secretbox import recipient_of
from tests.support.log_bytes import LogBytes

WAIT_S = 10.0
"""How long a test waits for what must come."""
POLICY = digest_of(b"policy")
M = TypeVar("M")


class Closed(Exception):
    """The plane closed the connection: with this code, after these goodbyes."""

    def __init__(self, code: int, goodbyes: Sequence[Bye]) -> None:
        self.code = code
        self.goodbyes = list(goodbyes)
        super().__init__(f"{code} {[bye.reason for bye in goodbyes]}")


@dataclass
class FakeRunner:
    """What a runner keeps across connections: keys, marks, its outbox and what of it was answered."""

    key: PrivateKey
    seal_seed: bytes
    certificate: Certificate
    root: Root
    keyset: Verified[Keyset]
    seen: Seen = field(default_factory=Seen)
    outbox: list[ReportItem] = field(default_factory=list)
    answered: list[ReportItem] = field(default_factory=list)
    instance: str = ""
    """The daemon that is running; empty: one that does not say."""
    dial: int = 0
    hostname: str = "box"
    boot_id: str = "boot"

    def started(self, letter: str, *, hostname: str = "box", boot_id: str = "boot") -> "FakeRunner":
        """A daemon that was started on this state: a new instance that shares the state with nobody from here on."""
        return replace(
            self,
            outbox=list(self.outbox),
            answered=list(self.answered),
            instance=letter * 22,
            dial=0,
            hostname=hostname,
            boot_id=boot_id,
        )

    @classmethod
    async def enrol(
        cls, join: str, name: str = "laptop", seed: bytes = b"k" * 32, labels: dict[str, str] | None = None
    ) -> "FakeRunner":
        """Enrol with a join string. Raises Closed when the plane refuses."""
        parsed, key = JoinString.parse(join), PrivateKey(seed)
        async with dial(parsed.port) as socket:
            await socket.send(encode(Enroll(env=enrolment(parsed.token, key, name, labels or {}))))
            answer = await _next(socket)
            assert isinstance(answer, Enrolled)
            assert answer.root.fingerprint == parsed.root
            keyset = open_keyset(answer.keyset.encode(), answer.root)
            certificate = open_certificate(answer.certificate.encode(), keyset.value).value
            assert (await closing_of(socket)).code == 1000
        return cls(key, _seal_seed(seed), certificate, answer.root, keyset)

    @property
    def id(self) -> str:
        """Its runner id."""
        return self.certificate.runner

    @asynccontextmanager
    async def connect(
        self, port: int, *, seed: bytes | None = None, purpose: Purpose = "session"
    ) -> AsyncIterator["Line"]:
        """Shake hands and hold the line. `seed`: another key than the enrolled one."""
        async with dial(port) as socket:
            line = await self.shake(socket, seed=seed, purpose=purpose)
            try:
                yield line
            finally:
                await socket.close()

    async def shake(
        self, socket: ClientConnection, *, seed: bytes | None = None, purpose: Purpose = "session"
    ) -> "Line":
        """The handshake on an open socket. Raises Closed."""
        handshake = self._handshake(seed, purpose)
        await socket.send(encode(handshake.start()))
        challenge = await _next(socket)
        assert isinstance(challenge, Challenge)
        await socket.send(encode(handshake.receive(challenge)))  # type: ignore[arg-type]
        welcome = await _next(socket)
        assert isinstance(welcome, Welcome)
        established = handshake.receive(welcome)
        assert isinstance(established, Established)
        self.keyset = established.keyset
        if established.certificate is not None:
            self.certificate = established.certificate.value
            self.seen = replace(self.seen, ctl=Mark())
        return Line(self, socket, established)

    async def prepare(self, socket: ClientConnection) -> str:
        """The handshake up to the proof, which is not sent."""
        handshake = self._handshake(None, "session")
        await socket.send(encode(handshake.start()))
        challenge = await _next(socket)
        assert isinstance(challenge, Challenge)
        return encode(handshake.receive(challenge))  # type: ignore[arg-type]

    def _handshake(self, seed: bytes | None, purpose: Purpose) -> RunnerHandshake:
        self.dial += purpose == "session"
        standing = Standing(
            key=self.key if seed is None else PrivateKey(seed),
            certificate=self.certificate,
            root=self.root,
            keyset=self.keyset,
            ctl=self.seen.ctl,
            out_head=len(self.outbox),
            boot_id=self.boot_id,
            policy_digest=POLICY,
            version="0.1.0",
            platform="linux",
            hostname=self.hostname,
            instance=self.instance,
            dial=self.dial,
            purpose=purpose,
        )
        return RunnerHandshake(standing, b64url(b"n" * 32))

    def judged(self, frame: CommandFrame) -> Refused:
        """What is said of a command that does not get through the door."""
        envelope = frame.env.encode()
        keys = self.keyset.value.keys_for(Role.COMMAND)
        command = open_envelope(envelope, PayloadType.COMMAND, keys, Command.parse)
        me = Audience(org=self.certificate.org, runner=self.id, inc=self.certificate.inc)
        verdict = judge(command, me, self.keyset.value, self.seen)
        assert isinstance(verdict, NotConsumed)
        return Refused(digest=digest_of(envelope), reason=verdict.reason, cmd_id=command.value.cmd_id)

    # --- statements ---------------------------------------------------------------------------------------------

    def receipt(
        self,
        command: Verified[Command],
        outcome: Outcome,
        *,
        reason: Reason | None = None,
        result: dict[str, Any] | None = None,
    ) -> ReportItem:
        """The signed fate of a command, in the outbox."""
        header = command.value
        statement = Receipt(
            org=self.certificate.org,
            runner=self.id,
            inc=self.certificate.inc,
            cmd_id=header.cmd_id,
            cmd_digest=command.digest,
            kind=header.kind,
            seq=header.seq,
            outcome=outcome,
            reason=reason,
            policy_digest=POLICY,
            keyset_version=self.keyset.value.version,
            at_ms=header.iat,
            result=result or {},
        )
        return self._put(ItemKind.RECEIPT, seal(statement.dump(), PayloadType.RECEIPT, [self.key]))

    def accepted(self, command: Verified[Command]) -> ReportItem:
        """The receipt of a start that was begun."""
        start = attempt_of(command)
        result = {"execution_id": start.execution_id, "start_token": start.start_token}
        return self.receipt(command, Outcome.ACCEPTED, result=result)

    def ended(
        self,
        command: Verified[Command],
        *,
        code: int = 0,
        log: LogBytes | None = None,
        verdict: Verdict = Verdict.EXITED,
    ) -> ReportItem:
        """The settlement of a start, as one that ended by itself if nothing else is said."""
        start = attempt_of(command)
        statement = Settlement(
            org=self.certificate.org,
            runner=self.id,
            inc=self.certificate.inc,
            execution_id=start.execution_id,
            start_token=start.start_token,
            cmd_id=command.value.cmd_id,
            cmd_digest=command.digest,
            verdict=verdict,
            code=code if verdict is Verdict.EXITED else None,
            cause=Cause(kind="none"),
            streams={} if log is None else log.streams(),
            log=None if log is None else LogEnd(end=len(log.data), segments=log.segments, chain=log.chain()),
            policy_digest=POLICY,
            at_ms=command.value.iat,
        )
        return self._put(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def _put(self, kind: ItemKind, body: bytes) -> ReportItem:
        item = ReportItem(out_seq=len(self.outbox) + 1, kind=kind, body=body.decode())
        self.outbox.append(item)
        return item


@dataclass
class Line:
    """One session of a fake runner."""

    runner: FakeRunner
    socket: ClientConnection
    established: Established
    heard: list[Message] = field(default_factory=list)
    beats: int = 0

    async def send(self, message: Message) -> None:
        """Send a message."""
        await self.socket.send(encode(message))

    async def expect(self, kind: type[M]) -> M:
        """The next message of a kind; others are kept for later. Raises Closed."""
        for at, message in enumerate(self.heard):
            if isinstance(message, kind):
                del self.heard[at]
                return message
        while True:
            message = await _next(self.socket)
            if isinstance(message, kind):
                return message
            self.heard.append(message)

    async def command(self) -> Verified[Command]:
        """The next new command, judged as a runner judges it; doubles are passed over."""
        runner = self.runner
        me = Audience(org=runner.certificate.org, runner=runner.id, inc=runner.certificate.inc)
        while True:
            frame = await self.expect(CommandFrame)
            keys = runner.keyset.value.keys_for(Role.COMMAND)
            command = open_envelope(frame.env.encode(), PayloadType.COMMAND, keys, Command.parse)
            verdict = judge(command, me, runner.keyset.value, runner.seen)
            if not isinstance(verdict, Advance):
                continue
            known = verdict.refuse
            runner.seen = after(runner.seen, command, verdict)
            if known is not None:
                runner.receipt(command, Outcome.REFUSED, reason=known)
                continue
            return command

    async def report(self, *items: ReportItem) -> Reported:
        """Report items and wait for the answer."""
        await self.send(Report(items=list(items)))
        reported = await self.expect(Reported)
        self.runner.answered += items
        return reported

    async def catch_up(self) -> Reported | None:
        """Report everything the plane does not have."""
        runner = self.runner
        above = self.established.report_above(
            min((item.out_seq for item in runner.outbox if item not in runner.answered), default=None)
        )
        rest = [item for item in runner.outbox if item.out_seq > above]
        return await self.report(*rest) if rest else None

    async def beat(
        self,
        leases: Sequence[HeldLease] = (),
        attempts: Sequence[str] = (),
        *,
        lost: Sequence[HeldLease] = (),
        full: bool = False,
        admission: str = "open",
    ) -> Beaten:
        """A beat and its answer."""
        self.beats += 1
        beat = Beat(
            n=self.beats,
            hw=self.runner.seen.ctl.hw,
            leases=list(leases),
            attempts=list(attempts),
            lost=list(lost),
            full=full,
            admission=admission,
        )
        await self.send(beat)
        return await self.expect(Beaten)

    async def open_log(self, attempt: str, channel: int = 1, first: int = 0) -> Resume:
        """Open a channel."""
        await self.send(LogOpen(channel=channel, attempt=attempt, first=first))
        return await self.expect(Resume)

    async def data(self, offset: int, data: bytes, channel: int = 1) -> None:
        """One data frame."""
        await self.socket.send(encode_data(DataFrame(channel, offset, data)))

    async def upload(self, attempt: str, log: LogBytes, channel: int = 1) -> None:
        """A whole log, and its end."""
        offset = (await self.open_log(attempt, channel)).offset
        for slice_ in log.slices(offset):
            await self.data(offset, slice_, channel)
            offset += len(slice_)
        await self.send(LogClosed(channel=channel, end=len(log.data)))

    async def closed(self) -> Closed:
        """Wait until the plane closes."""
        while True:
            try:
                message = await _next(self.socket)
            except Closed as closed:
                closed.goodbyes[:0] = [said for said in self.heard if isinstance(said, Bye)]
                return closed
            self.heard.append(message)


@asynccontextmanager
async def dial(port: int, subprotocol: str = SUBPROTOCOL) -> AsyncIterator[ClientConnection]:
    """A raw connection to the runner endpoint."""
    url = runner_url("127.0.0.1", port, secure=False)
    async with connect(url, subprotocols=[subprotocol], compression=None, proxy=None) as socket:  # type: ignore[list-item]
        yield socket


def enrolment(token: str, key: PrivateKey, name: str, labels: dict[str, str]) -> str:
    """A signed enrolment, as envelope text."""
    claims = EnrollClaims(
        token=token,
        name=name,
        x=key.public.x,
        seal_x=recipient_of(_seal_seed(key.seed)),
        boot_id="boot",
        hostname="box",
        platform="linux",
        version="0.1.0",
        labels=labels,
    )
    return seal(claims.dump(), PayloadType.ENROLL, [key]).decode()


def start_of(command: Verified[Command]) -> ExecutionStart:
    """The arguments of a start."""
    args = parse_args(command.value)
    assert isinstance(args, ExecutionStart)
    return args


def attempt_of(command: Verified[Command]) -> Attempt:
    """The attempt that a start begins, with pipes or with a terminal."""
    args = parse_args(command.value)
    assert isinstance(args, ExecutionStart | PtyOpen)
    return args.attempt


async def closing_of(socket: ClientConnection) -> Closed:
    """Wait until the plane closes a raw connection."""
    goodbyes: list[Bye] = []
    while True:
        try:
            message = await _next(socket)
        except Closed as closed:
            closed.goodbyes[:0] = goodbyes
            return closed
        if isinstance(message, Bye):
            goodbyes.append(message)


async def _next(socket: ClientConnection) -> Message:
    goodbyes: list[Bye] = []
    with anyio.fail_after(WAIT_S):
        try:
            while True:
                message = decode_from_plane(str(await socket.recv()))
                if not isinstance(message, Bye):
                    return message
                goodbyes.append(message)
        except ConnectionClosed as exc:
            raise Closed(exc.rcvd.code if exc.rcvd else 1006, goodbyes) from exc


def _seal_seed(seed: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in seed)
