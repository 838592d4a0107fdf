"""Reading logs with the real thing: the same from files and from the control plane, across crashes, and proven."""

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable

import pytest

from tests.support.stand import ANSWER_S, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STEPS = 4
SCRIPT = r"""
n=0
while [ $n -lt 4 ]; do
  until [ -e go$n ]; do sleep 0.02; done
  printf 'half '; printf '%d \351\n' $n; echo error $n >&2
  n=$((n + 1))
done
printf 'no end'; exit 3
"""
"""Says something each time it is let go on."""
OUT = b"".join(b"half %d \xe9\n" % n for n in range(STEPS)) + b"no end"
ERR = b"".join(b"error %d\n" % n for n in range(STEPS))
READERS = ("runner", "runner-control")


def spoken(printed: bytes) -> dict[str, bytes]:
    """What JSON lines hold of each stream; that no record came twice or is missing is checked on the way."""
    said = {"stdout": b"", "stderr": b""}
    behind = 0
    for line in map(json.loads, printed.splitlines()):
        assert line["kind"] in ("stdout", "stderr", "exit")
        assert line["offset"] >= behind
        if line["kind"] != "exit":
            data = base64.b64decode(line["data_base64"]) if "data_base64" in line else line["data"].encode()
            said[line["kind"]] += data
            behind = line["offset"] + 16 + len(data)
    assert json.loads(printed.splitlines()[-1])["exit"]["code"] == 3
    return said


def without_stamps(printed: bytes) -> bytes:
    """Lines without the times that each must begin with."""
    lines = printed.splitlines(keepends=True)
    assert all(line[:4].isdigit() and line[29:31] == b"Z " for line in lines), lines
    assert lines == sorted(lines, key=lambda line: line[:30])
    return b"".join(line[31:] for line in lines)


async def stored(system: Stand, execution: str, size: int) -> None:
    """Wait until the control plane has so much of the output."""

    async def there() -> bool:
        return sum(map(len, (await system.output(execution)).values())) >= size

    await poll(there, "the output at the control plane")


async def test_following_in_every_format_crosses_crashes_without_a_hole_or_a_repeat() -> None:
    """Daemon and control plane are killed while four followers read; each prints everything once."""
    async with stand() as system:
        execution = await system.order("sh", "-c", SCRIPT)
        followers = {
            (reader, form): await system.pipe(f"{reader}{form}", reader, "logs", "-f", form, execution)
            for reader in READERS
            for form in ("--json", "--timestamps")
        }
        reading = {name: asyncio.ensure_future(one.communicate()) for name, one in followers.items()}
        step = len(b"half 0 \xe9\nerror 0\n")
        (system.home / "go0").touch()
        await stored(system, execution, step)
        await system.kill("daemon")
        (system.home / "go1").touch()
        await system.start_daemon()
        await stored(system, execution, 2 * step)
        await system.kill("plane")
        (system.home / "go2").touch()
        await system.start_plane()
        await stored(system, execution, 3 * step)
        (system.home / "go3").touch()
        for (reader, form), communicating in reading.items():
            out, err = await asyncio.wait_for(communicating, ANSWER_S)
            assert followers[reader, form].returncode == 0, err
            if form == "--json":
                assert (spoken(out), err) == ({"stdout": OUT, "stderr": ERR}, b"")
            else:
                assert (without_stamps(out), without_stamps(err)) == (OUT, ERR)


async def prints_the_same(system: Stand, execution: str) -> None:
    """Whatever is asked for, from files and from the control plane."""
    for args in (
        ["--json", "--tail", "3"],
        ["--timestamps", "--since", "10m", "--stream", "stderr"],
        ["--export", "cri", "--since", "2001-09-09T01:46:40Z", "--tail", "2"],
        ["-f", "--offset", "150"],
    ):
        local, remote = await asyncio.gather(*(system.finished(reader, "logs", *args, execution) for reader in READERS))
        assert local == remote and local[0] == 0 and local[1] + local[2], args


async def test_both_sides_print_the_same_and_see_what_was_touched() -> None:
    """What is stored is proven; one flipped byte and a file that was cut off are seen, by `show` as well."""
    async with stand() as system:
        for n in range(STEPS):
            (system.home / f"go{n}").touch()
        execution = (await system.ran("sh", "-c", SCRIPT))["id"]
        await prints_the_same(system, execution)
        (segment,) = (system.state / "x" / f"{execution}.1" / "log").iterdir()
        paths = (segment, system.home / "plane" / "logs" / f"{execution}.1.log")
        for out in await verified(system, execution, status=0):
            assert f"stdout: {len(OUT)} bytes, SHA-256 {hashlib.sha256(OUT).hexdigest()}" in out
            assert "what is stored is what was signed" in out
        kept = [path.read_bytes() for path in paths]
        for spoil, words in SPOILT:
            for path, data in zip(paths, kept, strict=True):
                path.write_bytes(spoil(data))
            for out in await verified(system, execution, status=1):
                assert words in out and "NOT proven" in out, out
        assert "chain NOT proven" in await system.run("runner-control", "show", execution)


async def verified(system: Stand, execution: str, *, status: int) -> list[str]:
    """What both sides say of a log."""
    done = await asyncio.gather(*(system.finished(reader, "logs", "--verify", execution) for reader in READERS))
    assert [(one[0], one[2]) for one in done] == [(status, "")] * 2, done
    return [one[1] for one in done]


SPOILT: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data.replace(b"half", b"calf", 1), "stdout is not what was signed"),
    (lambda data: data[:-1], "WRONG"),
]
