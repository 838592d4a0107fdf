"""What must be true once a healed world has come to rest, and whether it has."""

import base64
import json
from typing import TYPE_CHECKING

from protocol.ids import Attempt
from runner.adapters import journal_rows
from tests.sim.host import Host
from tests.sim.story import short
from tests.sim.witness import Told, digest_of

if TYPE_CHECKING:
    from tests.sim.world import World

FINAL = "('settled', 'refused', 'cancelled')"


def open_ends(world: "World") -> list[str]:
    """What has not come to its end yet."""
    found = [f"'{request.what}' is not answered" for request in world.users.pending]
    for row in world.plane.rows("SELECT * FROM intents WHERE state IN ('queued', 'sent', 'held') ORDER BY ordinal"):
        found.append(f"{row['kind']} {row['cmd_id'][-4:]} of {row['subject'][-4:]} is {row['state']}")
    for table in ("executions", "attempts"):
        for row in world.plane.rows(f"SELECT * FROM {table} WHERE state NOT IN {FINAL} ORDER BY id"):
            found.append(f"{row['id'][-4:]}.{row['start_token']} is {row['state']} at the plane")
    sql = "SELECT * FROM worktrees WHERE state IN ('queued', 'creating', 'removing') ORDER BY id"
    found += [f"worktree {row['id']} is {row['state']}" for row in world.plane.rows(sql)]
    for host in world.hosts:
        found += _of_host(world, host, world.witness.told[host.name])
    return found


def _of_host(world: "World", host: Host, told: Told) -> list[str]:
    found = []
    daemon = world.daemons.get(host.name)
    if daemon is None or daemon.engine is None or not host.awake:
        return [f"{host.name} is down"]
    found += [
        f"{put.row.kind} {put.row.cmd_id[-4:]} has no receipt"
        for d, put in told.commands.items()
        if d not in told.outcomes
    ]
    found += [f"{a.name} is {state} on {host.name}" for a, state in told.attempts.items() if state != "settled"]
    if daemon.engine.attempts.living:
        found.append(f"{daemon.engine.attempts.living} attempts live in the engine of {host.name}")
    up = world.plane.up
    if up is None or not up.switchboard.is_online(host.name) or daemon.link.unanswered:
        found.append(f"{host.name} and the plane have not met")
    unanswered = journal_rows.read_oldest_unanswered(host.journal.db)
    if unanswered is not None:
        found.append(f"item {unanswered} of {host.name} is not answered")
    for proc in host.procs.values():
        if proc.cookie or host.cgroup:
            found.append(f"a process of {short(proc.attempt)} lives")
    return found


def final(world: "World") -> None:
    """Both sides remember the same, and nothing was said twice. Raises InvariantBroken."""
    for host in world.hosts:
        _same_memory(world, host)
    conflicts = world.plane.rows("SELECT * FROM events WHERE kind = 'settlement.conflict'")
    world.story.must(not conflicts or world.plane.restored > 0, "I3: the plane was told two settlements of one attempt")


def _same_memory(world: "World", host: Host) -> None:
    told, must = world.witness.told[host.name], world.story.must
    sql = "SELECT digest FROM statements WHERE runner_id = ?"
    stored = {row["digest"] for row in world.plane.rows(sql, host.name)}
    # The plane's mark is the highest number it has: where reports overtake each other, a backup may have it ahead of a gap.
    ahead = world.plane.restored > 0 and host.lossy
    for item in told.items.values():
        if item.kind != "event" and not ahead:
            digest = digest_of(base64.b64decode(json.loads(item.body)["payload"]))
            must(digest in stored, "item %d of %s (%s) is not at the plane", item.out_seq, host.name, item.kind)
    for digest, outcome in told.outcomes.items():
        attempt = world.witness.signed[digest].attempt
        if outcome["kind"] == "execution.start" and outcome["outcome"] == "accepted":
            must(attempt in told.settlements, "I3: %s was accepted and never settled", attempt)
    for attempt, said in told.settlements.items():
        if world.plane.restored and not _known_at_plane(world, host, attempt):
            # A rerun on another runner that a plane forgot is nothing it could believe a runner: told to people, and kept.
            continue
        must(_settled_at_plane(world, attempt, said), "%s is settled, and the plane says otherwise", attempt.name)


def _known_at_plane(world: "World", host: Host, attempt: Attempt) -> bool:
    for table in ("executions", "attempts"):
        sql = f"SELECT 1 FROM {table} WHERE id = ? AND start_token = ? AND runner_id = ?"
        if world.plane.rows(sql, attempt.execution_id, attempt.start_token, host.name):
            return True
    return False


def _settled_at_plane(world: "World", attempt: Attempt, said: dict[str, object]) -> bool:
    for table in ("executions", "attempts"):
        sql = f"SELECT settlement FROM {table} WHERE id = ? AND start_token = ?"
        for row in world.plane.rows(sql, attempt.execution_id, attempt.start_token):
            return row["settlement"] is not None and json.loads(row["settlement"]) == said
    return False
