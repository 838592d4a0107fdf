"""The shim's wire (docs/shim.md §4) as bytes: framing and message bodies. Pure."""

from __future__ import annotations

import _struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PROTO: Final = 1
HELLO, RELEASE, LEASE, STOP, COLLECTED, ARM, TRIM, RENEW = 1, 2, 3, 4, 5, 6, 7, 8
INPUT, SIGNAL, LIMIT = 9, 10, 11
VIEW, TYPE, RESIZE, SEEN, LEAVE = 12, 13, 14, 15, 16
WELCOME, STARTED, EXIT, BELL = 129, 130, 131, 132
FED, SIGNALLED, TAKEN = 133, 134, 135
PHASE_READY, PHASE_RELEASED, PHASE_RUNNING, PHASE_EXITED = 1, 2, 3, 4
FRAME_MAX: Final = 65_536
RELEASE_MAX: Final = 262_144
GRACE_OF_SPEC: Final = 0xFFFF_FFFF
WHO_BYTES_MAX: Final = 256
DEADLINE_MS_MAX: Final = 1 << 62
SIGNAL_MAX: Final = 64
INPUT_END: Final = 1
TO_CHILD, TO_TREE = 0, 1
VIEWER_BYTES_MAX: Final = 40
CELLS_MAX: Final = 1000
REDRAW: Final = 1
# In SEEN: nobody who may type follows.
NOBODY: Final = 0xFFFF_FFFF_FFFF_FFFF

_LENGTH: Final = _struct.Struct("<I")
HELLO_BODY: Final = _struct.Struct("<HHQ")
LEASE_BODY: Final = _struct.Struct("<QQB")
LEASE_GRACE: Final = _struct.Struct("<QQBI")
STOP_BODY: Final = _struct.Struct("<I")
OFFSET_BODY: Final = _struct.Struct("<Q")
WELCOME_BODY: Final = _struct.Struct("<HBQQQIQ")
STARTED_BODY: Final = _struct.Struct("<IQQ")
INPUT_BODY: Final = _struct.Struct("<QB")
FED_BODY: Final = _struct.Struct("<QQB")
SIGNAL_BODY: Final = _struct.Struct("<8sBB")
SIGNALLED_BODY: Final = _struct.Struct("<8sI")
RESIZE_BODY: Final = _struct.Struct("<QHHB")
TAKEN_BODY: Final = _struct.Struct("<QQB")


class WireError(ValueError):
    """A frame or body that breaks the protocol; its connection is closed, nothing else is touched."""


def pack(kind: int, body: bytes = b"") -> bytes:
    """One frame."""
    return _LENGTH.pack(len(body) + 1) + bytes((kind,)) + body


def take(inbox: bytearray) -> tuple[int, bytes] | None:
    """Remove the first whole frame from `inbox` as `(type, body)`, None while it is incomplete.

    Raises WireError for a length of zero or above the type's bound, before the body has arrived.
    """
    if len(inbox) < 5:
        if len(inbox) >= 4 and _LENGTH.unpack_from(inbox)[0] == 0:
            raise WireError("empty frame")
        return None
    (length,) = _LENGTH.unpack_from(inbox)
    if length == 0 or length > (RELEASE_MAX if inbox[4] == RELEASE else FRAME_MAX):
        raise WireError(f"frame of {length} bytes")
    if len(inbox) < 4 + length:
        return None
    kind = inbox[4]
    body = bytes(inbox[5 : 4 + length])
    if kind == RELEASE:
        # Secrets do not stay behind in a buffer that lives as long as the connection.
        inbox[: 4 + length] = bytes(4 + length)
    del inbox[: 4 + length]
    return kind, body


def unpack_hello(body: bytes) -> tuple[int, int, int]:
    """`(proto_min, proto_max, epoch)`. Raises WireError."""
    low, high, epoch = _unpack(HELLO_BODY, body)
    return low, high, epoch


def pack_lease(token: int, deadline_ms: int, action: int, grace_ms: int | None) -> bytes:
    """The body of LEASE and RENEW; None is the spec's grace."""
    return LEASE_GRACE.pack(token, deadline_ms, action, GRACE_OF_SPEC if grace_ms is None else grace_ms)


def unpack_lease(body: bytes) -> tuple[int, int, int, int | None]:
    """`(token, deadline_ms, action, grace_ms)`; None is the spec's grace. Raises WireError for what is not known."""
    grace_ms = GRACE_OF_SPEC
    if len(body) <= LEASE_BODY.size:
        token, deadline_ms, action = _unpack(LEASE_BODY, body)
    else:
        token, deadline_ms, action, grace_ms = _unpack(LEASE_GRACE, body)
    if action > 2 or deadline_ms > DEADLINE_MS_MAX:
        raise WireError("lease action or deadline out of range")
    return token, deadline_ms, action, _grace(grace_ms)


def unpack_stop(body: bytes) -> tuple[int | None, str]:
    """`(grace_ms, who)`; None is the spec's grace. Raises WireError."""
    (grace_ms,) = _unpack(STOP_BODY, body)
    who = body[STOP_BODY.size : STOP_BODY.size + WHO_BYTES_MAX].decode("utf-8", "replace")
    return _grace(grace_ms), who


def unpack_offset(body: bytes) -> int:
    """The offset of ARM, TRIM or BELL. Raises WireError."""
    (offset,) = _unpack(OFFSET_BODY, body)
    return offset


def pack_welcome(*, phase: int, first: int, end: int, lease_token: int, pid: int, start: int) -> bytes:
    """The WELCOME frame."""
    return pack(WELCOME, WELCOME_BODY.pack(PROTO, phase, first, end, lease_token, pid, start))


def pack_started(pid: int, start: int, started_ns: int) -> bytes:
    """The STARTED frame."""
    return pack(STARTED, STARTED_BODY.pack(pid, start, started_ns))


def pack_bell(end: int) -> bytes:
    """The BELL frame."""
    return pack(BELL, OFFSET_BODY.pack(end))


def unpack_input(body: bytes) -> tuple[int, bytes, bool]:
    """`(offset, data, end)` of INPUT; with `end` nothing comes behind. Raises WireError."""
    offset, flags = _unpack(INPUT_BODY, body)
    return offset, body[INPUT_BODY.size :], bool(flags & INPUT_END)


def pack_fed(received: int, credit: int, *, closed: bool) -> bytes:
    """The FED frame: how far stdin was received, up to where it may be sent, and whether anybody reads it."""
    return pack(FED, FED_BODY.pack(received, credit, closed))


def unpack_signal(body: bytes) -> tuple[bytes, int, int]:
    """`(id, number, to)` of SIGNAL. Raises WireError."""
    if len(body) < SIGNAL_BODY.size:
        raise WireError("short body")
    name, number, to = SIGNAL_BODY.unpack_from(body)
    if not 0 < number <= SIGNAL_MAX or to not in (TO_CHILD, TO_TREE):
        raise WireError("no such signal, or nobody to take it")
    return name, number, to


def pack_signalled(name: bytes, count: int) -> bytes:
    """The SIGNALLED frame: how many processes the signal of that id reached."""
    return pack(SIGNALLED, SIGNALLED_BODY.pack(name, count))


def pack_type(viewer: bytes, offset: int, data: bytes) -> bytes:
    """The TYPE frame: what a viewer types, from its own `offset` on."""
    return pack(TYPE, OFFSET_BODY.pack(offset) + _named(viewer) + data)


def unpack_type(body: bytes) -> tuple[bytes, int, bytes]:
    """`(viewer, offset, data)` of TYPE. Raises WireError."""
    (offset,) = _unpack(OFFSET_BODY, body)
    viewer, end = _viewer(body, OFFSET_BODY.size)
    return viewer, offset, body[end:]


def pack_resize(viewer: bytes, gen: int, rows: int, cols: int, *, redraw: bool) -> bytes:
    """The RESIZE frame: the size of a viewer's window."""
    return pack(RESIZE, RESIZE_BODY.pack(gen, rows, cols, REDRAW if redraw else 0) + _named(viewer))


def unpack_resize(body: bytes) -> tuple[bytes, int, int, int, bool]:
    """`(viewer, gen, rows, cols, redraw)` of RESIZE. Raises WireError."""
    gen, rows, cols, flags = _unpack(RESIZE_BODY, body)
    if not (0 < rows <= CELLS_MAX and 0 < cols <= CELLS_MAX):
        raise WireError("no terminal has that size")
    return _viewer(body, RESIZE_BODY.size)[0], gen, rows, cols, bool(flags & REDRAW)


def pack_seen(offset: int | None) -> bytes:
    """The SEEN frame: how far the foremost that may type has followed; None: nobody does."""
    return pack(SEEN, OFFSET_BODY.pack(NOBODY if offset is None else offset))


def unpack_seen(body: bytes) -> int | None:
    """The offset of SEEN. Raises WireError."""
    offset = unpack_offset(body)
    return None if offset == NOBODY else offset


def pack_leave(viewer: bytes) -> bytes:
    """The LEAVE frame: a viewer is gone."""
    return pack(LEAVE, _named(viewer))


def unpack_leave(body: bytes) -> bytes:
    """The viewer of LEAVE. Raises WireError."""
    return _viewer(body, 0)[0]


def pack_taken(viewer: bytes, received: int, credit: int, *, closed: bool) -> bytes:
    """The TAKEN frame: how much of a viewer's typing was taken, up to where it may be sent, and whether it is over."""
    return pack(TAKEN, TAKEN_BODY.pack(received, credit, closed) + _named(viewer))


def unpack_taken(body: bytes) -> tuple[bytes, int, int, bool]:
    """`(viewer, received, credit, closed)` of TAKEN. Raises WireError."""
    received, credit, closed = _unpack(TAKEN_BODY, body)
    return _viewer(body, TAKEN_BODY.size)[0], received, credit, bool(closed)


def _named(viewer: bytes) -> bytes:
    return bytes((len(viewer),)) + viewer


def _viewer(body: bytes, at: int) -> tuple[bytes, int]:
    length = body[at] if at < len(body) else 0
    if not 0 < length <= VIEWER_BYTES_MAX or len(body) < at + 1 + length:
        raise WireError("no viewer is named")
    return body[at + 1 : at + 1 + length], at + 1 + length


def _grace(grace_ms: int) -> int | None:
    return None if grace_ms == GRACE_OF_SPEC else grace_ms


def _unpack(form: _struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) < form.size:
        raise WireError("short body")
    # Bodies may grow at the end: what this version does not know is left alone.
    return form.unpack_from(body)
