"""`show` and `receipts`: what became of an order, and what the runner signed about it."""

import re
from pathlib import Path
from typing import Any, Final

import click

from controlplane.client import Json, PlaneClient, PlaneRefused
from controlplane.reach import Reach, pass_reach, path_id
from controlplane.render import complain, moment, print_table, try_again
from protocol.text import show_age, show_duration
from terminal.options import as_json
from terminal.printing import print_facts, print_json, shell_words

NOT_FOUND: Final = 404
_SAFE_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]")


@click.command(short_help="Tell all about an execution, worktree or runner.")
@click.argument("wanted", metavar="ID")
@as_json
@pass_reach
def show(reach: Reach, wanted: str, as_json: bool) -> None:
    """Tell all about an execution, worktree or runner.

    Of an execution: how it ended, its attempts, its streams as the child wrote them and as they are stored here. Of a
    runner: whether it takes work, what lives there that nobody here started, whether another machine has its key.

    \b
    Examples:
      runner-control show ex_1
      runner-control show ex_1 --json | jq .digests.streams
      runner-control show laptop
    """
    path_id(wanted)
    with reach.client() as client:
        found = _found(client, f"/executions/{wanted}")
        if found is None:
            other = _found(client, f"/worktrees/{wanted}")
            shown = other or _runner_or_nothing(client, wanted)
            print_json(shown) if as_json else print_facts(_runner(shown) if other is None else _worktree(shown))
            return
        digests = client.get(f"/executions/{wanted}/digests")
        attempts = client.get(f"/executions/{wanted}/attempts")["attempts"]
    if as_json:
        print_json({**found, "digests": digests, "attempts": attempts})
        return
    earlier = [_attempt(one) for one in attempts[:-1]]
    print_facts([*_execution(found), *earlier, *_streams(found, digests), *_statements(found)])


def _found(client: PlaneClient, path: str) -> Json | None:
    try:
        return client.get(path)
    except PlaneRefused as exc:
        if exc.status != NOT_FOUND:
            raise
        return None


def _runner_or_nothing(client: PlaneClient, wanted: str) -> Json:
    """The runner of this id or name. Raises PlaneRefused that speaks of everything that was looked for."""
    found = _found(client, f"/runners/{wanted}")
    if found is None:
        raise PlaneRefused(NOT_FOUND, "UNKNOWN_EXECUTION", "no execution, worktree or runner has this id or name")
    return found


def _runner(found: Json) -> list[tuple[str, str]]:
    words = "online" if found["online"] else "offline"
    facts = [
        ("runner", f"{found['name']} ({found['id']})"),
        ("session", f"{words}, {found['admission']}" if found["admission"] else words),
        ("seen", moment(found["last_seen_ms"])),
        ("host", f"{found['hostname'] or '-'}, boot {found['boot_id'] or '-'}"),
        ("version", f"{found['version']} on {found['platform']}"),
        ("incarnation", str(found["inc"])),
        ("key", found["key_id"]),
        ("policy", found["policy_digest"]),
        ("labels", " ".join(f"{name}={value}" for name, value in found["labels"].items()) or "-"),
        ("attempts", f"{found['attempts']} when it connected"),
    ]
    facts += [("unknown", f"{one['attempt']}: {one['why']}") for one in found["unknown"]]
    if conflict := found["conflict"]:
        facts.append(("CONFLICT", f"{conflict['detail']} ({moment(conflict['at_ms'])})"))
    return facts


def _attempt(one: Json) -> tuple[str, str]:
    """An earlier attempt in one line."""
    how = (one["verdict"] or one["state"]).replace("_", " ")
    words = [f"{how} on {one['runner_name']}"]
    words += [f"status {one['exit_status']}"] if one["exit_status"] is not None else []
    words += [str(part) for part in (one["reason"], one["detail"]) if part]
    return f"attempt {one['start_token']}", ", ".join(words)


def _worktree(found: Json) -> list[tuple[str, str]]:
    names = ("id", "state", "repo", "base", "branch", "path", "head", "cmd_id", "reason", "detail")
    facts = [("runner", f"{found['runner_name']} ({found['runner']})"), ("created", moment(found["created_ms"]))]
    again = try_again(found["retry_after_ms"]).removeprefix("; ")
    waits = [(name, words) for name, words in (("waits", found["waits"]), ("refused", again)) if words]
    return [
        *[(name, str(found[name])) for name in names[:2]],
        *waits,
        *facts,
        *[(name, str(found[name])) for name in names[2:] if found[name]],
    ]


def _execution(found: Json) -> list[tuple[str, str]]:
    state = found["state"] + (", stop requested" if found["stop_requested"] else "")
    state += f" ({found['waits']})" if found["waits"] else ""
    state += f", {found['verdict']}" if found["verdict"] and not found["settlement"] else ""
    facts = [
        ("execution", f"{found['id']}, attempt {found['start_token']}, lease token {found['lease_token']}"),
        ("runner", f"{found['runner_name']} ({found['runner']})"),
        ("command", shell_words(found["argv"])),
        ("directory", str(found["worktree"] or found["cwd"])),
        ("created", moment(found["created_ms"])),
        ("state", state),
    ]
    if found["reason"] or found["detail"]:
        why = " ".join(str(part) for part in (found["reason"], found["detail"]) if part)
        facts.append(("reason", why + try_again(found["retry_after_ms"])))
    if found["exit_status"] is not None:
        facts.append(("exit status", str(found["exit_status"])))
    return facts


def _streams(found: Json, digests: Json) -> list[tuple[str, str]]:
    settlement = found["settlement"] or {}
    written = settlement.get("streams") or {}
    copy = (settlement.get("log") or {}).get("uploaded")
    facts = []
    for name in sorted({*written, *digests["streams"]}):
        facts.append((f"{name} written", _stream(written.get(name))))
        stored = digests["streams"].get(name)
        facts.append((f"{name} stored", _stream(stored) + _likeness(name, stored, written, copy)))
    log = digests["log"]
    words = [f"{log['end']} bytes in {log['segments']} segments", "complete" if digests["complete"] else "not complete"]
    if copy is not None:
        words.append(f"secrets masked ({copy['redactor']}), so the chain is that of the log on its machine")
    else:
        words.append("chain proven" if digests["chain_ok"] else "chain NOT proven")
    words += [f"{end - start} bytes missing at {start}" for start, end in digests["gaps"]]
    return [*facts, ("log", ", ".join(words))]


def _likeness(name: str, stored: Json | None, written: Json, copy: Json | None) -> str:
    """How what is stored of a stream compares with what was signed."""
    if copy is None:
        return "" if not written else "  (the same)" if written.get(name) == stored else "  (NOT the same)"
    if not copy["streams"]:
        return "  (masked; its runner could not say how it adds up)"
    return "  (masked, as signed)" if copy["streams"].get(name) == stored else "  (masked, NOT as signed)"


def _stream(stream: dict[str, Any] | None) -> str:
    return "nothing" if stream is None else f"{stream['bytes']} bytes, SHA-256 {stream['sha256']}"


def _statements(found: Json) -> list[tuple[str, str]]:
    facts = []
    if receipt := found["receipt"]:
        words = [receipt["outcome"], receipt.get("reason"), receipt.get("detail")]
        facts.append(("receipt", f"{' '.join(str(word) for word in words if word)} at {moment(receipt['at_ms'])}"))
    if settlement := found["settlement"]:
        cause = settlement["cause"]
        took = settlement.get("duration_ms")
        words = [settlement["verdict"].replace("_", " ")]
        words += [f"after {show_duration(took) if took < 1000 else show_age(took)}"] if took is not None else []
        if cause["kind"] != "none":
            known = (cause["kind"], cause.get("reason"), cause.get("by"))
            words.append(f"({' '.join(str(word) for word in known if word)})")
        facts.append(("settlement", f"{' '.join(words)} at {moment(settlement['at_ms'])}"))
        if settlement.get("survivors"):
            facts.append(("survivors", f"{settlement['survivors']} processes could not be ended"))
    return facts


@click.command(short_help="List or save what the runner signed.")
@click.argument("wanted", metavar="ID")
@click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR", help="Write the envelopes and the runner's key there."
)
@as_json
@pass_reach
def receipts(reach: Reach, wanted: str, out: str | None, as_json: bool) -> None:
    """List what the runner signed about an execution, worktree or command; with --out write it as files.

    Each file is an envelope as it was received; RUNNER.pub holds the key (base64url) that verifies it without us:
    see examples/verify_receipt.py.

    \b
    Examples:
      runner-control receipts ex_1
      runner-control receipts ex_1 --out ./proof && ls ./proof
    """
    with reach.client() as client:
        found = client.get(f"/receipts/{path_id(wanted)}")
        if not found["statements"]:
            _say_nothing_signed(client, wanted)
        written = _write(client, Path(out), found["statements"]) if out is not None else []
    if as_json:
        print_json({**found, "files": written} if out is not None else found)
    elif out is not None:
        for name in written:
            click.echo(name)
    else:
        rows = [
            (moment(one["received_ms"]), one["kind"], _says(one["payload"]), one["digest"])
            for one in found["statements"]
        ]
        print_table(("RECEIVED", "KIND", "SAYS", "DIGEST"), rows)


def _say_nothing_signed(client: PlaneClient, wanted: str) -> None:
    """A word on stderr for what is known. Raises PlaneRefused for what is not."""
    if _found(client, f"/executions/{wanted}") is None and _found(client, f"/worktrees/{wanted}") is None:
        raise PlaneRefused(NOT_FOUND, "UNKNOWN_WORKTREE", "no execution and no worktree has this id")
    complain(f"the runner has signed nothing about {wanted} yet", f"runner-control show {wanted}")


def _says(payload: Json) -> str:
    return " ".join(str(payload[name]) for name in ("kind", "outcome", "verdict", "reason") if payload.get(name))


def _write(client: PlaneClient, directory: Path, statements: list[Json]) -> list[str]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = []
    for number, statement in enumerate(statements, start=1):
        short = _SAFE_NAME.sub("", statement["digest"].removeprefix("sha256:"))[:12]
        path = directory / f"{number:02d}-{_SAFE_NAME.sub('', statement['kind'])}-{short}.json"
        path.write_text(statement["envelope"], "utf-8")
        written.append(str(path))
    signers = {statement["payload"]["runner"] for statement in statements}
    for key in client.get("/keys")["runners"]:
        if key["id"] in signers:
            path = directory / f"{_SAFE_NAME.sub('', key['id'])}.pub"
            path.write_text(key["x"] + "\n", "ascii")
            written.append(str(path))
    return written


VERBS: Final[tuple[click.Command, ...]] = (show, receipts)
