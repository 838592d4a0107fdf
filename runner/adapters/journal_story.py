"""The story of an execution, a command or a worktree as the journal has it: read beside a daemon, or without one.

Theory of operation. Leaves are what was decided, in order; they are the spine of the story. Receipts and settlements are opened from
the outbox and compared with the digest that their leaf has. What a settlement tells of the time before it (the child began, signals
were sent, it ended) is put where it belongs by its time, never before the decision it followed from.

Rule 1: the file is opened read-only and in one short transaction, so nobody waits for us. Rule 2: arguments are shown, values of
variables and secrets never.
"""

import shlex
import signal
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.commands import Kind
from protocol.envelope import digest_of
from protocol.errors import Reason
from runner.adapters.journal_schema import SCHEMA_VERSION
from runner.adapters.journal_words import ABOUT, TOLD, payload_of, signers_of
from runner.core.ledger import TOMBSTONE_MS
from runner.errors import Broken, Refused

BUSY_S: Final = 5.0
"""The daemon's own commit is over in milliseconds, folding its log back in a second."""
ENTRIES_MAX: Final = 10_000
"""Leaves of one story; more would be a defect, and is cut from the front."""
ARGV_SHOWN: Final = 8
"""Words of a command line, as `runner ps` shows them."""
_STANDS: Final = ("attempt.intent", "attempt.prepared", "attempt.running", "attempt.stopping")
_ENDED_BY_US: Final = ("stopped", "timed_out", "fenced")

Fact = str | int | None


@dataclass(slots=True, kw_only=True)
class Entry:
    """One thing that happened. `evidence` is what it can be found and proven by."""

    at_ms: int
    what: str
    detail: str
    evidence: dict[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Story:
    """Everything there is about one id, in order."""

    attempts: tuple[str, ...]
    entries: tuple[Entry, ...]


def read_story(path: Path, wanted: str) -> Story:
    """The story of an execution, attempt, command or worktree.

    Raises:
        Refused: the journal knows nothing of `wanted`.
        Broken: there is no journal, it is damaged, or of another version.
    """
    with _reading(path) as db:
        subjects = _Subjects(db, wanted)
        if not subjects.names:
            raise Refused(
                Reason.UNKNOWN_TARGET, f"the journal knows no execution, attempt, command or worktree {wanted}"
            )
        entries = _told(db, subjects)
        entries += [*_tombstones(db, subjects), *_worktree(db, wanted, entries)]
        return Story(tuple(subjects.attempts), tuple(entries))


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.exists():
        raise Broken(Reason.INFRA, f"there is no journal at {path}: no daemon has run here yet")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None)) as db:
            db.execute("BEGIN")
            (version,) = db.execute("SELECT coalesce(max(n), 0) FROM migration").fetchone()
            if version > SCHEMA_VERSION:
                raise Broken(Reason.INFRA, f"{path} was written by a newer runner (version {version})")
            yield db
    except sqlite3.Error as exc:
        raise Broken(Reason.INFRA, f"{path} cannot be read: {exc}") from exc


class _Subjects:
    """What a story is about: attempts by name, commands by digest."""

    def __init__(self, db: sqlite3.Connection, wanted: str) -> None:
        attempts = db.execute(
            "SELECT name, digest FROM attempt WHERE name = ? OR (name > ? AND name < ?) ORDER BY rowid",
            # The names of an execution's attempts, by the index on names: `/` is what follows `.`.
            (wanted, f"{wanted}.", f"{wanted}/"),
        ).fetchall()
        execution, _dot, token = wanted.rpartition(".") if attempts and attempts[0][0] == wanted else (wanted, "", "")
        commands = [row[0] for row in db.execute("SELECT digest FROM command WHERE cmd_id = ?", (wanted,))]
        about = db.execute("SELECT detail FROM leaf WHERE subject = ? AND kind = ?", (execution, ABOUT)).fetchall()
        for digest in commands:
            attempts += db.execute("SELECT name, digest FROM attempt WHERE digest = ?", (digest,)).fetchall()
        commands += [row[0] for row in db.execute("SELECT digest FROM worktree WHERE worktree_id = ?", (wanted,))]
        self.attempts: Final = dict.fromkeys(name for name, _ in attempts)
        digests = dict.fromkeys([*(digest for _, digest in attempts), *commands, *(row[0] for row in about)])
        self.commands: Final = {digest: _Command(db, digest) for digest in digests}
        if token:
            others = [digest for digest, command in self.commands.items() if command.token not in (None, int(token))]
            for digest in others:
                del self.commands[digest]

    @property
    def names(self) -> list[str]:
        """Subjects of leaves."""
        return [*self.attempts, *self.commands]


class _Command:
    """A command as far as it is still known: its envelope is kept for a week."""

    def __init__(self, db: sqlite3.Connection, digest: str) -> None:
        found = db.execute(
            "SELECT cmd_id, kind, seq, policy_digest, receipt_seq, envelope FROM command WHERE digest = ?", (digest,)
        ).fetchone()
        self.cmd_id: str
        self.kind: str
        self.seq: int | None
        self.policy: str
        self.receipt_seq: int | None
        self.cmd_id, self.kind, self.seq, self.policy, self.receipt_seq, envelope = found
        self.header = payload_of(envelope)
        self.signers = signers_of(envelope)
        args = self.header.get("args")
        self.args: dict[str, Any] = args if isinstance(args, dict) else {}

    @property
    def token(self) -> int | None:
        """The attempt's token that it names; None where it names none."""
        token = (_part(self.args, "target") or self.args).get("start_token")
        return token if isinstance(token, int) else None

    @property
    def words(self) -> str:
        """What it asks for."""
        number = "" if self.seq is None else f" #{self.seq}"
        return f"{self.cmd_id} {self.kind}{number}{_asked(self.kind, self.args)}{_leased(self.header.get('lease'))}"


def _asked(kind: str, args: dict[str, Any]) -> str:
    if not args:
        return ""
    match kind:
        case Kind.EXECUTION_START | Kind.PTY_OPEN:
            argv, cwd = [str(word) for word in args.get("argv", ())], _part(args, "cwd")
            more = " …" if len(argv) > ARGV_SHOWN else ""
            place = cwd.get("path") or f"{cwd.get('worktree_id')} {cwd.get('subdir') or ''}".rstrip()
            return f": {shlex.join(argv[:ARGV_SHOWN]) or 'the login shell'}{more} in {place}"
        case Kind.EXECUTION_STOP | Kind.PTY_CLOSE:
            target = _part(args, "target")
            attempt = f"{target.get('execution_id')}.{target.get('start_token')}"
            return f": {target.get('cmd_id') or attempt}"
        case _:
            shown = {name: value for name, value in args.items() if isinstance(value, str | int) and name != "key"}
            return f": {' '.join(f'{name} {value}' for name, value in shown.items())}"


def _part(whole: dict[str, Any], name: str) -> dict[str, Any]:
    part = whole.get(name)
    return part if isinstance(part, dict) else {}


def _leased(lease: object) -> str:
    if not isinstance(lease, dict):
        return ""
    return f"; lease {lease.get('res')} token {lease.get('token')} for {lease.get('ttl_ms')} ms"


# --- the spine ----------------------------------------------------------------------------------------------------


def _told(db: sqlite3.Connection, subjects: _Subjects) -> list[Entry]:
    marks = ", ".join("?" * len(subjects.names))
    leaves = db.execute(
        f"SELECT n, at_ms, kind, subject, detail, policy_digest FROM leaf WHERE subject IN ({marks})"  # noqa: S608 - marks
        " AND kind <> ? ORDER BY n DESC LIMIT ?",
        (*subjects.names, ABOUT, ENTRIES_MAX),
    ).fetchall()[::-1]
    story: list[Entry] = []
    beside: list[tuple[list[Entry], Entry | None, Entry | None]] = []
    begun: dict[str, Entry] = {}
    known: dict[str, str] = {}
    for n, at_ms, kind, subject, detail, policy in leaves:
        entry = Entry(at_ms=at_ms, what=kind, detail=detail, evidence={"leaf": n})
        if subject in subjects.attempts:
            entry.evidence["attempt"] = subject
        before, after = _explained(db, entry, subject, subjects.commands.get(subject), policy)
        beside += [(before, begun.get(subject), entry), (after, entry, None)]
        if kind in _STANDS:
            entry.detail, known[subject] = _news(detail, known.get(subject, "")), detail
        if kind == "attempt.prepared":
            begun[subject] = entry
        story.append(entry)
    for entries, low, high in beside:
        _put_between(story, entries, low, high)
    return story


def _explained(
    db: sqlite3.Connection, entry: Entry, subject: str, command: _Command | None, policy: str
) -> tuple[list[Entry], list[Entry]]:
    """Say in `entry` what its leaf is about; returns what happened before it and after it, by the same evidence."""
    match entry.what:
        case "command.received" if command is not None:
            entry.detail = command.words
            entry.evidence |= {"digest": subject, "key": command.signers or None, "policy": policy}
        case "command.receipted" if command is not None:
            return [], _receipt(db, entry, command)
        case "attempt.settled":
            return _settlement(db, entry, subject)
        case _ if entry.what == TOLD:
            entry.detail = f"the control plane is told {entry.detail}"
    return [], []


def _news(words: str, before: str) -> str:
    """What is said of an attempt now and was not said before."""
    if words.startswith("sha256:"):
        return ""  # an earlier version named the command and nothing else
    known = before.split("; ")
    return "; ".join(word for word in words.split("; ") if word not in known)


def _receipt(db: sqlite3.Connection, entry: Entry, command: _Command) -> list[Entry]:
    body, answered = _item(db, command.receipt_seq, entry)
    if body is None:
        entry.detail = f"{command.cmd_id}: its text was pruned"
        return answered
    said = f"{command.cmd_id} {body.get('outcome')}"
    if body.get("reason"):
        said += f": {body['reason']}"
    if body.get("detail"):
        said += f" ({body['detail']})"
    if body.get("result"):
        said += f"; {' '.join(f'{name} {value}' for name, value in body['result'].items())}"
    entry.detail = said
    entry.evidence |= {"policy": body.get("policy_digest"), "keyset": body.get("keyset_version")}
    return answered


def _settlement(db: sqlite3.Connection, entry: Entry, attempt: str) -> tuple[list[Entry], list[Entry]]:
    found = db.execute("SELECT settled_seq FROM attempt WHERE name = ?", (attempt,)).fetchone()
    if found is None or found[0] is None:
        entry.detail = "it never began, as the receipt of its command says"
        return [], []
    body, answered = _item(db, found[0], entry)
    if body is None:
        entry.detail = "its text was pruned"
        return [], answered
    cause = body.get("cause") or {}
    words = [str(body.get("verdict"))]
    words += [f"{name} {body[name]}" for name in ("code", "signal") if body.get(name) is not None]
    if cause.get("kind") not in (None, "none"):
        words.append(
            "cause " + " ".join(str(cause[name]) for name in ("kind", "by", "reason", "detail") if cause.get(name))
        )
    if body.get("token") is not None:
        words.append(f"lease token {body['token']}")
    entry.detail = ", ".join(words)
    entry.evidence |= {"policy": body.get("policy_digest"), "boot": body.get("boot_id")}
    before = list(_of_settlement(body, entry.at_ms))
    for each in before:
        each.evidence |= {"attempt": attempt, "report": found[0]}
    return before, answered


def _of_settlement(body: dict[str, Any], at_ms: int) -> Iterator[Entry]:
    """What a settlement tells of the time before it."""
    ended_ms, log = body.get("ended_ms"), body.get("log") or {}
    at_end_ms = at_ms if ended_ms is None else ended_ms
    if body.get("started_ms") is not None:
        yield Entry(at_ms=body["started_ms"], what="child.started", detail="")
    said = [("signal.sent", _signalled(each)) for each in body.get("swept") or ()]
    if ended_ms is not None:
        cpu_ms = (body.get("usage") or {}).get("utime_us", 0) // 1000
        ended = ("child.ended", f"after {body.get('duration_ms')} ms, with {cpu_ms} ms of processor time")
        # What was signalled ended it, or was left by it.
        said = [*said, ended] if body.get("verdict") in _ENDED_BY_US else [ended, *said]
    said += [("process.left", f"{_process(each)}, could not be ended") for each in body.get("remains") or ()]
    said += [("process.left", f"{_process(each)}, was let live") for each in body.get("outlived") or ()]
    if tiers := body.get("tiers"):
        said.append(("tree.searched", f"by {', '.join(tiers)}"))
    if evidence := body.get("evidence"):
        said.append(("remains.swept", ", ".join(f"{name} {value}" for name, value in evidence.items())))
    for what, words in said:
        yield Entry(at_ms=at_end_ms, what=what, detail=words)
    if log:
        streams = body.get("streams") or {}
        sizes = ", ".join(f"{name} {each.get('bytes')} bytes" for name, each in streams.items())
        detail = f"at offset {log.get('end')} in {log.get('segments')} segments; {sizes}; {body.get('drain')}"
        digests = {f"{name} sha256": each.get("sha256") for name, each in streams.items()}
        yield Entry(at_ms=at_end_ms, what="log.ended", detail=detail, evidence={"chain": log.get("chain"), **digests})


def _signalled(sweep: dict[str, Any]) -> str:
    number = sweep.get("signal")
    known = isinstance(number, int) and number in list(signal.Signals)
    name = signal.Signals(int(number or 0)).name if known else f"signal {number}"
    return f"{name} to {sweep.get('count')} found by {sweep.get('tier')}"


def _process(process: dict[str, Any]) -> str:
    return " ".join(str(process[key]) for key in ("pid", "name", "state", "wchan", "why") if process.get(key))


def _item(db: sqlite3.Connection, out_seq: int | None, entry: Entry) -> tuple[dict[str, Any] | None, list[Entry]]:
    """The statement with this number, and when the control plane answered it; `entry` gets the evidence."""
    found = db.execute("SELECT body, answered_ms FROM outbox WHERE out_seq = ?", (out_seq,)).fetchone()
    if found is None:
        return None, []
    body, answered_ms = found
    entry.evidence |= {"report": out_seq, "digest": entry.detail}
    answer = Entry(at_ms=entry.at_ms, what="report.waiting", detail=f"no answer to report {out_seq} is recorded yet")
    if answered_ms is not None:
        answer = Entry(at_ms=answered_ms, what="report.answered", detail=f"the control plane has report {out_seq}")
    answered = [answer]
    if not body:
        return None, answered
    if digest_of(body.encode()) != entry.detail:
        entry.evidence["digest"] = f"DIFFERS: the leaf says {entry.detail}"
    return payload_of(body), answered


def _put_between(story: list[Entry], entries: Iterable[Entry], low: Entry | None, high: Entry | None) -> None:
    """Put each where its time says, behind `low` and before `high`: clocks may have been set in between."""
    for entry in entries:
        begin = 0 if low is None else _index(story, low) + 1
        end = len(story) if high is None else _index(story, high)
        at = next((at for at in range(begin, end) if story[at].at_ms > entry.at_ms), end)
        story.insert(at, entry)


def _index(story: list[Entry], wanted: Entry) -> int:
    return next(at for at, entry in enumerate(story) if entry is wanted)


# --- what stands now ----------------------------------------------------------------------------------------------


def _tombstones(db: sqlite3.Connection, subjects: _Subjects) -> Iterator[Entry]:
    targets = {*subjects.attempts, *(command.cmd_id for command in subjects.commands.values())}
    for target, cmd_id, expires_ms in db.execute("SELECT target, cmd_id, expires_ms FROM tombstone"):
        if target in targets:
            detail = f"{target} must not begin, says {cmd_id}"
            # By the control plane's clock, as far as it was known.
            yield Entry(at_ms=expires_ms - TOMBSTONE_MS, what="tombstone.left", detail=detail)


def _worktree(db: sqlite3.Connection, wanted: str, told: list[Entry]) -> Iterator[Entry]:
    row = db.execute("SELECT repo, path, head, branch FROM worktree WHERE worktree_id = ?", (wanted,)).fetchone()
    if row is None:
        return
    repo, path, head, branch = row
    stands = f"at {path}, made at {head} on {branch or 'no branch'}" if path else "being made"
    yield Entry(at_ms=told[-1].at_ms if told else 0, what="worktree.stands", detail=f"{wanted}: of {repo}, {stands}")
