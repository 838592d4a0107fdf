"""`show` and `receipts`: what became of an order, and what the runner signed about it."""

import re
from pathlib import Path
from typing import Any, Final

import click

from controlplane.client import Json, PlaneClient, PlaneRefused
from controlplane.reach import Reach, pass_reach, path_id
from controlplane.render import complain, moment, print_table
from protocol.text import show_age, show_duration
from terminal.options import as_json
from terminal.printing import print_facts, print_json, shell_words

NOT_FOUND: Final = 404
_SAFE_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]")


@click.command(short_help="Tell all about an execution or worktree.")
@click.argument("wanted", metavar="ID")
@as_json
@pass_reach
def show(reach: Reach, wanted: str, as_json: bool) -> None:
    """Tell all about an execution or worktree: how it ended, its streams as the child wrote them and as they are stored here.

    \b
    Examples:
      runner-control show ex_1
      runner-control show ex_1 --json | jq .digests.streams
    """
    path_id(wanted)
    with reach.client() as client:
        try:
            found = client.get(f"/executions/{wanted}")
        except PlaneRefused as exc:
            if exc.status != NOT_FOUND:
                raise
            found = _worktree_or_nothing(client, wanted)
            print_json(found) if as_json else print_facts(_worktree(found))
            return
        digests = client.get(f"/executions/{wanted}/digests")
    if as_json:
        print_json({**found, "digests": digests})
        return
    print_facts([*_execution(found), *_streams(found, digests), *_statements(found)])


def _worktree_or_nothing(client: PlaneClient, wanted: str) -> Json:
    """The worktree of this id. Raises PlaneRefused that speaks of executions, too: both were looked for."""
    try:
        return client.get(f"/worktrees/{wanted}")
    except PlaneRefused as exc:
        if exc.status != NOT_FOUND:
            raise
        raise PlaneRefused(exc.status, exc.reason, "no execution and no worktree has this id") from None


def _worktree(found: Json) -> list[tuple[str, str]]:
    names = ("id", "state", "repo", "base", "branch", "path", "head", "cmd_id", "reason", "detail")
    facts = [("runner", f"{found['runner_name']} ({found['runner']})"), ("created", moment(found["created_ms"]))]
    return (
        [(name, str(found[name])) for name in names[:2]] + facts + [(n, str(found[n])) for n in names[2:] if found[n]]
    )


def _execution(found: Json) -> list[tuple[str, str]]:
    state = found["state"] + (", stop requested" if found["stop_requested"] else "")
    facts = [
        ("execution", f"{found['id']}, attempt {found['start_token']}"),
        ("runner", f"{found['runner_name']} ({found['runner']})"),
        ("command", shell_words(found["argv"])),
        ("directory", str(found["worktree"] or found["cwd"])),
        ("created", moment(found["created_ms"])),
        ("state", state),
    ]
    if found["reason"] or found["detail"]:
        facts.append(("reason", " ".join(str(part) for part in (found["reason"], found["detail"]) if part)))
    if found["exit_status"] is not None:
        facts.append(("exit status", str(found["exit_status"])))
    return facts


def _streams(found: Json, digests: Json) -> list[tuple[str, str]]:
    written = (found["settlement"] or {}).get("streams") or {}
    facts = []
    for name in sorted({*written, *digests["streams"]}):
        facts.append((f"{name} written", _stream(written.get(name))))
        same = written.get(name) == digests["streams"].get(name)
        verdict = "" if not written else "  (the same)" if same else "  (NOT the same)"
        facts.append((f"{name} stored", _stream(digests["streams"].get(name)) + verdict))
    log = digests["log"]
    words = [f"{log['end']} bytes in {log['segments']} segments", "complete" if digests["complete"] else "not complete"]
    words.append("chain proven" if digests["chain_ok"] else "chain NOT proven")
    words += [f"{end - start} bytes missing at {start}" for start, end in digests["gaps"]]
    return [*facts, ("log", ", ".join(words))]


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
    try:
        client.get(f"/executions/{wanted}")
    except PlaneRefused as exc:
        if exc.status != NOT_FOUND:
            raise
        _worktree_or_nothing(client, wanted)
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
