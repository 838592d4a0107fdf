"""A terminal that nobody looks at: what its screen shows after some output, and how another one is made to show the same.

The emulator (pyte) has one screen and reads less than programs write: each of the two screens gets one of its own here, what it would
misread is left out, what it does not know is added, and line drawing is given to it as characters.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

import pyte
from pyte.screens import Char

from terminal.modes import Modes
from terminal.replay import CLEAR, FRESH
from terminal.sequences import unfinished

REPEATS_MAX: Final = 1000
"""Cells of the longest line: more repetitions of a character, or more lines to scroll, show nothing else."""
_SWITCH: Final = re.compile(rb"\x1b(?:\[\?(?:[0-9]{1,5};){0,4}(?:47|1047|1049)(?:;[0-9]{1,5}){0,4}([hl])|(c))")
_TITLE: Final = re.compile(rb"\x1b\][02];([^\x07\x18\x1a\x1b]{0,256})(?:\x07|\x1b\\)")
_MISREAD: Final = re.compile(
    rb"\x1b(?:[PX^_][^\x18\x1a\x1b]*(?:\x1b\\|[\x18\x1a])?"  # strings: it shows them
    rb"|\][^\x07\x18\x1a\x1b]*(?:\x07|\x1b\\|[\x18\x1a])?"
    rb"|\[[<=>][0-9;:]*[\x20-\x2f]*[\x40-\x7e]|\[\??[0-9;:]*[\x20-\x2f]+[\x40-\x7e]"  # it takes them for others
    rb"|\[\?[0-9;:]*[^hl0-9;:\x00-\x1f]|\[[0-9;:]*[nctx]"
    rb"|[\x20-\x22\x24-\x27*-\x2f][\x30-\x7e]|[=>\\])"
    rb"|[\x00-\x06\x10-\x1a\x1c-\x1f\x7f]"
)
_COLONS: Final = re.compile(rb"\x1b\[[0-9;]*:[0-9;:]*m")
_CHARSET: Final = re.compile(rb"\x1b\(([0-9A-Z])|\x1b\)[0-9A-Z]")
_SEQUENCE: Final = re.compile(rb"(\x1b(?:\[[0-9;?]*[\x40-\x7e]|.))", re.DOTALL)
_LINES: Final = dict(zip(range(0x60, 0x7F), "◆▒␉␌␍␊°±␤␋┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·", strict=True))
_UNSHOWN: Final = frozenset({"Cc", "Cf", "Mn", "Me", "Zl", "Zp"})
_STYLES: Final = (("bold", 1), ("italics", 3), ("underscore", 4), ("blink", 5), ("reverse", 7), ("strikethrough", 9))
_COLOURS: Final = ("black", "red", "green", "brown", "blue", "magenta", "cyan", "white")


class Emulator:
    """A terminal with its two screens, its modes and its title."""

    def __init__(self, rows: int, cols: int) -> None:
        self._rows, self._cols = rows, cols
        self._main = self._shown = _Screen(rows, cols)
        self._title = b""
        self._rest = b""
        self.modes = Modes()

    def feed(self, data: bytes) -> None:
        """Take output as it comes, cut anywhere."""
        text = self._rest + data
        self._rest = unfinished(text)
        # A string too long to be held back loses its middle, which shows nothing.
        whole = text[: text.rfind(b"\x1b")] if self._rest else text
        self.modes.feed(whole)
        for title in _TITLE.finditer(whole):
            self._title = title[1]
        at = 0
        for match in _SWITCH.finditer(whole):
            self._shown.feed(whole[at : match.start()])
            at = match.end()
            self._switch(match)
        self._shown.feed(whole[at:])

    def resize(self, rows: int, cols: int) -> None:
        """It has another size now."""
        self._rows, self._cols = rows, cols
        for screen in {self._main, self._shown}:
            screen.canvas.resize(rows, cols)

    @property
    def lines(self) -> list[str]:
        """What is shown, as text."""
        return ["".join(cell.data for cell in row) for row in self.cells]

    @property
    def cursor(self) -> tuple[int, int]:
        """Row and column of the cursor, from 0."""
        canvas = self._shown.canvas
        return canvas.cursor.y, min(canvas.cursor.x, canvas.columns - 1)

    @property
    def cells(self) -> list[list[Char]]:
        """What is shown, with its colours."""
        canvas = self._shown.canvas
        return [list(_whole([canvas.buffer[row][col] for col in range(canvas.columns)])) for row in range(canvas.lines)]

    def draw(self) -> bytes:
        """What makes another terminal of this size show the same: screen, colours, modes, region, title, cursor."""
        canvas = self._shown.canvas
        parts = [FRESH, self.modes.setting(), CLEAR]
        if self._title:
            parts.append(b"\x1b]2;%s\x07" % self._title)
        for row, cells in enumerate(self.cells):
            if any(cell != canvas.default_char for cell in cells):
                parts += [b"\x1b[%dH" % (row + 1), *_drawn(cells, canvas.default_char)]
        top, (row, col) = 0, self.cursor
        if canvas.margins is not None:
            parts.append(b"\x1b[%d;%dr" % (canvas.margins.top + 1, canvas.margins.bottom + 1))
            # With origin mode on, rows count from the top of the region.
            top = canvas.margins.top if self.modes.changed.get(6) else 0
        parts += [b"\x1b[%d;%dH" % (row - top + 1, col + 1), _pen(canvas.cursor.attrs)]
        return b"".join(parts)

    def _switch(self, match: "re.Match[bytes]") -> None:
        if match[2]:
            self._main = self._shown = _Screen(self._rows, self._cols)
        elif match[1] == b"h" and self._shown is self._main:
            self._shown = _Screen(self._rows, self._cols)
            before, cursor = self._main.canvas.cursor, self._shown.canvas.cursor
            cursor.y, cursor.x = before.y, before.x
        elif match[1] == b"l":
            self._shown = self._main


class _Canvas(pyte.Screen):
    """One screen, with the acts that programs rely on and the emulator lacks."""

    last = " "

    def draw(self, data: str) -> None:
        """Text at the cursor. One character that takes no room would end all that comes with it."""
        if not (data.isascii() and data.isprintable()):
            data = "".join(
                char for char in data if unicodedata.category(char) not in _UNSHOWN or unicodedata.combining(char)
            )
        if data:
            self.last = data[-1]
            super().draw(data)

    def repeat(self, count: int = 1, **_: Any) -> None:
        """REP: the last character again."""
        self.draw(self.last * min(max(count, 1), REPEATS_MAX))

    def scroll_up(self, count: int = 1, **_: Any) -> None:
        """SU: the region moves up, the cursor stays."""
        self._scroll(count, up=True)

    def scroll_down(self, count: int = 1, **_: Any) -> None:
        """SD: the region moves down, the cursor stays."""
        self._scroll(count, up=False)

    def back_tab(self, count: int = 1, **_: Any) -> None:
        """CBT: to tab stops before the cursor."""
        before = sorted((stop for stop in self.tabstops if stop < self.cursor.x), reverse=True)
        self.cursor.x = (before[count - 1 : count] or [0])[0]

    def _scroll(self, count: int, *, up: bool) -> None:
        row = self.cursor.y
        top, bottom = (0, self.lines - 1) if self.margins is None else self.margins
        self.cursor.y = bottom if up else top
        for _ in range(min(max(count, 1), REPEATS_MAX)):
            self.index() if up else self.reverse_index()
        self.cursor.y = row


class _Stream(pyte.ByteStream):
    csi = {
        **pyte.Stream.csi, "b": "repeat", "S": "scroll_up", "T": "scroll_down", "Z": "back_tab", "s": "save_cursor",
        "u": "restore_cursor",
    }  # fmt: skip


class _Screen:
    def __init__(self, rows: int, cols: int) -> None:
        self.canvas = _Canvas(cols, rows)
        self._stream = _Stream(self.canvas)
        self._drawing = False

    def feed(self, data: bytes) -> None:
        text = _COLONS.sub(_with_semicolons, _MISREAD.sub(b"", data))
        at = 0
        for match in _CHARSET.finditer(text):
            self._draw(text[at : match.start()])
            self._drawing = match[1] == b"0" if match[1] else self._drawing
            at = match.end()
        self._draw(text[at:])

    def _draw(self, text: bytes) -> None:
        self._stream.feed(b"".join(_as_lines(text)) if self._drawing else text)


def _as_lines(text: bytes) -> Iterator[bytes]:
    """Text in the line drawing set as the characters it stands for; sequences stay."""
    for place, piece in enumerate(_SEQUENCE.split(text)):
        yield piece if place % 2 else piece.decode("utf-8", "replace").translate(_LINES).encode()


def _with_semicolons(match: "re.Match[bytes]") -> bytes:
    """SGR with sub-parameters as the emulator reads it: colours by semicolons, every underline as one."""
    said: list[bytes] = []
    for parameter in match[0][2:-1].split(b";"):
        parts = parameter.split(b":")
        if parts[0] in (b"38", b"48") and len(parts) > 2:
            said += [*parts[:2], *(parts[-3:] if parts[1] == b"2" else parts[2:3])]
        elif parts[0] == b"4" and len(parts) > 1:
            said.append(b"24" if parts[1] == b"0" else b"4")
        elif parts[0] != b"58":
            said.append(parts[0])
    return b"\x1b[%bm" % b";".join(said) if said else b""


def _is_wide(cell: Char) -> bool:
    return bool(cell.data) and unicodedata.east_asian_width(cell.data[0]) in ("W", "F")


def _whole(cells: list[Char]) -> Iterator[Char]:
    """A row without halves of wide characters whose other half was written over."""
    for place, cell in enumerate(cells):
        before = cells[place - 1] if place else None
        behind = cells[place + 1] if place + 1 < len(cells) else None
        alone = _is_wide(cell) and (behind is None or behind.data)
        orphan = not cell.data and (before is None or not _is_wide(before))
        yield cell._replace(data=" ") if alone or orphan else cell


def _drawn(cells: list[Char], blank: Char) -> Iterator[bytes]:
    """A row from its first column on; blanks at its end are left to the clear that came before."""
    last = max(place for place, cell in enumerate(cells) if cell != blank)
    for attributes, group in groupby(cells[: last + 1], key=lambda cell: cell._replace(data="")):
        # The second half of a wide character holds nothing.
        yield _pen(attributes) + "".join(cell.data for cell in group).encode("utf-8", "replace")
    yield b"\x1b[m"


def _pen(char: Char) -> bytes:
    codes = ["0", *(str(code) for name, code in _STYLES if getattr(char, name))]
    codes += _colour(char.fg, 30) + _colour(char.bg, 40)
    return f"\x1b[{';'.join(codes)}m".encode()


def _colour(name: str, base: int) -> list[str]:
    """A colour as the emulator names it: by name, `bright` before it, or six hexadecimal digits."""
    if name == "default":
        return []
    # One of its bright names has a letter in the wrong place.
    plain = name.replace("bfight", "bright").removeprefix("bright")
    if plain in _COLOURS:
        return [str(_COLOURS.index(plain) + base + (0 if plain == name else 60))]
    red, green, blue = (int(name[at : at + 2], 16) for at in (0, 2, 4))
    return [str(base + 8), "2", str(red), str(green), str(blue)]
