"""`runner-control pty`: as processes, with a runner that does as it is told."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli import cli
from protocol.commands import Kind, PtyOpen, parse_args
from protocol.messages import LogClosed
from protocol.records import RecordKind
from tests.support.control_plane import Running, running
from tests.support.log_bytes import LogBytes

WAIT_S = 30


async def run(cp: Running, home: Path, *args: str) -> tuple[int | None, str, str]:
    """Run one: status, stdout, stderr."""
    environ = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "LOCAL_RUNNER_CONTROL_URL": f"http://127.0.0.1:{cp.port}",
        "LOCAL_RUNNER_CONTROL_TOKEN_FILE": str(home / "admin.token"),
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controlplane.cli", "pty", *args, stdout=pipe, stderr=pipe, env=environ
    )
    out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
async def test_a_terminal_from_its_opening_to_its_recording(tmp_path: Path) -> None:
    """Opened detached with the size that is given, listed, recorded with size and end, killed as it has ended."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            options = ["--cwd", "/srv", "--rows", "40", "--cols", "120", "--size-policy", "fixed", "--env", "A=b", "-d"]
            status, out, err = await run(cp, tmp_path, "open", "laptop", *options, "--", "top", "-d1")
            assert status == 0, err
            command = await line.command()
            args = parse_args(command.value)
            assert isinstance(args, PtyOpen)
            assert (args.argv, args.env, args.size.rows, args.size.cols) == (["top", "-d1"], {"A": "b"}, 40, 120)
            assert (args.size_policy, args.background) == ("fixed", "sweep")
            await line.report(runner.accepted(command))
            status, listed, _ = await run(cp, tmp_path, "ls", "laptop")
            assert (status, "120x40" in listed, out.strip() in listed, "top -d1" in listed) == (0, True, True, True)
            log = LogBytes(f"{out.strip()}.1")
            log._add(RecordKind.RESIZE, b"\x28\0\x78\0")
            log.write(b"load", RecordKind.PTY)
            log._add(RecordKind.EXIT, b'{"code": 0}')
            await line.upload(log.attempt, log)
            await line.report(runner.ended(command, log=log))
            await line.send(LogClosed(channel=1, end=len(log.data)))
            status, cast, err = await run(cp, tmp_path, "record", "--follow", out.strip())
            assert status == 0, err
            header, *events = map(json.loads, cast.splitlines())
            assert header["term"] == {"cols": 120, "rows": 40}
            assert [event[1:] for event in events] == [["o", "load"], ["x", "0"]]
            status, said, _ = await run(cp, tmp_path, "kill", out.strip())
            assert (status, said) == (0, f"{out.strip()} is settled\n")
            status, listed, _ = await run(cp, tmp_path, "ls", "--json")
            assert json.loads(listed) == {"ptys": []}


@pytest.mark.slow
async def test_kill_hangs_up_and_waits(tmp_path: Path) -> None:
    """What is ordered is `pty.close`; what is no terminal is refused with a next step."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            _, out, _ = await run(cp, tmp_path, "open", "laptop", "--cwd", "/srv", "--detach")
            start = await line.command()
            args = parse_args(start.value)
            assert isinstance(args, PtyOpen)
            assert args.argv == []
            await line.report(runner.accepted(start))
            killing = asyncio.create_task(run(cp, tmp_path, "kill", out.strip(), "--grace", "1s"))
            command = await line.command()
            assert command.value.kind == Kind.PTY_CLOSE
            await line.report(runner.ended(start, code=129))
            assert await killing == (0, f"{out.strip()} is settled\n", "")
            other = await cp.start()
            status, _, err = await run(cp, tmp_path, "kill", other["id"])
            assert status == 1
            assert "NOT_A_PTY" in err
            assert "next: runner-control pty ls" in err


@pytest.mark.parametrize(
    "args",
    [
        ["pty", "open", "laptop"],
        ["pty", "open", "laptop", "--cwd", "here"],
        ["pty", "open", "laptop", "--cwd", "/a", "--subdir", "b"],
        ["pty", "open", "laptop", "--cwd", "/a", "--rows", "0"],
        ["pty", "open", "la ptop", "--cwd", "/a"],
        ["serve", "--origin", "https://Dev.example"],
        ["serve", "--origin", "https://dev.example/"],
        ["serve", "--origin", "*"],
    ],
)
def test_wrong_words_are_usage(args: list[str]) -> None:
    """Told before anything is asked or begun."""
    assert CliRunner().invoke(cli, args).exit_code == 2
