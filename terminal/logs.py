"""What `logs` of both command lines have in common: options, what they ask for, and printing what is met."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from protocol.limits import JSON_INT_MAX
from protocol.logevents import WithEvents
from protocol.logproof import Proof
from protocol.logselect import STREAM_NAMES, Cut, Selection, Wish
from protocol.logtext import Piece, View, how_it_ended
from protocol.logviews import Format, make_view
from protocol.moments import moment_ns
from protocol.records import Record
from protocol.text import duration_ms, visible
from terminal.options import SIZE
from terminal.printing import print_json, safe_streams, write_piece

_NS_PER_MS: Final = 1_000_000
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Since:
    """A point in time: `at_ns`, or so long before now."""

    at_ns: int | None = None
    ago_ms: int = 0

    def ns(self, now_ms: int) -> int:
        """The point, when it is now `now_ms`."""
        return max(0, now_ms - self.ago_ms) * _NS_PER_MS if self.at_ns is None else self.at_ns


class _SinceType(click.ParamType[Since]):
    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Since:
        """A duration before now, or an RFC 3339 time."""
        if isinstance(value, Since):
            return value
        try:
            return Since(ago_ms=duration_ms(value))
        except ValueError:
            pass
        try:
            return Since(at_ns=moment_ns(value))
        except ValueError:
            self.fail("expected a duration such as 10m, or a time such as 2026-11-21T21:30:00Z", param, ctx)


_OPTIONS: Final = (
    click.option("--follow", "-f", is_flag=True, help="Go on until the log is complete."),
    click.option("--since", type=_SinceType(), metavar="TIME", help="From then on: 10m (ago), or an RFC 3339 time."),
    click.option("--tail", type=click.IntRange(0, JSON_INT_MAX), metavar="N", help="Only the last N lines."),
    click.option("--offset", type=SIZE, metavar="BYTES", help="Begin at the record that holds this offset of the log."),
    click.option("--stream", type=click.Choice(list(STREAM_NAMES)), help="Only this stream."),
    click.option("--timestamps", "-t", is_flag=True, help="Begin each line with the time of its first byte (UTC)."),
    click.option("--raw", is_flag=True, help="Send control characters to the terminal as they are."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object for each record, gap and end."),
    click.option("--export", type=click.Choice(["asciicast", "cri"]), help="In the format of other programs."),
    click.option(
        "--verify", is_flag=True, help="Prove what is stored instead of printing it; status 1 when it is not."
    ),
)


def log_options(command: F) -> F:
    """The options of `logs`, for `read_request`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRequest:
    """What is asked for."""

    wish: Wish
    form: Format
    follow: bool
    raw: bool
    verify: bool
    as_json: bool


def read_request(
    now_ms: int,
    *,
    follow: bool,
    since: Since | None,
    tail: int | None,
    offset: int | None,
    stream: str | None,
    timestamps: bool,
    raw: bool,
    as_json: bool,
    export: str | None,
    verify: bool,
) -> LogRequest:
    """What the options say together. Raises click.UsageError when they contradict each other."""
    given = {
        "-f": follow,
        "--since": since is not None,
        "--tail": tail is not None,
        "--offset": offset is not None,
        "--stream": stream is not None,
        "--timestamps": timestamps,
        "--raw": raw,
        "--export": export is not None,
        "--json": as_json,
    }
    if verify:
        _refuse("--verify", given, [name for name in given if name != "--json"], "it reads the whole log")
    if offset is not None:
        _refuse("--offset", given, ["--since", "--tail"], "each says where to begin")
    if as_json or export is not None:
        form = "--json" if as_json else "--export"
        others = ["--timestamps", "--raw", "--export"] if as_json else ["--timestamps", "--raw"]
        _refuse(form, given, others, "its format has times and escapes of its own")
    plain = Format.STAMPED if timestamps else Format.PLAIN
    return LogRequest(
        wish=Wish(
            offset=offset or 0,
            since_ns=None if since is None else since.ns(now_ms),
            tail=tail,
            stream=None if stream is None else STREAM_NAMES[stream],
        ),
        form=Format.JSON if as_json else plain if export is None else Format(export),
        follow=follow,
        raw=raw,
        verify=verify,
        as_json=as_json,
    )


def _refuse(option: str, given: Mapping[str, bool], others: list[str], why: str) -> None:
    if both := [name for name in others if given[name]]:
        raise click.UsageError(f"{option} does not go with {both[0]}: {why}")


class LogPrinter:
    """Prints what is wanted of a log, record by record."""

    def __init__(self, view: View, wish: Wish, write: Callable[[Piece], None] = write_piece) -> None:
        self._view = view
        self._selection = Selection(wish)
        self._write = write

    @classmethod
    def of(cls, request: LogRequest) -> "LogPrinter":
        """The printer for what is asked for, to this process's standard streams."""
        view = make_view(request.form, safe_streams(raw=request.raw))
        if request.form is Format.PLAIN:
            view = WithEvents(view, bars=request.follow and sys.stderr.isatty())
        return cls(view, request.wish)

    def begin(self, cuts: Mapping[int, Cut]) -> None:
        """Where each stream begins, before the first record."""
        self._selection.cut(cuts)

    def show(self, record: Record) -> None:
        """The next record."""
        wanted = self._selection.take(record)
        if wanted is not None:
            for piece in self._view.show(wanted):
                self._write(piece)

    def gap(self, start: int, end: int) -> None:
        """A hole."""
        if self._selection.wants_gap(end):
            for piece in self._view.gap(start, end):
                self._write(piece)

    def finish(self, fate: Mapping[str, Any] | None) -> None:
        """The end of what there is; `fate` where the log is complete."""
        for piece in self._view.finish() if fate is None else (*self._view.finish(), *self._view.ended(fate)):
            self._write(piece)
        if fate is not None and sys.stderr.isatty():
            click.echo(f"[{how_it_ended(fate)}]", err=True)


def print_proof(proof: Proof, about: str, *, as_json: bool) -> None:
    """What a verification found; the verdict is the last line."""
    if as_json:
        print_json({"ok": proof.ok, "proven": proof.proven, "missing": proof.missing, "wrong": proof.wrong})
        return
    said = (("proven", "green", proof.proven), ("missing", "yellow", proof.missing), ("WRONG", "red", proof.wrong))
    for title, colour, sentences in said:
        for sentence in sentences:
            click.echo(f"{click.style(title.ljust(7), fg=colour)}  {visible(sentence)}")
    click.echo(f"{about}: {'what is stored is what was signed' if proof.ok else 'NOT proven'}")
