"""Everything that may happen next, from any state; and a world that heals, in which everything comes to its end.

Three commands on two streams under two tokens are signed beforehand. While there is a session each of them may arrive, in any order,
again and again: a double is a second arrival, a loss is no arrival. A shim is there or cannot be had; a child ends, or its shim is
killed; an answer comes; the clock goes on by half a ttl; a beat is answered by renewals or refusals; the session goes and comes, and
may bring a revocation; the daemon dies between two turns, or after the commit of one and so many of its deeds; it starts; the machine
reboots. A crash before the commit of a turn leaves what a crash before its input leaves, since both lose the connection and what was
on its way: it has no move of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from protocol.commands import Command
from protocol.envelope import PayloadType, Verified, open_envelope
from protocol.errors import Reason
from protocol.handshake import Established
from protocol.ids import Attempt
from protocol.keyset import Keyset
from protocol.messages import Renewal
from protocol.receipt import Outcome
from protocol.replay import Mark
from protocol.session import BeatAnswered
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    EnvelopeReceived,
    Input,
    Now,
    OrphansFound,
    RemainsSwept,
    SessionDown,
    SessionUp,
    Tick,
)
from runner.core.plans import LeaseAction, Orphan, Phase, ProcessIdentity, Swept
from tests.exhaustive.ground import (
    REVOKED,
    STEP_MS,
    TTL_MS,
    Bound,
    Directory,
    Ground,
    Move,
    Signed,
    Story,
    must,
    named,
    record_of,
)
from tests.exhaustive.states import label
from tests.support.builders import NOW_MS, a_key, an_attempt
from tests.support.engine import BOOT_MS, JournalModel, World

REST_TURNS_MAX: Final = 100
"""Turns after which a world that has not come to rest never will."""
COMMAND_KEY: Final = a_key("command")
FIRST, SECOND = an_attempt("ex_1", 1), an_attempt("ex_1", 2)


def lease(token: int, on_loss: str) -> dict[str, Any]:
    """A grant on the execution."""
    return {"res": "exec:ex_1", "token": token, "ttl_ms": TTL_MS, "on_loss": on_loss}


def signed(name: str, env: bytes, **meant: Attempt) -> Signed:
    """A command as its plane remembers it."""
    command = open_envelope(env, PayloadType.COMMAND, {COMMAND_KEY.key_id: COMMAND_KEY.public}, Command.parse)
    return Signed(name, env, command.value.cmd_id, command.digest, **meant)


def stories() -> dict[str, Story]:
    """A successor with a stop of the first or of the second; a lease that is taken again, or released, and a stop."""
    long: dict[str, Any] = {"exp": NOW_MS + 600_000}
    told = {}
    for target in (FIRST, SECOND):
        world = World()
        starts = (
            signed("start 1.1", world.start("ex_1", 1, lease=lease(1, "stop"), **long), starts=FIRST),
            signed("start 1.2", world.start("ex_1", 2, lease=lease(2, "stop"), **long), starts=SECOND),
        )
        stop = signed(f"stop 1.{target.start_token}", world.stop("ex_1", target.start_token, **long), stops=target)
        told[f"a successor, and a stop of attempt {target.start_token}"] = Story(starts, (stop,))
    for word in ("stop", "release"):
        world = World()
        start = signed("start 1.1", world.start("ex_1", 1, lease=lease(1, "freeze"), **long), starts=FIRST)
        again = world.acquire(token=2, lease={"on_loss": "freeze"}, iat=NOW_MS + STEP_MS, **long)
        last = world.stop("ex_1", 1, **long) if word == "stop" else world.release_lease(token=1, **long)
        safety = signed(word, last, **({"stops": FIRST} if word == "stop" else {}))
        told[f"a lease that is taken again, and a {word}"] = Story((start, signed("acquire", again)), (safety,))
    return told


def beginning(story: Story, bound: Bound) -> Ground:
    """A daemon that has just started, on an empty machine."""
    ground = Ground(story=story, bound=bound, engine=None, journal=JournalModel(), now=Now(NOW_MS, BOOT_MS))
    return list(started(ground))[-1][1]


# --- what may happen ------------------------------------------------------------------------------------------------------


def successors(ground: Ground) -> Iterator[Move]:
    """Every next state, with what happened."""
    for attempt, its in ground.dirs.items():
        if its.shim:
            yield from _shim_moves(ground, attempt, its)
    if ground.steps < ground.bound.steps:
        yield from named("time goes on", time_goes_on(ground))
    if ground.reboots < ground.bound.reboots:
        yield from named("the machine reboots", rebooted(ground))
    if ground.engine is None:
        yield from named("the daemon starts", started(ground))
        return
    yield from named("the daemon dies", ground.fork().deaths())
    yield from _network_moves(ground)
    for attempt, again in ground.preparing.items():
        yield from named(f"a shim of {attempt.name} is there", prepared(ground, attempt, again=again))
        yield from named(f"no shim of {attempt.name} can be had", not_prepared(ground, attempt))
    for kind, about in sorted(ground.answers, key=str):
        yield from named(f"{kind} {about.name if about else ''}".strip(), answered(ground, kind, about))


def _shim_moves(ground: Ground, attempt: Attempt, its: Directory) -> Iterator[Move]:
    if its.child:
        yield f"{attempt.name} ends", ended(ground, attempt, "exited")
    if ground.bound.kills and not its.exit:
        killed = ground.fork()
        killed.dirs[attempt] = replace(its, shim=False)
        killed.tell_end(attempt)
        yield f"the shim of {attempt.name} is killed", killed


def _network_moves(ground: Ground) -> Iterator[Move]:
    if not ground.up:
        yield from named("the session comes up", session_up(ground, ground.keyset))
        if ground.bound.revoke and ground.keyset is not REVOKED:
            yield from named("the session brings a revocation", session_up(ground, REVOKED))
        return
    down = ground.fork()
    down.up, down.beat = False, None
    yield from named("the session goes down", down.turn(SessionDown()))
    for command in ground.story.all:
        yield from named(f"{command.name} arrives", arrives(ground, command))
    if ground.beat is not None:
        for word in ("renewals", "refusals"):
            yield from named(f"the beat is answered by {word}", beaten(ground, renewed=word == "renewals"))


# --- each of them ---------------------------------------------------------------------------------------------------------


def started(ground: Ground) -> Iterator[Move]:
    """A daemon starts, and may die in its first turn."""
    after = ground.fork()
    after.engine, after.engine_named = after.new_engine(), None
    yield from after.carried_out(after.engine.recover(after.observed(), after.now))


def session_up(ground: Ground, keyset: Verified[Keyset]) -> Iterator[Move]:
    """A handshake, under a keyset that may be newer."""
    after = ground.fork()
    after.up = True
    established = Established(
        session="s_1",
        now_ms=ground.now.wall_ms,
        beat_ms=10_000,
        out_hw=0,
        ctl=ground.journal.marks.get(1, Mark()),
        keyset=keyset,
        certificate=None,
    )
    yield from after.turn(SessionUp(established))


def arrives(ground: Ground, command: Signed) -> Iterator[Move]:
    """A command, for the first time or again."""
    assert ground.engine is not None, "a daemon hears it"
    believed = COMMAND_KEY.key_id in ground.engine.keys
    for name, then in ground.turn(EnvelopeReceived(command.env)):
        if command in ground.story.safety:
            row = then.journal.commands.get(command.digest)
            must(not believed or (row is not None and row.receipt_seq is not None), "I7: a stop waits for nobody")
        yield name, then


def prepared(ground: Ground, attempt: Attempt, *, again: bool) -> Iterator[Move]:
    """A shim waits behind its barrier; what an earlier daemon left of it is cleared first."""
    after = ground.fork()
    del after.preparing[attempt]
    left = after.dirs.get(attempt)
    if left is not None and not again:
        yield from after.turn(AttemptNotPrepared(attempt, Reason.SPAWN_FAILED, "", refused=False))
        return
    must(left is None or not left.child, "I8: what runs is never cleared")
    after.dirs[attempt] = Directory()
    shim = ProcessIdentity(boot_id=ground.boot_id, pid=4242, start=99)
    yield from after.turn(AttemptPrepared(attempt, shim))


def not_prepared(ground: Ground, attempt: Attempt) -> Iterator[Move]:
    """It cannot be had."""
    after = ground.fork()
    again = after.preparing.pop(attempt)
    if again:
        after.dirs.pop(attempt, None)
    yield from after.turn(AttemptNotPrepared(attempt, Reason.SPAWN_FAILED, "", refused=False))


def ended(ground: Ground, attempt: Attempt, how: str) -> Ground:
    """A child ends and its shim writes how."""
    after = ground.fork()
    after.dirs[attempt] = replace(after.dirs[attempt], child=False, exit=how)
    after.tell_end(attempt)
    return after


def answered(ground: Ground, kind: str, about: Attempt | None) -> Iterator[Move]:
    """The machine tells what it was asked for, or what happened."""
    after = ground.fork()
    after.answers -= {(kind, about)}
    if about is None:
        alive = [(attempt, its) for attempt, its in after.dirs.items() if its.child]
        orphans = [Orphan(name=attempt.name, processes=1, shim_alive=its.shim) for attempt, its in alive]
        yield from after.turn(OrphansFound(tuple(orphans)))
    else:
        yield from after.turn(_told(after, kind, about))


def _told(after: Ground, kind: str, attempt: Attempt) -> Input:
    its = after.dirs.get(attempt)
    if its is not None and its.exit and kind != "remains":
        return AttemptExited(attempt, record_of(its.exit, its.stop_by))
    found = 1 if its is not None and its.child else 0
    must(its is None or not its.shim or kind == "hung", "a living shim is swept by nobody")
    if its is not None:
        after.dirs[attempt] = replace(its, child=False, shim=False)
    swept = Swept(found=found, signalled=found, remaining=0)
    if kind == "remains":
        return RemainsSwept(attempt, swept)
    return AttemptLost(attempt, Reason.SHIM_HUNG if kind == "hung" else Reason.SHIM_LOST, swept)


def beaten(ground: Ground, *, renewed: bool) -> Iterator[Move]:
    """Every lease that the beat asked for is renewed, or none."""
    assert ground.beat is not None, "there is a beat"
    sent_ms, asked = ground.beat
    reason = None if renewed else Reason.FENCED
    leases = tuple(
        Renewal(res=res, token=token, ttl_ms=TTL_MS if renewed else None, reason=reason) for res, token in asked
    )
    before = {row.attempt: row.lease for row in ground.journal.attempts.values() if row.lease is not None}
    after = ground.fork()
    after.beat = None
    for name, then in after.turn(BeatAnswered(sent_ms, ground.now.wall_ms, 10_000, leases, ())):
        for attempt, was in before.items():
            now = then.journal.attempts[attempt].lease
            assert now is not None, "a lease stays with its attempt"
            most_ms = max(was.deadline_ms, sent_ms + TTL_MS if renewed else 0)
            must(now.deadline_ms <= most_ms, "a renewal counts from when it was asked for, and a refusal for nothing")
        yield name, then


def time_goes_on(ground: Ground) -> Iterator[Move]:
    """By half a ttl. Shims act at their deadlines, whoever lives; a daemon wakes."""
    after = ground.fork()
    after.steps += 1
    after.now = Now(ground.now.wall_ms + STEP_MS, ground.now.boot_ms + STEP_MS)
    for attempt, its in ground.dirs.items():
        token, deadline_ms, action = its.lease
        if token and action is LeaseAction.STOP and its.shim and not its.exit and deadline_ms <= after.now.boot_ms:
            after = ended(after, attempt, "lease" if its.child else "unreleased")
    if after.engine is None:
        yield "", after
    else:
        yield from after.turn(Tick())


def rebooted(ground: Ground) -> Iterator[Move]:
    """The machine starts anew: nothing is alive, and BOOTTIME begins again."""
    after = ground.fork()
    after.reboots += 1
    after.now = Now(ground.now.wall_ms + STEP_MS, 1_000)
    yield from after.deaths(reboot=True)


# --- a world that heals -----------------------------------------------------------------------------------------------


def healed(ground: Ground, at_rest: set[int], passed: list[str]) -> None:
    """Nothing is lost and nobody dies any more: it comes to rest. Raises Violated, with what happened until then in `passed`.

    `at_rest`: states that are known to; it grows.
    """
    known: list[int] = []
    for _ in range(REST_TURNS_MAX):
        here = ground.state()
        if here in at_rest:
            break
        known.append(here)
        good = next_good(ground)
        if good is None:
            assert_at_rest(ground)
            break
        what, moves = good
        ground = list(named(what, moves))[-1][1]
        passed.append(what)
    else:
        must(False, "I3: it comes to rest")
    at_rest.update(known)


def next_good(ground: Ground) -> tuple[str, Iterator[Move]] | None:
    """Something that still has to happen; None at rest. The last of its moves is the one without a death."""
    if ground.engine is None:
        return "the daemon starts", started(ground)
    if not ground.up:
        return "the session comes up", session_up(ground, ground.keyset)
    if COMMAND_KEY.key_id in ground.engine.keys:
        for each in ground.story.all:
            if each.digest not in ground.journal.commands:
                return f"{each.name} arrives", arrives(ground, each)
    for attempt, again in ground.preparing.items():
        return f"a shim of {attempt.name} is there", prepared(ground, attempt, again=again)
    for kind, about in sorted(ground.answers, key=str):
        return f"{kind} {about.name if about else ''}".strip(), answered(ground, kind, about)
    for attempt, its in ground.dirs.items():
        if its.child and its.shim:
            return f"{attempt.name} ends", iter([("", ended(ground, attempt, "exited"))])
        if its.child:
            # Nobody guards it: the next look at all processes finds it.
            return "time goes on", time_goes_on(ground)
    return None


def assert_at_rest(ground: Ground) -> None:
    """Every command that was consumed has its one receipt, every accepted attempt its one settlement, and nothing is alive."""
    assert ground.engine is not None, "it was healed"
    journal = ground.journal
    told = [label(item.kind, item.body) for item in journal.items.values() if item.kind == "receipt"]
    outcomes = {digest: outcome for _, digest, outcome, _ in told}
    must(outcomes.keys() == journal.commands.keys(), "I3: every consumed command has its receipt")
    for row in journal.attempts.values():
        accepted = outcomes[row.digest] == Outcome.ACCEPTED
        must((row.settled_seq is not None) == accepted, "I3: what was accepted is settled, and nothing else")
        must(accepted or row.attempt not in ground.starts, "I3: what ran was accepted")
    must(ground.engine.attempts.living == 0 and len(ground.engine.claims) == 0, "I3: nothing waits")
    must(not any(its.child for its in ground.dirs.values()), "nothing of what is settled lives")
    must(all(its.phase is not Phase.RUNNING or attempt in ground.starts for attempt, its in ground.dirs.items()), "I1")
