"""What a viewer of a PTY knows: what it has shown, what it typed that nobody has taken yet, and how it stands. Pure.

Theory of operation. A line to the PTY comes and goes; what is heard and typed is put in here, and what is to be done comes out, in
order. Typed bytes have offsets of this viewer's own and are kept until they are taken.

Rule 1. What was typed is said from the first byte that is not taken, each time there is a line anew: what was taken meanwhile is not
        taken twice, so no byte is typed twice or lost.
Rule 2. Nothing is typed while a replay is shown: a terminal answers some of it, and the answers would be typed into the program.
Rule 3. A line that comes back goes on where the last one ended, unless something of ours was written across the screen.
"""

from dataclasses import dataclass
from typing import Final

from protocol.limits import TYPED_BYTES_MAX
from terminal.modes import Modes

SEEN_BYTES: Final = 64 * 1024
"""Shown between two words about it: half of what a PTY may be ahead before it waits would be too late."""
HELD_BYTES_MAX: Final = 1024 * 1024
"""Typed and not taken: a large paste. Beyond it nothing more is read from the keyboard."""
WHOLE_REGION: Final = b"\x1b7\x1b[r\x1b8"
"""All lines scroll, and the cursor stays where it is."""
FATAL: Final = frozenset({"BAD_SIG", "UNKNOWN_VIEWER"})
"""Why nothing that this viewer types will ever be taken."""


# --- what is said ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Begin:
    """First on every line: what is to be shown, or from where on (`offset`), on a screen of this size."""

    attach: str
    offset: int | None
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class Typing:
    """Bytes from this viewer's own `offset` on."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resizing:
    """The size of the window; a later `gen` counts."""

    gen: int
    rows: int
    cols: int
    redraw: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything up to this log offset was shown."""

    offset: int


Said = Typing | Resizing | Seen


# --- what is heard -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Begun:
    """The line stands: what is shown begins at the log offset `offset`; `received` of this viewer was taken before."""

    attempt: str
    writes: bool
    offset: int
    received: int


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes for the terminal, up to the log offset `end`."""

    end: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Live:
    """The replay is through."""

    offset: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Below `received` what was typed is taken, up to `credit` there is room."""

    received: int
    credit: int
    closed: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """What follows is a new replay."""


@dataclass(frozen=True, slots=True)
class Sized:
    """The PTY has another size from here on."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Whether the machine of the PTY cannot be reached now, though the line stands."""

    gone: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The PTY has ended, with this status for a shell."""

    status: int


Heard = Begun | Output | Live | Taken | Skipped | Sized | Absent | Ended


# --- what is to be done ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Show:
    """Bytes to the terminal."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Again:
    """The line is to be made anew, for a new replay."""


@dataclass(frozen=True, slots=True)
class Finish:
    """It is over; `complaint` says why where neither the PTY ended nor the person `left`."""

    status: int
    complaint: str = ""
    left: bool = False


Effect = Said | Show | Again | Finish


class Viewing:
    """One viewer, across all its lines. `gen`: sizes are numbered from it on."""

    def __init__(self, attach: str, rows: int, cols: int, *, gen: int) -> None:
        self.modes = Modes()
        self.trouble: str | None = None
        """Why nothing comes now; None: all is well."""
        self.spoiled = False
        """Something of ours was written across the screen."""
        self._attach = attach
        self._rows, self._cols = rows, cols
        self._gen = gen
        self._attempt: str | None = None
        self._writes = True
        self._shown: int | None = None
        self._asked: int | None = None
        self._told_seen = 0
        self._live = False
        self._resumes = False
        self._base = 0
        self._sent = 0
        self._credit = 0
        self._kept = bytearray()
        self._rewound: tuple[int, int] | None = None

    @property
    def unanswered(self) -> int:
        """Bytes that were typed and are not taken."""
        return len(self._kept)

    @property
    def clears(self) -> bool:
        """Whether the screen is cleared first."""
        return self._attach in ("replay", "snapshot")

    @property
    def base(self) -> int:
        """Below it, all that was typed is taken."""
        return self._base

    @property
    def unsaid(self) -> bool:
        """Whether more was shown than was told."""
        return self._live and self._shown is not None and self._shown > self._told_seen

    @property
    def live(self) -> bool:
        """Whether what is typed is said at once."""
        return self._live

    def begin(self) -> Begin:
        """There is a line, or there is about to be one."""
        self._live = False
        offset = None if self.spoiled else self._shown
        # Who comes back wants to see what he missed, however he came first.
        attach = self._attach if self._shown is None or self._attach == "snapshot" else "replay"
        self._asked = offset
        return Begin(attach, offset, self._rows, self._cols)

    def lost(self, why: str) -> None:
        """The line is gone."""
        self._live = False
        self.trouble = why

    def hear(self, heard: Heard) -> list[Effect]:
        """What one message asks for."""
        match heard:
            case Begun():
                return self._begun(heard)
            case Output(end, data):
                self._shown = max(end, self._shown or 0)
                self.modes.feed(data)
                return [Show(data), *(self.rested() if end - self._told_seen >= SEEN_BYTES else [])]
            case Live(offset):
                return self._go_live(offset)
            case Taken():
                return self._taken(heard)
            case Skipped():
                self._live = self._resumes = False
                self.modes = Modes()
                return []
            case Sized():
                # A terminal that is resized forgets its scrolling region; this one is not, and its program counts on it.
                return [Show(WHOLE_REGION)]
            case Absent(gone):
                self.trouble = "its machine cannot be reached" if gone else None
                return [Again()] if self.spoiled and not gone else []
            case Ended(status):
                return [Finish(status)]

    def typed(self, data: bytes) -> list[Effect]:
        """Something was typed."""
        if self._writes:
            self._kept += data
        return self._offered()

    def resized(self, rows: int, cols: int, *, redraw: bool = False) -> list[Effect]:
        """The window has another size, or what it shows was lost (`redraw`)."""
        self._rows, self._cols = rows, cols
        return self._size(redraw=redraw) if self._live else []

    def rested(self) -> list[Effect]:
        """Nothing more is coming: tell how far it was shown."""
        if self._shown is None or self._shown <= self._told_seen:
            return []
        self._told_seen = self._shown
        return [Seen(self._shown)]

    def resend(self) -> list[Effect]:
        """There was no answer for long."""
        self._sent = self._base
        return self._offered()

    def _begun(self, begun: Begun) -> list[Effect]:
        self.trouble = None
        self._writes = begun.writes
        self._resumes = self._asked is not None and begun.offset == self._asked
        if self._resumes and self.spoiled:
            # It was written across while the line was being made.
            return [Again()]
        self.spoiled = False
        if not self._resumes:
            self.modes = Modes()
        if self._attempt == begun.attempt:
            # Who says less than was heard before has forgotten; what was taken stays taken.
            received = max(begun.received, self._base)
            del self._kept[: received - self._base]
        else:
            received = begun.received
        self._attempt = begun.attempt
        self._base = self._sent = received
        self._credit = self._base + TYPED_BYTES_MAX
        self._rewound = None
        if not self._writes:
            self._kept.clear()
        return []

    def _go_live(self, offset: int) -> list[Effect]:
        fresh = not self._resumes
        self._live, self._resumes = True, True
        self._shown = max(offset, self._shown or 0)
        redraw = fresh and (self._attach == "redraw" or (self._attach == "replay" and self.modes.alternate))
        return [*self._size(redraw=redraw), *self._offered(), *self.rested()]

    def _size(self, *, redraw: bool) -> list[Effect]:
        if not self._writes:
            return []
        self._gen += 1
        return [Resizing(self._gen, self._rows, self._cols, redraw)]

    def _taken(self, taken: Taken) -> list[Effect]:
        if taken.reason in FATAL:
            return [Finish(255, f"nothing is taken from this viewer: {taken.reason}")]
        if taken.reason == "READ_ONLY":
            self._writes = False
        if taken.closed or not self._writes:
            self._kept.clear()
        moved = taken.received > self._base
        if moved:
            del self._kept[: taken.received - self._base]
            self._base = taken.received
            self._sent = max(self._sent, self._base)
        place = (self._base, taken.credit)
        if not moved and self._sent > self._base and self._rewound != place:
            # It answers a piece that was not taken: there was no room for it, or something before it was lost.
            self._rewound = place
            self._sent = self._base
        self._credit = max(taken.credit, self._base)
        return self._offered()

    def _offered(self) -> list[Effect]:
        pieces: list[Effect] = []
        until = min(self._base + len(self._kept), self._credit)
        while self._live and self._sent < until:
            length = min(until - self._sent, TYPED_BYTES_MAX)
            at = self._sent - self._base
            pieces.append(Typing(self._sent, bytes(self._kept[at : at + length])))
            self._sent += length
        return pieces
