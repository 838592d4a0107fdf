"""A world for the engine: a plane that numbers and seals, a journal in memory that keeps its rules, and the effects so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, assert_never

from protocol import strict_json
from protocol.commands import STREAM_OF, Kind, Stream
from protocol.envelope import PayloadType, Verified, digest_of, seal
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.handshake import Established, open_certificate
from protocol.ids import Attempt, CommandId, Digest, WorktreeId
from protocol.keys import PrivateKey
from protocol.keyset import Keyset
from protocol.messages import ItemKind, Refused, ReportItem
from protocol.receipt import Receipt, Settlement, open_receipt, open_settlement
from protocol.replay import Mark
from runner.core.effects import (
    CreateWorktree,
    Effect,
    Offer,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    ReportAgain,
    Say,
)
from runner.core.engine import Engine, EngineIdentity
from runner.core.inputs import (
    AttemptExited,
    AttemptPrepared,
    EnvelopeReceived,
    Input,
    Now,
    SessionUp,
    WorktreeCreated,
)
from runner.core.journaling import (
    AppendLeaf,
    AttemptRow,
    DropWorktree,
    Image,
    PutAdmission,
    PutAnswered,
    PutAttempt,
    PutCommand,
    PutEvent,
    PutMark,
    PutReceipt,
    PutSettlement,
    PutTombstone,
    PutWorktree,
    WorktreeRow,
    Write,
)
from runner.core.plans import Admission, CommandRow, ExitRecord, Observed, ProcessIdentity, WorktreeMade
from runner.core.policy import Policy
from tests.support.builders import (
    NOW_MS,
    ORG,
    RUNNER,
    a_certificate,
    a_key,
    a_sealed_certificate,
    a_verified_keyset,
    an_attempt,
)

E = TypeVar("E")

BOOT_MS = 5_000_000
BOOT_ID = "boot-1"
HEAD = "ab" * 20
HEX = "cd" * 32
SHIM = ProcessIdentity(boot_id=BOOT_ID, pid=4242, start=99)
CTL_KINDS = frozenset(kind for kind, stream in STREAM_OF.items() if stream is Stream.CTL)


def a_policy(**over: Any) -> Policy:
    """An owner who lets /srv/work and /srv/repos be used, by eight attempts at a time."""
    fields: dict[str, Any] = {
        "digest": Digest("sha256:" + "11" * 32),
        "kinds": CTL_KINDS,
        "roots": ("/srv/work", "/srv/repos"),
        "env_allow": ("CI", "APP_*"),
        "concurrent_max": 8,
        "signals": frozenset({"HUP", "USR1"}),
        "grace_ms_max": 60_000,
    }
    return Policy(**(fields | over))


def an_exit(**over: Any) -> ExitRecord:
    """The record of an attempt that exited with 0."""
    fields: dict[str, Any] = {
        "verdict": "exited",
        "code": 0,
        "signal": None,
        "core": False,
        "cause_kind": "none",
        "cause_by": "",
        "cause_reason": None,
        "cause_detail": "",
        "started_ms": NOW_MS,
        "ended_ms": NOW_MS + 5,
        "duration_ms": 5,
        "utime_us": 1,
        "stime_us": 2,
        "maxrss_kib": 3,
        "streams": {"stdout": (4, HEX)},
        "log_end": 100,
        "log_segments": 1,
        "log_chain": HEX,
        "drain": "eof",
        "swept": (("group", 15, 1),),
        "survivors": 0,
        "boot_id": BOOT_ID,
    }
    return ExitRecord(**(fields | over))


def an_unreleased_exit() -> ExitRecord:
    """The record of a shim that was never let go."""
    return an_exit(verdict="never_started", code=None, cause_kind="unreleased", unreleased=True)


def a_row(number: int, cmd_id: str = "", receipt_seq: int | None = None) -> CommandRow:
    """A command with this number for a digest."""
    return CommandRow(
        digest=Digest(f"sha256:{number:064x}"),
        cmd_id=CommandId(cmd_id or f"cmd_{number}"),
        kind="execution.start",
        seq=number,
        envelope=b"{}",
        policy_digest=Digest("sha256:" + "0" * 64),
        receipt_seq=receipt_seq,
    )


class RuleBroken(AssertionError):
    """The engine asked the journal for what it must never be asked for."""


@dataclass
class JournalModel:
    """What survives a crash, with the rules of `runner/core/journaling.py` checked at every write."""

    marks: dict[int, Mark] = field(default_factory=dict)
    commands: dict[Digest, CommandRow] = field(default_factory=dict)
    attempts: dict[Attempt, AttemptRow] = field(default_factory=dict)
    prepared: set[Attempt] = field(default_factory=set)
    """Attempts that were ever journaled as PREPARED."""
    tombstones: dict[str, tuple[CommandId, int]] = field(default_factory=dict)
    worktrees: dict[WorktreeId, WorktreeRow] = field(default_factory=dict)
    items: dict[int, ReportItem] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    leaves: list[AppendLeaf] = field(default_factory=list)
    admission: tuple[Admission, int | None] = (Admission.OPEN, None)

    def apply(self, write: Write) -> None:
        """Do one write. Raises RuleBroken."""
        match write:
            case PutMark(inc, mark):
                before = self.marks.get(inc, Mark())
                _must(mark.hw == before.hw + 1, "the mark moves by one")
                self.marks[inc] = mark
            case PutCommand(row):
                _must(row.digest not in self.commands, "a command is received once")
                self.commands[row.digest] = row
            case PutReceipt(digest, item):
                _must(self.commands[digest].receipt_seq is None, "a command has one receipt")
                self.commands[digest] = replace(self.commands[digest], receipt_seq=item.out_seq)
                self._put(item, ItemKind.RECEIPT)
            case PutAttempt(row):
                before_row = self.attempts.get(row.attempt)
                _must(before_row is None or before_row.state is not AttemptState.SETTLED, "a settled attempt stays")
                self.attempts[row.attempt] = row
                if row.state is AttemptState.PREPARED:
                    self.prepared.add(row.attempt)
            case PutSettlement(attempt, item):
                row = self.attempts[attempt]
                _must(row.state is not AttemptState.SETTLED, "an attempt is settled once")
                _must(self.commands[row.digest].receipt_seq is not None, "what is settled was accepted")
                self.attempts[attempt] = replace(row, state=AttemptState.SETTLED, settled_seq=item.out_seq)
                self._put(item, ItemKind.SETTLEMENT)
            case PutEvent(item):
                self._put(item, ItemKind.EVENT)
            case PutTombstone(target, cmd_id, expires_ms):
                self.tombstones[target] = (cmd_id, expires_ms)
            case PutWorktree(tree):
                self.worktrees[tree.worktree_id] = tree
            case DropWorktree(worktree_id):
                self.worktrees.pop(worktree_id, None)
            case PutAnswered(out_seqs):
                self.answered.update(out_seqs)
            case PutAdmission(admission, deadline_ms):
                self.admission = (admission, deadline_ms)
            case AppendLeaf():
                self.leaves.append(write)
            case _:
                assert_never(write)

    def _put(self, item: ReportItem, kind: ItemKind) -> None:
        _must(item.kind is kind and item.out_seq not in self.items, "a number is used once")
        self.items[item.out_seq] = item

    def image(self) -> Image:
        """What a daemon that starts is given."""
        living = {row.digest for row in self.attempts.values() if row.state is not AttemptState.SETTLED}
        return Image(
            marks=dict(self.marks),
            commands=[
                row if row.receipt_seq is None or row.digest in living else replace(row, envelope=b"")
                for row in self.commands.values()
            ],
            attempts=list(self.attempts.values()),
            tombstones=dict(self.tombstones),
            worktrees=list(self.worktrees.values()),
            out_head=max(self.items, default=0),
            admission=self.admission[0],
            drain_deadline_ms=self.admission[1],
        )


class Turn(list[Effect]):
    """Effects in order, by kind."""

    def of(self, kind: type[E]) -> list[E]:
        """All of one kind."""
        return [effect for effect in self if isinstance(effect, kind)]

    def one(self, kind: type[E]) -> E:
        """The only one of its kind."""
        found = self.of(kind)
        assert len(found) == 1, f"{len(found)} of {kind.__name__}: {list(self)}"
        return found[0]

    def has(self, kind: type[Effect]) -> bool:
        """Whether there is one of the kind."""
        return bool(self.of(kind))

    @property
    def items(self) -> list[ReportItem]:
        """What was offered to the plane."""
        return [item for offer in self.of(Offer) for item in offer.items]

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts that were offered, each verified."""
        return [opened_receipt(item) for item in self.items if item.kind is ItemKind.RECEIPT]

    @property
    def receipt(self) -> Receipt:
        """The only receipt."""
        assert len(self.receipts) == 1, self.receipts
        return self.receipts[0]

    @property
    def settlements(self) -> list[Settlement]:
        """The settlements that were offered, each verified."""
        return [opened_settlement(item) for item in self.items if item.kind is ItemKind.SETTLEMENT]

    @property
    def settlement(self) -> Settlement:
        """The only settlement."""
        assert len(self.settlements) == 1, self.settlements
        return self.settlements[0]

    @property
    def refused(self) -> Refused:
        """The only unsigned refusal."""
        said = self.one(Say).message
        assert isinstance(said, Refused)
        return said

    @property
    def reasons(self) -> list[Reason | None]:
        """Why the receipts say no."""
        return [receipt.reason for receipt in self.receipts]


def opened_receipt(item: ReportItem) -> Receipt:
    """A receipt as a plane reads it."""
    key = a_key("runner")
    return open_receipt(item.body.encode(), {key.key_id: key.public}).value


def opened_settlement(item: ReportItem) -> Settlement:
    """A settlement as a plane reads it."""
    key = a_key("runner")
    return open_settlement(item.body.encode(), {key.key_id: key.public}).value


@dataclass
class World:
    """One runner's engine, the plane that commands it, and everything that happened."""

    policy: Policy = field(default_factory=a_policy)
    keyset: Verified[Keyset] = field(default_factory=a_verified_keyset)
    journal: JournalModel = field(default_factory=JournalModel)
    now: Now = field(default_factory=lambda: Now(NOW_MS, BOOT_MS))
    inc: int = 1
    boot_id: str = BOOT_ID
    mark: Mark = field(default_factory=Mark)
    """How far the plane has signed."""
    released: list[Attempt] = field(default_factory=list)
    engine: Engine = field(init=False)
    _ids: int = 0

    def __post_init__(self) -> None:
        self.engine = self._new_engine()

    # --- the plane ----------------------------------------------------------------------------------------------

    def fields(self, kind: str, args: dict[str, Any], /, **over: Any) -> dict[str, Any]:
        """A command as JSON values: the next of its stream, with an id of its own."""
        stream = over.get("stream", STREAM_OF.get(kind, Stream.CTL))
        self._ids += 1
        iat = over.get("iat", self.now.wall_ms)
        ordered = stream == Stream.CTL
        fields = {
            "v": 1,
            "cmd_id": f"cmd_{self._ids}",
            "kind": str(kind),
            "aud": {"org": ORG, "runner": RUNNER, "inc": self.inc},
            "iss": "https://plane.test",
            "stream": str(stream),
            "seq": self.mark.hw + 1 if ordered else None,
            "prev": self.mark.head if ordered else None,
            "iat": iat,
            "nbf": iat,
            "exp": iat + 60_000,
            "keyset_min": 1,
            "args": args,
        }
        return fields | over

    def seal(self, fields: dict[str, Any], key: PrivateKey | None = None) -> bytes:
        """Sign it, and go on from it on the ordered stream."""
        payload = strict_json.dumps(fields)
        if fields["stream"] == "ctl" and fields["seq"] == self.mark.hw + 1:
            self.mark = Mark(fields["seq"], digest_of(payload))
        return seal(payload, PayloadType.COMMAND, [key or a_key("command")])

    def start(
        self, execution_id: str = "ex_1", token: int = 1, *, args: dict[str, Any] | None = None, **over: Any
    ) -> bytes:
        """A sealed start."""
        fields = {
            "execution_id": execution_id,
            "start_token": token,
            "argv": ["make", "test"],
            "cwd": {"type": "path", "path": "/srv/work"},
        }
        return self.seal(self.fields(Kind.EXECUTION_START, fields | (args or {}), **over))

    def start_in(self, worktree_id: str, execution_id: str = "ex_1", token: int = 1, **over: Any) -> bytes:
        """A sealed start inside a managed worktree."""
        return self.start(execution_id, token, args={"cwd": {"type": "worktree", "worktree_id": worktree_id}}, **over)

    def stop(self, execution_id: str = "ex_1", token: int = 1, **over: Any) -> bytes:
        """A sealed stop of an attempt."""
        target = {"type": "attempt", "execution_id": execution_id, "start_token": token}
        return self._stop(target, **over)

    def stop_command(self, cmd_id: str, **over: Any) -> bytes:
        """A sealed stop of whatever a command starts."""
        return self._stop({"type": "command", "cmd_id": cmd_id}, **over)

    def _stop(self, target: dict[str, Any], **over: Any) -> bytes:
        key = over.pop("key", None)
        args = {"target": target, "grace_ms": over.pop("grace_ms", None)}
        return self.seal(self.fields(Kind.EXECUTION_STOP, args, **over), key)

    def create(self, worktree_id: str = "wt_1", repo: str = "/srv/repos/a", **over: Any) -> bytes:
        """A sealed worktree.create."""
        args = {"worktree_id": worktree_id, "repo": repo, "base": "main", "branch": "topic"}
        return self.seal(self.fields(Kind.WORKTREE_CREATE, args, **over))

    def remove(self, worktree_id: str = "wt_1", **over: Any) -> bytes:
        """A sealed worktree.remove."""
        return self.seal(self.fields(Kind.WORKTREE_REMOVE, {"worktree_id": worktree_id}, **over))

    def release_lease(self, res: str = "exec:ex_1", token: int = 1, **over: Any) -> bytes:
        """A sealed lease.release."""
        return self.seal(self.fields(Kind.LEASE_RELEASE, {"res": res, "token": token}, **over))

    def acquire(self, execution_id: str = "ex_1", token: int = 2, start_token: int = 1, **over: Any) -> bytes:
        """A sealed lease.acquire: the same attempt, under another token of its resource."""
        lease = {"res": f"exec:{execution_id}", "token": token, "ttl_ms": 60_000, "on_loss": "stop"}
        lease |= over.pop("lease", {})
        args = {"execution_id": execution_id, "start_token": start_token}
        return self.seal(self.fields(Kind.LEASE_ACQUIRE, args, lease=lease, **over))

    # --- the runner ---------------------------------------------------------------------------------------------

    def _new_engine(self) -> Engine:
        identity = EngineIdentity(
            key=a_key("runner"),
            certificate=a_certificate(inc=self.inc),
            keyset=self.keyset,
            boot_id=self.boot_id,
        )
        return Engine(identity, self.policy, {"PATH": "/bin"}, self.journal.image())

    def pass_time(self, ms: int) -> None:
        """Both clocks go on."""
        self.now = Now(self.now.wall_ms + ms, self.now.boot_ms + ms)

    def step(self, *inputs: Input) -> Turn:
        """Step the engine and journal what it says."""
        return self.take([effect for happened in inputs for effect in self.engine.step(happened, self.now)])

    def send(self, *envelopes: bytes) -> Turn:
        """The runner receives these."""
        return self.step(*(EnvelopeReceived(env) for env in envelopes))

    def take(self, effects: Sequence[Effect]) -> Turn:
        """Journal in the order of the effects, and hold each effect against what is journaled before it."""
        for effect in effects:
            match effect:
                case Persist(writes):
                    for write in writes:
                        self.journal.apply(write)
                case Offer(items):
                    _must(all(self.journal.items.get(item.out_seq) == item for item in items), "offered before durable")
                case ReportAgain(numbers):
                    _must(all(number in self.journal.items for number in numbers), "what is said again was said")
                case PrepareAttempt(plan):
                    _must(plan.attempt in self.journal.attempts, "INTENT before effect")
                case ReleaseAttempt(attempt):
                    _must(attempt in self.journal.prepared, "PREPARED before release")
                    _must(attempt not in self.released, "no attempt starts twice")
                    self.released.append(attempt)
                case CreateWorktree(tree):
                    _must(tree.worktree_id in self.journal.worktrees, "the row before the directory")
        return Turn(effects)

    def crash(self, *found: Observed, boot_ms: int = 0) -> Turn:
        """Another daemon starts on the same journal and finds these directories; `boot_ms` later."""
        self.pass_time(boot_ms)
        self.engine = self._new_engine()
        return self.take(self.engine.recover(found, self.now))

    def reboot(self, *found: Observed, boot_ms: int = 1_000) -> Turn:
        """The machine starts anew, and its clock with it; then a daemon that finds these directories."""
        self.boot_id = f"{self.boot_id}+"
        self.now = Now(self.now.wall_ms + 60_000, boot_ms)
        return self.crash(*found)

    def session(
        self,
        *,
        reborn: bool = False,
        now_ms: int | None = None,
        beat_ms: int = 10_000,
        keyset: Verified[Keyset] | None = None,
    ) -> Turn:
        """A handshake succeeds."""
        return self.step(SessionUp(self.established(reborn=reborn, now_ms=now_ms, beat_ms=beat_ms, keyset=keyset)))

    def established(
        self,
        *,
        reborn: bool = False,
        now_ms: int | None = None,
        beat_ms: int = 10_000,
        keyset: Verified[Keyset] | None = None,
    ) -> Established:
        """What a handshake brings; `reborn`: a new incarnation; `keyset`: a newer one."""
        certificate = None
        if reborn:
            self.inc += 1
            self.mark = Mark()
            sealed = a_sealed_certificate(inc=self.inc)
            certificate = open_certificate(sealed, self.engine.keyset.value)
        return Established(
            session="s_1",
            now_ms=self.now.wall_ms if now_ms is None else now_ms,
            beat_ms=beat_ms,
            out_hw=0,
            ctl=self.mark,
            keyset=keyset or self.engine.keyset,
            certificate=certificate,
        )

    # --- shortcuts ----------------------------------------------------------------------------------------------

    def running(self, execution_id: str = "ex_1", token: int = 1, env: bytes | None = None, **over: Any) -> Turn:
        """A start that was received, prepared and let go."""
        self.send(env or self.start(execution_id, token, **over))
        return self.step(AttemptPrepared(an_attempt(execution_id, token), SHIM))

    def exit(self, execution_id: str = "ex_1", token: int = 1, **over: Any) -> Turn:
        """Its shim tells the end."""
        return self.step(AttemptExited(an_attempt(execution_id, token), an_exit(**over)))

    def made(self, worktree_id: str = "wt_1", repo: str = "/srv/repos/a") -> Turn:
        """A worktree that was asked for and is there."""
        plan = self.send(self.create(worktree_id, repo)).one(CreateWorktree)
        return self.step(WorktreeCreated(plan.digest, a_made(worktree_id)))

    def row(self, execution_id: str = "ex_1", token: int = 1) -> AttemptRow:
        """The attempt as the engine has it."""
        return self.engine.attempts.rows[an_attempt(execution_id, token)]


def a_made(worktree_id: str = "wt_1") -> WorktreeMade:
    """A verified worktree."""
    return WorktreeMade(path=f"/state/{worktree_id}/repo", head=HEAD, branch="topic")


def _must(held: bool, rule: str) -> None:
    if not held:
        raise RuleBroken(rule)
