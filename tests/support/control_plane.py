"""A control plane on a free loopback port inside the test's loop, and a client that holds its token."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from controlplane.plane import ControlPlane, boottime_ms, wall_ms
from controlplane.server import run_embedded
from tests.support.fake_runner import FakeRunner


@dataclass
class Moved:
    """A clock, moved by a test."""

    ahead_ms: int = 0
    of: Callable[[], int] = wall_ms

    def __call__(self) -> int:
        return self.of() + self.ahead_ms


@dataclass
class Running:
    """A control plane that serves."""

    plane: ControlPlane
    port: int
    http: httpx.AsyncClient
    clock: Moved
    boot: Moved
    """What leases run by."""

    async def post(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> httpx.Response:
        """POST under a fresh Idempotency-Key, or under `key`."""
        headers = {"Idempotency-Key": key or uuid4().hex}
        return await self.http.post(path, json=body or {}, headers=headers)

    async def get(self, path: str, **params: Any) -> Any:
        """GET the JSON of a path that answers 200."""
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def join(self, name: str | None = None) -> str:
        """A join string."""
        return (await self.plane.join_token(name)).join

    async def enrol(self, name: str = "laptop", seed: bytes = b"k" * 32) -> FakeRunner:
        """A new runner."""
        return await FakeRunner.enrol(await self.join(), name, seed)

    async def start(self, runner: str = "laptop", argv: tuple[str, ...] = ("true",)) -> dict[str, Any]:
        """Ask for an execution."""
        answer = await self.post(f"/v1/runners/{runner}/executions", {"argv": list(argv), "cwd": "/srv"})
        assert answer.status_code == 202, answer.text
        found: dict[str, Any] = answer.json()
        return found


@asynccontextmanager
async def running(directory: Path, *, port: int = 0, clock: Moved | None = None) -> AsyncIterator[Running]:
    """Serve the control plane of `directory`."""
    clock, boot = clock or Moved(), Moved(of=boottime_ms)
    async with (
        ControlPlane.open(directory, clock=clock, boot_clock=boot, beat_ms=1000) as plane,
        run_embedded(plane, port=port) as bound,
    ):
        headers = {"Authorization": f"Bearer {plane.keys.admin_token}"}
        url = f"http://127.0.0.1:{bound}"
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20, trust_env=False) as http:
            yield Running(plane, bound, http, clock, boot)
