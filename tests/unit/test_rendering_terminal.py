"""What both command lines print at a terminal, judged by a terminal: an emulator is fed every naughty string by every path.

Of what arrives there nothing but text, line ends, tabs and colours of our own may be obeyed: no mode, no title, no report, no cursor
that goes where text does not, and colours are back to plain at the end of each line. A bar of progress may erase its own line.

Hand mutants, each tried, and each red: `Visible.feed` keeps ESC, CR or U+009B; `LogText` forgets its filters; a table or a complaint
that shows words as they came.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pyte
import pytest
from ptyprocess import PtyProcess

from protocol.logevents import WithEvents
from protocol.logtext import Piece, Standard
from protocol.logviews import Format, make_view
from protocol.records import Record, RecordKind
from tests.support.stand import stand

NAUGHTY: Final = Path(__file__).parents[3] / "shared" / "vectors" / "blns" / "blns.json"
OURS: Final = (
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]2;title\x1b\\",
    "\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://x/\x07link\x1b]8;;\x07",
    "\x1bP$qm\x1b\\",
    "\x1b_G\x1b\\",
    "\x1b[?1049h",
    "\x1b[?25l",
    "\x1b[?1000h\x1b[?1006h",
    "\x1b[?2004h",
    "\x1b[4h",
    "\x1b[5n",
    "\x1b[6n",
    "\x1b[c",
    "\x1b[>c",
    "\x1bZ",
    "\x1bc",
    "\x1b[!p",
    "\x1b(0lqqk",
    "\x1b[5;10r",
    "\x1b[31mred, and never plain again",
    "\x1b[8mhidden",
    "\x1b7\x1b[99A\x1b8",
    "\x9b31mC1",
    "\x9d0;C1 title\x9c",
    "\x90C1 DCS\x9c",
    "\x0e\x0fshifted",
    "\x05answerback",
    "bell\x07 back\x08\x08 over\rwritten",
    "\x0bvertical\x0cform feed",
    "\x7fdel",
    "\u202eright to left\u202c",
    "\u2028line\u2029paragraph",
    "\u200b\ufeffzero width",
    "\x85next line",
    "[bold red]markup[/]",
    "half of an escape \x1b",
    "half of a sequence \x1b[",
    "\udc9bundecodable",
)
"""Each would have a terminal do something, if it got there."""
OBEYED: Final = frozenset({"draw", "linefeed", "carriage_return", "tab"})
SGR: Final = frozenset({0, 1, 2, 3, 4, 22, 39, *range(30, 38), *range(90, 98)})
"""Bold, dim, italic, underlined, and the foreground colours: what `click` and `rich` make of ours."""
STEP_S: Final = 60.0
COLS: Final = 160
ROWS: Final = 50
PRINTING: Final = """
import json, sys
from terminal import printing
for word in json.load(open(sys.argv[1])):
    printing.print_facts([("name", word), ("other", word)])
    printing.print_table({"ok": "green", word: "red"}, ("ONE", "TWO"), [(word, "ok"), ("ok", word)])
    printing.complain("runner", word, "runner doctor")
    printing.print_json({"word": word})
"""
"""Every way in which a command line prints words, at whatever its stdout is."""


def words() -> list[str]:
    """Ours, and the public list where it is beside this checkout."""
    public = json.loads(NAUGHTY.read_text("utf-8")) if NAUGHTY.exists() else []
    return [*OURS, *public]


def as_bytes(word: str) -> bytes:
    """What a program would write to say it; C1 controls also as the bytes that they are."""
    return word.encode("utf-8", "surrogateescape")


class Terminal:
    """An emulator that notes whatever it was made to do beyond showing text."""

    def __init__(self, *, bar: bool = False) -> None:
        self.screen = pyte.Screen(COLS, ROWS)
        self.modes = set(self.screen.mode)
        self.obeyed: list[tuple[str, tuple[Any, ...]]] = []
        self.answered: list[str] = []
        self.screen.write_process_input = self.answered.append
        self.shown = ""
        self._returned = False
        """The cursor is where its line began, and what comes next would overwrite it."""
        self._allowed = OBEYED | ({"erase_in_line"} if bar else frozenset())
        self._stream = pyte.Stream(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        def happens(*args: Any, **more: Any) -> None:
            if name == "select_graphic_rendition" and set(args) <= SGR and not more:
                pass
            elif name not in self._allowed:
                self.obeyed.append((name, args))
            if self._returned and name == "draw":
                self.obeyed.append(("a line that is overwritten", args))
            self._returned = name == "carriage_return"
            if name == "draw":
                self.shown += args[0]
            if name == "linefeed":
                self.shown += "\n"
                if self.screen.cursor.attrs != self.screen.default_char:
                    self.obeyed.append(("a colour that outlives its line", (self.shown[-40:],)))
            getattr(self.screen, name)(*args, **more)

        if name not in pyte.Stream.events:
            raise AttributeError(name)
        return happens

    def feed(self, data: bytes, *, cooked: bool = False) -> None:
        """Bytes that come; `cooked`: not through a kernel's terminal, which would have made CR LF of LF."""
        self._stream.feed((data.replace(b"\n", b"\r\n") if cooked else data).decode("utf-8", "replace"))

    def judge(self) -> None:
        """Nothing was obeyed, and everything is as it was."""
        assert self.obeyed == []
        assert self.answered == []
        assert (self.screen.mode, self.screen.margins, self.screen.title, self.screen.icon_name) == (
            self.modes,
            None,
            "",
            "",
        )
        assert not self.screen.cursor.hidden and self.screen.charset == 0
        assert self.screen.cursor.attrs == self.screen.default_char


def test_the_judge_sees_what_is_obeyed() -> None:
    """Most of our own strings, as they are, would do something: whoever judges notices each."""
    harmless = set()
    for word in OURS:
        terminal = Terminal()
        terminal.feed(as_bytes(word))
        # What is no sequence by itself may be one with what follows.
        terminal.feed(b"c\r\n")
        try:
            terminal.judge()
        except AssertionError:
            continue
        harmless.add(word)
    assert len(harmless) < len(OURS) / 2, harmless


def records_of(kind: RecordKind, texts: Iterable[bytes]) -> list[Record]:
    """Each text cut in two by a record, which is where a filter could lose its state."""
    pieces = [piece for text in texts for piece in (text[: len(text) // 2], text[len(text) // 2 :])]
    return [Record(at * 1000, kind, at * 1_000_000, piece) for at, piece in enumerate(pieces)]


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("kind", [RecordKind.STDOUT, RecordKind.STDERR, RecordKind.PTY])
def test_a_log_at_a_terminal_shows_and_does_nothing(form: Format, kind: RecordKind) -> None:
    """In every format, of every stream; also an end that a stranger worded."""
    view = WithEvents(make_view(form, frozenset(Standard)), bars=False)
    terminal = Terminal()
    for record in records_of(kind, [as_bytes(word) + b"\n" for word in words()]):
        show(terminal, view.show(record))
    show(terminal, view.gap(10**9, 10**9 + 5))
    show(terminal, view.finish())
    for word in OURS:
        show(terminal, view.ended({"verdict": word, "cause": {"kind": word, "reason": word}}))
    terminal.judge()
    assert "31mred" in terminal.shown


@pytest.mark.parametrize("bars", [False, True])
def test_what_a_program_tells_beside_its_output_does_nothing(bars: bool) -> None:
    """Labels, remarks, files, artifacts and paths; the bar erases its own line, and nothing else."""
    told = []
    for word in (word.encode("utf-8", "replace").decode() for word in words()):
        told += [
            {"type": "progress", "value": 0.5, "label": word},
            {"type": "annotation", "level": "error", "message": word or "-", "file": word, "line": 3},
            {"type": "artifact", "name": word or "-", "path": word, "bytes": 5},
        ]
    lines = [json.dumps(one).encode() + b"\n" for one in told]
    view = WithEvents(make_view(Format.PLAIN, frozenset(Standard)), bars=bars)
    terminal = Terminal(bar=bars)
    for event, output in zip(records_of(RecordKind.EVENT, lines), records_of(RecordKind.STDOUT, lines), strict=True):
        show(terminal, view.show(event))
        show(terminal, view.show(output))
    show(terminal, view.finish())
    terminal.judge()
    assert "31mred" in terminal.shown


def show(terminal: Terminal, pieces: Iterable[Piece]) -> None:
    """Both standard streams are the same terminal."""
    for piece in pieces:
        terminal.feed(piece.data, cooked=True)


# --- programs at a terminal of their own ------------------------------------------------------------------------------


async def at_terminal(*argv: str, env: Mapping[str, str] | None = None, bar: bool = False) -> Terminal:
    """Run a program whose stdout and stderr are a terminal, to its end."""

    def run() -> bytes:
        program = PtyProcess.spawn(list(argv), env=dict(env or os.environ), dimensions=(ROWS, COLS), echo=False)
        said = bytearray()
        try:
            while True:
                said += program.read(65536)
        except EOFError:
            return bytes(said)
        finally:
            program.close(force=True)

    terminal = Terminal(bar=bar)
    terminal.feed(await asyncio.wait_for(asyncio.to_thread(run), STEP_S))
    return terminal


async def test_tables_facts_complaints_and_json_do_nothing(tmp_path: Path) -> None:
    """At a real terminal, in the colours it takes."""
    (tmp_path / "words.json").write_text(json.dumps(words()))
    env = {**os.environ, "TERM": "xterm-256color"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("NO_COLOR", None)
    terminal = await at_terminal(sys.executable, "-c", PRINTING, str(tmp_path / "words.json"), env=env)
    terminal.judge()
    assert re.search(r"\\x1b\[31mred", terminal.shown) and "next: runner doctor" in terminal.shown


@pytest.mark.slow
async def test_command_lines_do_nothing_to_the_terminal_they_run_in() -> None:
    """A whole system: arguments, output while it comes and later, lists, status, story, refusals, and mistakes of whoever types."""
    async with stand() as system:
        env = {**system.env, "TERM": "xterm-256color"}
        env.pop("NO_COLOR", None)
        (system.home / "words").write_bytes(b"\n".join(map(as_bytes, words())) + b"\n")
        named = [word for word in OURS if not re.search("[\ud800-\udfff]", word)]
        cat = ("sh", "-c", 'cat "$0"; cat "$0" >&2', str(system.home / "words"), *named)
        at = ("--cwd", str(system.home))

        async def runs(*argv: str) -> str:
            terminal = await at_terminal(
                str(Path(sys.executable).parent / argv[0]), *argv[1:], env=env, bar="-f" in argv
            )
            terminal.judge()
            return terminal.shown

        # Without --detach `exec` is its command, byte for byte, as `ssh` is: what that says to the terminal is meant.
        execution = (await runs("runner-control", "exec", "--detach", "stand", *at, "--", *cat)).strip()
        await system.ended(execution)
        logs = [(reader, "logs", *how, execution) for reader in ("runner", "runner-control") for how in ([], ["-f"])]
        for shown in await asyncio.gather(*(runs(*argv) for argv in logs)):
            assert "\\x1b[31mred" in shown
        listings = (
            ("runner", "explain", execution),
            ("runner", "ps", "--all"),
            ("runner", "status"),
            ("runner-control", "ps"),
            ("runner-control", "show", execution),
        )
        assert all(await asyncio.gather(*(runs(*argv) for argv in listings)))
        typed = "\x1b[31m\x1b]0;title\x07\x9b5n"
        mistakes = (
            ("runner", "logs", typed),
            ("runner-control", "logs", typed),
            ("runner-control", "exec", "stand", "--cwd", f"/{typed}", "--", "true"),
            ("runner-control", typed),
        )
        assert all(await asyncio.gather(*(runs(*argv) for argv in mistakes)))
