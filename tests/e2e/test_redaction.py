"""What a program prints of its secrets reaches the control plane masked, and stands in no file but the program's own log on its machine."""

import base64
import hashlib
import json
import secrets
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from protocol.records import RecordKind, records
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NAME = "DEPLOY_TOKEN"
CANARY = f'canary/{secrets.token_hex(8)} "behind" the=wall'
HALF = len(CANARY) // 2
CHILD = f"""
import base64, json, os, sys, time
from urllib.parse import quote
secret = os.environ[{NAME!r}].encode()
say = lambda what: os.write(1, what)
say(b"raw <" + secret + b">\\n")
for shift in range(3):
    say(b"base64 " + base64.b64encode(b"x" * shift + secret + b"yz") + b"\\n")
say(json.dumps({{"token": secret.decode()}}).encode() + b"\\n")
say(b"https://host/?q=" + quote(secret).encode() + b"\\n")
os.write(2, b"half of it: " + secret[:{HALF}])
while not os.path.exists('go'):
    time.sleep(0.02)
os.write(2, secret[{HALF}:] + b"\\n")
say(b"the end\\n")
"""
SPELLINGS = (
    CANARY.encode(),
    CANARY[:HALF].encode(),
    CANARY[HALF:].encode(),
    *(base64.b64encode(b"x" * shift + CANARY.encode() + b"yz")[4:-4] for shift in range(3)),
    json.dumps(CANARY)[1:-1].encode(),
    quote(CANARY).encode(),
)


def spelled(content: bytes) -> bool:
    """Whether the secret is in there."""
    return any(spelling in content for spelling in SPELLINGS)


def holders(home: Path) -> list[Path]:
    """Files in `home` that hold the secret in any spelling."""
    return [path for path in home.rglob("*") if path.is_file() and spelled(path.read_bytes())]


def segments(system: Stand, execution: str) -> list[Path]:
    """The raw log of an execution's first attempt."""
    return sorted((system.state / "x" / f"{execution}.1" / "log").glob("*.seg"))


async def begun(system: Stand) -> str:
    """An execution with the secret that has printed all but the last half of it."""
    with tempfile.NamedTemporaryFile("w", prefix="secret-") as file:
        file.write(f"{CANARY}\n")
        file.flush()
        order = ("exec", RUNNER, "--cwd", str(system.home), "--secret", f"{NAME}=@{file.name}", "--detach")
        execution = (await system.run("runner-control", *order, "--", sys.executable, "-c", CHILD)).strip()

    async def printed() -> bool:
        return any(b"half of it" in path.read_bytes() for path in segments(system, execution))

    await poll(printed, "the first half")
    return execution


async def said(system: Stand, execution: str) -> list[str]:
    """Everything that our programs tell of an execution, the plane's log of it as it is stored included."""
    verbs = (
        ("runner", "ps", "--all"),
        ("runner", "status"),
        ("runner", "explain", execution),
        ("runner", "doctor"),
        ("runner-control", "show", execution),
        ("runner-control", "show", execution, "--json"),
        ("runner-control", "logs", execution),
        ("runner-control", "receipts", execution),
        ("runner-control", "events"),
        ("runner-control", "ps"),
    )
    told = [await system.finished(*verb) for verb in verbs]
    assert [verb for verb, (status, _, _) in zip(verbs, told, strict=True) if status and "doctor" not in verb] == []
    return [out + err for _, out, err in told]


async def test_a_printed_secret_stays_on_its_machine() -> None:
    """Printed whole, in halves across a crash of the daemon, in base64, JSON and a URL; the logs are as loud as they can be."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        await system.start_daemon(log_level="debug")
        await system.online()
        execution = await begun(system)
        await system.kill("daemon")
        await system.start_daemon(log_level="debug")
        await system.online()
        (system.home / "go").touch()
        ended = await system.ended(execution)

        output = await system.output(execution)
        stars = b"*" * len(CANARY)
        assert b"raw <" + stars + b">\n" in output["stdout"] and output["stdout"].endswith(b"the end\n")
        assert output["stderr"] == b"half of it: " + stars + b"\n"
        assert set(holders(system.home)) == set(segments(system, execution)) != set()
        told = await said(system, execution)
        assert not any(spelled(text.encode()) for text in told), told
        shown = await system.run("runner-control", "show", execution)
        assert shown.count("(masked, as signed)") >= 2 and "NOT" not in shown
        verified = await system.get(f"/executions/{execution}/digests")
        assert verified["proof"]["wrong"] == []

        raw = [record for path in segments(system, execution) for record in records(path.read_bytes(), 0)]
        written = b"".join(record.payload for record in raw if record.kind == RecordKind.STDERR)
        copy = ended["settlement"]["log"]["uploaded"]
        assert copy["redactor"] == "mask-1"
        for name, content in output.items():
            assert copy["streams"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert ended["settlement"]["streams"]["stderr"]["sha256"] == hashlib.sha256(written).hexdigest()
        assert len((await system.http.get(f"/executions/{execution}/log")).content) == ended["settlement"]["log"]["end"]
        assert await system.end("daemon") == 0


async def test_a_log_whose_secrets_cannot_be_had_any_more_is_not_shown() -> None:
    """The journal forgot the command while it ran: nothing the program printed goes up from then on, and the owner is told."""
    async with stand() as system:
        execution = await begun(system)
        await system.kill("daemon")
        with closing(sqlite3.connect(system.state / "journal.db")) as journal, journal:
            journal.execute("UPDATE command SET envelope = x''")
        await system.start_daemon()
        await system.online()
        (system.home / "go").touch()
        ended = await system.ended(execution)
        output = await system.output(execution)
        assert "the end" not in output["stdout"].decode() and not spelled(output["stdout"] + output["stderr"])
        assert ended["settlement"]["log"]["uploaded"]["redactor"] == "mask-1-all"
        assert "log.masked" in system.daemon_log()
