"""Being at a PTY from afar: lines over the WebSocket of `/v1/ptys/{id}` (docs/terminals.md §7), each opened by a ticket of its own.

The key that signs what is typed is made here for this process, and no one else ever has it.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.typing import Subprotocol

from controlplane.client import Json, PlaneClient, PlaneRefused, PlaneUnreachable, refusal
from controlplane.ptymessages import PTY_SUBPROTOCOL, decode_output
from controlplane.render import complain
from protocol.errors import RemoteError
from protocol.groups import ungrouped
from protocol.keys import PrivateKey
from protocol.limits import FRAME_BYTES_MAX
from protocol.receipt import INFRA_STATUS
from protocol.terminals import sign_resized, sign_typed
from terminal.attach import FAILED, Line, LineLost, LineRefused, attach, say_how_it_ended
from terminal.raw import RawTerminal
from terminal.viewing import (
    Absent,
    Begin,
    Begun,
    Ended,
    Finish,
    Heard,
    Live,
    Output,
    Resizing,
    Said,
    Seen,
    Sized,
    Skipped,
    Taken,
    Typing,
)

KEY_BYTES: Final = 32
LET_IN_S: Final = 30.0
"""A control plane waits 20 s for a runner to let somebody in."""
OPEN_S: Final = 10.0
CLOSE_S: Final = 1.0
SILENCE_S: Final = 10.0
"""Between signs of life, and as long for each: a dead line is noticed in 20 s."""
FIRST_DELAY_S: Final = 0.5
DELAY_S_MAX: Final = 10.0
QUEUE_FRAMES: Final = (16, 4)
"""Frames that were received and not shown: beyond it the socket is not read."""
_LATER: Final = frozenset({"RUNNER_SILENT", "BUSY", "BAD_TICKET", "STORE_FAILED", "INTERNAL"})
"""Refusals that may be none the next time."""


class PlaneDialer:
    """Lines to one PTY through a control plane."""

    def __init__(self, url: str, token: str, execution_id: str, mode: str, key: PrivateKey) -> None:
        self.failure: PlaneRefused | PlaneUnreachable | None = None
        """Why there never was a line."""
        self._url = url
        self._token = token
        self._pty = execution_id
        self._mode = mode
        self._key = key
        self._viewer: str | None = None

    def delays(self) -> Iterator[float]:
        """See Dialer. It is tried until the person leaves."""
        for tries in itertools.count():
            yield min(DELAY_S_MAX, FIRST_DELAY_S * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0)  # noqa: S311

    @asynccontextmanager
    async def dial(self, begin: Begin) -> AsyncIterator[Line]:
        """See Dialer."""
        try:
            admitted = await self._let_in()
        except (PlaneRefused, PlaneUnreachable) as exc:
            if self._viewer is None:
                self.failure = exc
                raise LineRefused(str(exc)) from exc
            if isinstance(exc, PlaneRefused) and exc.reason not in _LATER:
                raise LineRefused(str(exc)) from exc
            raise LineLost(_trouble(exc)) from exc
        self._viewer = str(admitted["viewer"])
        connection = await self._connect(str(admitted["ticket"]))
        line = PlaneLine(connection, self._key, str(admitted["attempt"]), self._viewer)
        try:
            with ungrouped():
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(line.send_all())
                    line.begin(begin)
                    try:
                        yield line
                    finally:
                        sending.cancel()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await connection.close()
            connection.transport.abort()

    async def _let_in(self) -> Json:
        """A ticket. Raises PlaneRefused or PlaneUnreachable."""
        body = {"key": self._key.public.x, "mode": self._mode, **({"viewer": self._viewer} if self._viewer else {})}
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            # No proxy of the environment gets to see the admin token.
            async with httpx.AsyncClient(timeout=LET_IN_S, trust_env=False) as http:
                answer = await http.post(f"{self._url}/v1/ptys/{self._pty}/attach", json=body, headers=headers)
        except httpx.TransportError as exc:
            raise PlaneUnreachable(self._url, str(exc) or type(exc).__name__) from exc
        if answer.is_error:
            raise refusal(answer)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"viewer", "ticket", "attempt"} <= found.keys():
            raise PlaneUnreachable(self._url, "what answers there is no control plane")
        return found

    async def _connect(self, ticket: str) -> ClientConnection:
        address = f"ws{self._url.removeprefix('http')}/v1/ptys/{self._pty}?ticket={ticket}"
        try:
            return await connect(
                address,
                subprotocols=[Subprotocol(PTY_SUBPROTOCOL)],
                compression=None,
                max_size=FRAME_BYTES_MAX,
                max_queue=QUEUE_FRAMES,
                open_timeout=OPEN_S,
                close_timeout=CLOSE_S,
                ping_interval=SILENCE_S,
                ping_timeout=SILENCE_S,
                proxy=None,
                user_agent_header=None,
            )
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ssl.SSLError) as exc:
            raise LineLost("the control plane does not answer") from exc


class PlaneLine:
    """One connection to the control plane."""

    def __init__(self, connection: ClientConnection, key: PrivateKey, attempt: str, viewer: str) -> None:
        self._connection = connection
        self._key = key
        self._attempt = attempt
        self._viewer = viewer
        self._unsent: asyncio.Queue[str] = asyncio.Queue()  # bounded by the credit for what is typed

    def begin(self, begin: Begin) -> None:
        """The first word."""
        said = {"attach": begin.attach, "from": begin.offset, "rows": begin.rows, "cols": begin.cols}
        self._unsent.put_nowait(json.dumps({"t": "begin", **said}))

    async def hear(self) -> Heard:
        """See Line."""
        while True:
            try:
                frame = await self._connection.recv()
            except ConnectionClosed as exc:
                raise LineLost("the connection broke") from exc
            try:
                heard = Output(*decode_output(frame)) if isinstance(frame, bytes) else _heard(json.loads(frame))
            except (RemoteError, ValueError, KeyError, TypeError) as exc:
                raise LineRefused("what answers there is no control plane of this version") from exc
            if heard is not None:
                return heard

    def say(self, said: Said) -> None:
        """See Line. What is typed, and the size, are signed."""
        match said:
            case Typing(offset, data):
                words = sign_typed(self._key, self._attempt, self._viewer, offset, data).model_dump(mode="json")
            case Resizing(gen, rows, cols, redraw):
                signed = sign_resized(self._key, self._attempt, self._viewer, gen, rows, cols, redraw=redraw)
                words = signed.model_dump(mode="json")
            case Seen(offset):
                words = {"t": "seen", "offset": offset}
        # The ticket has both.
        self._unsent.put_nowait(json.dumps({k: v for k, v in words.items() if k not in ("attempt", "viewer")}))

    async def said(self) -> None:
        """See Line."""
        await self._unsent.join()

    def drop(self) -> None:
        """See Line."""
        self._connection.transport.abort()

    async def send_all(self) -> None:
        """Send what is said, in order; a broken connection is heard of by who listens."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._connection.send(await self._unsent.get())
                self._unsent.task_done()


def _heard(said: dict[str, Any]) -> Heard | None:
    """A text frame; None: nothing that this viewer acts upon. Raises LineLost, LineRefused, KeyError, TypeError or ValueError."""
    match said["t"]:
        case "begun":
            return Begun(str(said["attempt"]), said["mode"] == "rw", int(said["offset"]), int(said["received"]))
        case "live":
            return Live(int(said["offset"]))
        case "taken":
            return Taken(int(said["received"]), int(said["credit"]), said.get("closed") is True, said.get("reason"))
        case "skipped":
            return Skipped()
        case "size":
            return Sized()
        case "offline" | "online":
            return Absent(said["t"] == "offline")
        case "ended":
            status = said.get("exit_status")
            return Ended(INFRA_STATUS if status is None else int(status))
        case "refused":
            text = ": ".join(str(said[name]) for name in ("reason", "detail") if said.get(name))
            raise (LineLost if said.get("reason") in _LATER else LineRefused)(text)
    return None


def _trouble(exc: PlaneRefused | PlaneUnreachable) -> str:
    """In few words: it stands in one line."""
    if isinstance(exc, PlaneRefused) and exc.reason == "RUNNER_SILENT":
        return "its machine cannot be reached"
    return "the control plane cannot be reached"


def attach_remote(
    client: PlaneClient,
    execution_id: str,
    *,
    mode: str = "rw",
    attach: str = "replay",
    terminal: RawTerminal | None = None,
) -> int:
    """Be at a PTY until it ends or the person leaves; the exit status. `mode`: `rw` or `ro`; `attach`: what is shown first.

    Raises PlaneRefused or PlaneUnreachable when there never was a way to it.
    """
    dialer = PlaneDialer(client.url, client.token, execution_id, mode, PrivateKey(os.urandom(KEY_BYTES)))
    with ungrouped():
        finish = asyncio.run(_attach(dialer, terminal or RawTerminal(), attach, writes=mode == "rw"))
    if dialer.failure is not None:
        raise dialer.failure
    if finish.complaint:
        complain(finish.complaint, f"runner-control show {execution_id}")
        return FAILED
    say_how_it_ended(finish, execution_id, f"runner-control attach {execution_id}")
    return finish.status


async def _attach(dialer: PlaneDialer, terminal: RawTerminal, mode: str, *, writes: bool) -> Finish:
    return await attach(dialer, terminal, mode, gen=time.time_ns() // 1_000_000, writes=writes)
