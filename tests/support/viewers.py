"""A viewer of a PTY, as a program afar would be one: REST for its ticket, then the WebSocket of docs/terminals.md §7."""

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from protocol.keys import PrivateKey
from protocol.terminals import sign_resized, sign_typed

WAIT_S = 10.0
"""How long a test waits for what must come."""
SUBPROTOCOL = "local-runner.pty.v1"


@dataclass
class Key:
    """Of a viewer: the same one is the same viewer."""

    key: PrivateKey = field(default_factory=lambda: PrivateKey(b"v" * 32))
    typed: int = 0
    gen: int = 0


@dataclass
class Seat:
    """One connection of a viewer: what it heard, and what its terminal got."""

    socket: ClientConnection
    key: Key
    ticket: dict[str, Any]
    heard: list[dict[str, Any]] = field(default_factory=list)
    screen: bytes = b""
    offset: int = 0

    async def begin(self, attach: str = "replay", start: int | None = None) -> dict[str, Any]:
        """Say the first word; gives `begun`."""
        await self.say({"t": "begin", "attach": attach, "from": start, "rows": 24, "cols": 80})
        return await self.expect("begun")

    async def type(self, data: bytes) -> None:
        """Type, from where it was."""
        piece = sign_typed(self.key.key, self.ticket["attempt"], self.ticket["viewer"], self.key.typed, data)
        self.key.typed += len(data)
        await self.say(piece.model_dump(mode="json", include={"t", "offset", "data", "sig"}))

    async def resize(self, rows: int, cols: int, *, redraw: bool = False) -> None:
        """Tell a size."""
        self.key.gen += 1
        attempt, viewer = self.ticket["attempt"], self.ticket["viewer"]
        said = sign_resized(self.key.key, attempt, viewer, self.key.gen, rows, cols, redraw=redraw)
        await self.say(said.model_dump(mode="json", include={"t", "gen", "rows", "cols", "redraw", "sig"}))

    async def seen(self) -> None:
        """Tell that all is shown."""
        await self.say({"t": "seen", "offset": self.offset})

    async def say(self, message: dict[str, Any]) -> None:
        """Send a frame."""
        await self.socket.send(json.dumps(message))

    async def hear(self) -> dict[str, Any] | None:
        """The next frame; None: it was output. Raises ConnectionClosed."""
        with anyio.fail_after(WAIT_S):
            frame = await self.socket.recv()
        if isinstance(frame, bytes):
            (self.offset,) = struct.unpack_from("<Q", frame)
            self.screen += frame[8:]
            return None
        found: dict[str, Any] = json.loads(frame)
        return found

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next frame of a kind; others are kept for later."""
        for at, message in enumerate(self.heard):
            if message["t"] == kind:
                return self.heard.pop(at)
        while True:
            heard = await self.hear()
            if heard is not None and heard["t"] == kind:
                return heard
            if heard is not None:
                self.heard.append(heard)

    async def shows(self, text: bytes) -> None:
        """Wait until it was sent this."""
        while text not in self.screen:
            heard = await self.hear()
            if heard is not None:
                self.heard.append(heard)

    async def closed(self) -> tuple[int, list[dict[str, Any]]]:
        """Wait until it is closed: with this code, after these words."""
        try:
            while True:
                heard = await self.hear()
                if heard is not None:
                    self.heard.append(heard)
        except ConnectionClosed as exc:
            return (exc.rcvd.code if exc.rcvd else 1006), self.heard


async def admit(http: httpx.AsyncClient, pty: str, key: Key, mode: str = "rw", **more: Any) -> dict[str, Any]:
    """Have a viewer let in: its ticket."""
    answer = await http.post(f"{prefix(http)}/ptys/{pty}/attach", json={"key": key.key.public.x, "mode": mode, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def prefix(http: httpx.AsyncClient) -> str:
    """What paths begin with, for a client that may have it already."""
    return "" if http.base_url.path.rstrip("/").endswith("/v1") else "/v1"


@asynccontextmanager
async def seated(
    port: int, pty: str, ticket: dict[str, Any], key: Key, origin: str | None = None
) -> AsyncIterator[Seat]:
    """A connection with a ticket."""
    url = f"ws://127.0.0.1:{port}/v1/ptys/{pty}?ticket={ticket['ticket']}"
    async with connect(
        url,
        subprotocols=[SUBPROTOCOL],
        compression=None,
        max_queue=None,
        proxy=None,
        origin=origin,  # type: ignore[list-item, arg-type]
    ) as socket:
        yield Seat(socket, key, ticket)
