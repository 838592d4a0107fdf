"""What users may ask wrongly of a real system: the control plane or the runner says why, by a stable reason, and nothing happens."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.support.repositories import git, make_repository, snapshot
from tests.support.stand import RUNNER, Stand, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Stand]:
    """One control plane and one runner for all."""
    async with stand() as whole:
        make_repository(whole.home / "repo")
        (whole.home / "plain").mkdir()
        (whole.home / "file").touch()
        (whole.home / "way-out").symlink_to("/etc")
        yield whole


async def lives(system: Stand) -> None:
    """The next good command runs."""
    assert (await system.ran("true"))["exit_status"] == 0


def at(system: Stand, value: Any) -> Any:
    """`value` with HOME replaced by the home of the stand, wherever it stands."""
    return json.loads(json.dumps(value).replace("HOME", str(system.home)))


EXECUTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "outside the roots": ({"cwd": "/etc"}, "CWD_OUTSIDE_ROOTS"),
    "beside a root": ({"cwd": "HOME-evil"}, "CWD_OUTSIDE_ROOTS"),
    "outside by a link": ({"cwd": "HOME/way-out"}, "CWD_OUTSIDE_ROOTS"),
    "a directory that is not there": ({"cwd": "HOME/nowhere"}, "CWD_MISSING"),
    "a directory that is a file": ({"cwd": "HOME/file"}, "CWD_MISSING"),
    "an unknown worktree": ({"worktree": "wt_nobody"}, "WORKTREE_UNKNOWN"),
    "a loader's variable": ({"env": {"LD_PRELOAD": "/tmp/x.so"}}, "ENV_DENIED"),
    "a variable of git": ({"env": {"GIT_SSH_COMMAND": "x"}}, "ENV_DENIED"),
    "a variable of Python": ({"env": {"PYTHONSTARTUP": "x"}}, "ENV_DENIED"),
    "a variable of the shell": ({"env": {"BASH_ENV": "x"}}, "ENV_DENIED"),
    "a variable of ours": ({"env": {"LOCAL_RUNNER_COOKIE": "x"}}, "ENV_DENIED"),
    "a secret in the clear": ({"env": {"DEPLOY_TOKEN": "x"}}, "ENV_SECRET_NAME"),
    "a sealed loader's variable": ({"secrets": {"LD_PRELOAD": "x"}}, "ENV_DENIED"),
}


@pytest.mark.parametrize("name", EXECUTIONS)
async def test_an_execution_that_may_not_begin_is_refused_by_a_receipt(system: Stand, name: str) -> None:
    """The runner's word, with its reason; there is no attempt."""
    asked, reason = EXECUTIONS[name]
    before = system.effects()
    ended = await system.ran("true", **at(system, asked))
    assert (ended["state"], ended["reason"], ended["settlement"]) == ("refused", reason, None)
    (statement,) = (await system.get(f"/receipts/{ended['id']}"))["statements"]
    assert (statement["payload"]["outcome"], statement["payload"]["reason"]) == ("refused", reason)
    assert statement["payload"]["seq"] > 0
    assert system.effects() == before
    await lives(system)


@pytest.mark.parametrize(
    ("argv", "reason", "status"),
    [
        (["no-such-program-anywhere"], "EXEC_NOT_FOUND", 125),
        (["HOME/file"], "EXEC_NOT_EXECUTABLE", 125),
        (["HOME/plain"], "EXEC_NOT_EXECUTABLE", 125),
    ],
)
async def test_a_program_that_cannot_be_run_never_started(
    system: Stand, argv: list[str], reason: str, status: int
) -> None:
    """The attempt is settled as never started: that is no exit status of the program."""
    ended = await system.ran(*at(system, argv))
    assert (ended["exit_status"], ended["settlement"]["verdict"]) == (status, "never_started")
    assert ended["settlement"]["cause"]["reason"] == reason
    await lives(system)


WORKTREES: dict[str, tuple[dict[str, Any], str]] = {
    "a directory that is no repository": ({"repo": "HOME/plain"}, "REPO_INVALID"),
    "a repository that is not there": ({"repo": "HOME/nowhere"}, "REPO_INVALID"),
    "a repository outside the roots": ({"repo": "/usr"}, "REPO_OUTSIDE_ROOTS"),
    "a repository outside by a link": ({"repo": "HOME/way-out"}, "REPO_OUTSIDE_ROOTS"),
    "a base that is not there": ({"base": "no-such-branch"}, "BASE_NOT_FOUND"),
    "a base that is an option": ({"base": "--orphan"}, "BASE_NOT_FOUND"),
    "a base that is a command line": ({"base": "HEAD; touch HOME/pwned"}, "BASE_NOT_FOUND"),
    "a branch that is there": ({"branch": "main"}, "BRANCH_EXISTS"),
    "a branch with two dots": ({"branch": "a..b"}, "BRANCH_INVALID"),
    "a branch that climbs": ({"branch": "../../evil"}, "BRANCH_INVALID"),
    "a branch that is an option": ({"branch": "--force"}, "BRANCH_INVALID"),
    "a branch with a line in it": ({"branch": "a\nb"}, "BRANCH_INVALID"),
    "a branch that is locked by its name": ({"branch": "a.lock"}, "BRANCH_INVALID"),
    "a branch that is HEAD": ({"branch": "HEAD"}, "BRANCH_INVALID"),
}


@pytest.mark.parametrize("name", WORKTREES)
async def test_a_worktree_that_cannot_be_made_leaves_nothing(system: Stand, name: str) -> None:
    """A receipt with the reason; no directory, no branch, no entry in the repository."""
    asked, reason = WORKTREES[name]
    repo = system.home / "repo"
    before, refs = system.effects(), snapshot(repo / ".git")
    body = {"repo": str(repo), "base": "main", **at(system, asked)}
    made = await system.post(f"/runners/{RUNNER}/worktrees", body)
    ended = await system.get(f"/worktrees/{made['id']}", wait_ms=20_000)
    assert (ended["state"], ended["reason"]) in [("refused", reason), ("failed", reason)], ended
    (statement,) = (await system.get(f"/receipts/{made['id']}"))["statements"]
    assert statement["payload"]["reason"] == reason
    assert system.effects() == before and snapshot(repo / ".git") == refs
    assert not (system.home / "pwned").exists()
    await lives(system)


GOOD = '{"argv":["true"],"cwd":"/tmp"}'
BODIES: dict[str, tuple[str, int, str]] = {
    "no JSON": ("argv", 422, "BAD_REQUEST"),
    "an array": ("[]", 422, "BAD_REQUEST"),
    "no argv": ('{"argv":[],"cwd":"/tmp"}', 422, "BAD_REQUEST"),
    "argv of nothing": ('{"argv":[""],"cwd":"/tmp"}', 422, "BAD_REQUEST"),
    "an argument with a NUL": ('{"argv":["a\\u0000b"],"cwd":"/tmp"}', 422, "BAD_REQUEST"),
    "nowhere": ('{"argv":["true"]}', 422, "BAD_REQUEST"),
    "two places": ('{"argv":["true"],"cwd":"/tmp","worktree":"wt_1"}', 422, "BAD_REQUEST"),
    "a relative directory": ('{"argv":["true"],"cwd":"tmp"}', 422, "BAD_REQUEST"),
    "path traversal": ('{"argv":["true"],"cwd":"/tmp/../etc"}', 422, "BAD_REQUEST"),
    "traversal in a worktree": ('{"argv":["true"],"worktree":"wt_1","subdir":"../.."}', 422, "BAD_REQUEST"),
    "a worktree by traversal": ('{"argv":["true"],"worktree":"../x"}', 422, "BAD_REQUEST"),
    "a name that is none": ('{"argv":["true"],"cwd":"/tmp","env":{"A=B":"1"}}', 422, "BAD_REQUEST"),
    "an unknown field": (GOOD[:-1] + ',"shell":true}', 422, "BAD_REQUEST"),
    "a duplicate key": (GOOD[:-1] + ',"cwd":"/etc"}', 422, "BAD_REQUEST"),
    "a float": (GOOD[:-1] + ',"timeout_ms":1.5}', 422, "BAD_REQUEST"),
    "NaN": (GOOD[:-1] + ',"timeout_ms":NaN}', 422, "BAD_REQUEST"),
    "true for a number": (GOOD[:-1] + ',"timeout_ms":true}', 422, "BAD_REQUEST"),
    "deep nesting": (GOOD[:-1] + ',"env":' + '{"a":' * 50 + "1" + "}" * 51, 422, "BAD_REQUEST"),
    "bottomless nesting": ("[" * 100_000, 422, "BAD_REQUEST"),
    "a lone surrogate": ('{"argv":["\\ud800"],"cwd":"/tmp"}', 422, "BAD_REQUEST"),
    "more than a command can carry": (json.dumps({"argv": ["x" * 30_000] * 3, "cwd": "/tmp"}), 413, "TOO_LARGE"),
    "more than a request may have": (json.dumps({"argv": ["x" * 1_000_000] * 9, "cwd": "/tmp"}), 413, "TOO_LARGE"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_bad_request_is_refused_at_the_door(system: Stand, name: str) -> None:
    """Nothing is queued for the runner, and the answer repeats none of it."""
    body, status, reason = BODIES[name]
    before = len((await system.get("/executions"))["executions"])
    answer = await ask(system, body, **{"Idempotency-Key": name})
    assert (answer.status_code, answer.json()["error"]["reason"]) == (status, reason)
    assert len((await system.get("/executions"))["executions"]) == before
    await lives(system)


async def test_an_idempotency_key_is_wanted_and_means_one_request(system: Stand) -> None:
    """Without one: refused. The same again: the same answer. Another request under it: refused."""
    body = json.dumps({"argv": ["true"], "cwd": str(system.home)})
    assert (await ask(system, body)).json()["error"]["reason"] == "IDEMPOTENCY_KEY_MISSING"
    first = await ask(system, body, **{"Idempotency-Key": "one"})
    again = await ask(system, body, **{"Idempotency-Key": "one"})
    assert first.json()["id"] == again.json()["id"]
    other = await ask(system, GOOD, **{"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["error"]["reason"]) == (409, "IDEMPOTENCY_MISMATCH")
    assert (await system.ended(first.json()["id"]))["exit_status"] == 0


async def test_nothing_is_answered_without_the_admin_token(system: Stand) -> None:
    """But health."""
    for token in ("", "Bearer", "Bearer wrong", "Basic YTpi"):
        answer = await ask(system, GOOD, Authorization=token, **{"Idempotency-Key": "x"})
        assert (answer.status_code, answer.json()["error"]["reason"]) == (401, "UNAUTHORIZED")


async def ask(system: Stand, body: str, **headers: str) -> httpx.Response:
    """POST any text as an order of an execution."""
    return await system.http.post(f"/runners/{RUNNER}/executions", content=body.encode(), headers=headers)


async def test_a_stop_of_what_has_ended_changes_nothing(system: Stand) -> None:
    """The stored settlement stands; a stop of nobody is refused."""
    ended = await system.ran("sh", "-c", "exit 7")
    stopped = await system.post(f"/executions/{ended['id']}/stop", {}, status=200)
    assert stopped["settlement"] == ended["settlement"] and stopped["exit_status"] == 7
    nobody = await system.post("/executions/ex_nobody/stop", {}, status=404)
    assert nobody["error"]["reason"] == "UNKNOWN_EXECUTION"


async def test_a_dirty_worktree_is_removed_by_force_alone(system: Stand) -> None:
    """Without it: WORKTREE_DIRTY, and every byte is there; while something runs in it: WORKTREE_BUSY."""
    repo = system.home / "repo"
    made = await system.post(f"/runners/{RUNNER}/worktrees", {"repo": str(repo), "base": "main"})
    ready = await system.get(f"/worktrees/{made['id']}", wait_ms=20_000)
    assert (await system.ran("sh", "-c", "echo mine > mine.txt", worktree=made["id"]))["exit_status"] == 0
    kept = await removed(system, made["id"])
    assert (kept["state"], kept["reason"]) == ("ready", "WORKTREE_DIRTY")
    assert git(ready["path"], "status", "--porcelain") == "?? mine.txt"
    gone = await removed(system, made["id"], force=True)
    assert gone["state"] == "removed"
    assert git(repo, "worktree", "list", "--porcelain").count("worktree ") == 1


async def removed(system: Stand, worktree: str, *, force: bool = False) -> dict[str, Any]:
    """Ask for a removal and wait for what became of it."""
    await system.post(f"/worktrees/{worktree}/remove", {"force": force})
    found: dict[str, Any] = await system.get(f"/worktrees/{worktree}", wait_ms=20_000)
    return found
