"""The shim's wire (docs/shim.md §4) as bytes: framing and message bodies. Pure."""

from __future__ import annotations

import _struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PROTO: Final = 1
HELLO, RELEASE, LEASE, STOP, COLLECTED, ARM, TRIM, RENEW = 1, 2, 3, 4, 5, 6, 7, 8
INPUT, SIGNAL, LIMIT = 9, 10, 11
WELCOME, STARTED, EXIT, BELL = 129, 130, 131, 132
FED, SIGNALLED = 133, 134
PHASE_READY, PHASE_RELEASED, PHASE_RUNNING, PHASE_EXITED = 1, 2, 3, 4
FRAME_MAX: Final = 65_536
RELEASE_MAX: Final = 262_144
GRACE_OF_SPEC: Final = 0xFFFF_FFFF
WHO_BYTES_MAX: Final = 256
DEADLINE_MS_MAX: Final = 1 << 62
SIGNAL_MAX: Final = 64
INPUT_END: Final = 1
TO_CHILD, TO_TREE = 0, 1

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


def _grace(grace_ms: int) -> int | None:
    return None if grace_ms == GRACE_OF_SPEC else grace_ms


def _unpack(form: _struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) < form.size:
        raise WireError("short body")
    # Bodies may grow at the end: what this version does not know is left alone.
    return form.unpack_from(body)
