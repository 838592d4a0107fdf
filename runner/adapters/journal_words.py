"""What leaves of the journal say in words, and what commands are about: written with each decision, read by `runner explain`.

Leaves are history: their words are for a person, are never parsed, and may change from version to version. Nothing here is
believed: an envelope was verified when it came, what it says in its arguments may still be nonsense.
"""

import base64
import json
from typing import Any, Final

from protocol.commands import Kind
from protocol.ids import ID_PATTERN
from protocol.messages import ReportItem
from runner.core.journaling import AttemptRow

ABOUT: Final = "command.about"
"""A leaf whose subject is what a command is about, and whose detail is the command's digest."""
TOLD: Final = "event.told"
"""A leaf whose subject is an attempt that the control plane was told something about."""
_KINDS: Final[frozenset[str]] = frozenset(Kind)


def payload_of(envelope: str | bytes) -> dict[str, Any]:
    """The payload of an envelope of ours; empty where there is none to read."""
    try:
        payload = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return payload if isinstance(payload, dict) else {}


def signers_of(envelope: bytes) -> str:
    """The ids of the keys that signed it, as it says."""
    try:
        return " ".join(str(each["keyid"]) for each in json.loads(envelope)["signatures"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def subjects_of(kind: str, envelope: bytes) -> tuple[str, ...]:
    """What a command is about: executions, worktrees, the command that a stop names. Empty where that cannot be read."""
    args = payload_of(envelope).get("args")
    if not isinstance(args, dict) or kind not in _KINDS:
        return ()
    found = [args.get("execution_id"), args.get("worktree_id"), *_inside(args.get("target")), *_inside(args.get("cwd"))]
    if isinstance(res := args.get("res"), str):
        found.append(res.partition(":")[2])
    named = (each for each in found if isinstance(each, str) and ID_PATTERN.fullmatch(each))
    return tuple(dict.fromkeys(named))


def _inside(part: object) -> list[object]:
    return [part.get(name) for name in ("execution_id", "cmd_id", "worktree_id")] if isinstance(part, dict) else []


def attempt_words(row: AttemptRow) -> str:
    """How an attempt stands, but for the deadline of its lease, which moves with every renewal and decides nothing."""
    shim, lease = row.shim, row.lease
    said = [f"command {row.cmd_id}"]
    if shim is not None:
        said.append(f"shim pid {shim.pid} started {shim.start} in boot {shim.boot_id}")
    if lease is not None:
        said.append(f"lease {lease.res} token {lease.token} {lease.state}, on loss {lease.on_loss}")
    if row.worktree_id is not None:
        said.append(f"worktree {row.worktree_id}")
    if row.stop_by is not None:
        said.append(f"stop by {row.stop_by}" + ("" if row.stop_grace_ms is None else f" in {row.stop_grace_ms} ms"))
    if row.fenced_by is not None:
        said.append(f"fenced by token {row.fenced_by}")
    return "; ".join(said)


def event_words(item: ReportItem) -> tuple[str, str] | None:
    """The attempt that an event is about, and what it says; None for an event about no attempt."""
    try:
        told = json.loads(item.body)
        attempt = f"{told['execution_id']}.{told['start_token']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    words = (told.get("kind"), told.get("reason"), told.get("detail"))
    return attempt, " ".join(str(word) for word in words if word)
