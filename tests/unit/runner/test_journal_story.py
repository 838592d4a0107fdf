"""The story of an execution: everything that was decided, in order, with evidence, and nothing secret."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from protocol.envelope import digest_of
from protocol.errors import Reason
from protocol.messages import Answer
from protocol.session import ItemsAnswered
from runner.adapters import journal_rows
from runner.adapters.journal_schema import MIGRATIONS, SCHEMA_VERSION, migrate
from runner.adapters.journal_story import Entry, Story, read_story
from runner.adapters.journal_words import payload_of, signers_of, subjects_of
from runner.cli import cli
from runner.core.effects import AdmitViewer, Effect, Persist
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptPrepared,
    Now,
    OwnerStop,
    SessionDown,
    ViewerAdmitted,
    WorktreeCreated,
)
from runner.core.journaling import PutAttempt
from runner.core.plans import Swept, WorktreeMade
from runner.errors import Broken, Refused
from tests.support.builders import a_key, an_attempt
from tests.support.engine import HEAD, SHIM, Turn, World, a_policy, an_exit

LEASE = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}


class Recorded(World):
    """A world whose journal is a real one, too."""

    def __init__(self, path: Path, **over: object) -> None:
        super().__init__(**over)  # type: ignore[arg-type]
        self.path = path
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        migrate(self.db)

    def take(self, effects: Sequence[Effect]) -> Turn:
        """Journal it in both."""
        turn = super().take(effects)
        for persist in turn.of(Persist):
            for write in persist.writes:
                journal_rows.apply(self.db, write)
        self.pass_time(10)
        return turn

    def story(self, wanted: str) -> Story:
        """As another process reads it."""
        return read_story(self.path, wanted)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Recorded]:
    """One for each test, where `runner explain` looks for it."""
    (tmp_path / "state").mkdir()
    recorded = Recorded(tmp_path / "state" / "journal.db")
    yield recorded
    recorded.db.close()


def whats(story: Story) -> list[str]:
    """What happened, in order."""
    return [entry.what for entry in story.entries]


def only(story: Story, what: str) -> Entry:
    """The one entry of its kind."""
    (found,) = [entry for entry in story.entries if entry.what == what]
    return found


def a_stopped_execution(world: Recorded) -> None:
    """Started under a lease, stopped by the plane, ended by KILL, reported."""
    args = {"env": {"APP_MODE": "hunter2"}, "secrets": [{"name": "APP_KEY", "sealed": "c2VhbGVk"}]}
    world.send(world.start(args=args, lease=LEASE))
    world.step(AttemptPrepared(an_attempt(), SHIM))
    world.send(world.stop())
    ended_ms = world.now.wall_ms - 2
    record = an_exit(
        verdict="stopped",
        code=None,
        signal=9,
        cause_kind="stop",
        cause_by="cmd_2",
        started_ms=ended_ms - 15,
        ended_ms=ended_ms,
        swept=(("descendants", 15, 2), ("cookie", 9, 1)),
        tiers=("descendants", "cookie"),
    )
    world.step(AttemptExited(an_attempt(), record))
    world.session()
    answers = tuple(Answer(out_seq=number, stored=True) for number in sorted(world.journal.items))
    world.step(ItemsAnswered(answers), SessionDown())


def test_a_story_of_a_pty_tells_what_was_asked_and_no_key(world: Recorded) -> None:
    """Opened, looked at, closed."""
    args: dict[str, Any] = {"execution_id": "ex_1", "start_token": 1, "cwd": {"type": "path", "path": "/srv/work"}}
    world.send(world.seal(world.fields("pty.open", args | {"argv": [], "size": {"rows": 24, "cols": 80}})))
    world.step(AttemptPrepared(an_attempt(), SHIM))
    attach = {"execution_id": "ex_1", "start_token": 1, "viewer": "v_1", "key": a_key("viewer").public.x, "mode": "ro"}
    (wanted,) = world.send(world.seal(world.fields("pty.attach", attach))).of(AdmitViewer)
    world.step(ViewerAdmitted(wanted.digest))
    target = {"type": "attempt", "execution_id": "ex_1", "start_token": 1}
    world.send(world.seal(world.fields("pty.close", {"target": target})))
    details = [entry.detail for entry in world.story("ex_1").entries]
    asked = [detail for detail in details if detail.startswith("cmd_") and " pty." in detail]
    assert asked == [
        "cmd_1 pty.open #1: the login shell in /srv/work",
        "cmd_2 pty.attach #2: execution_id ex_1 start_token 1 viewer v_1 mode ro",
        "cmd_3 pty.close: ex_1.1",
    ]
    assert "cmd_2 done; viewer v_1 mode ro" in details


def test_a_story_is_told_from_the_command_to_the_answer(world: Recorded) -> None:
    """Every command, decision, lease, process, signal, offset, verdict and answer, in order."""
    a_stopped_execution(world)
    story = world.story("ex_1")
    assert story.attempts == ("ex_1.1",)
    assert whats(story) == [
        "command.received",
        "attempt.intent",
        "lease.granted",
        "attempt.prepared",
        "command.receipted",
        "child.started",
        "command.received",
        "attempt.stopping",
        "command.receipted",
        "signal.sent",
        "signal.sent",
        "child.ended",
        "tree.searched",
        "log.ended",
        "attempt.settled",
        "report.answered",
        "report.answered",
        "report.answered",
    ]
    details = [entry.detail for entry in story.entries]
    assert details[0].startswith(
        "cmd_1 execution.start #1: make test in /srv/work; lease exec:ex_1 token 1 for 60000 ms"
    )
    assert story.entries[0].evidence["key"] == a_key("command").key_id
    assert details[2:5] == [
        "token 1, ttl 60000 ms, on_loss stop",
        f"shim pid {SHIM.pid} started {SHIM.start} in boot {SHIM.boot_id}",
        "cmd_1 accepted; execution_id ex_1 start_token 1",
    ]
    assert details[6:9] == [
        "cmd_2 execution.stop: ex_1.1",
        "stop by cmd_2",
        "cmd_2 done; state stopping execution_id ex_1 start_token 1",
    ]
    assert details[9:11] == ["SIGTERM to 2 found by descendants", "SIGKILL to 1 found by cookie"]
    assert only(story, "attempt.settled").detail == "stopped, signal 9, cause stop cmd_2, lease token 1"
    assert only(story, "log.ended").detail.startswith("at offset 100 in 1 segments; stdout 4 bytes")


def test_evidence_is_what_the_outbox_has(world: Recorded) -> None:
    """Digests of what was signed, the policy each was judged under, the leaf it stands in."""
    a_stopped_execution(world)
    settled = only(world.story("ex_1.1"), "attempt.settled")
    body = next(item.body for item in world.journal.items.values() if item.kind == "settlement")
    assert settled.evidence["digest"] == digest_of(body.encode())
    assert settled.evidence["policy"] == a_policy().digest
    (leaf,) = world.db.execute("SELECT n FROM leaf WHERE kind = 'attempt.settled'").fetchone()
    assert (settled.evidence["leaf"], settled.evidence["report"]) == (leaf, 3)


def test_no_value_of_a_variable_and_no_secret_is_told(world: Recorded) -> None:
    """Sealed stays sealed, and even that is not shown."""
    a_stopped_execution(world)
    for wanted in ("ex_1", "ex_1.1", "cmd_1"):
        said = json.dumps([asdict(entry) for entry in world.story(wanted).entries])
        assert "hunter2" not in said and "c2VhbGVk" not in said and "APP_KEY" not in said


def test_a_start_that_was_refused_has_a_story_without_an_attempt(tmp_path: Path) -> None:
    """By the execution it was to be: what was asked, and why not."""
    world = Recorded(tmp_path / "journal.db", policy=a_policy(concurrent_max=0))
    world.send(world.start())
    story = world.story("ex_1")
    assert story.attempts == () and whats(story)[:2] == ["command.received", "command.receipted"]
    refused = story.entries[1].detail
    assert refused.startswith("cmd_1 refused: CAPACITY (0 attempts are the owner's limit); retry_after_ms 30000")
    world.db.close()


def test_each_id_has_the_story_it_names(world: Recorded) -> None:
    """An execution has all of its attempts; an attempt, a command and a worktree have their own."""
    world.send(world.create())
    made = WorktreeMade(path="/w/1", head=HEAD, branch="topic")
    world.step(WorktreeCreated(next(iter(world.journal.commands)), made))
    world.running(env=world.start_in("wt_1"))
    world.send(world.start("ex_1", 2))
    world.step(
        AttemptExited(an_attempt(), an_exit(verdict="stopped", cause_kind="stop", cause_by="superseded by cmd_3"))
    )
    world.step(AttemptPrepared(an_attempt("ex_1", 2), SHIM))

    both = world.story("ex_1")
    assert both.attempts == ("ex_1.1", "ex_1.2")
    assert "fenced by token 2" in " ".join(entry.detail for entry in both.entries)
    first, second = world.story("ex_1.1"), world.story("ex_1.2")
    for story, cmd_id in ((first, "cmd_2"), (second, "cmd_3")):
        received = only(story, "command.received")
        assert received.detail.startswith(cmd_id)
        assert {entry.evidence.get("attempt", story.attempts[0]) for entry in story.entries} == {story.attempts[0]}
    assert only(first, "attempt.settled").detail.startswith("fenced")
    assert world.story("cmd_3") == second
    tree = world.story("wt_1")
    assert [entry.detail.split(" ")[0] for entry in tree.entries if entry.what == "command.received"] == [
        "cmd_1",
        "cmd_2",
    ]
    assert only(tree, "worktree.stands").detail == f"wt_1: of /srv/repos/a, at /w/1, made at {HEAD} on topic"


def test_a_stop_before_its_start_leaves_a_tombstone_in_the_story(world: Recorded) -> None:
    """Of what never came there is a story, too."""
    world.send(world.stop("ex_9"))
    story = world.story("ex_9")
    assert whats(story)[:2] == ["command.received", "command.receipted"]
    world.send(world.start("ex_9"))
    story = world.story("ex_9")
    assert "CANCELLED_BEFORE_START" in [entry.detail for entry in story.entries if entry.what == "command.receipted"][1]


def test_what_was_found_of_a_lost_attempt_is_told(world: Recorded) -> None:
    """And the owner's own word, and what the plane is told beside statements."""
    world.running()
    world.step(OwnerStop("ex_1", 300, "owner:7"))
    world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, Swept(found=2, signalled=2, remaining=0)))
    story = world.story("ex_1")
    assert only(story, "owner.stop").detail == "owner:7"
    assert only(story, "attempt.stopping").detail == "stop by owner:7 in 300 ms"
    assert only(story, "remains.swept").detail == "found 2, signalled 2, remaining 0"
    assert only(story, "attempt.settled").detail.startswith("lost, cause shim_lost SHIM_LOST")


def test_a_clock_that_was_set_back_changes_no_order(world: Recorded) -> None:
    """What was decided later is told later, whatever the time on it."""
    world.running()
    world.now = Now(world.now.wall_ms - 3_600_000, world.now.boot_ms + 1000)
    record = an_exit(started_ms=world.now.wall_ms + 3_590_000, ended_ms=world.now.wall_ms - 1)
    world.step(AttemptExited(an_attempt(), record))
    told = whats(world.story("ex_1"))
    assert told.index("attempt.prepared") < told.index("child.started") < told.index("attempt.settled")
    assert told.index("child.ended") < told.index("attempt.settled")


def test_a_renewed_lease_is_no_decision(world: Recorded) -> None:
    """A hundred renewals leave no leaf; the deadline is in the row all the same."""
    world.running(lease=LEASE)
    world.session()
    row = world.journal.attempts[an_attempt()]
    (before,) = world.db.execute("SELECT count(*) FROM leaf").fetchone()
    assert row.lease is not None
    for number in range(100):
        later = replace(row, lease=replace(row.lease, deadline_ms=row.lease.deadline_ms + number))
        journal_rows.apply(world.db, PutAttempt(later, world.now.wall_ms))
    assert world.db.execute("SELECT count(*) FROM leaf").fetchone() == (before,)
    assert world.db.execute("SELECT lease_deadline_ms FROM attempt").fetchone() == (row.lease.deadline_ms + 99,)


def test_what_was_pruned_or_changed_is_said(world: Recorded) -> None:
    """A body that is gone; and one that is not what its leaf says."""
    a_stopped_execution(world)
    world.db.execute("UPDATE outbox SET body = '' WHERE out_seq = 1")
    world.db.execute("UPDATE outbox SET body = replace(body, 'a', 'b') WHERE out_seq = 3")
    story = world.story("ex_1")
    assert story.entries[4].detail == "cmd_1: its text was pruned"
    assert str(only(story, "attempt.settled").evidence["digest"]).startswith("DIFFERS")


def test_leaves_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """They named the command's digest and nothing else; there was no index, and columns were missing."""
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("CREATE TABLE migration(n INTEGER PRIMARY KEY)")
        for statement in MIGRATIONS[0]:
            db.execute(statement)
        digest = digest_of(b"1")
        db.execute("INSERT INTO migration VALUES(1)")
        db.execute("INSERT INTO command VALUES(1, ?, 'cmd_1', 'execution.start', 1, x'', 'p', 5, NULL)", (digest,))
        db.execute(
            "INSERT INTO attempt(name, digest, cmd_id, state, at_ms) VALUES('ex_1.1', ?, 'cmd_1', 'intent', 6)",
            (digest,),
        )
        leaf = "INSERT INTO leaf(at_ms, kind, subject, detail, policy_digest) VALUES(?, ?, ?, ?, 'p')"
        db.execute(leaf, (5, "command.received", digest, "cmd_1 execution.start 1"))
        db.execute(leaf, (6, "attempt.intent", "ex_1.1", digest))
    story = read_story(path, "ex_1")
    assert [(entry.at_ms, entry.what, entry.detail) for entry in story.entries] == [
        (5, "command.received", "cmd_1 execution.start #1"),
        (6, "attempt.intent", ""),
    ]


def test_a_story_is_read_beside_a_writer(world: Recorded) -> None:
    """Whoever writes is not waited for, and waits for nobody who reads."""
    a_stopped_execution(world)
    world.db.execute("BEGIN IMMEDIATE")
    world.db.execute("INSERT INTO tombstone VALUES('ex_1.1', 'cmd_9', 1)")
    assert "tombstone.left" not in whats(world.story("ex_1"))
    world.db.execute("COMMIT")
    assert only(world.story("ex_1"), "tombstone.left").detail == "ex_1.1 must not begin, says cmd_9"
    assert world.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def test_what_cannot_be_told_is_one_sentence(world: Recorded, tmp_path: Path) -> None:
    """Nobody knows the id; no journal; damaged; of a newer version."""
    with pytest.raises(Refused, match="knows no execution, attempt, command or worktree ex_9"):
        world.story("ex_9")
    with pytest.raises(Broken, match="no daemon has run here"):
        read_story(tmp_path / "nowhere.db", "ex_1")
    (tmp_path / "damaged.db").write_bytes(b"\xa5" * 8192)
    with pytest.raises(Broken, match="cannot be read"):
        read_story(tmp_path / "damaged.db", "ex_1")
    world.db.execute("INSERT INTO migration VALUES(?)", (SCHEMA_VERSION + 1,))
    with pytest.raises(Broken, match="newer runner"):
        world.story("ex_9")


@pytest.mark.parametrize(
    "envelope", [b"", b"{", b"[]", b'{"payload":1}', b'{"payload":"bnVsbA=="}', b"\xff", b"[" * 100_000]
)
def test_an_envelope_that_says_nothing_is_about_nothing(envelope: bytes) -> None:
    """Whatever is in it, the journal takes it."""
    assert payload_of(envelope) == {} and subjects_of("execution.start", envelope) == ()
    assert signers_of(envelope) == ""


def test_explain_prints_it_for_people_and_programs(
    world: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line each, digests cut; a list of objects; exit status 1 and a next step for what is not known."""
    a_stopped_execution(world)
    monkeypatch.setenv("LOCAL_RUNNER_STATE_DIR", str(tmp_path / "state"))
    run = CliRunner().invoke
    done = run(cli, ["explain", "ex_1"])
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and len(lines) == len(world.story("ex_1").entries) + 1
    assert "command.received  cmd_1 execution.start #1: make test" in lines[0]
    assert "ex_1.1:" not in done.stdout and "its directory was removed" in lines[-1]
    told = json.loads(run(cli, ["explain", "ex_1", "--json"]).stdout)
    assert {tuple(sorted(one)) for one in told} == {("at_ms", "detail", "evidence", "what")}
    assert len(str(told[0]["evidence"]["digest"])) == 71 and told[0]["evidence"]["digest"] not in done.stdout
    unknown = run(cli, ["explain", "ex_9"])
    assert unknown.exit_code == 1 and "next: runner ps --all" in unknown.stderr
    world.db.execute("INSERT INTO migration VALUES(99)")
    newer = run(cli, ["explain", "ex_1"])
    assert newer.exit_code == 1 and "next: runner doctor --only R007" in newer.stderr
