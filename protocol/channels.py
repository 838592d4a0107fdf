"""Messages about what flows: logs by their channels, bytes for a stdin, and what viewers of a PTY type and say.

Like all text frames (`protocol/messages.py`) they are unsigned; a piece that must be believed carries its own signature.
"""

from typing import Annotated, Literal

from pydantic import Field

from protocol.errors import Reason
from protocol.limits import INPUT_PIECE_BYTES_MAX, TERMINAL_CELLS_MAX, TYPED_BYTES_MAX, VIEWERS_MAX
from protocol.wire import Count, Open, Positive, ViewerId

AttemptName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}\.[1-9][0-9]{0,15}$")]
SignatureText = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{86}$")]


class LogOpen(Open):
    """runner → plane: `channel` is the log of `attempt`; it can be had from `first` on."""

    t: Literal["open"] = "open"
    channel: Count
    attempt: AttemptName
    first: Count


class Resume(Open):
    """plane → runner: send the log of `channel` from `offset`, up to `credit`."""

    t: Literal["resume"] = "resume"
    channel: Count
    offset: Count
    credit: Count


class Ack(Open):
    """plane → runner: below `offset` the log is durable here; up to `credit` may be sent. Absolute, so doubles are harmless."""

    t: Literal["ack"] = "ack"
    channel: Count
    offset: Count
    credit: Count


class Credit(Open):
    """plane → runner: so many bytes of data, of all channels of this session together, may be sent; absolute, and only rises."""

    t: Literal["credit"] = "credit"
    total: Count


class Watch(Open):
    """plane → runner: somebody follows the log of `channel`, or nobody does any more: what is followed goes first."""

    t: Literal["watch"] = "watch"
    channel: Count
    on: bool


class Blocked(Open):
    """runner → plane: there is more in the log of `channel`, and its credit ends at `credit`: the window is too small."""

    t: Literal["blocked"] = "blocked"
    channel: Count
    credit: Count


class Gap(Open):
    """runner → plane: `[start, end)` of the log does not exist any more; needs no credit."""

    t: Literal["gap"] = "gap"
    channel: Count
    start: Count
    end: Count


class LogClosed(Open):
    """runner → plane: the log of `channel` is complete at `end`."""

    t: Literal["closed"] = "closed"
    channel: Count
    end: Count


class Input(Open):
    """plane → runner: bytes for an attempt's stdin from `offset` on, base64, signed by the key of its start; `end`: the last."""

    t: Literal["input"] = "input"
    attempt: AttemptName
    offset: Count
    data: Annotated[str, Field(max_length=(INPUT_PIECE_BYTES_MAX + 2) // 3 * 4)]
    end: bool = False
    sig: SignatureText


class InputFed(Open):
    """runner → plane: below `received` an attempt's stdin is taken for good; up to `credit` it may be sent.

    `closed`: nobody reads it any more, and what still comes is dropped. `reason`: why a piece was not taken.
    """

    t: Literal["fed"] = "fed"
    attempt: AttemptName
    received: Count
    credit: Count
    closed: bool
    reason: Reason | None = None


class Typed(Open):
    """plane → runner: what a viewer of a PTY types, from its own `offset` on, base64, signed by the viewer's key."""

    t: Literal["typed"] = "typed"
    attempt: AttemptName
    viewer: ViewerId
    offset: Count
    data: Annotated[str, Field(max_length=(TYPED_BYTES_MAX + 2) // 3 * 4)]
    sig: SignatureText


class Resized(Open):
    """plane → runner: the size of a viewer's window, signed by its key; an older `gen` than the last counts no more.

    `redraw`: the program is made to draw anew.
    """

    t: Literal["resized"] = "resized"
    attempt: AttemptName
    viewer: ViewerId
    gen: Positive
    rows: Annotated[int, Field(ge=1, le=TERMINAL_CELLS_MAX)]
    cols: Annotated[int, Field(ge=1, le=TERMINAL_CELLS_MAX)]
    redraw: bool = False
    sig: SignatureText


class Viewers(Open):
    """plane → runner: who looks at a PTY now, and how far the foremost of those that may type has followed; unsigned.

    `seen` null: nobody who may type follows. It paces the reading and counts for the size, and nothing else.
    """

    t: Literal["viewers"] = "viewers"
    attempt: AttemptName
    seen: Count | None = None
    viewers: Annotated[list[ViewerId], Field(max_length=VIEWERS_MAX)] = []


class Taken(Open):
    """runner → plane: what `viewer` typed is taken for good below `received`; up to `credit` it may be sent.

    `closed`: the PTY has ended. `reason`: why something was not taken.
    """

    t: Literal["taken"] = "taken"
    attempt: AttemptName
    viewer: ViewerId
    received: Count
    credit: Count
    closed: bool = False
    reason: Reason | None = None
