"""One connection to one shim: frames out, frames in, in the event loop (docs/shim.md §4). It decides nothing."""

import asyncio
import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from runner.core.plans import LeaseAction, ProcessIdentity
from runner.shim import wire

STOPS_MAX: Final = 4
"""Stops that are said again to a shim that may not have heard them: the first is the cause, the last the shortest grace."""
_ACTIONS: Final = {LeaseAction.CONTINUE: 0, LeaseAction.FREEZE: 1, LeaseAction.STOP: 2}


def lease_body(token: int, deadline_ms: int, action: LeaseAction, grace_ms: int | None) -> bytes:
    """The body of LEASE and of RENEW."""
    return wire.pack_lease(token, max(deadline_ms, 0), _ACTIONS[action], grace_ms)


class ShimListener(Protocol):
    """Who hears what a shim says; called from the event loop, and must not block."""

    def shim_welcomed(self, link: "ShimLink", shim_pid: int, shim_start: int) -> None:
        """The shim is there."""

    def shim_exited(self, link: "ShimLink", found: dict[str, Any]) -> None:
        """The attempt has ended; the object is a claim and not judged yet."""

    def shim_rang(self, link: "ShimLink", end: int) -> None:
        """The log has grown to `end`."""

    def shim_signalled(self, link: "ShimLink", name: bytes, count: int) -> None:
        """A signal reached so many processes."""

    def shim_fed(self, link: "ShimLink", received: int, credit: int, *, closed: bool) -> None:
        """How far stdin was received, up to where it may be sent, and whether nobody reads it any more."""

    def shim_taken(self, link: "ShimLink", viewer: str, received: int, credit: int, *, closed: bool) -> None:
        """How much of a viewer's typing was taken, up to where there is room, and whether the terminal has ended."""

    def shim_gone(self, link: "ShimLink") -> None:
        """The connection is closed."""


class ShimLink(asyncio.Protocol):
    """A connection to the shim of `attempt`."""

    def __init__(self, attempt: str, listener: ShimListener) -> None:
        self.attempt: Final = attempt
        self.child: tuple[int, int] | None = None
        """Pid and start time of the child, once it runs."""
        self.started_ms: int | None = None
        self.exited = False
        self._listener = listener
        self._inbox = bytearray()
        self._transport: asyncio.Transport | None = None

    # --- what we say --------------------------------------------------------------------------------------------

    def hello(self, epoch: int) -> None:
        """Introduce this daemon on the shim's listening socket; the newest one wins."""
        self._send(wire.pack(wire.HELLO, wire.HELLO_BODY.pack(wire.PROTO, wire.PROTO, epoch)))

    def release(self, secrets: Mapping[str, bytes]) -> None:
        """Open the start barrier, with the secrets."""
        body = {name: base64.b64encode(value).decode("ascii") for name, value in secrets.items()}
        self._send(wire.pack(wire.RELEASE, json.dumps(body).encode("utf-8")))

    def lease(self, token: int, deadline_ms: int, action: LeaseAction, grace_ms: int | None) -> None:
        """Push a deadline (BOOTTIME), and the grace of a stop at the loss; the shim takes the spec's where that is shorter."""
        self._send(wire.pack(wire.LEASE, lease_body(token, deadline_ms, action, grace_ms)))

    def stop(self, grace_ms: int | None, by: str) -> None:
        """Begin the ladder."""
        grace = wire.GRACE_OF_SPEC if grace_ms is None else grace_ms
        self._send(wire.pack(wire.STOP, wire.STOP_BODY.pack(grace) + by.encode("utf-8")[: wire.WHO_BYTES_MAX]))

    def collected(self) -> None:
        """The end is settled: the shim may go."""
        self._send(wire.pack(wire.COLLECTED))

    def arm(self, seen_end: int) -> None:
        """Ask to be told once when the log is longer than `seen_end`."""
        self._send(wire.pack(wire.ARM, wire.OFFSET_BODY.pack(seen_end)))

    def trim(self, offset: int) -> None:
        """Everything below `offset` is safe at the control plane."""
        self._send(wire.pack(wire.TRIM, wire.OFFSET_BODY.pack(offset)))

    def limit(self, size: int) -> None:
        """Keep no more of the log than this."""
        self._send(wire.pack(wire.LIMIT, wire.OFFSET_BODY.pack(size)))

    def input(self, offset: int, data: bytes, *, end: bool) -> None:
        """Bytes for stdin, from `offset` on; with `end` nothing comes behind them."""
        self._send(wire.pack(wire.INPUT, wire.INPUT_BODY.pack(offset, wire.INPUT_END if end else 0) + data))

    def signal(self, name: bytes, number: int, *, tree: bool) -> None:
        """A signal to the child or to its tree; `name` is obeyed once."""
        self._send(wire.pack(wire.SIGNAL, wire.SIGNAL_BODY.pack(name, number, wire.TO_TREE if tree else wire.TO_CHILD)))

    def type(self, viewer: str, offset: int, data: bytes) -> None:
        """What a viewer of its terminal types, from the viewer's own `offset` on."""
        self._send(wire.pack_type(viewer.encode("ascii"), offset, data))

    def resize(self, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool) -> None:
        """The size of a viewer's window."""
        self._send(wire.pack_resize(viewer.encode("ascii"), gen, rows, cols, redraw=redraw))

    def seen(self, offset: int | None) -> None:
        """How far the foremost viewer that may type has followed; None: nobody does."""
        self._send(wire.pack_seen(offset))

    def leave(self, viewer: str) -> None:
        """A viewer is gone: its size counts no more."""
        self._send(wire.pack_leave(viewer.encode("ascii")))

    def close(self) -> None:
        """Close the connection; before the release this is the word that nothing will ever run."""
        if self._transport is not None:
            self._transport.abort()

    def _send(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    # --- what we hear -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's word that the socket is ours."""
        assert isinstance(transport, asyncio.Transport), "a stream socket has a stream transport"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take whole frames; a shim that talks nonsense is treated as gone."""
        self._inbox += data
        try:
            while (frame := wire.take(self._inbox)) is not None:
                self._heard(*frame)
        except (wire.WireError, struct.error, ValueError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end is closed, or we closed it."""
        self._transport = None
        self._listener.shim_gone(self)

    def _heard(self, kind: int, body: bytes) -> None:
        if kind == wire.WELCOME:
            _proto, _phase, _first, _end, _token, pid, start = wire.WELCOME_BODY.unpack_from(body)
            self._listener.shim_welcomed(self, pid, start)
        elif kind == wire.STARTED:
            pid, start, started_ns = wire.STARTED_BODY.unpack_from(body)
            self.child = (pid, start)
            self.started_ms = started_ns // 1_000_000
        elif kind == wire.EXIT:
            found = json.loads(body)
            if not isinstance(found, dict):
                raise ValueError("not an object")
            self.exited = True
            self._listener.shim_exited(self, found)
        elif kind == wire.BELL:
            self._listener.shim_rang(self, wire.unpack_offset(body))
        elif kind == wire.SIGNALLED:
            self._listener.shim_signalled(self, *wire.SIGNALLED_BODY.unpack_from(body))
        elif kind == wire.FED:
            received, credit, closed = wire.FED_BODY.unpack_from(body)
            self._listener.shim_fed(self, received, credit, closed=bool(closed))
        elif kind == wire.TAKEN:
            viewer, received, credit, over = wire.unpack_taken(body)
            self._listener.shim_taken(self, viewer.decode("ascii"), received, credit, closed=over)
        # Whatever a later shim says beside these is not for this version.


def identity(boot_id: str, pid: int, start: int) -> ProcessIdentity:
    """A process as we remember it."""
    return ProcessIdentity(boot_id=boot_id, pid=pid, start=start)


@dataclass(slots=True)
class Words:
    """What a shim must know and perhaps has not heard: said again on each new connection, which is harmless."""

    lease: tuple[int, int, LeaseAction, int | None] | None = None
    stops: list[tuple[int | None, str]] = field(default_factory=list)
    signals: dict[bytes, tuple[int, bool]] = field(default_factory=dict)
    """Without an answer yet: number, and whether for the whole tree, by id."""

    def add_stop(self, grace_ms: int | None, by: str) -> None:
        """One more stop; the same one counts once."""
        if (grace_ms, by) not in self.stops:
            self.stops.append((grace_ms, by))
            del self.stops[1 : 1 - STOPS_MAX]

    def say(self, link: ShimLink) -> None:
        """Say all of it."""
        if self.lease is not None:
            link.lease(*self.lease)
        for grace_ms, by in self.stops:
            link.stop(grace_ms, by)
        for name, (number, tree) in self.signals.items():
            link.signal(name, number, tree=tree)
