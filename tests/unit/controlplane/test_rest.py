"""The REST contract: who may ask, how, and what comes back."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane.limits import BODY_BYTES_MAX, IDEMPOTENCY_TTL_MS
from protocol.identity import JoinString
from protocol.keyset import Root, open_keyset
from tests.support.control_plane import Moved, running

pytestmark = pytest.mark.slow

PATHS = [
    ("GET", "/v1/runners"),
    ("GET", "/v1/executions"),
    ("GET", "/v1/executions/x/log"),
    ("GET", "/v1/keys"),
    ("GET", "/v1/events"),
    ("GET", "/v1/openapi.json"),
    ("GET", "/v1/nothing"),
    ("POST", "/v1/join-tokens"),
    ("POST", "/v1/runners/r/executions"),
    ("DELETE", "/v1/runners"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_nothing_answers_without_the_token(tmp_path: Path, method: str, path: str) -> None:
    """401 everywhere, also for what does not exist; a wrong token, another scheme and two headers are no token."""
    async with running(tmp_path) as cp:
        good = cp.http.headers.pop("Authorization")
        for values in ([], ["Bearer wrong"], ["Bearer"], ["Basic abc"], [good + "x"], [good, good]):
            headers = [("Idempotency-Key", "k"), *(("Authorization", value) for value in values)]
            answer = await cp.http.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["reason"]) == (401, "UNAUTHORIZED")


async def test_health_needs_no_token(tmp_path: Path) -> None:
    """And tells nothing but that."""
    async with running(tmp_path) as cp:
        cp.http.headers.pop("Authorization")
        answer = await cp.http.get("/v1/health")
        assert answer.status_code == 200
        assert set(answer.json()) == {"status", "version", "now_ms"}


async def test_a_join_string_is_made(tmp_path: Path) -> None:
    """It names this plane, pins the root, and the key set opens under it."""
    async with running(tmp_path) as cp:
        answer = await cp.post("/v1/join-tokens", {"name": "laptop", "labels": {"a": "b"}})
        assert answer.status_code == 201
        join, keys = JoinString.parse(answer.json()["join"]), await cp.get("/v1/keys")
        assert (join.port, join.root, answer.json()["name"]) == (cp.port, keys["root_fingerprint"], "laptop")
        root = Root.model_validate(keys["root"])
        assert root.fingerprint == join.root
        assert open_keyset(keys["keyset"].encode(), root).value.version == 1


async def test_every_post_wants_an_idempotency_key(tmp_path: Path) -> None:
    """400 without."""
    async with running(tmp_path) as cp:
        for key in (None, "", "k" * 201):
            headers = {} if key is None else {"Idempotency-Key": key}
            answer = await cp.http.post("/v1/join-tokens", json={}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["reason"]) == (400, "IDEMPOTENCY_KEY_MISSING")


async def test_the_same_request_gets_the_same_answer(tmp_path: Path) -> None:
    """One effect however often it is asked, also at once, also after a restart; after a day it is a new request."""
    clock = Moved()
    body = {"argv": ["true"], "cwd": "/srv"}
    async with running(tmp_path, clock=clock) as cp:
        await cp.enrol()
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await cp.post("/v1/runners/laptop/executions", body, key="once"))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask)
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.text for answer in answers}) == 1
        joins = [(await cp.post("/v1/join-tokens", {}, key="join")).json() for _ in range(2)]
        assert joins[0] == joins[1]
    async with running(tmp_path, clock=clock) as cp:
        assert (await cp.post("/v1/runners/laptop/executions", body, key="once")).text == answers[0].text
        assert len((await cp.get("/v1/executions"))["executions"]) == 1
        clock.ahead_ms = IDEMPOTENCY_TTL_MS + 1000
        assert (await cp.post("/v1/runners/laptop/executions", body, key="once")).json() != answers[0].json()


async def test_a_key_for_another_request_is_refused(tmp_path: Path) -> None:
    """Other body or other path: 409, and no effect."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        path, body = "/v1/runners/laptop/executions", {"argv": ["true"], "cwd": "/srv"}
        assert (await cp.post(path, body, key="k")).status_code == 202
        for answer in (
            await cp.post(path, body | {"argv": ["false"]}, key="k"),
            await cp.post("/v1/join-tokens", {}, key="k"),
        ):
            assert (answer.status_code, answer.json()["error"]["reason"]) == (409, "IDEMPOTENCY_MISMATCH")
        assert len((await cp.get("/v1/executions"))["executions"]) == 1


async def test_a_failed_request_does_not_spend_its_key(tmp_path: Path) -> None:
    """What was refused may be asked again."""
    async with running(tmp_path) as cp:
        path, body = "/v1/runners/laptop/executions", {"argv": ["true"], "cwd": "/srv"}
        assert (await cp.post(path, body, key="k")).status_code == 404
        await cp.enrol()
        assert (await cp.post(path, body, key="k")).status_code == 202


BAD = [
    {},
    {"argv": [], "cwd": "/srv"},
    {"argv": [""], "cwd": "/srv"},
    {"argv": ["x"]},
    {"argv": ["x"], "cwd": "relative"},
    {"argv": ["x"], "cwd": "/a/../b"},
    {"argv": ["x"], "cwd": "/srv", "worktree": "wt"},
    {"argv": ["x"], "worktree": "wt", "subdir": "../up"},
    {"argv": ["x"], "cwd": "/srv", "subdir": "s"},
    {"argv": ["x"], "cwd": "/srv", "unknown": "canary"},
    {"argv": ["canary\0"], "cwd": "/srv"},
    {"argv": ["x"], "cwd": "/srv", "timeout_ms": "1"},
    {"argv": ["x"], "cwd": "/srv", "timeout_ms": 0},
    {"argv": ["x"], "cwd": "/srv", "on_loss": "canary"},
    {"argv": ["x"], "cwd": "/srv", "env": {"A": "1"}, "secrets": {"A": "canary"}},
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
async def test_a_bad_request_is_refused_and_never_echoed(tmp_path: Path, body: dict[str, Any]) -> None:
    """422 with a reason; what was sent does not come back."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        answer = await cp.post("/v1/runners/laptop/executions", body)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "BAD_REQUEST")
        assert "canary" not in answer.text


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"argv":["x"],"argv":["y"],"cwd":"/"}', b"\xff", b'{"a":1e3}'])
async def test_a_body_is_strict_json(tmp_path: Path, raw: bytes) -> None:
    """Duplicate keys and floats are no requests."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        headers = {"Idempotency-Key": "k"}
        answer = await cp.http.post("/v1/runners/laptop/executions", content=raw, headers=headers)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "BAD_REQUEST")


async def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    """A body, also without a length; arguments that no command carries; a secret."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        path, headers = "/v1/runners/laptop/executions", {"Idempotency-Key": "k"}

        async def endless() -> Any:
            for _ in range(3):
                yield b" " * (BODY_BYTES_MAX // 2)

        answers = [
            await cp.http.post(path, content=b" " * (BODY_BYTES_MAX + 1), headers=headers),
            await cp.http.post(path, content=endless(), headers=headers),
            await cp.post(path, {"argv": ["x" * 32_000, "y" * 32_000], "cwd": "/srv"}),
            await cp.post(path, {"argv": ["x"], "cwd": "/srv", "secrets": {"S": "s" * 20_000}}),
        ]
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["reason"]) == (413, "TOO_LARGE")


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/v1/executions/nobody", 404, "UNKNOWN_EXECUTION"),
        ("/v1/executions/nobody/log", 404, "UNKNOWN_EXECUTION"),
        ("/v1/executions/nobody/digests", 404, "UNKNOWN_EXECUTION"),
        ("/v1/worktrees/nobody", 404, "UNKNOWN_WORKTREE"),
        ("/v1/executions?runner=nobody", 404, "UNKNOWN_RUNNER"),
        ("/v1/executions?state=canary", 422, "BAD_REQUEST"),
        ("/v1/executions?limit=501", 422, "BAD_REQUEST"),
        ("/v1/executions/x?wait_ms=30001", 422, "BAD_REQUEST"),
        ("/v1/executions/%20canary", 422, "BAD_REQUEST"),
        ("/v1/nothing", 404, "NOT_FOUND"),
        ("/v1/join-tokens", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_an_error_has_a_reason(tmp_path: Path, path: str, status: int, reason: str) -> None:
    """And one shape."""
    async with running(tmp_path) as cp:
        answer = await cp.http.get(path)
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"reason", "detail"}
        assert answer.json()["error"]["reason"] == reason
        assert "canary" not in answer.text


async def test_lists_are_filtered_newest_first(tmp_path: Path) -> None:
    """By runner and state, bounded."""
    async with running(tmp_path) as cp:
        await cp.enrol("one", b"1" * 32)
        await cp.enrol("two", b"2" * 32)
        ids = [(await cp.start("one" if n % 2 else "two"))["id"] for n in range(6)]
        await cp.post(f"/v1/executions/{ids[1]}/stop")

        async def listed(**params: Any) -> list[str]:
            return [row["id"] for row in (await cp.get("/v1/executions", **params))["executions"]]

        assert await listed() == ids[::-1]
        assert await listed(limit=2) == [ids[5], ids[4]]
        assert await listed(runner="one") == [ids[5], ids[3], ids[1]]
        assert await listed(runner="one", state="cancelled") == [ids[1]]


async def test_waiting_ends_with_the_time(tmp_path: Path) -> None:
    """As it is by then."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        asked = await cp.start()
        assert (await cp.get(f"/v1/executions/{asked['id']}", wait_ms=50))["state"] == "queued"


async def test_the_shape_of_an_execution_is_the_contract(tmp_path: Path) -> None:
    """Every name, no other."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        asked = await cp.start()
        assert list(asked) == [
            "id", "runner", "runner_name", "start_token", "state", "argv", "cwd", "worktree", "created_ms", "cmd_id",
            "stop_requested", "receipt", "settlement", "exit_status", "reason", "detail", "log", "lease_token", "verdict",
            "waits", "retry_after_ms", "pty", "size",
        ]  # fmt: skip
        assert asked["log"] == {"end": 0, "complete": False, "short_bytes": 0}
        assert json.loads(json.dumps(await cp.get(f"/v1/executions/{asked['id']}"))) == asked
