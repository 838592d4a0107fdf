"""The process: where it listens, what it announces, how it ends."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from controlplane.errors import StartRefused
from controlplane.plane import ControlPlane
from controlplane.server import refuse_remote, run_embedded
from tests.support.control_plane import running
from tests.support.fake_runner import FakeRunner, dial

SERVE = """
import json, pathlib, sys
from controlplane.server import serve
data = pathlib.Path(sys.argv[1])
serve(data, data / "plane.db", "127.0.0.1", 0, allow_remote=False, log_format="json",
      announce=lambda said: print(json.dumps([said.port, said.root_fingerprint, said.join]), flush=True))
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.test", ""])
def test_it_listens_on_loopback_only(host: str) -> None:
    """Anything else wants to be allowed."""
    with pytest.raises(StartRefused, match="loopback"):
        refuse_remote(host, allow_remote=False)
    refuse_remote(host, allow_remote=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_allowed(host: str) -> None:
    """In every form."""
    refuse_remote(host, allow_remote=False)


async def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    """StartRefused itself, not a group of it."""
    async with running(tmp_path / "one") as cp:
        with pytest.raises(StartRefused, match=str(cp.port)):
            async with ControlPlane.open(tmp_path / "two") as plane, run_embedded(plane, port=cp.port):
                pass


async def test_two_planes_cannot_have_one_directory(tmp_path: Path) -> None:
    """The second does not start."""
    async with running(tmp_path):
        with pytest.raises(StartRefused, match="another control plane"):
            async with ControlPlane.open(tmp_path):
                pass


async def test_nothing_stays_open_behind_it(tmp_path: Path) -> None:
    """Descriptors and tasks are those of before."""
    async with running(tmp_path) as cp:
        await cp.enrol()
    files, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    async with running(tmp_path):
        pass
    assert (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) == (files, tasks)


async def started(directory: Path) -> tuple[asyncio.subprocess.Process, tuple[int, str, str | None]]:
    """A control plane process that has announced itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(directory), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    port, root, join = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
    return process, (port, root, join)


async def ended(process: asyncio.subprocess.Process) -> int:
    """Its status, once it is gone and its pipes are read."""
    await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode is not None
    return process.returncode


@pytest.mark.slow
async def test_a_process_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    """The first start gives a join string, TERM ends it with 0 and a goodbye, the second start knows its runner."""
    data = tmp_path / "data"
    process, (_, root, join) = await started(data)
    assert join is not None
    runner = await FakeRunner.enrol(join)
    assert runner.root.fingerprint == root
    async with dial(await asked_port(join)) as socket:
        line = await runner.shake(socket)
        process.send_signal(signal.SIGTERM)
        assert (await line.closed()).code == 1001
    assert await ended(process) == 0
    process, (port, again, join) = await started(data)
    assert (again, join) == (root, None)
    async with runner.connect(port) as line:
        assert (await line.beat()).n == 1
    process.send_signal(signal.SIGINT)
    assert await ended(process) == 0


async def asked_port(join: str) -> int:
    """The port in a join string."""
    return int(join.split("/")[2].rpartition(":")[2])


@pytest.mark.slow
async def test_a_killed_process_loses_nothing_it_answered(tmp_path: Path) -> None:
    """KILL right after a 202: the execution is there and is sent, once."""
    data = tmp_path / "data"
    process, (port, _, join) = await started(data)
    assert join is not None
    runner = await FakeRunner.enrol(join)
    token = (data / "admin.token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "k"}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://127.0.0.1:{port}/v1/runners/laptop/executions"
        answer = await http.post(url, json={"argv": ["true"], "cwd": "/srv"}, headers=headers)
    assert answer.status_code == 202
    process.kill()
    assert await ended(process) == -signal.SIGKILL
    process, (port, _, _) = await started(data)
    async with runner.connect(port) as line:
        assert (await line.command()).value.cmd_id == answer.json()["cmd_id"]
        await line.beat()
        assert not [message for message in line.heard if message.t == "command"]
    process.send_signal(signal.SIGTERM)
    assert await ended(process) == 0
