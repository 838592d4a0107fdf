"""A relay between runner and control plane that reads, repeats and forges: the transport is not trusted, so it may be anybody."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

SUBPROTOCOL = Subprotocol("local-runner.v1")
FRAME_BYTES_MAX = 128 * 1024


class Relay:
    """Listens on a free loopback port and passes everything on to `upstream` (a ws:// URL)."""

    def __init__(self, upstream: str) -> None:
        self.port = 0
        self.commands: list[str] = []
        """Command frames as they passed, oldest first."""
        self.refused: list[dict[str, Any]] = []
        """What the runner refused, as it told the plane."""
        self.data_bytes = 0
        self._upstream = upstream
        self._runner: ServerConnection | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "Relay":
        self._server = await serve(
            self._pass_on, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL], compression=None, max_size=FRAME_BYTES_MAX
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def inject(self, frame: str) -> None:
        """Say something to the runner as if the plane had."""
        assert self._runner is not None, "no runner is connected"
        await self._runner.send(frame)

    async def until(self, holds: Callable[["Relay"], bool], seconds: float) -> None:
        """Wait until something has passed. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not holds(self):
                self._changed.clear()
                await self._changed.wait()

    async def _pass_on(self, runner: ServerConnection) -> None:
        self._runner = runner
        try:
            async with connect(
                self._upstream,
                subprotocols=[SUBPROTOCOL],
                compression=None,
                max_size=FRAME_BYTES_MAX,
                proxy=None,
            ) as plane:
                up = asyncio.ensure_future(self._copy(runner, plane))
                down = asyncio.ensure_future(self._copy(plane, runner))
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                await plane.close()
                await runner.close()
                await asyncio.gather(up, down)
        except OSError:
            await runner.close(1013, "the control plane is away")

    async def _copy(self, source: Any, sink: Any) -> None:
        try:
            async for frame in source:
                self._look(frame)
                await sink.send(frame)
        except ConnectionClosed:
            return

    def _look(self, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            self.data_bytes += len(frame)
        elif frame.startswith('{"t":"command"'):
            self.commands.append(frame)
        elif frame.startswith('{"t":"refused"'):
            self.refused.append(json.loads(frame))
        self._changed.set()
