"""The control plane's command line: real processes against a real control plane, with a runner that does as it is told."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from click.testing import CliRunner

from controlplane.cli import cli
from controlplane.client import LogParser, PlaneClient, PlaneRefused, PlaneUnreachable
from controlplane.follow import Left, stop_at_interrupt
from protocol.errors import Reason
from protocol.identity import JoinString
from protocol.messages import LogClosed
from protocol.receipt import Outcome, Verdict
from protocol.records import RecordKind, encode_record
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Closed, FakeRunner, Line, LogBytes

WAIT_S = 30


@dataclass
class Shell:
    """The command line as processes, against one control plane."""

    plane: Running
    home: Path

    async def start(self, *args: str, before: tuple[str, ...] = (), **env: str) -> asyncio.subprocess.Process:
        """Begin one, as the arguments of `before`."""
        environ = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "LOCAL_RUNNER_CONTROL_URL": f"http://127.0.0.1:{self.plane.port}",
            "LOCAL_RUNNER_CONTROL_TOKEN_FILE": str(self.home / "plane" / "admin.token"),
            **env,
        }
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *before, sys.executable, "-m", "controlplane.cli", *args, stdout=pipe, stderr=pipe, env=environ
        )

    async def run(self, *args: str, **env: str) -> tuple[int | None, bytes, str]:
        """Run one: status, stdout, stderr."""
        process = await self.start(*args, **env)
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        return process.returncode, out, err.decode()

    async def told(self, *args: str) -> Any:
        """Run one with --json that ends well."""
        status, out, err = await self.run(*args)
        assert status == 0, err
        return json.loads(out)


@asynccontextmanager
async def shop(tmp_path: Path) -> AsyncIterator[tuple[Shell, FakeRunner]]:
    """A control plane, a shell, and one enrolled runner."""
    async with running(tmp_path / "plane") as plane:
        yield Shell(plane, tmp_path), await plane.enrol()


async def act(line: Line, log: "LogBytes | None" = None, code: int = 0, **over: Any) -> str:
    """Take the next start, upload its log, settle it; gives the execution's id."""
    command = await line.command()
    execution_id: str = command.value.args["execution_id"]
    await line.report(line.runner.accepted(command))
    log = log or LogBytes(f"{execution_id}.1").write(b"out\x00\xff\n").write(b"err\x1b[1m\n", RecordKind.STDERR)
    await line.upload(f"{execution_id}.{command.value.args['start_token']}", log)
    await line.report(line.runner.ended(command, code=code, log=log, **over))
    return execution_id


def every_verb(group: click.Group = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb and verb of a verb."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += [(*path, name)]
        found += every_verb(command, (*path, name)) if isinstance(command, click.Group) else []
    return found


@pytest.mark.parametrize("verb", every_verb(), ids=" ".join)
def test_every_verb_explains_itself(verb: tuple[str, ...]) -> None:
    """With an example that begins with the command's name."""
    done = CliRunner().invoke(cli, [*verb, "--help"])
    assert done.exit_code == 0
    assert f"runner-control {verb[0]}" in done.stdout.partition("Example")[2]


@pytest.mark.slow
async def test_exec_is_the_command(tmp_path: Path) -> None:
    """Its bytes, apart and exact, and its status."""
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "make", "-j4", "--", "x")
        execution_id = await act(line, code=3)
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert (process.returncode, out, err) == (3, b"out\x00\xff\n", b"err\x1b[1m\n")
        assert (await shell.told("show", execution_id, "--json"))["argv"] == ["make", "-j4", "--", "x"]

        shown = (await shell.run("show", execution_id))[1].decode()
        assert "make -j4 -- x" in shown and "(the same)" in shown and "chain proven" in shown and "exit status" in shown
        assert await shell.run("logs", execution_id) == (0, b"out\x00\xff\n", "err\x1b[1m\n")
        assert (await shell.run("logs", "-f", execution_id))[1] == b"out\x00\xff\n"
        assert (await shell.told("ps", "--json")) == {"executions": []}
        (listed,) = (await shell.told("ps", "--all", "--json"))["executions"]
        assert (listed["id"], listed["exit_status"]) == (execution_id, 3)
        assert execution_id in (await shell.run("ps", "--all"))[1].decode()


@pytest.mark.slow
async def test_exec_passes_what_it_is_given(tmp_path: Path) -> None:
    """Variables, limits, and secrets that are in no argument and no answer; --json tells the end, --detach the id."""
    (tmp_path / "token").write_text("s3cret-file\n")
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        options = [
            "--env",
            "A=b=c",
            "--secret",
            "FROM_ENV",
            "--secret",
            f"FROM_FILE=@{tmp_path}/token",
            "--timeout",
            "10m",
        ]
        process = await shell.start(
            "exec", "laptop", "--cwd", "/srv", *options, "--grace", "2s", "--json", "--", "true", FROM_ENV="s3cret-env"
        )
        command = await line.command()
        args = command.value.args
        assert (args["env"], args["timeout_ms"], args["grace_ms"]) == ({"A": "b=c"}, 600_000, 2000)
        assert sorted(one["name"] for one in args["secrets"]) == ["FROM_ENV", "FROM_FILE"]
        await line.report(runner.accepted(command))
        log = LogBytes(f"{args['execution_id']}.1")
        await line.upload(f"{args['execution_id']}.{args['start_token']}", log)
        await line.report(runner.ended(command, log=log))
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert (process.returncode, json.loads(out)["state"]) == (0, "settled")
        assert b"s3cret" not in out + err

        status, out, _ = await shell.run("exec", "laptop", "--cwd", "/srv", "--detach", "--", "sleep", "9")
        assert status == 0
        assert (await line.command()).value.args["execution_id"] == out.decode().strip()


@pytest.mark.slow
async def test_a_control_plane_that_restarts_is_waited_for(tmp_path: Path) -> None:
    """The stream goes on where it was: nothing twice, nothing lost."""
    async with running(tmp_path / "plane") as plane:
        shell, runner, port = Shell(plane, tmp_path), await plane.enrol(), plane.port
        async with runner.connect(port) as line:
            process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
            command = await line.command()
            await line.report(runner.accepted(command))
            name = f"{command.value.args['execution_id']}.{command.value.args['start_token']}"
            log = LogBytes(name).write(b"before\n")
            offset = (await line.open_log(name)).offset
            await line.data(offset, log.data)
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), WAIT_S) == b"before\n"
    async with running(tmp_path / "plane", port=port), runner.connect(port) as line:
        log.write(b"after\n")
        await line.catch_up()
        await line.upload(name, log)
        await line.report(runner.ended(command, log=log))
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert (process.returncode, out, err) == (0, b"after\n", b"")


@pytest.mark.slow
async def test_an_interrupt_stops_and_waits(tmp_path: Path) -> None:
    """The runner gets a stop; the exit status is what became of the command."""
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "sleep", "60")
        command = await line.command()
        await line.report(runner.accepted(command))
        name = f"{command.value.args['execution_id']}.{command.value.args['start_token']}"
        log = LogBytes(name).write(b"up\n")
        await line.data((await line.open_log(name)).offset, log.data)
        assert process.stdout is not None and await asyncio.wait_for(process.stdout.readline(), WAIT_S) == b"up\n"
        process.send_signal(signal.SIGINT)
        stop = await line.command()
        assert (stop.value.kind, stop.value.args["target"]["execution_id"]) == (
            "execution.stop",
            name.rpartition(".")[0],
        )
        await line.data(len(log.data), log.write(b"bye\n").data[len(log.data) - 20 :])
        await line.upload(name, log, channel=2)
        await line.report(runner.ended(command, code=7, log=log))
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert (process.returncode, out) == (7, b"bye\n")
        assert b"^C again to leave" in err


@pytest.mark.slow
async def test_a_reader_that_leaves_stops_it(tmp_path: Path) -> None:
    """As a broken pipe ends a command of this machine; what nobody reads does not run on for ever."""
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        headed = ("sh", "-c", '{ "$@"; echo "status $?" >&2; } | head -n 1', "sh")
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "yes", before=headed)
        command = await line.command()
        await line.report(runner.accepted(command))
        name = f"{command.value.args['execution_id']}.{command.value.args['start_token']}"
        log = LogBytes(name).write(b"y\n")
        await line.data((await line.open_log(name)).offset, log.data)
        assert process.stdout is not None and await asyncio.wait_for(process.stdout.readline(), WAIT_S) == b"y\n"
        heard = asyncio.ensure_future(line.command())
        while not heard.done():
            # It notices with the first line after its reader has really gone.
            sent = len(log.data)
            await line.data(sent, log.write(b"y\n").data[sent:])
            await asyncio.wait({heard}, timeout=0.1)
        stop = heard.result()
        assert stop.value.kind == "execution.stop"
        _, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert b"status 141" in err and b"nobody reads" in err and b"Traceback" not in err


@pytest.mark.slow
async def test_a_second_interrupt_leaves(tmp_path: Path) -> None:
    """With the shell's own status for it, and the way back."""
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "sleep", "60")
        command = await line.command()
        await line.report(runner.accepted(command))
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        await line.command()
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert process.returncode == 130 and b"runner-control logs -f" in err


@pytest.mark.slow
async def test_our_failures_are_125(tmp_path: Path) -> None:
    """Refused by the runner, cancelled, an unknown runner, and no control plane: with the reason, on stderr and as JSON."""
    async with shop(tmp_path) as (shell, runner):
        status, _, err = await shell.run("exec", "nobody", "--cwd", "/srv", "--", "true")
        assert status == 125 and "UNKNOWN_RUNNER" in err and "next: runner-control runners" in err
        status, out, _ = await shell.run("exec", "nobody", "--cwd", "/srv", "--json", "--", "true")
        assert status == 125 and json.loads(out)["error"]["reason"] == "UNKNOWN_RUNNER"

        async with runner.connect(shell.plane.port) as line:
            process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
            refused = runner.receipt(await line.command(), Outcome.REFUSED, reason=Reason.CWD_OUTSIDE_ROOTS)
            await line.report(refused)
            _, err_bytes = await asyncio.wait_for(process.communicate(), WAIT_S)
            assert process.returncode == 125 and b"CWD_OUTSIDE_ROOTS" in err_bytes

        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
        while not (queued := (await shell.plane.get("/v1/executions", state="queued"))["executions"]):
            await asyncio.sleep(0.05)
        said = await shell.told("stop", queued[0]["id"], "--json")
        assert said["state"] == "cancelled"
        _, err_bytes = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert process.returncode == 125 and b"cancelled" in err_bytes

    status, _, err = await shell.run("exec", "laptop", "--cwd", "/srv", "--", "true")
    assert status == 125 and "does not answer" in err
    status, _, err = await shell.run("runners")
    assert status == 6 and "next: runner-control serve" in err


@pytest.mark.slow
async def test_another_attempt_is_ordered_shown_and_read(tmp_path: Path) -> None:
    """`rerun`, and what `show` and `logs` say of the attempt before; its secrets are wanted again."""
    (tmp_path / "token").write_text("s3cret")
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        secret = ["--secret", f"TOKEN=@{tmp_path}/token"]
        status, out, err = await shell.run("exec", "laptop", "--cwd", "/srv", *secret, "--detach", "--", "true")
        assert status == 0, err
        execution_id = out.decode().strip()
        await act(line, code=3)
        status, _, err = await shell.run("rerun", execution_id)
        assert status == 1 and "SECRETS_WANTED" in err and "TOKEN" in err and "--secret" in err
        status, out, err = await shell.run("rerun", execution_id, *secret)
        assert status == 0, err
        match = re.fullmatch(rf"{execution_id}: attempt (\d+) on laptop is sent\n", out.decode())
        assert match is not None and int(match[1]) > 1
        log = LogBytes(f"{execution_id}.{match[1]}").write(b"second\n")
        await act(line, log)
        shown = (await shell.run("show", execution_id))[1].decode()
        assert f"attempt {match[1]}, lease token {match[1]}" in shown
        assert re.search(r"^attempt 1 +exited on laptop, status 3$", shown, re.MULTILINE)
        told = await shell.told("show", execution_id, "--json")
        assert [one["start_token"] for one in told["attempts"]] == [1, int(match[1])]
        assert (await shell.run("logs", execution_id))[1] == b"second\n"
        for follow in ([], ["-f"]):
            assert (await shell.run("logs", *follow, execution_id, "--attempt", "1"))[1] == b"out\x00\xff\n"
        status, _, err = await shell.run("logs", execution_id, "--attempt", "999")
        assert status == 1 and "UNKNOWN_ATTEMPT" in err


@pytest.mark.slow
async def test_exec_is_its_own_attempt_when_somebody_runs_it_again(tmp_path: Path) -> None:
    """Story.

    1. It follows the first attempt. Somebody orders another one; the first one ends fenced.
    2. It has printed the bytes of the first one, and none of the second; it says what became of it, with 125.
    3. ^C of one whose place was taken stops that attempt and not its successor.
    """
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
        first = await line.command()
        await line.report(runner.accepted(first))
        execution_id = first.value.args["execution_id"]
        log = LogBytes(f"{execution_id}.1").write(b"mine\n")
        await shell.plane.post(f"/v1/executions/{execution_id}/attempts")
        second = await line.command()
        await line.report(runner.accepted(second))
        await line.open_log(f"{execution_id}.1")
        await line.data(0, log.data)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), WAIT_S) == b"mine\n"
        process.send_signal(signal.SIGINT)
        stop = await line.command()
        assert stop.value.args["target"]["start_token"] == 1
        await line.report(runner.receipt(stop, Outcome.DONE), runner.ended(first, verdict=Verdict.FENCED, log=log))
        await line.send(LogClosed(channel=1, end=len(log.data)))
        out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert (process.returncode, out) == (125, b"")
        assert f"{execution_id} fenced" in err.decode()
        assert (await shell.plane.get(f"/v1/executions/{execution_id}"))["state"] == "running"


@pytest.mark.slow
async def test_a_runner_is_shown_with_what_is_wrong(tmp_path: Path) -> None:
    """What lives there and nobody started here, how that is ended; another machine with its key."""
    async with shop(tmp_path) as (shell, enrolled):
        runner = enrolled.started("A", hostname="desk")
        copy = runner.started("B", hostname="cloud\x1b[1m")
        async with runner.connect(shell.plane.port) as line:
            shown = (await shell.run("show", "laptop"))[1].decode()
            assert "online" in shown and "CONFLICT" not in shown and "unknown" not in shown
            await shell.plane.start()
            await line.report(runner.accepted(await line.command()))
            await line.beat([], ["ex_9.3"], full=True, admission="paused")
            with pytest.raises(Closed):
                async with copy.connect(shell.plane.port):
                    pass
            shown = (await shell.run("show", runner.id))[1].decode()
            assert "online, paused" in shown and "ex_9.3: not known here" in shown
            assert re.search(r"^CONFLICT +cloud.*was refused.*desk", shown, re.MULTILINE)
            assert "\x1b" not in shown
            assert "paused" in (await shell.run("runners"))[1].decode()
            kinds = {one["kind"] for one in (await shell.told("events", "--json"))["events"]}
            assert kinds == {"attempt.unknown", "identity.conflict"}
            status, out, err = await shell.run("stop", "ex_9", "--runner", "laptop")
            assert (status, out.decode()) == (0, "ex_9 is stopping at laptop\n"), err
            assert (await line.command()).value.args["target"]["start_token"] == 3
            status, out, _ = await shell.run("stop", "ex_8", "--runner", "laptop", "--token", "2")
            assert status == 0
            assert (await line.command()).value.args["target"]["execution_id"] == "ex_8"
            status, _, err = await shell.run("stop", "ex_7", "--runner", "laptop")
            assert status == 1 and "UNKNOWN_ATTEMPT" in err


@pytest.mark.slow
async def test_what_waits_and_what_is_refused_for_now_is_said(tmp_path: Path) -> None:
    """A paused runner, and one without room: why, and when to ask again."""
    async with shop(tmp_path) as (shell, runner), runner.connect(shell.plane.port) as line:
        await line.beat(admission="paused")
        process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
        while not (queued := (await shell.plane.get("/v1/executions", state="queued"))["executions"]):
            await asyncio.sleep(0.05)
        assert "the runner is paused" in (await shell.run("ps"))[1].decode()
        assert "queued (the runner is paused)" in (await shell.run("show", queued[0]["id"]))[1].decode()
        await line.beat(admission="open")
        result = {"retry_after_ms": 30_000}
        refusal = runner.receipt(await line.command(), Outcome.REFUSED, reason=Reason.DISK_LOW, result=result)
        await line.report(refusal)
        _, err = await asyncio.wait_for(process.communicate(), WAIT_S)
        assert process.returncode == 125
        assert b"waits: the runner is paused" in err
        assert b"refused: DISK_LOW; try again in 30s" in err
        shown = (await shell.run("show", queued[0]["id"]))[1].decode()
        assert "DISK_LOW; try again in 30s" in shown
        making = await shell.start("worktree", "create", "laptop", "--repo", "/srv/r", "--base", "main")
        await line.report(
            runner.receipt(await line.command(), Outcome.REFUSED, reason=Reason.INODES_LOW, result=result)
        )
        _, err = await asyncio.wait_for(making.communicate(), WAIT_S)
        assert making.returncode == 1 and b"INODES_LOW; try again in 30s" in err


@pytest.mark.slow
async def test_listings_and_receipts(tmp_path: Path) -> None:
    """Runners, join strings, events, statements as files that verify without us."""
    async with shop(tmp_path) as (shell, runner):
        (one,) = (await shell.told("runners", "--json"))["runners"]
        assert (one["name"], one["id"], one["online"]) == ("laptop", runner.id, False)
        assert "offline" in (await shell.run("runners"))[1].decode()
        status, out, err = await shell.run("enroll-token", "--name", "two", "--label", "a=b")
        assert status == 0 and "good once" in err
        assert JoinString.parse(out.decode().splitlines()[-1]).port == shell.plane.port
        assert "join" in await shell.told("enroll-token", "--json")
        assert "events" in await shell.told("events", "--json")
        assert (await shell.run("events"))[0] == 0

        async with runner.connect(shell.plane.port) as line:
            process = await shell.start("exec", "laptop", "--cwd", "/srv", "--", "true")
            execution_id = await act(line)
            await asyncio.wait_for(process.communicate(), WAIT_S)
        kinds = [one["kind"] for one in (await shell.told("receipts", execution_id, "--json"))["statements"]]
        assert sorted(kinds) == ["receipt", "settlement"]
        assert "settlement" in (await shell.run("receipts", execution_id))[1].decode()
        proof = tmp_path / "proof"
        status, out, err = await shell.run("receipts", execution_id, "--out", str(proof))
        assert status == 0, err
        files = sorted(path.name for path in proof.iterdir())
        assert len(files) == 3 and files[-1] == f"{runner.id}.pub"
        assert (proof / files[-1]).read_text().strip() == runner.key.public.x
        assert all("payloadType" in json.loads((proof / name).read_text()) for name in files[:-1])


@pytest.mark.slow
async def test_what_is_unknown_is_said_clearly(tmp_path: Path) -> None:
    """With the verb that lists what is known; a wrong token, too."""
    async with shop(tmp_path) as (shell, _runner):
        for args in (["show", "ex_404"], ["logs", "ex_404"], ["stop", "ex_404"], ["worktree", "remove", "wt_404"]):
            status, _, err = await shell.run(*args)
            assert status == 1 and "UNKNOWN" in err and "next: runner-control" in err, (args, err)
        assert "no execution, worktree or runner has this id or name" in (await shell.run("show", "ex_404"))[2]
        assert "no execution and no worktree has this id" in (await shell.run("receipts", "ex_404"))[2]
        (tmp_path / "wrong").write_text("x" * 43)
        status, _, err = await shell.run("--token-file", str(tmp_path / "wrong"), "runners")
        assert status == 1 and "UNAUTHORIZED" in err


@pytest.mark.parametrize(
    "args",
    [
        ["exec", "laptop", "--", "true"],
        ["exec", "laptop", "--cwd", "/a", "--worktree", "wt_1", "--", "true"],
        ["exec", "laptop", "--cwd", "relative", "--", "true"],
        ["exec", "laptop", "--cwd", "/a", "--subdir", "b", "--", "true"],
        ["exec", "laptop", "--cwd", "/a"],
        ["exec", "laptop", "--cwd", "/a", "--secret", "A=literal", "--", "true"],
        ["exec", "laptop", "--cwd", "/a", "--secret", "NOT_IN_THIS_ENVIRONMENT", "--", "true"],
        ["exec", "laptop", "--cwd", "/a", "--env", "A", "--", "true"],
        ["exec", "laptop", "--cwd", "/a", "--timeout", "10", "--", "true"],
        ["exec", "../runners", "--cwd", "/a", "--", "true"],
        ["show", "../keys"],
        ["logs", "ex_1?x"],
        ["serve", "--listen", "nowhere"],
        ["--url", "nowhere", "runners"],
        ["--url", "http://127.0.0.1:99999", "runners"],
        ["--url", "http://127.0.0.1:7410/v1", "runners"],
    ],
)
def test_wrong_usage_is_said_before_anything_is_asked(args: list[str], tmp_path: Path) -> None:
    """Exit status 2; no control plane is needed to find out."""
    (tmp_path / "token").write_text("t")
    where = ["--url", "http://127.0.0.1:9", "--token-file", str(tmp_path / "token")]
    done = CliRunner().invoke(cli, [*where, *args])
    assert done.exit_code == 2, done.stderr


def test_a_machine_without_a_control_plane_says_how_to_get_one(tmp_path: Path) -> None:
    """Exit status 3, with the file that is missing."""
    done = CliRunner().invoke(cli, ["--token-file", str(tmp_path / "admin.token"), "runners"])
    assert done.exit_code == 3 and str(tmp_path / "admin.token") in done.stderr
    assert "next: runner-control serve" in done.stderr


def test_a_place_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """Not as a traceback."""
    (tmp_path / "file").touch()
    done = CliRunner().invoke(cli, ["serve", "--db", str(tmp_path / "file" / "plane" / "control.db")])
    assert done.exit_code == 1 and str(tmp_path / "file") in done.stderr and "next:" in done.stderr


@pytest.mark.slow
async def test_a_second_control_plane_on_the_same_data_says_so(tmp_path: Path) -> None:
    """Exit status 5; and an address that others reach wants a word."""
    async with shop(tmp_path) as (shell, _runner):
        db = ("--db", str(tmp_path / "plane" / "control.db"))
        status, _, err = await shell.run("serve", "--listen", "127.0.0.1:0", *db)
        assert status == 5 and str(tmp_path / "plane") in err and "next:" in err
    status, _, err = await shell.run("serve", "--listen", "0.0.0.0:0", "--db", str(tmp_path / "x.db"))
    assert status == 1 and "--allow-remote" in err


def test_exec_without_a_place_names_both(tmp_path: Path) -> None:
    """--worktree and --cwd."""
    done = CliRunner().invoke(cli, ["exec", "laptop", "--", "true"])
    assert "--worktree" in done.stderr and "--cwd" in done.stderr


def a_client(answers: list[httpx.Response | Exception], seen: list[httpx.Request]) -> PlaneClient:
    """A client whose requests are answered in turn."""

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return PlaneClient("http://plane", "t0ken", transport=httpx.MockTransport(answer), rest=lambda _s: None)


def test_a_second_try_carries_the_same_key() -> None:
    """So that what was ordered is ordered once; another order has another key."""
    seen: list[httpx.Request] = []
    broken = httpx.ReadError("reset")
    with a_client(
        [broken, broken, httpx.Response(202, json={"id": "x"}), httpx.Response(202, json={})], seen
    ) as client:
        assert client.post("/join-tokens", {"name": "a"}) == {"id": "x"}
        client.post("/join-tokens", {"name": "a"})
    keys = [request.headers["Idempotency-Key"] for request in seen]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert seen[0].headers["Authorization"] == "Bearer t0ken"


def test_tries_are_bounded() -> None:
    """Then it is unreachable, and so is whatever answers without JSON."""
    seen: list[httpx.Request] = []
    answers: list[httpx.Response | Exception] = [httpx.ConnectError("refused")] * 9
    with a_client(answers, seen) as client, pytest.raises(PlaneUnreachable):
        client.get("/runners")
    assert len(seen) == 4
    with a_client([httpx.Response(200, text="<html>")], seen) as client, pytest.raises(PlaneUnreachable):
        client.get("/runners")
    with a_client([httpx.Response(502, text="<html>")], seen) as client, pytest.raises(PlaneRefused, match="502"):
        client.get("/runners")


def test_a_log_is_cut_into_records_however_it_comes() -> None:
    """Byte by byte; a hole moves the offset to its end; a record that was cut off is asked for again."""
    gap = encode_record(RecordKind.GAP, (26).to_bytes(8, "little") + (500).to_bytes(8, "little"), 1)
    data = encode_record(RecordKind.STDOUT, b"0123456789", 1) + gap + encode_record(RecordKind.STDERR, b"end", 1)
    parser = LogParser()
    records = [record for at in range(len(data)) for record in parser.feed(data[at : at + 1])]
    assert [(record.kind, record.payload[:3]) for record in records] == [(1, b"012"), (6, b"\x1a\0\0"), (2, b"end")]
    assert [record.offset for record in records] == [0, 26, 500]
    assert parser.offset == 500 + 16 + 3
    cut = LogParser()
    assert list(cut.feed(data[:20])) == []
    cut.begin_again()
    assert (cut.offset, len(list(cut.feed(data)))) == (0, 3)


def test_the_first_interrupt_stops_and_the_second_leaves() -> None:
    """And afterwards interrupts mean what they meant before."""
    before = signal.getsignal(signal.SIGINT)
    said: list[str] = []
    ordered = threading.Event()
    with stop_at_interrupt(ordered.set, said.append):
        signal.raise_signal(signal.SIGINT)
        assert ordered.wait(5) and len(said) == 1
        with pytest.raises(Left):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
async def test_serve_announces_and_serves(tmp_path: Path) -> None:
    """A first start gives a join string, a second does not; SIGTERM ends it well; another address is refused."""
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    pipe = asyncio.subprocess.PIPE

    async def start(*more: str) -> asyncio.subprocess.Process:
        args = ("-m", "controlplane.cli", "serve", "--db", str(tmp_path / "d" / "plane.db"), *more)
        return await asyncio.create_subprocess_exec(sys.executable, *args, stdout=pipe, stderr=pipe, env=environ)

    for words in (b"Enrol a runner with", b"enroll-token"):
        process = await start("--listen", "127.0.0.1:0")
        assert process.stdout is not None
        said = b""
        while words not in said:
            line = await asyncio.wait_for(process.stdout.readline(), WAIT_S)
            assert line, said
            said += line
        assert b"SHA256:" in said and b"http://127.0.0.1:" in said
        process.terminate()
        await asyncio.wait_for(process.communicate(), WAIT_S)
        assert process.returncode == 0
    refused = await start("--listen", "0.0.0.0:0")
    _, err = await asyncio.wait_for(refused.communicate(), WAIT_S)
    assert refused.returncode == 1 and b"loopback" in err


HEAVY = ("cryptography", "fastapi", "pydantic", "rich", "structlog", "websockets")


@pytest.mark.parametrize("verb", [("exec", "--help"), ("logs", "--help"), ("signal", "--help")])
def test_what_asks_a_plane_is_light(tmp_path: Path, verb: tuple[str, ...]) -> None:
    """No models, keys or colours are loaded before a verb needs them."""
    script = (
        "import atexit, sys; from controlplane.cli import main; sys.argv[0] = 'runner-control';"
        f"atexit.register(lambda: print('HEAVY', *sorted(sys.modules.keys() & set({HEAVY!r})), file=sys.stderr)); main()"
    )
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", script, *verb], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "HEAVY")
