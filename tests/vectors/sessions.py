"""Vectors of whole conversations, each message as its exact text."""

from protocol.commands import LeaseGrant, OnLoss
from protocol.envelope import PayloadType, digest_of, open_envelope, seal
from protocol.errors import Reason
from protocol.handshake import Established, PlaneHandshake, RunnerHandshake, Standing, seal_welcome
from protocol.identity import EnrollClaims
from protocol.messages import (
    Ack,
    Answer,
    Beat,
    Beaten,
    Bye,
    CommandFrame,
    Enroll,
    Enrolled,
    Fetch,
    HeldLease,
    Hint,
    ItemKind,
    LogClosed,
    LogOpen,
    Message,
    Need,
    Proof,
    Refused,
    Renewal,
    Report,
    Reported,
    Resume,
    Taken,
    Viewers,
    Welcome,
    encode,
)
from protocol.receipt import Cause, Process, Verdict
from protocol.replay import Mark
from protocol.terminals import sign_resized, sign_typed
from tests.support import builders as make

Line = tuple[str, Message]
RUNNER, PLANE = "runner", "plane"


def transcripts() -> dict[str, object]:
    """Conversations by name; `from` says who speaks."""
    conversations: dict[str, list[Line]] = {
        "enrolment": enrolment(),
        "handshake": handshake(Mark(), None),
        "a command, its receipt and its settlement": ordinary(),
        "a gap is asked for": gap(),
        "a duplicate has the same receipt": duplicate(),
        "a fork ends in a new incarnation": handshake(make.a_mark(2), 2),
        "a beat renews a lease": beat(),
        "lists are compared, and what is missing is fetched": compared(),
        "a later attempt takes the place of an earlier one": fenced(),
        "a log is streamed": log(),
        "a viewer of a terminal types and says its size": typed(),
        "an envelope that consumes nothing": refused(),
        "a farewell": [(PLANE, Bye(reason=Reason.SESSION_REPLACED))],
    }
    return {
        "root_fingerprint": make.a_root().fingerprint,
        "transcripts": [
            {"name": name, "messages": [{"from": who, "text": encode(message)} for who, message in lines]}
            for name, lines in conversations.items()
        ],
    }


def enrolment() -> list[Line]:
    """A join token becomes a certificate."""
    claims: EnrollClaims = make.an_enrolment()
    asks = Enroll(env=seal(claims.dump(), PayloadType.ENROLL, [make.a_key("runner")]).decode())
    gets = Enrolled(
        root=make.a_root(), keyset=make.a_sealed_keyset().decode(), certificate=make.a_sealed_certificate().decode()
    )
    return [(RUNNER, asks), (PLANE, gets)]


def handshake(ctl: Mark, inc: int | None) -> list[Line]:
    """Hello to welcome, by the machines themselves; with `inc`, into a new incarnation."""
    standing = Standing(
        key=make.a_key("runner"), certificate=make.a_certificate(), root=make.a_root(), keyset=make.a_verified_keyset(),
        ctl=ctl, out_head=0, boot_id="boot-1", policy_digest=make.POLICY_DIGEST, version="0.1.0", platform="linux",
    )  # fmt: skip
    runner, plane = RunnerHandshake(standing, make.a_nonce("runner")), PlaneHandshake(make.a_nonce("plane"))
    hello = runner.start()
    challenge = plane.challenge(hello, make.NOW_MS)
    proof = runner.receive(challenge)
    assert isinstance(proof, Proof)
    claims = plane.verify(proof, make.a_key("runner").public)
    env = seal_welcome(
        claims, inc=inc or 1, session="ses_1", now_ms=make.NOW_MS, beat_ms=10_000,
        ctl=ctl if inc is None else Mark(), out_hw=0, key=make.a_key("command"),
    )  # fmt: skip
    welcome = Welcome(env=env, certificate=None if inc is None else make.a_sealed_certificate(inc=inc).decode())
    assert isinstance(runner.receive(welcome), Established)
    return [(RUNNER, hello), (PLANE, challenge), (RUNNER, proof), (PLANE, welcome)]


def command(seq: int, prev: str) -> tuple[CommandFrame, str]:
    """A numbered command and its digest."""
    lease = {"res": f"exec:ex_{seq}", "token": 1, "ttl_ms": 60_000, "on_loss": str(OnLoss.CONTINUE)}
    args = make.start_fields(execution_id=f"ex_{seq}")
    verified = make.a_verified_command(cmd_id=f"cmd_{seq}", seq=seq, prev=prev, lease=lease, args=args)
    return CommandFrame(env=verified.envelope.decode()), verified.digest


def receipt(seq: int, digest: str, out_seq: int) -> Report:
    """The report of a receipt."""
    said = make.a_receipt(cmd_id=f"cmd_{seq}", cmd_digest=digest, seq=seq)
    body = seal(said.dump(), PayloadType.RECEIPT, [make.a_key("runner")]).decode()
    return Report(items=[make.an_item(out_seq, body, ItemKind.RECEIPT)])


def stored(out_seq: int) -> Reported:
    """The answer to one item."""
    return Reported(answers=[Answer(out_seq=out_seq, stored=True)])


def ordinary() -> list[Line]:
    """Accepted at once, settled later."""
    frame, digest = command(1, Mark().head)
    said = make.a_settlement(cmd_digest=digest, started_ms=make.NOW_MS, ended_ms=make.NOW_MS + 5, duration_ms=5)
    body = seal(said.dump(), PayloadType.SETTLEMENT, [make.a_key("runner")]).decode()
    settlement = Report(items=[make.an_item(2, body, ItemKind.SETTLEMENT)])
    return [
        (PLANE, frame),
        (RUNNER, receipt(1, digest, 1)),
        (PLANE, stored(1)),
        (RUNNER, settlement),
        (PLANE, stored(2)),
    ]


def gap() -> list[Line]:
    """The first command is lost on the way, the second asks for it."""
    first, first_digest = command(1, Mark().head)
    second, second_digest = command(2, first_digest)
    return [
        (PLANE, second),
        (RUNNER, Need(seq=1)),
        (PLANE, first),
        (PLANE, second),
        (RUNNER, receipt(1, first_digest, 1)),
        (RUNNER, receipt(2, second_digest, 2)),
    ]


def duplicate() -> list[Line]:
    """The same bytes have no second effect."""
    frame, digest = command(1, Mark().head)
    told = receipt(1, digest, 1)
    return [(PLANE, frame), (RUNNER, told), (PLANE, stored(1)), (PLANE, frame), (RUNNER, told), (PLANE, stored(1))]


def beat() -> list[Line]:
    """One lease is renewed, one is refused."""
    asks = Beat(
        n=1,
        hw=1,
        leases=[HeldLease(res="exec:ex_1", token=1), HeldLease(res="exec:ex_2", token=1)],
        attempts=["ex_1.1", "ex_2.1"],
    )
    renewals = [
        Renewal(res="exec:ex_1", token=1, ttl_ms=60_000),
        Renewal(res="exec:ex_2", token=1, reason=Reason.FENCED),
    ]
    return [(RUNNER, asks), (PLANE, Beaten(n=1, now_ms=make.NOW_MS, beat_ms=10_000, leases=renewals))]


def compared() -> list[Line]:
    """Both say all they know: one lease was lost and is granted anew, and one command never came."""
    asks = Beat(
        n=1,
        hw=0,
        attempts=["ex_1.1"],
        lost=[HeldLease(res="exec:ex_1", token=1)],
        full=True,
        admission="paused",
    )
    grant = LeaseGrant(res="exec:ex_1", token=2, ttl_ms=60_000, on_loss=OnLoss.FREEZE)
    args = {"execution_id": "ex_1", "start_token": 1}
    fields = {"cmd_id": "cmd_1", "kind": "lease.acquire", "lease": grant.model_dump(mode="json"), "args": args}
    acquire = CommandFrame(env=make.a_sealed_command(**fields).decode())
    hints = [Hint(attempt="ex_1.1", want="running", cmd_id="cmd_1")]
    answer = Beaten(n=1, now_ms=make.NOW_MS, beat_ms=10_000, hints=hints, full=True)
    return [(RUNNER, asks), (PLANE, answer), (RUNNER, Fetch(cmd_ids=["cmd_1"])), (PLANE, acquire)]


def fenced() -> list[Line]:
    """Its settlement says so, what was left of it, and under which token it ran last."""
    _frame, digest = command(1, Mark().head)
    said = make.a_settlement(
        cmd_digest=digest,
        verdict=Verdict.FENCED,
        code=None,
        signal=15,
        cause=Cause(kind="fenced", by="superseded by cmd_2", reason=Reason.FENCED),
        survivors=1,
        remains=[Process(pid=4242, name="sleep", state="D", wchan="folio_wait_bit", why="d_state")],
        outlived=[Process(pid=4243, name="watchman")],
        tiers=["descendants", "cookie"],
        token=1,
    )
    body = seal(said.dump(), PayloadType.SETTLEMENT, [make.a_key("runner")]).decode()
    return [(RUNNER, Report(items=[make.an_item(2, body, ItemKind.SETTLEMENT)])), (PLANE, stored(2))]


def log() -> list[Line]:
    """Control of a log's channel; the data frames between are binary."""
    return [
        (RUNNER, LogOpen(channel=0, attempt="ex_1.1", first=0)),
        (PLANE, Resume(channel=0, offset=0, credit=4_194_304)),
        (PLANE, Ack(channel=0, offset=1_048_576, credit=5_242_880)),
        (RUNNER, LogClosed(channel=0, end=2_000_000)),
        (PLANE, Ack(channel=0, offset=2_000_000, credit=6_194_304)),
    ]


def typed() -> list[Line]:
    """Each word is signed by the viewer's key; one that comes twice is answered twice and taken once."""
    key, name, viewer = make.a_key("viewer"), "ex_1.1", "vw_1"
    said = sign_typed(key, name, viewer, 0, b"ls\r")
    return [
        (PLANE, Viewers(attempt=name, seen=0, viewers=[viewer])),
        (PLANE, sign_resized(key, name, viewer, 1, 40, 120, redraw=True)),
        (PLANE, said),
        (RUNNER, Taken(attempt=name, viewer=viewer, received=3, credit=262_147)),
        (PLANE, said),
        (RUNNER, Taken(attempt=name, viewer=viewer, received=3, credit=262_147)),
        (PLANE, Viewers(attempt=name)),
    ]


def refused() -> list[Line]:
    """A command for an older incarnation."""
    frame, _digest = command(1, Mark().head)
    key = make.a_key("command")
    opened = open_envelope(frame.env.encode(), PayloadType.COMMAND, {key.key_id: key.public}, bytes)
    answer = Refused(digest=digest_of(opened.envelope), reason=Reason.STALE_INC, cmd_id="cmd_1")
    return [(PLANE, frame), (RUNNER, answer)]
