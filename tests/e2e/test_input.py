"""`exec -i`, `signal` and time limits through the whole system: real processes, real kills, every byte once."""

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from protocol.ids import Attempt
from protocol.keys import PrivateKey
from protocol.stdin import sign_piece
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

MIB = 1024 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Stand]:
    """One plane and one runner for all."""
    async with stand() as running:
        yield running


async def exec_with(system: Stand, data: bytes | None, *command: str, options: tuple[str, ...] = ()) -> "Typed":
    """`runner-control exec -i`, with a stdin of its own; `data` None: it stays open."""
    argv = [f"{os.path.dirname(sys.executable)}/runner-control", "exec", "-i", *options, RUNNER]
    process = await asyncio.create_subprocess_exec(
        *argv,
        "--cwd",
        str(system.home),
        "--",
        *command,
        env={**os.environ, **system.env},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    typed = Typed(process)
    if data is not None:
        typed.writing = asyncio.ensure_future(typed.write(data))
    return typed


class Typed:
    """A command that somebody types to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.writing: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """All of it, and the end."""
        stdin = self.process.stdin
        assert stdin is not None
        try:
            for at in range(0, len(data), MIB // 4):
                stdin.write(data[at : at + MIB // 4])
                await stdin.drain()
            stdin.close()
        except ConnectionError:
            return

    async def end(self) -> tuple[int, bytes, bytes]:
        """Exit status, stdout, stderr."""
        stdout, stderr = self.process.stdout, self.process.stderr
        assert stdout is not None and stderr is not None
        out, err = await asyncio.gather(stdout.read(), stderr.read())
        if self.writing is not None:
            await self.writing
        return await self.process.wait(), out, err


async def test_what_is_typed_arrives_and_its_end_too(system: Stand) -> None:
    """More than any buffer on the way holds, both directions at once."""
    data = os.urandom(3 * MIB)
    status, out, err = await (await exec_with(system, data, "cat")).end()
    assert (status, err) == (0, b"")
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


async def test_a_command_that_reads_no_more_ends_by_itself(system: Stand) -> None:
    """And so does who types to it, with its status."""
    status, out, _ = await (await exec_with(system, os.urandom(2 * MIB), "sh", "-c", "head -c 5 | wc -c; exit 7")).end()
    assert (status, out) == (7, b"5\n")


@pytest.mark.parametrize("victim", ["daemon", "plane"])
async def test_no_byte_is_lost_or_fed_twice_when_something_is_killed(system: Stand, victim: str) -> None:
    """In the middle of the stream; what comes back goes on."""
    data = os.urandom(2 * MIB)
    script = "head -c 1048576 > half; touch halfway; cat > rest; cat half rest | sha256sum; rm half rest halfway"
    typed = await exec_with(system, data, "sh", "-c", script)

    async def halfway() -> bool:
        return (system.home / "half").exists()

    await poll(halfway, "the first half")
    await system.kill(victim)
    await (system.start_daemon() if victim == "daemon" else system.start_plane())
    status, out, _ = await typed.end()
    assert status == 0
    assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_whoever_has_not_the_key_feeds_nothing(system: Stand) -> None:
    """A control plane that makes something up, say: the runner refuses it, and what is fed by its owner goes on."""
    owner, stranger = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    body = {"argv": ["cat"], "cwd": str(system.home), "stdin": {"key": owner.public.x}}
    execution = (await system.post(f"/runners/{RUNNER}/executions", body))["id"]
    attempt = Attempt.parse(f"{execution}.1")

    async def feed(key: PrivateKey, offset: int, data: bytes, *, end: bool = False) -> dict[str, object]:
        signed = sign_piece(key, attempt, offset, data, end=end)
        piece = {"offset": offset, "data": signed.data, "end": end, "sig": signed.sig}
        return dict(await system.post(f"/executions/{execution}/input", piece))

    assert await feed(stranger, 0, b"evil\n") == {"received": 0, "closed": True, "reason": "BAD_SIG"}
    assert (await feed(owner, 0, b"good\n"))["received"] == 5
    assert (await feed(owner, 0, b"good\n"))["received"] == 5, "the same again is taken once"
    assert (await feed(owner, 5, b"", end=True))["received"] == 5
    await system.ended(execution)
    assert (await system.output(execution))["stdout"] == b"good\n"


async def test_a_signal_is_sent_once_and_told(system: Stand) -> None:
    """Also when its daemon is killed and back; a command that is over gets none."""
    script = "trap 'echo got' USR1; trap 'exit 3' HUP; echo up; while :; do sleep .02; done"
    execution = await system.order("sh", "-c", script)

    async def printed(text: bytes) -> None:
        async def there() -> bool:
            return text in (await system.output(execution))["stdout"]

        await poll(there, repr(text))

    await printed(b"up\n")
    said = await system.run("runner-control", "signal", execution, "USR1")
    assert said == f"{execution}: SIGUSR1 reached 1 process\n"
    await system.kill("daemon")
    ordered = await system.post(f"/executions/{execution}/signal", {"signal": "USR1"})
    await system.start_daemon()
    answered = await system.get(f"/orders/{ordered['cmd_id']}", wait_ms=20_000)
    assert (answered["outcome"], answered["result"]) == ("done", {"reached": 1})
    await printed(b"got\ngot\n")
    await system.run("runner-control", "signal", execution, "HUP", "--tree")
    assert (await system.ended(execution))["exit_status"] == 3
    assert (await system.output(execution))["stdout"].count(b"got") == 2
    again = await system.http.post(
        f"/executions/{execution}/signal", json={"signal": "USR1"}, headers={"Idempotency-Key": "late"}
    )
    assert (again.status_code, again.json()["error"]["reason"]) == (409, "NOT_RUNNING")


async def test_silence_is_a_limit_of_its_own(system: Stand) -> None:
    """The settlement says which limit it was."""
    typed = await exec_with(system, None, "sh", "-c", "echo once; cat", options=("--idle-timeout", "400ms"))
    status, out, err = await typed.end()
    assert (status, out) == (143, b"once\n")
    assert b"no output for 400 ms" in err


async def test_what_a_program_says_beside_its_output_is_shown_and_kept(system: Stand) -> None:
    """Remarks on stderr, output untouched, and a record of it with its digest in the settlement."""
    script = (
        'echo out; echo "{\\"type\\":\\"annotation\\",\\"message\\":\\"odd\\"}" >&$LOCAL_RUNNER_EVENTS_FD;'
        ' echo "{\\"type\\":\\"progress\\",\\"value\\":0.5}" >&$LOCAL_RUNNER_EVENTS_FD'
    )
    status, out, err = await (await exec_with(system, b"", "bash", "-c", script)).end()
    assert (status, out, err) == (0, b"out\n", b"[notice] odd\n")
    newest = (await system.get("/executions", limit=1))["executions"][0]
    streams = newest["settlement"]["streams"]
    assert streams["events"]["bytes"] == len('{"type":"annotation","message":"odd"}\n{"type":"progress","value":0.5}\n')
