"""A secret reaches the child and nothing else: no file of daemon, shim or plane, no argument list, no environment but the child's."""

import base64
import hashlib
import secrets
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NAME = "DEPLOY_TOKEN"
CANARY = f"canary-{secrets.token_hex(8)}-behind-the-wall"
"""Like no other text on this machine, not even of another run."""
CHILD = f"""
import hashlib, os, time
print(hashlib.sha256(os.environ[{NAME!r}].encode()).hexdigest(), flush=True)
while not os.path.exists('go'):
    time.sleep(0.02)
"""
SPELLINGS = tuple(
    spelling
    for text in (CANARY, CANARY[4:], CANARY[5:], CANARY[6:])
    for spelling in (text.encode(), base64.b64encode(text.encode())[:-4], text.encode().hex().encode())
)
"""As it is, in base64 at each of its three phases, in hex."""


def holders(home: Path) -> list[str]:
    """Files in `home` that hold the secret in any spelling."""
    return [str(path) for path in home.rglob("*") if path.is_file() and spelled(path.read_bytes())]


def spelled(content: bytes) -> bool:
    """Whether the secret is in there."""
    return any(spelling in content for spelling in SPELLINGS)


def knowing(what: str) -> set[int]:
    """Processes whose /proc file `what` holds the secret."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and spelled((entry / what).read_bytes()):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def child_of(system: Stand) -> set[int]:
    """The processes of the attempt."""
    return set(system.carriers())


async def test_a_secret_is_in_its_child_alone() -> None:
    """While it runs, after a crash of the daemon, and when all is over; the logs are as loud as they can be."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        await system.start_daemon(log_level="debug")
        await system.online()
        with tempfile.NamedTemporaryFile("w", prefix="secret-") as file:
            file.write(f"{CANARY}\n")
            file.flush()
            order = ("exec", RUNNER, "--cwd", str(system.home), "--secret", f"{NAME}=@{file.name}", "--detach")
            execution = (await system.run("runner-control", *order, "--", sys.executable, "-c", CHILD)).strip()

        async def printed() -> bool:
            return len((await system.output(execution))["stdout"]) > 64

        await poll(printed, "the child's word")
        assert knowing("environ") == child_of(system) != set()
        assert knowing("cmdline") == set()
        assert holders(system.home) == []
        await system.kill("daemon")
        await system.start_daemon(log_level="debug")
        await system.online()
        assert knowing("environ") == child_of(system) != set()
        (system.home / "go").touch()
        ended = await system.ended(execution)
        assert ended["exit_status"] == 0
        assert (await system.output(execution))["stdout"].decode().strip() == hashlib.sha256(
            CANARY.encode()
        ).hexdigest()
        assert knowing("environ") == knowing("cmdline") == set()
        for name in ("daemon", "plane"):
            assert await system.end(name) == 0
        assert holders(system.home) == []


async def test_a_secret_that_the_child_prints_is_found_where_its_own_log_is() -> None:
    """The search above finds what is there: without this it would prove nothing. The copy at the plane is masked."""
    async with stand() as system:
        ended = await system.ran("sh", "-c", f"echo ${NAME}", secrets={NAME: CANARY})
        assert ended["exit_status"] == 0
        found = holders(system.home)
        assert found and all("/state/x/" in path and path.endswith(".seg") for path in found)


async def test_a_secret_looking_name_is_no_variable_in_the_clear() -> None:
    """`env` is refused with ENV_SECRET_NAME and says how to do it; nothing runs."""
    async with stand() as system:
        order = ("exec", RUNNER, "--cwd", str(system.home), "--env", f"{NAME}={CANARY}", "--", "touch", "ran")
        status, _, complaint = await system.finished("runner-control", *order)
        assert (status, "ENV_SECRET_NAME" in complaint) == (125, True)
        assert CANARY not in complaint and not (system.home / "ran").exists()
