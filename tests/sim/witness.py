"""Who watches: the world's own record of what was signed, decided, done and told, and the invariants held against it at every step.

Nothing here asks the engine or the dispatcher what they think. Commands are known from the wire, decisions from what became durable,
effects from what the modelled machine did, leases from what the plane said they are.
"""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import REGRANT_DELAY_MS
from protocol.messages import ReportItem
from runner.core.effects import (
    CreateWorktree,
    Effect,
    Offer,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    StopAttempt,
)
from runner.core.inputs import EnvelopeReceived, Input, Tick
from runner.core.journaling import (
    PutAttempt,
    PutCommand,
    PutMark,
    PutReceipt,
    PutSettlement,
    PutTombstone,
    Write,
)
from runner.core.plans import AttemptPlan, Observed, Phase
from tests.sim.host import Directory, Host
from tests.sim.link import DOWN, Line
from tests.sim.story import Story, short
from tests.sim.timeline import MS_US, SECOND_US, Timeline

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon
    from tests.sim.plane import Plane
    from tests.sim.shims import Shim

WAKE_LOOK_US = 2_500 * MS_US
"""A shim looks at the clock at least every two seconds after a wake."""
GO_US = 50 * MS_US
"""TERM, CONT and KILL in one go."""
_RUNNING_VERDICTS = frozenset({"exited", "signalled", "stopped", "timed_out"})


@dataclass(slots=True)
class Odds:
    """What may go wrong inside of the hands."""

    fork_fails: float = 0.0
    born_hung: float = 0.0


@dataclass(slots=True)
class Signed:
    """A command as it was seen on the wire first."""

    digest: str
    header: dict[str, Any]
    seen_us: int

    @property
    def kind(self) -> str:
        """Its kind."""
        return str(self.header["kind"])

    @property
    def cmd_id(self) -> str:
        """Its id."""
        return str(self.header["cmd_id"])

    @property
    def attempt(self) -> Attempt | None:
        """The attempt it names."""
        args = self.header["args"]
        args = args.get("target", args)
        if "start_token" not in args:
            return None
        return Attempt(ExecutionId(args["execution_id"]), FencingToken(args["start_token"]))


@dataclass(slots=True)
class Told:
    """What is durable of one host, as it was written."""

    commands: dict[str, PutCommand] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Receipts by the digest of their command."""
    attempts: dict[Attempt, str] = field(default_factory=dict)
    """States."""
    stop_by: dict[Attempt, str] = field(default_factory=dict)
    settlements: dict[Attempt, dict[str, Any]] = field(default_factory=dict)
    items: dict[int, ReportItem] = field(default_factory=dict)
    marks: dict[int, int] = field(default_factory=dict)
    unborn: set[Attempt] = field(default_factory=set)
    """Stopped before they were begun: they never may be."""
    leaves: int = 0


@dataclass(slots=True)
class Grant:
    """What the plane said of a lease."""

    attempt: Attempt
    runner: str
    on_loss: str
    signed_us: int
    until_us: int
    """The plane's own deadline."""


@dataclass
class Witness:
    """The record, and the rules."""

    timeline: Timeline
    story: Story
    plane: "Plane" = field(init=False)
    odds: Odds = field(default_factory=Odds)
    signed: dict[str, Signed] = field(default_factory=dict)
    by_id: dict[str, list[Signed]] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    grants: dict[tuple[str, int], Grant] = field(default_factory=dict)
    """By resource and token."""
    leased: dict[Attempt, list[Grant]] = field(default_factory=dict)
    ran: set[tuple[str, Attempt]] = field(default_factory=set)
    """Attempts that ever ran: where, and which."""
    spawned_cmds: dict[str, Attempt] = field(default_factory=dict)
    ends: dict[tuple[str, Attempt], tuple[int | None, int | None]] = field(default_factory=dict)
    owner_words: set[str] = field(default_factory=set)
    trees: dict[str, str] = field(default_factory=dict)
    """Worktrees that were made: by which command."""
    wakes: dict[str, int] = field(default_factory=dict)
    """When a host woke up last (µs)."""
    unguarded: set[Attempt] = field(default_factory=set)
    """Their shim was killed, hung, or held up: nobody could keep their lease."""
    steps: int = 0
    reached: Counter[str] = field(default_factory=Counter)
    """What happened at all: events of the log, receipts and settlements by what they say."""
    hosts: list[Host] = field(default_factory=list)
    _looking: set[Attempt] = field(default_factory=set)
    _frames: dict[str, Signed] = field(default_factory=dict)

    # --- the wire -----------------------------------------------------------------------------------------------

    def tap(self, _line: Line, way: str, frame: str) -> str:
        """See every frame."""
        if way == DOWN:
            if frame.startswith('{"t":"command"'):
                self._command(frame)
            elif frame.startswith('{"t":"beaten"'):
                self._beaten(frame)
        return frame

    def _command(self, frame: str) -> None:
        if frame in self._frames:
            return
        envelope = json.loads(json.loads(frame)["env"])
        payload = base64.b64decode(envelope["payload"])
        header = json.loads(payload)
        digest = digest_of(payload)
        known = self.signed.get(digest)
        if known is None:
            known = self.signed[digest] = Signed(digest, header, self.timeline.now_us)
            for other in self.by_id.get(known.cmd_id, ()):
                same = (other.kind, other.header["args"], other.header.get("lease"))
                self.story.must(
                    same == (known.kind, header["args"], header.get("lease")),
                    "%s was signed in two meanings",
                    known.cmd_id,
                )
            self.by_id.setdefault(known.cmd_id, []).append(known)
            self._granted(known)
        self._frames[frame] = known

    def _granted(self, command: Signed) -> None:
        lease, attempt = command.header.get("lease"), command.attempt
        if lease is None or attempt is None or not lease["res"].startswith("exec:"):
            return
        signed_us = (command.header["iat"] - self.plane.wall_offset_ms) * MS_US
        if not self.timeline.now_us - 600 * SECOND_US <= signed_us <= self.timeline.now_us:
            signed_us = self.timeline.now_us
        key = (lease["res"], lease["token"])
        known = self.grants.get(key)
        if known is not None:
            self.story.must(known.attempt == attempt, "token %s was granted to two attempts", key)
            return
        self._regranted_in_time(command, key, signed_us)
        until_us = signed_us + lease["ttl_ms"] * MS_US
        grant = Grant(attempt, command.header["aud"]["runner"], lease["on_loss"], signed_us, until_us)
        self.grants[key] = grant
        self.leased.setdefault(attempt, []).append(grant)

    def _regranted_in_time(self, command: Signed, key: tuple[str, int], signed_us: int) -> None:
        for (res, token), before in self.grants.items():
            if res != key[0]:
                continue
            if before.signed_us > signed_us:
                # It was signed first, and is seen first only now: what came after it has waited for it, or for its end.
                self.story.must(token > key[1], "token %d of %s was granted after token %d", token, res, key[1])
                continue
            self.story.must(token < key[1], "token %d of %s was granted after token %d", key[1], res, token)
            same_runner = before.runner == command.header["aud"]["runner"]
            if self._final(before.attempt) or (same_runner and command.kind == "execution.start"):
                # A runner lets a later attempt wait for the end of the earlier one, whatever their leases.
                continue
            free_us = before.until_us + REGRANT_DELAY_MS * MS_US
            self.story.must(
                signed_us + MS_US >= free_us,
                "%s was granted anew (%s, token %d) %.1f s too early",
                res,
                command.cmd_id,
                key[1],
                (free_us - signed_us) / SECOND_US,
            )

    def _final(self, attempt: Attempt) -> bool:
        """Whether the plane knows that an attempt is over."""
        for table in ("executions", "attempts"):
            sql = f"SELECT state FROM {table} WHERE id = ? AND start_token = ?"
            for row in self.plane.rows(sql, attempt.execution_id, attempt.start_token):
                return row["state"] in ("settled", "refused", "cancelled")
        return True

    def _beaten(self, frame: str) -> None:
        for renewal in json.loads(frame).get("leases", ()):
            ttl_ms = renewal.get("ttl_ms")
            grant = self.grants.get((renewal["res"], renewal["token"]))
            if ttl_ms is not None and grant is not None:
                grant.until_us = max(grant.until_us, self.timeline.now_us + ttl_ms * MS_US)

    # --- what becomes durable -----------------------------------------------------------------------------------

    def committed(self, host: Host, _daemon: "Daemon", writes: Sequence[Write]) -> None:
        """One commit of a journal."""
        told = self.told[host.name]
        for write in writes:
            self._written(host, told, write)

    def _written(self, host: Host, told: Told, write: Write) -> None:
        must = self.story.must
        match write:
            case PutMark(inc, mark):
                must(
                    mark.hw == told.marks.get(inc, 0) + 1,
                    "I5: the mark goes from %d to %d",
                    told.marks.get(inc, 0),
                    mark.hw,
                )
                told.marks[inc] = mark.hw
            case PutCommand(row):
                must(row.digest in self.signed, "I1: %s was taken and never signed", row.cmd_id)
                told.commands[row.digest] = write
            case PutReceipt(digest, item):
                must(digest not in told.outcomes, "I3: a second receipt of %s", digest)
                said = statement(item)
                told.outcomes[digest] = said
                self.reached[f"receipt {said.get('reason') or said['result'].get('state') or said['outcome']}"] += 1
                told.items[item.out_seq] = item
                state = said["result"].get("state")
                if said["kind"] == "execution.stop" and state in ("tombstone", "cancelled"):
                    self._stopped_early(told, digest)
            case PutAttempt(row):
                must(told.attempts.get(row.attempt) != "settled", "I3: %s goes on after its end", short(row.attempt))
                told.attempts[row.attempt] = row.state
                if row.stop_by is not None:
                    told.stop_by[row.attempt] = row.stop_by
            case PutSettlement(attempt, item):
                self._settled(host, told, attempt, item)
            case PutTombstone() | _:
                told_item = getattr(write, "item", None)
                if isinstance(told_item, ReportItem):
                    told.items[told_item.out_seq] = told_item

    def _stopped_early(self, told: Told, digest: str) -> None:
        target = self.signed[digest].attempt
        if target is None:
            named = self.signed[digest].header["args"]["target"]["cmd_id"]
            starts = self.by_id.get(named, ())
            target = next((start.attempt for start in starts), None)
        if target is not None:
            told.unborn.add(target)

    def _settled(self, host: Host, told: Told, attempt: Attempt, item: ReportItem) -> None:
        must, said = self.story.must, statement(item)
        must(attempt not in told.settlements, "I3: a second settlement of %s", short(attempt))
        told.settlements[attempt] = said
        told.attempts[attempt] = "settled"
        told.items[item.out_seq] = item
        name, verdict = short(attempt), said["verdict"]
        ran = (host.name, attempt) in self.ran
        self.story.say(host.name, "%s: settled %s", name, verdict)
        self.reached[f"settled {verdict} {said['cause']['kind']}"] += 1
        if verdict in _RUNNING_VERDICTS:
            must(ran, "%s is settled as %s and never ran", name, verdict)
        if verdict == "never_started":
            must(not ran, "%s is settled as never_started and ran", name)
        if verdict in ("exited", "signalled"):
            truth = self.ends.get((host.name, attempt))
            must(
                truth == (said.get("code"), said.get("signal")),
                "%s is settled as %s, its child says %s",
                name,
                said,
                truth,
            )
        left = host.living(attempt) if verdict in _RUNNING_VERDICTS else host.seen(attempt)
        named = said.get("survivors", 0)
        must(
            len(left) <= named, "%s is settled as %s while %d processes live (%d told)", name, verdict, len(left), named
        )

    # --- what is done -------------------------------------------------------------------------------------------

    def stepped(self, host: Host, happened: Input, effects: Sequence[Effect]) -> None:
        """One input of the engine."""
        self.steps += 1
        if not (isinstance(happened, Tick) and not effects):
            self.story.say(host.name, "%s -> %s", _Brief(happened), _BriefAll(effects))
        if isinstance(happened, EnvelopeReceived):
            writes = [write for effect in effects if isinstance(effect, Persist) for write in effect.writes]
            for write in writes:
                if isinstance(write, PutCommand) and write.row.seq is None:
                    answered = any(isinstance(w, PutReceipt) and w.digest == write.row.digest for w in writes)
                    self.story.must(answered, "I7: %s waits", write.row.cmd_id)

    def recovered(self, host: Host, found: Sequence[Observed], effects: Sequence[Effect]) -> None:
        """A daemon has looked at what there is."""
        brief = " ".join(
            f"{short(o.attempt)}:{o.phase}{'+lock' if o.lock_held else ''}{'+exit' if o.exit else ''}" for o in found
        )
        self.story.say(host.name, "recovers [%s] -> %s", brief, _BriefAll(effects))

    def effect(self, host: Host, _daemon: "Daemon", effect: Effect) -> None:
        """An effect is about to be performed: what it rests on is durable."""
        told, must = self.told[host.name], self.story.must
        match effect:
            case PrepareAttempt(plan, digest):
                self._has_command(told, digest, "execution.start", short(plan.attempt))
                must(
                    told.attempts.get(plan.attempt) in ("intent", "prepared"),
                    "%s is prepared before INTENT",
                    short(plan.attempt),
                )
            case ReleaseAttempt(attempt):
                must(
                    told.attempts.get(attempt) in ("prepared", "running", "stopping"),
                    "%s is released before PREPARED",
                    short(attempt),
                )
            case StopAttempt(attempt, _, by):
                must(told.stop_by.get(attempt) is not None, "%s is stopped before it is written", short(attempt))
                must(self._justified(told, by), "I1: %s is stopped by %s, who never said so", short(attempt), by)
            case CreateWorktree(plan, digest):
                self._has_command(told, digest, "worktree.create", plan.worktree_id)
            case RemoveWorktree(plan, digest):
                self._has_command(told, digest, "worktree.remove", plan.worktree_id)
            case Offer(items):
                must(all(item.out_seq in told.items for item in items), "something is offered before it is durable")
            case ReportAgain(numbers):
                must(all(number in told.items for number in numbers), "something is said again that was not said")
            case _:
                pass

    def _has_command(self, told: Told, digest: str, kind: str, name: str) -> None:
        must = self.story.must
        must(digest in told.commands, "%s: an effect of a command that is not durable", name)
        command = self.signed[digest]
        must(command.kind == kind, "I1: %s: an effect of a %s", name, command.kind)
        outcome = told.outcomes.get(digest, {}).get("outcome")
        must(outcome in (None, "accepted"), "I3: %s: an effect after the receipt %s", name, outcome)

    def _justified(self, told: Told, by: str) -> bool:
        by = by.removeprefix("superseded by ")
        if by in self.owner_words or by.endswith(" drain"):
            return True
        return any(put.row.cmd_id == by for put in told.commands.values())

    def spawned(self, host: Host, attempt: Attempt, plan: AttemptPlan) -> None:
        """A child is started."""
        told, must, name = self.told[host.name], self.story.must, short(attempt)
        must((host.name, attempt) not in self.ran, "I2: %s runs a second time", name)
        elsewhere = any(other == attempt for _, other in self.ran)
        # A plane that forgot a rerun gives its token again, to another start: the two are told apart by their runners.
        must(not elsewhere or self.plane.restored > 0, "I2: %s runs on two runners", name)
        before = self.spawned_cmds.get(plan.cmd_id)
        must(before is None, "I2: %s runs twice", plan.cmd_id)
        self.ran.add((host.name, attempt))
        self.spawned_cmds[plan.cmd_id] = attempt
        self.story.say(host.name, "%s: RUNS", name)
        start = next((c for c in self.by_id.get(plan.cmd_id, ()) if c.kind == "execution.start"), None)
        must(start is not None, "I1: %s runs without a signed start", name)
        assert start is not None
        must(start.attempt == attempt, "I1: %s runs by the start of %s", name, start.attempt)
        must(start.header["args"]["argv"] == list(plan.argv), "I1: %s runs %s", name, plan.argv)
        must(start.header["aud"]["runner"] == host.name, "I1: %s runs on %s", name, host.name)
        must(
            told.attempts.get(attempt) in ("prepared", "running", "stopping"),
            "%s runs as %s",
            name,
            told.attempts.get(attempt),
        )
        must(attempt not in told.unborn, "%s runs after it was stopped", name)
        accepted = any(o["outcome"] == "accepted" and o["cmd_id"] == plan.cmd_id for o in told.outcomes.values())
        must(accepted, "%s runs before its receipt", name)

    def child_ended(self, host: Host, attempt: Attempt, status: tuple[int | None, int | None]) -> None:
        """The truth about a child."""
        self.ends[host.name, attempt] = status
        self.story.say(host.name, "%s: its child ends %s", short(attempt), status)

    def changed(self, host: Host, attempt: Attempt) -> None:
        """Something of an attempt runs, or does not any more: whether it has the right to is seen a moment later.

        What is frozen and told to stop is thawed, sent a TERM and a KILL in one go.
        """
        if attempt not in self._looking:
            self._looking.add(attempt)
            self.timeline.after(None, GO_US, self._check, host, attempt)

    def _check(self, host: Host, attempt: Attempt) -> None:
        self._looking.discard(attempt)
        running = [proc for proc in host.living(attempt) if not proc.frozen]
        if not running or not host.awake or attempt in self.unguarded or self._just_woke(host):
            return
        self._in_time(attempt)
        for other_host, other in self._others(attempt):
            lease = self.leased.get(other)
            free = lease and lease[-1].on_loss == "continue"
            if not (free or other in self.unguarded or self._just_woke(other_host)):
                self.story.fail("I4: %s and %s run at the same time", short(attempt), short(other))

    def _in_time(self, attempt: Attempt) -> None:
        grants = self.leased.get(attempt)
        if not grants or grants[-1].on_loss == "continue":
            return
        late_us = self.timeline.now_us - max(grant.until_us for grant in grants)
        self.story.must(late_us <= GO_US, "I4: %s runs %.1f s after its lease", short(attempt), late_us / SECOND_US)

    def _others(self, attempt: Attempt) -> list[tuple[Host, Attempt]]:
        found = {}
        for host in self.hosts:
            for proc in host.procs.values():
                other = proc.attempt
                if host.awake and other.execution_id == attempt.execution_id and other != attempt and not proc.frozen:
                    found[other] = host
        return [(host, other) for other, host in found.items()]

    def _just_woke(self, host: Host) -> bool:
        return self.timeline.now_us - self.wakes.get(host.name, -SECOND_US * 3600) <= WAKE_LOOK_US

    def woke(self, host: Host) -> None:
        """A machine woke up."""
        self.wakes[host.name] = self.timeline.now_us

    def look(self) -> None:
        """Everything that can be seen without being told, now and then."""
        for host in self.hosts:
            for attempt in {proc.attempt: None for proc in host.procs.values()}:
                self.changed(host, attempt)
            leaves, top = host.journal.db.execute("SELECT count(*), coalesce(max(n), 0) FROM leaf").fetchone()
            told = self.told[host.name]
            self.story.must(
                leaves == top and leaves >= told.leaves, "I9: %d leaves up to %d, %d before", leaves, top, told.leaves
            )
            told.leaves = leaves

    # --- what is removed or ended -------------------------------------------------------------------------------

    def cleared(self, host: Host, attempt: Attempt, directory: Directory) -> None:
        """A directory is removed."""
        self.story.must(
            (host.name, attempt) not in self.ran, "I8: the directory of %s is removed, and it ran", short(attempt)
        )
        released = directory.phase in (Phase.RELEASED, Phase.RUNNING)
        self.story.must(not released, "I8: the directory of %s is removed, and it was released", short(attempt))

    def swept(self, host: Host, attempt: Attempt) -> None:
        """What carries the cookie of an attempt is about to be ended."""
        directory = host.directories.get(attempt)
        guarded = directory is not None and directory.shim is not None
        settled = self.told[host.name].attempts.get(attempt) == "settled"
        self.story.must(not guarded or settled, "%s is swept under its shim's hands", short(attempt))
        self.unguarded.add(attempt)

    def hung_ended(self, host: Host, shim: "Shim") -> None:
        """A shim is killed for doing nothing."""
        well = not shim.was_hung and shim.record is None
        self.story.must(not well, "the shim of %s is killed as hung, and it is well", short(shim.attempt))
        self.unguarded.add(shim.attempt)

    def tree_made(self, host: Host, worktree_id: str, cmd_id: str) -> None:
        """A worktree is made."""
        key = f"{host.name} {cmd_id}"
        self.story.must(key not in self.trees, "I2: %s makes %s a second time", cmd_id, worktree_id)
        self.trees[key] = worktree_id

    def tree_removed(self, host: Host, worktree_id: str, cmd_id: str) -> None:
        """A worktree is removed."""
        busy = [
            a for a, state in self.told[host.name].attempts.items() if state != "settled" and (host.name, a) in self.ran
        ]
        for attempt in busy:
            directory = host.directories.get(attempt)
            if directory is not None and directory.plan.worktree_id == worktree_id and host.living(attempt):
                self.story.fail("%s is removed under %s", worktree_id, short(attempt))


class _Brief:
    """An input in a few words, when somebody reads them."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return brief(self._value)


class _BriefAll:
    def __init__(self, values: Sequence[object]) -> None:
        self._values = tuple(values)

    def __str__(self) -> str:
        return " ".join(filter(None, map(brief, self._values))) or "-"


def brief(value: object) -> str:
    """An input or an effect in a few words."""
    name = type(value).__name__
    match value:
        case EnvelopeReceived(env):
            header = json.loads(base64.b64decode(json.loads(env)["payload"]))
            seq = "" if header["seq"] is None else f"#{header['seq']}"
            return f"{header['kind']}{seq} {header['cmd_id'][-4:]}"
        case Persist(writes):
            return "{" + " ".join(map(_write, writes)) + "}"
    if name in ("Note", "Offer"):
        return ""
    attempt = getattr(value, "attempt", None) or getattr(getattr(value, "plan", None), "attempt", None)
    if isinstance(attempt, Attempt):
        more = getattr(value, "deadline_ms", None)
        return f"{name}({short(attempt)}{'' if more is None else f' until {more}'})"
    if name == "SendBeat":
        return "beat"
    if name == "BeatAnswered":
        return f"beaten{[(r.res[-4:], r.token, r.ttl_ms) for r in value.leases]}{[h.want for h in value.hints]}"  # type: ignore[attr-defined]
    return name


def _write(write: Write) -> str:
    match write:
        case PutReceipt(_, item):
            said = statement(item)
            return f"receipt:{said['outcome']}{'' if not said.get('reason') else ' ' + said['reason']}"
        case PutAttempt(row):
            return f"{short(row.attempt)}:{row.state}"
        case PutSettlement(attempt, item):
            return f"settle {short(attempt)}:{statement(item)['verdict']}"
        case _:
            return type(write).__name__.removeprefix("Put").lower()


def statement(item: ReportItem) -> dict[str, Any]:
    """What a signed item says."""
    said: dict[str, Any] = json.loads(base64.b64decode(json.loads(item.body)["payload"]))
    return said


def digest_of(payload: bytes) -> str:
    """As the protocol names payloads."""
    import hashlib

    return "sha256:" + hashlib.sha256(payload).hexdigest()
