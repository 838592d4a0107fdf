"""`runner explain`: the whole story of an execution, from the journal."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from protocol.text import visible
from runner.render import complain
from runner.verbs.options import ExitCode, settings_of
from terminal.options import as_json
from terminal.printing import print_json

if TYPE_CHECKING:
    from runner.adapters.journal_story import Entry, Fact
    from runner.config import Settings

DIGEST_SHOWN: Final = len("sha256:") + 12
WHAT_WIDTH: Final = 17
_DIGEST: Final = re.compile(r"(sha256:)?[0-9a-f]{64}")
_NOT_SHOWN: Final = ("attempt", "written", "acked")
"""Evidence that the line itself says."""


@click.command(short_help="Tell the whole story of an execution.")
@click.argument("wanted", metavar="ID")
@as_json
@click.pass_context
def explain(ctx: click.Context, wanted: str, as_json: bool) -> None:
    """Tell the whole story of an execution in order, with its evidence: every command about it, each decision and why,
    leases and their tokens, processes, signals, how far its log was stored, how it ended, and when the control plane
    knew.

    ID is an execution, an attempt, a command or a worktree. It is read from the journal, with or without a daemon. Values of
    variables and secrets are not shown.

    \b
    Examples:
      runner explain ex_01jx
      runner explain ex_01jx --json | jq '.[] | select(.what == "signal.sent")'
    """
    from runner.adapters.journal_story import read_story
    from runner.adapters.succession import JOURNAL
    from runner.errors import Broken, Refused

    settings = settings_of(ctx)
    try:
        story = read_story(settings.state_dir / JOURNAL, wanted)
    except Refused as exc:
        complain(str(exc), "runner ps --all")
        ctx.exit(ExitCode.INTERNAL)
    except Broken as exc:
        complain(exc.detail, "runner doctor --only R007")
        ctx.exit(ExitCode.INTERNAL)
    told = [*story.entries, *(entry for name in story.attempts for entry in _files(settings, name))]
    if as_json:
        print_json([asdict(entry) for entry in told])
    else:
        for entry in told:
            _print(entry, several=len(story.attempts) > 1)


def _files(settings: "Settings", name: str) -> "list[Entry]":
    """What the files of an attempt say now, while they are kept."""
    from runner.adapters.attemptfiles import ATTEMPTS_DIR, read_attempt, written_end
    from runner.adapters.journal_story import Entry
    from runner.adapters.uplink import read_ack
    from runner.adapters.wallclock import wall_ms

    directory = settings.state_dir / ATTEMPTS_DIR / name
    if not directory.is_dir():
        return [
            Entry(at_ms=wall_ms(), what="files.gone", detail="its directory was removed", evidence={"attempt": name})
        ]
    files, end, acked = read_attempt(directory), written_end(directory), read_ack(directory)
    detail = f"{files.state}; the log is written to {end or 0}, stored at the control plane to {acked or 0}"
    evidence: dict[str, Fact] = {"attempt": name, "directory": str(directory), "written": end, "acked": acked}
    return [Entry(at_ms=wall_ms(), what="files.now", detail=detail, evidence=evidence)]


def _print(entry: "Entry", *, several: bool) -> None:
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(entry.at_ms / 1000, UTC).astimezone()
    shown = {name: value for name, value in entry.evidence.items() if value is not None and name not in _NOT_SHOWN}
    named = [f"{entry.evidence['attempt']}:"] if several and "attempt" in entry.evidence else []
    proof = ", ".join(f"{name} {_short(value)}" for name, value in shown.items())
    words = [
        f"{moment:%Y-%m-%d %H:%M:%S}.{entry.at_ms % 1000:03d} ",
        click.style(entry.what.ljust(WHAT_WIDTH), bold=True),
        *map(visible, filter(None, [*named, entry.detail])),
        *([click.style(f"[{visible(proof)}]", dim=True)] if proof else []),
    ]
    click.echo(" ".join(words))


def _short(value: "Fact") -> str:
    """Digests are cut: enough is left to find them by, and --json has all of it."""
    text = str(value)
    return text[:DIGEST_SHOWN] if _DIGEST.fullmatch(text) else text
