"""The control socket: who is answered, what is refused, and that everything is bounded. Real sockets throughout."""

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from protocol.errors import Reason
from runner.adapters import control
from runner.adapters.control import CONNECTIONS_MAX, ControlCall, ControlUnavailable, call_control, serve_control
from runner.adapters.control_client import REQUEST_BYTES_MAX, reachable
from runner.errors import AnotherDaemon, ConfigError, Refused


async def echo(call: ControlCall) -> dict[str, Any]:
    """Answers with the question."""
    return {"verb": call.verb, "args": dict(call.args), "uid": call.uid, "pid": call.pid}


@asynccontextmanager
async def served(path: Path, answer: control.AnswerCall = echo) -> AsyncIterator[None]:
    """A control socket that listens."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(partial(serve_control, path, answer))
        yield
        tasks.cancel_scope.cancel()


async def asked(path: Path, verb: str = "status", timeout_s: float = 5.0, **args: Any) -> dict[str, Any]:
    """Ask from a thread, as another process would."""
    return await anyio.to_thread.run_sync(partial(call_control, path, verb, args, timeout_s))


async def raw(path: Path, request: bytes) -> dict[str, Any]:
    """Send bytes as they are and read the answer."""

    def talk() -> bytes:
        with reachable(path) as name, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(name)
            with suppress(BrokenPipeError):
                connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(partial(connection.recv, 65536), b""))

    found: dict[str, Any] = json.loads(await anyio.to_thread.run_sync(talk))
    return found


async def test_a_question_is_answered_with_who_asked(tmp_path: Path) -> None:
    """The kernel says who: this process."""
    async with served(tmp_path / "rt" / "control.sock"):
        said = await asked(tmp_path / "rt" / "control.sock", "ps", all=True)
    assert said == {"verb": "ps", "args": {"all": True}, "uid": os.geteuid(), "pid": os.getpid()}


async def test_socket_and_directory_are_their_owners_alone(tmp_path: Path) -> None:
    """0600 in 0700, whatever the umask, and gone at the end."""
    path = tmp_path / "rt" / "control.sock"
    before = os.umask(0)
    try:
        async with served(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert [one.name for one in path.parent.iterdir()] == ["control.sock"]
    finally:
        os.umask(before)
    assert not path.exists()


async def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever modes say: the kernel names the peer's user."""
    async with served(tmp_path / "rt" / "control.sock"):
        monkeypatch.setattr(control, "trusted", lambda uid: uid != os.geteuid())
        with pytest.raises(Refused) as caught:
            await asked(tmp_path / "rt" / "control.sock")
    assert caught.value.reason is Reason.POLICY_DENIED
    monkeypatch.undo()
    monkeypatch.setattr("runner.adapters.control_client.trusted", lambda _uid: False)
    async with served(tmp_path / "rt" / "control.sock"):
        with pytest.raises(ControlUnavailable, match="another user"):
            await asked(tmp_path / "rt" / "control.sock")


async def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    """Another user could put a socket of theirs there; the error names the repair."""
    directory = tmp_path / "rt"
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match=f"chmod 700 {directory}"):
        await serve_control(directory / "control.sock", echo)


async def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    """Its file is there, and nobody listens."""
    tmp_path.chmod(0o700)
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with served(path):
        assert (await asked(path))["verb"] == "status"


async def test_the_socket_of_a_living_daemon_is_left_alone(tmp_path: Path) -> None:
    """The second one says who holds it; the first goes on."""
    path = tmp_path / "rt" / "control.sock"
    async with served(path):
        with pytest.raises(AnotherDaemon) as caught:
            await serve_control(path, echo)
        assert caught.value.pid == os.getpid()
        assert (await asked(path))["verb"] == "status"


async def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    """sun_path holds 107 bytes."""
    path = tmp_path / ("d" * 150) / "control.sock"
    async with served(path):
        assert (await asked(path))["verb"] == "status"


async def test_a_refusal_keeps_its_reason(tmp_path: Path) -> None:
    """What the daemon refuses is refused to the asker, word for word."""

    async def refuse(_call: ControlCall) -> dict[str, Any]:
        raise Refused(Reason.UNKNOWN_TARGET, "no such execution")

    async with served(tmp_path / "rt" / "control.sock", refuse):
        with pytest.raises(Refused) as caught:
            await asked(tmp_path / "rt" / "control.sock", "stop")
    assert (caught.value.reason, caught.value.detail) == (Reason.UNKNOWN_TARGET, "no such execution")


async def test_a_failing_answer_ends_no_daemon(tmp_path: Path) -> None:
    """The asker hears of it, the next one is answered."""

    async def fail(call: ControlCall) -> dict[str, Any]:
        if call.verb == "status":
            raise KeyError("broken")
        return {}

    path = tmp_path / "rt" / "control.sock"
    async with served(path, fail):
        with pytest.raises(Refused, match="KeyError"):
            await asked(path, "status")
        assert await asked(path, "ps") == {}


@pytest.mark.parametrize(
    "request_line",
    [b"", b"no json\n", b"[1]\n", b'{"verb":"x"}\n', b'{"verb":1,"args":{}}\n', b'{"verb":"x","args":[]}\n', b"{}"],
)
async def test_what_is_no_request_is_refused(tmp_path: Path, request_line: bytes) -> None:
    """Every form of it, with the same reason."""
    path = tmp_path / "rt" / "control.sock"
    async with served(path):
        assert (await raw(path, request_line))["error"]["reason"] == "BAD_FRAME"
        assert (await asked(path))["verb"] == "status"


async def test_a_line_without_an_end_is_cut_off(tmp_path: Path) -> None:
    """After 64 KiB."""
    path = tmp_path / "rt" / "control.sock"
    async with served(path):
        said = await raw(path, b"x" * (REQUEST_BYTES_MAX + 10_000))
    assert said["error"]["detail"] == f"a request holds at most {REQUEST_BYTES_MAX} bytes"


async def test_an_asker_too_many_is_told_so(tmp_path: Path) -> None:
    """Sixteen are being answered; the seventeenth is refused at once, and answered once there is room."""
    path = tmp_path / "rt" / "control.sock"
    begun, go = 0, anyio.Event()

    async def slow(_call: ControlCall) -> dict[str, Any]:
        nonlocal begun
        begun += 1
        await go.wait()
        return {}

    async with served(path, slow), anyio.create_task_group() as tasks:
        for _ in range(CONNECTIONS_MAX):
            tasks.start_soon(asked, path)
        with anyio.fail_after(5):
            while begun < CONNECTIONS_MAX:
                await anyio.sleep(0.01)
        with pytest.raises(Refused) as caught:
            await asked(path)
        go.set()
        assert caught.value.reason is Reason.CAPACITY
        assert await asked(path) == {}


async def test_a_silent_asker_loses_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange has a deadline; the connection is closed without an answer."""
    monkeypatch.setattr(control, "EXCHANGE_TIMEOUT_S", 0.05)
    path = tmp_path / "rt" / "control.sock"
    async with served(path), await anyio.connect_unix(str(path)) as silent:
        with anyio.fail_after(5), pytest.raises(anyio.EndOfStream):
            await silent.receive()


def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    """No file; a file without a listener."""
    with pytest.raises(ControlUnavailable, match="no daemon listens"):
        call_control(tmp_path / "control.sock", "status", {}, 1.0)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(ControlUnavailable, match="no daemon answers"):
        call_control(tmp_path / "control.sock", "status", {}, 1.0)


def test_a_stuck_daemon_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    """It accepts and says nothing."""
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(str(tmp_path / "control.sock"))
        stuck.listen()
        with pytest.raises(ControlUnavailable, match="no daemon answers"):
            call_control(tmp_path / "control.sock", "status", {}, 0.1)
