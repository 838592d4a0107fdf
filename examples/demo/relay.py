"""A relay between runner and control plane that reads, repeats and forges: the transport is not trusted, so it may be anybody."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Subprotocol

SUBPROTOCOL = Subprotocol("local-runner.v1")
FRAME_BYTES_MAX = 128 * 1024
_KEPT = ("hello", "challenge", "proof", "welcome", "refused", "report")


class Relay:
    """Listens on a free loopback port and passes everything on to `upstream` (a ws:// URL)."""

    def __init__(self, upstream: str) -> None:
        self.port = 0
        self.commands: list[str] = []
        """Command frames as they passed, oldest first."""
        self.passed: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KEPT}
        """Other messages as they passed, by kind, oldest first."""
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
            async with (
                connect(
                    self._upstream,
                    subprotocols=[SUBPROTOCOL],
                    compression=None,
                    max_size=FRAME_BYTES_MAX,
                    proxy=None,
                ) as plane,
                asyncio.TaskGroup() as tasks,
            ):
                tasks.create_task(self._copy(runner, plane))
                tasks.create_task(self._copy(plane, runner))
        except (OSError, InvalidHandshake):
            await runner.close(1013, "the control plane is away")

    async def _copy(self, source: Any, sink: Any) -> None:
        """Pass on until either side has closed, then close both with the code that was given."""
        try:
            async for frame in source:
                self._look(frame)
                await sink.send(frame)
        except ConnectionClosed:
            pass
        # 1005 and 1006 say that no code was given; they are never sent.
        code = source.close_code if source.close_code not in (None, 1005, 1006) else 1001
        await sink.close(code, source.close_reason or "")

    def _look(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            kind = frame[:20].partition('"t":"')[2].partition('"')[0]
            if kind == "command":
                self.commands.append(frame)
            elif kind in self.passed:
                self.passed[kind].append(json.loads(frame))
        self._changed.set()
