"""A plane and a runner that remember what they must, and the link between them; test_session.py tells the rules.

Everything in a store is durable at once; a session and the link are lost whenever the connection is.
"""

import copy
from dataclasses import dataclass, field

from protocol.commands import Audience, Command
from protocol.envelope import PayloadType, digest_of, open_envelope
from protocol.errors import Reason, RemoteError
from protocol.handshake import Established
from protocol.ids import GENESIS, CommandId, Digest
from protocol.messages import (
    Answer,
    Beat,
    Beaten,
    CommandFrame,
    FromPlane,
    FromRunner,
    ItemKind,
    Need,
    Refused,
    Report,
    Reported,
    ReportItem,
    decode_from_plane,
    decode_from_runner,
    encode,
)
from protocol.receipt import Outcome, Receipt
from protocol.replay import Adopt, Advance, Duplicate, Gap, Mark, NotConsumed, Seen, after, judge, reconcile
from protocol.session import ItemsAnswered, PlaneSession, RunnerSession, SentCommand
from tests.support.builders import ORG, RUNNER, a_key, a_keyset, a_receipt, a_sealed_command, a_verified_keyset, an_item

KEY = a_key("command")
KEYS = {KEY.key_id: KEY.public}
KEYSET = a_keyset()
SEALED_KEYSET = a_verified_keyset()
EVENT_BODY = '{"event":?}'
REFUSED_BODY = '{"refuse":?}'


@dataclass(frozen=True, slots=True)
class Intent:
    """What somebody asked for; `again` is a second payload under an id that is taken."""

    cmd_id: str
    safety: bool
    again: int = 0


@dataclass(frozen=True, slots=True)
class Signed:
    """What the world knows of a signed command, beside both sides."""

    intent: Intent
    inc: int
    seq: int | None
    prev: Digest | None


@dataclass(slots=True)
class PlaneStore:
    """What a plane keeps."""

    inc: int = 1
    intents: list[Intent] = field(default_factory=list)
    mark: Mark = field(default_factory=Mark)
    acked_hw: int = 0
    ctl: dict[int, SentCommand] = field(default_factory=dict)
    safety: dict[str, SentCommand] = field(default_factory=dict)
    origin: dict[str, Intent] = field(default_factory=dict)
    items: dict[tuple[int, str], ReportItem] = field(default_factory=dict)
    """By number and bytes: a runner that was set back uses numbers again."""
    out_hw: int = 0
    """The highest number of an item; what was lost below it had no answer."""
    receipts: dict[str, list[str]] = field(default_factory=dict)
    receipted_ids: set[str] = field(default_factory=set)

    @property
    def unanswered(self) -> bool:
        """Whether a number that was signed in this incarnation has no receipt yet."""
        return any(c.cmd_digest in self.origin and c.cmd_digest not in self.receipts for c in self.ctl.values())


@dataclass(slots=True)
class RunnerStore:
    """What a runner keeps; `chain` is what it consumed in this incarnation, `effects` what it ever did."""

    inc: int = 1
    seen: Seen = field(default_factory=Seen)
    chain: list[Digest] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    outbox: list[ReportItem] = field(default_factory=list)
    receipt_of: dict[Digest, int] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)

    @property
    def oldest_unanswered(self) -> int | None:
        """The lowest number without an answer."""
        return min({item.out_seq for item in self.outbox} - self.answered, default=None)


class World:
    """Both sides, the link, and a record of everything that was ever signed."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.plane, self.runner = PlaneStore(), RunnerStore()
        self.backup, self.snapshot = PlaneStore(), RunnerStore()
        self.plane_session: PlaneSession | None = None
        self.runner_session: RunnerSession | None = None
        self.to_plane: list[str] = []
        self.to_runner: list[str] = []
        self.signed: dict[str, Signed] = {}
        self.recorded: list[str] = []
        self.wait_for = 0
        self.replayed = False
        self.ids = 0
        self.told = 0

    def disconnect(self) -> None:
        """The connection, and all that was under way on it, is gone."""
        self.plane_session = self.runner_session = None
        self.to_plane, self.to_runner = [], []

    def conflict(self) -> bool:
        """Whether the two histories cannot both go on, from the full chains (which neither side has of the other)."""
        chain, plane = self.runner.chain, self.plane
        return (
            self.runner.inc != plane.inc
            or len(chain) < plane.acked_hw
            or len(self.runner.outbox) < plane.out_hw
            or (len(chain) > plane.mark.hw and plane.unanswered)
            or any(seq in plane.ctl and plane.ctl[seq].cmd_digest != d for seq, d in enumerate(chain, 1))
        )

    def connect(self) -> None:
        """A handshake: the runner says how far it is, the plane reconciles, both begin new sessions."""
        plane, runner, expected = self.plane, self.runner, self.conflict()
        before = max(plane.inc, runner.inc)
        known = {seq: Digest(command.cmd_digest) for seq, command in plane.ctl.items()}
        verdict = reconcile(
            known,
            plane.mark.hw,
            plane.acked_hw,
            runner.seen.ctl,
            unanswered=plane.unanswered,
            out_hw=plane.out_hw,
            out_head=len(runner.outbox),
        )
        if isinstance(verdict, Adopt) and runner.inc == plane.inc:
            assert not expected, "two histories went on as one"
            plane.acked_hw = verdict.mark.hw
            if verdict.lost:
                plane.mark = verdict.mark
                plane.ctl[verdict.mark.hw] = SentCommand(verdict.mark.head, verdict.mark.hw, "known to the runner only")
        else:
            assert expected, "a new incarnation without need"
            self.restart_streams(before + 1)
        if len(runner.outbox) < plane.out_hw:
            plane.out_hw = 0
        self.wait_for, self.replayed = len(runner.outbox), False
        self.plane_session = PlaneSession(plane.acked_hw)
        for command in [*plane.ctl.values(), *plane.safety.values()]:
            self.plane_session.queue(command)
        self.runner_session = RunnerSession(self.welcomed().report_above(runner.oldest_unanswered), 10_000)

    def welcomed(self) -> Established:
        """What the runner takes from the welcome."""
        return Established(
            session="ses_1",
            now_ms=self.now_ms,
            beat_ms=10_000,
            out_hw=self.plane.out_hw,
            ctl=self.runner.seen.ctl,
            keyset=SEALED_KEYSET,
            certificate=None,
        )

    def restart_streams(self, inc: int) -> None:
        """A new incarnation: what was signed and has no receipt is an intent again, under its own id."""
        plane, runner = self.plane, self.runner
        open_digests = [c.cmd_digest for c in (*plane.ctl.values(), *plane.safety.values())]
        back = [plane.origin[d] for d in open_digests if d in plane.origin and d not in plane.receipts]
        plane.intents = [*back, *plane.intents]
        plane.inc, plane.mark, plane.acked_hw, plane.ctl, plane.safety = inc, Mark(), 0, {}, {}
        runner.inc, runner.chain = inc, []
        runner.seen = Seen(digests=runner.seen.digests, receipted=runner.seen.receipted)

    def number_and_sign(self) -> None:
        """Turn intents into signed commands while there is room, once everything the runner had to tell is stored."""
        session, plane = self.plane_session, self.plane
        assert session is not None
        while plane.intents and session.room > 0 and plane.out_hw >= self.wait_for:
            intent = plane.intents.pop(0)
            if intent.cmd_id in plane.receipted_ids and not intent.again:
                continue
            command = self.sign(intent)
            if command.seq is None:
                plane.safety[command.cmd_digest] = command
            else:
                plane.ctl[command.seq] = command
                plane.mark = Mark(command.seq, Digest(command.cmd_digest))
            session.queue(command)

    def sign(self, intent: Intent) -> SentCommand:
        """A signed command for `intent`, on the plane's present mark."""
        mark = self.plane.mark
        seq, prev = (None, None) if intent.safety else (mark.hw + 1, mark.head)
        envelope = a_sealed_command(
            key=KEY,
            cmd_id=intent.cmd_id,
            kind="execution.stop" if intent.safety else "execution.start",
            seq=seq,
            prev=prev,
            aud={"org": ORG, "runner": RUNNER, "inc": self.plane.inc},
            iss=f"https://plane.test/{self.now_ms}/{intent.again}",
        )
        digest = open_envelope(envelope, PayloadType.COMMAND, KEYS, Command.parse).digest
        self.signed[digest] = Signed(intent, self.plane.inc, seq, prev)
        self.plane.origin[digest] = intent
        return SentCommand(digest, seq, envelope.decode())

    def plane_sends(self) -> None:
        """Whatever the plane has to say now."""
        if self.plane_session is None:
            return
        self.number_and_sign()
        for frame in self.plane_session.outgoing(self.now_ms):
            self.recorded.append(encode(frame))
            self.to_runner.append(self.recorded[-1])

    def runner_sends(self, *, beat: bool) -> None:
        """Whatever the runner has to say now."""
        session = self.runner_session
        if session is None:
            return
        session.feed(self.runner.outbox[session.cursor : session.cursor + session.room])
        for report in session.outgoing(self.now_ms):
            self.to_plane.append(encode(report))
        if beat:
            self.to_plane.append(encode(session.beat(self.now_ms, self.runner.seen.ctl.hw)))

    def to_the_runner(self, text: str) -> None:
        """A frame arrives at the runner."""
        message: FromPlane = decode_from_plane(text)
        session = self.runner_session
        assert session is not None
        if isinstance(message, Reported | Beaten):
            told = session.receive(message)
            if isinstance(told, ItemsAnswered):
                self.runner.answered |= {answer.out_seq for answer in told.answers}
        elif isinstance(message, CommandFrame):
            answer = self.runner_judges(message.env.encode(), session)
            if answer is not None:
                self.to_plane.append(encode(answer))

    def runner_judges(self, envelope: bytes, session: RunnerSession) -> Need | Refused | None:
        """Through the door, in the order of judgement."""
        runner = self.runner
        command = open_envelope(envelope, PayloadType.COMMAND, KEYS, Command.parse)
        verdict = judge(command, Audience(org=ORG, runner=RUNNER, inc=runner.inc), KEYSET, runner.seen)
        match verdict:
            case Duplicate(digest):
                number = runner.receipt_of[digest]
                session.again(runner.outbox[number - 1 : number])
                return None
            case Gap(need):
                return Need(seq=need)
            case NotConsumed(reason):
                return Refused(digest=digest_of(envelope), reason=reason)
            case Advance(_, refuse):
                runner.seen = after(runner.seen, command, verdict)
                self.consume(command.value, command.digest, refuse)
                return None

    def consume(self, command: Command, digest: Digest, refuse: Reason | None) -> None:
        """The effect and the receipt, durable with the mark."""
        runner = self.runner
        if command.seq is not None:
            runner.chain.append(digest)
        if refuse is None:
            runner.effects.append(command.cmd_id)
        outcome = Outcome.DONE if refuse is None else Outcome.REFUSED
        number = len(runner.outbox) + 1
        self.told += 1
        receipt = a_receipt(
            inc=runner.inc, cmd_id=command.cmd_id, cmd_digest=digest, seq=command.seq, outcome=outcome, at_ms=self.told
        )
        runner.outbox.append(an_item(number, receipt.dump().decode(), ItemKind.RECEIPT))
        runner.receipt_of[digest] = number

    def runner_tells(self, body: str) -> None:
        """An event for the outbox; no two are the same, whatever was forgotten."""
        self.told += 1
        body = body.replace("?", str(self.told))
        self.runner.outbox.append(an_item(len(self.runner.outbox) + 1, body))

    def to_the_plane(self, text: str) -> None:
        """A frame arrives at the plane."""
        message: FromRunner = decode_from_runner(text)
        session = self.plane_session
        assert session is not None
        match message:
            case Report():
                self.to_runner.append(encode(Reported(answers=[self.store(item, session) for item in message.items])))
            case Need():
                self.plane_hears_need(message, session)
            case Beat():
                session.receive(message)
                self.to_runner.append(encode(Beaten(n=message.n, now_ms=self.now_ms, beat_ms=10_000)))
            case _:
                pass

    def plane_hears_need(self, message: Need, session: PlaneSession) -> None:
        """Go back; a number from the future can only come from a replayed history, and ends the connection."""
        try:
            session.receive(message)
        except RemoteError:
            assert self.replayed, "an honest runner asked for what was never sent"
            self.disconnect()

    def store(self, item: ReportItem, session: PlaneSession) -> Answer:
        """One item, by its number and its bytes; what it says is taken once."""
        plane, place = self.plane, (item.out_seq, item.body)
        if place not in plane.items:
            plane.items[place] = item
            if item.kind is ItemKind.RECEIPT:
                self.take_receipt(item.body)
        plane.out_hw = max(plane.out_hw, item.out_seq)
        if item.kind is ItemKind.RECEIPT:
            receipt = Receipt.parse(item.body.encode())
            if receipt.inc == plane.inc:
                session.receipted(receipt.cmd_digest, receipt.seq)
        return Answer(out_seq=item.out_seq, stored=not item.body.startswith('{"refuse'))

    def take_receipt(self, body: str) -> None:
        """The fate of a command: kept by the digest of its payload."""
        receipt = Receipt.parse(body.encode())
        bodies = self.plane.receipts.setdefault(receipt.cmd_digest, [])
        if body not in bodies:
            bodies.append(body)
        self.plane.receipted_ids.add(CommandId(receipt.cmd_id))
        self.plane.safety.pop(receipt.cmd_digest, None)

    def persist_acked(self) -> None:
        """What the session learnt of the runner's mark becomes durable."""
        if self.plane_session is not None:
            self.plane.acked_hw = max(self.plane.acked_hw, self.plane_session.acked_hw)

    def keep_backup(self) -> None:
        """A copy of the plane, to come back to."""
        self.backup = copy.deepcopy(self.plane)

    def keep_snapshot(self) -> None:
        """A copy of the runner, to come back to."""
        self.snapshot = copy.deepcopy(self.runner)

    def prev_of(self, seq: int) -> Digest:
        """What must stand in the `prev` of the number `seq` of the runner's chain."""
        return GENESIS if seq == 1 else self.runner.chain[seq - 2]
