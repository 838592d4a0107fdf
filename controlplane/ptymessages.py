"""What a viewer of a PTY and the control plane say to each other on `/v1/ptys/{id}` (docs/terminals.md §7). Pure.

Text frames are JSON objects told apart by `t`; output comes in binary frames: the log offset behind it, then the bytes.
"""

import struct
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from protocol import strict_json
from protocol.channels import SignatureText, Taken
from protocol.errors import CloseCode, Reason, RemoteError
from protocol.limits import TERMINAL_CELLS_MAX, TYPED_BYTES_MAX
from protocol.wire import Count, JsonObject, Open, Positive, first_error

PTY_SUBPROTOCOL: Final = "local-runner.pty.v1"
REFUSED_CODE: Final = 1008
"""The connection is refused for good: the same again will not be taken either."""
_OUTPUT: Final = struct.Struct("<Q")
Cells = Annotated[int, Field(ge=1, le=TERMINAL_CELLS_MAX)]


class Begin(Open):
    """How the viewer's terminal is to be brought to what the PTY shows; `start` (`from`): the log offset that it has already."""

    t: Literal["begin"] = "begin"
    attach: Literal["replay", "snapshot", "redraw", "none"] = "replay"
    start: Annotated[Count | None, Field(alias="from")] = None
    rows: Cells
    cols: Cells


class SaidTyped(Open):
    """As `protocol.channels.Typed`, of the viewer that the ticket names."""

    t: Literal["typed"] = "typed"
    offset: Count
    data: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=(TYPED_BYTES_MAX + 2) // 3 * 4)]
    sig: SignatureText

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return len(self.data) // 4 * 3 - self.data.count("=")


class SaidResized(Open):
    """As `protocol.channels.Resized`."""

    t: Literal["resized"] = "resized"
    gen: Positive
    rows: Cells
    cols: Cells
    redraw: bool = False
    sig: SignatureText


class SaidSeen(Open):
    """Everything below this log offset is shown."""

    t: Literal["seen"] = "seen"
    offset: Count


FromViewer = Begin | SaidTyped | SaidResized | SaidSeen
_FROM_VIEWER: Final[TypeAdapter[FromViewer]] = TypeAdapter(Annotated[FromViewer, Field(discriminator="t")])


def decode_from_viewer(text: str) -> FromViewer:
    """Read a viewer's text frame. Raises RemoteError(BAD_FRAME)."""
    try:
        return _FROM_VIEWER.validate_json(text)
    except ValidationError as exc:
        raise RemoteError(Reason.BAD_FRAME, first_error(exc), CloseCode.BAD_FRAME) from None


def encode_output(offset: int, data: bytes) -> bytes:
    """A binary frame: `offset` is that of the log behind `data`."""
    return _OUTPUT.pack(offset) + data


def decode_output(frame: bytes) -> tuple[int, bytes]:
    """Read a binary frame. Raises RemoteError(BAD_FRAME)."""
    if len(frame) < _OUTPUT.size:
        raise RemoteError(Reason.BAD_FRAME, "output without its offset")
    return int(_OUTPUT.unpack_from(frame)[0]), frame[_OUTPUT.size :]


def to_viewer(t: str, **fields: object) -> str:
    """A text frame for a viewer."""
    return strict_json.dumps({"t": t, **fields}).decode("utf-8")


def taken_frame(taken: Taken) -> str:
    """What the runner answered, for the viewer that it is about."""
    said: JsonObject = taken.model_dump(
        mode="json", include={"received", "credit", "closed", "reason"}, exclude_none=True
    )
    return to_viewer("taken", **said)
