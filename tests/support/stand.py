"""A whole system for end-to-end tests: the real control plane and the real daemon as processes, in a temporary home."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from examples.demo.stage import Stage, until
from protocol.limits import DATA_SLICE_BYTES_MAX
from protocol.records import RecordKind, records

RUNNER = "stand"
ANSWER_S = 60.0
"""A bound for anything that is waited for: generous, since two cores run everything at once."""


class Stand(Stage):
    """Processes and a client of the control plane's REST interface."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._http: httpx.AsyncClient | None = None

    @property
    def state(self) -> Path:
        """The runner's state directory."""
        return self.home / "state"

    # --- processes ----------------------------------------------------------------------------------------------

    async def start_plane(self) -> None:
        """Start the control plane and wait until it answers."""
        listen = f"127.0.0.1:{self.port}"
        await self.start(
            "plane", "runner-control", "serve", "--db", f"{self.home}/plane/control.db", "--listen", listen
        )

        async def answers() -> bool:
            try:
                async with httpx.AsyncClient(trust_env=False) as probe:
                    return (await probe.get(f"http://{listen}/v1/health")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, "the control plane", ANSWER_S)
        if self._http is None:
            token = (self.home / "plane" / "admin.token").read_text().strip()
            self._http = httpx.AsyncClient(
                base_url=f"http://{listen}/v1",
                headers={"Authorization": f"Bearer {token}"},
                timeout=ANSWER_S,
                trust_env=False,
            )

    async def enroll(self, *, port: int | None = None, join: str | None = None) -> None:
        """Enrol the runner: through another port if one is given, with another control plane if its join string is."""
        if join is None:
            join = str((await self.post("/join-tokens", {"name": RUNNER}))["join"])
        if port is not None:
            join = join.replace(f":{self.port}/", f":{port}/")
        (self.home / "join.txt").write_text(join)
        await self.run(
            "runner", "enroll", "--token-file", f"{self.home}/join.txt", "--name", RUNNER, "--root", str(self.home)
        )

    async def start_daemon(self, *, log_level: str = "info", **env: str) -> None:
        """Start the daemon; it need not be connected yet. `env` adds to its environment."""
        self.env.update(env)
        try:
            await self.start("daemon", "runner", "--log-format", "json", "--log-level", log_level, "start")
        finally:
            for name in env:
                del self.env[name]

    async def online(self) -> None:
        """Wait until the plane has a session with the runner."""

        async def seen() -> bool:
            return any(runner["online"] for runner in (await self.get("/runners"))["runners"])

        await until(seen, "the session", ANSWER_S)

    def daemon_log(self) -> str:
        """Everything the daemons of this stand logged."""
        path = self.home / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def logged(self, text: str) -> None:
        """Wait until a daemon has logged `text`."""

        async def there() -> bool:
            return text in self.daemon_log()

        await until(there, f"the log line {text}", ANSWER_S)

    def pid(self, name: str) -> int:
        """The process id of a program that runs. Raises AssertionError when it has ended."""
        process = self._running[name]
        assert process.returncode is None, f"{name} ended with {process.returncode}"
        return process.pid

    def effects(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What commands left on the runner's disk: attempt directories and managed worktrees."""
        return tuple(
            tuple(sorted(path.name for path in (self.state / place).glob("*"))) for place in ("x", "worktrees")
        )  # type: ignore[return-value]

    # --- the control plane --------------------------------------------------------------------------------------

    @property
    def http(self) -> httpx.AsyncClient:
        """A client under /v1 that holds the admin token."""
        assert self._http is not None, "start_plane comes first"
        return self._http

    async def get(self, path: str, **query: Any) -> Any:
        """GET under /v1."""
        answer = await self.http.get(path, params=query)
        answer.raise_for_status()
        return answer.json()

    async def post(self, path: str, body: dict[str, Any], *, status: int | None = None) -> Any:
        """POST under /v1 with a fresh Idempotency-Key."""
        answer = await self.http.post(path, json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        if status is None:
            answer.raise_for_status()
        else:
            assert answer.status_code == status, answer.text
        return answer.json()

    async def order(self, *argv: str, **extra: Any) -> str:
        """Order an execution; its id."""
        body = {"argv": list(argv), **({} if {"worktree", "cwd"} & extra.keys() else {"cwd": str(self.home)}), **extra}
        ordered = await self.post(f"/runners/{RUNNER}/executions", body)
        execution: str = ordered["id"]
        return execution

    async def ended(self, execution: str) -> dict[str, Any]:
        """Wait for the end of an execution, and for its log to be complete where it has one."""

        async def over() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = await self.get(f"/executions/{execution}", wait_ms=5000)
            except httpx.HTTPError:
                return None
            return found if found["state"] != "settled" or found["log"]["complete"] else None

        async def final() -> dict[str, Any] | None:
            found = await over()
            return found if found is not None and found["state"] in ("settled", "refused", "cancelled") else None

        result: dict[str, Any] = await until(final, f"the end of {execution}", ANSWER_S)
        return result

    async def ran(self, *argv: str, **extra: Any) -> dict[str, Any]:
        """Order an execution and wait for its end."""
        return await self.ended(await self.order(*argv, **extra))

    async def output(self, execution: str) -> dict[str, bytes]:
        """What the plane stored of stdout and stderr."""
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        names = {RecordKind.STDOUT: "stdout", RecordKind.STDERR: "stderr"}
        data = (await self.http.get(f"/executions/{execution}/log")).content
        for record in records(data, 0):
            assert len(record.payload) <= DATA_SLICE_BYTES_MAX
            if record.kind in (RecordKind.STDOUT, RecordKind.STDERR):
                streams[names[RecordKind(record.kind)]] += record.payload
        return {name: bytes(content) for name, content in streams.items()}

    async def close(self) -> list[int]:
        """End everything and remove the home."""
        if self._http is not None:
            await self._http.aclose()
        return await super().close()


@asynccontextmanager
async def stand(*, enrolled: bool = True) -> AsyncIterator[Stand]:
    """A stand with a running control plane and, unless told otherwise, a connected daemon."""
    system = Stand()
    try:
        await system.start_plane()
        if enrolled:
            await system.enroll()
            await system.start_daemon()
            await system.online()
        yield system
    except BaseException:
        print(system.log_tail("daemon"), system.log_tail("plane"), sep="\n--- plane\n")
        raise
    finally:
        await system.close()


async def poll(holds: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Wait until `holds()` is true."""
    return await until(holds, what, ANSWER_S)
