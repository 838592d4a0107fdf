"""PTYs at a real daemon: what viewers sign is typed once, in order; sizes count while somebody looks; who is gone holds nothing back."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.keys import PrivateKey
from protocol.limits import PTY_AHEAD_BYTES, PTY_RING_BYTES, PTY_SEGMENT_BYTES
from protocol.messages import Message, Taken, Viewers, encode
from protocol.receipt import Outcome, Settlement, Verdict
from protocol.records import Record, RecordKind, records
from protocol.terminals import sign_resized, sign_typed
from runner.adapters.attemptfiles import living_ptys, written_end
from tests.support.builders import a_key
from tests.support.siege import Siege, siege
from tests.support.stand import poll

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

ECHO: Final = ["sh", "-c", 'stty -echo; echo ready; while read -r line; do echo "got $line"; done']


@dataclass(slots=True)
class Pty:
    """One PTY of a daemon, and the control plane's side of it."""

    system: Siege
    execution: str
    keys: dict[str, PrivateKey] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its attempt."""
        return f"{self.execution}.1"

    @property
    def directory(self) -> Path:
        """Its files."""
        return self.system.stand.state / "x" / self.name

    async def attach(self, viewer: str, mode: str = "rw") -> None:
        """A viewer is let in."""
        key = self.keys[viewer] = a_key(viewer)
        args = {"execution_id": self.execution, "start_token": 1, "viewer": viewer, "key": key.public.x, "mode": mode}
        receipt = await self.system.plane.fate(self.system.plane.command(Kind.PTY_ATTACH, args))
        assert (receipt.outcome, receipt.reason) == (Outcome.DONE, None)

    async def say(self, message: Message) -> None:
        """Anything about it."""
        await self.system.plane.say(encode(message))

    async def types(self, viewer: str, offset: int, data: bytes, key: PrivateKey | None = None) -> Taken:
        """What a viewer types, and the answer."""
        before = len(self.taken(viewer))
        await self.say(sign_typed(key or self.keys[viewer], self.name, viewer, offset, data))
        await self.system.plane.until(lambda: len(self.taken(viewer)) > before, "an answer to what was typed")
        return self.taken(viewer)[before]

    async def resizes(self, viewer: str, gen: int, rows: int, cols: int) -> None:
        """A viewer's window."""
        await self.say(sign_resized(self.keys[viewer], self.name, viewer, gen, rows, cols))

    async def looks(self, *viewers: str, seen: int | None = None) -> None:
        """Who looks on."""
        await self.say(Viewers(attempt=self.name, viewers=list(viewers), seen=seen))

    def taken(self, viewer: str) -> list[Taken]:
        """All answers to a viewer so far."""
        heard = [message for message in self.system.plane.heard if isinstance(message, Taken)]
        return [taken for taken in heard if (taken.attempt, taken.viewer) == (self.name, viewer)]

    def records(self) -> list[Record]:
        """Its log, as it is on the disk."""
        segments = sorted((self.directory / "log").glob("*.seg"))
        return [each for path in segments for each in records(path.read_bytes(), int(path.stem, 16))]

    def text(self) -> bytes:
        """What its terminal got."""
        return b"".join(each.payload for each in self.records() if each.kind == RecordKind.PTY)

    def sizes(self) -> list[tuple[int, int]]:
        """The sizes that it had."""
        return [
            (int.from_bytes(each.payload[:2], "little"), int.from_bytes(each.payload[2:4], "little"))
            for each in self.records()
            if each.kind == RecordKind.RESIZE
        ]

    async def shows(self, text: bytes) -> None:
        """Wait until it does."""

        async def there() -> bool:
            return text in self.text()

        await poll(there, f"{text!r} on the terminal")

    async def close(self) -> Settlement:
        """Hang up."""
        target = {"type": "attempt", "execution_id": self.execution, "start_token": 1}
        await self.system.plane.fate(self.system.plane.command(Kind.PTY_CLOSE, {"target": target, "grace_ms": 500}))
        return await self.system.plane.end(self.execution)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Siege]:
    """One daemon for all."""
    async with siege() as besieged:
        yield besieged


async def a_pty(system: Siege, *argv: str, **over: Any) -> Pty:
    """One that runs."""
    execution = system.new_execution()
    args: dict[str, Any] = {"execution_id": execution, "argv": list(argv), "size": {"rows": 24, "cols": 80}}
    receipt = await system.plane.fate(system.start(args | over, kind=Kind.PTY_OPEN))
    assert (receipt.outcome, receipt.reason) == (Outcome.ACCEPTED, None)
    pty = Pty(system, execution)

    async def runs() -> bool:
        return any(each.attempt == pty.name and each.started_ms for each in living_ptys(system.stand.state))

    await poll(runs, "its program")
    return pty


async def restarted(system: Siege) -> None:
    """The daemon is killed, and another one comes."""
    before = system.plane.sessions
    await system.stand.kill("daemon")
    await system.stand.start_daemon()
    await system.plane.online(before)


async def test_what_is_typed_is_typed_once_whoever_dies_and_however_often_it_comes(system: Siege) -> None:
    """1. Typed, and again. 2. The daemon is killed. 3. All of it once more, and what follows. 4. A gap. 5. The end."""
    pty = await a_pty(system, *ECHO)
    await pty.attach("v")
    await pty.shows(b"ready")
    for _ in range(2):
        taken = await pty.types("v", 0, b"one\n")
        assert (taken.received, taken.closed, taken.reason) == (4, False, None)
    await restarted(system)
    assert (await pty.types("v", 0, b"one\ntwo\n")).received == 8
    gap = await pty.types("v", 100, b"never\n")
    assert (gap.received, gap.reason) == (8, Reason.OUT_OF_ORDER)
    assert (await pty.types("v", 8, b"three\n")).received == 14
    await pty.shows(b"got three")
    assert pty.text() == b"ready\r\ngot one\r\ngot two\r\ngot three\r\n"
    ended = await pty.close()
    assert (ended.verdict, list(ended.streams)) == (Verdict.STOPPED, ["pty"])
    assert (await pty.types("v", 14, b"late\n")).closed


async def test_only_who_was_let_in_to_type_types(system: Siege) -> None:
    """Another key, a viewer that may look on only, nobody: told so, and the terminal shows nothing of it."""
    pty = await a_pty(system, *ECHO)
    await pty.attach("v")
    await pty.attach("w", "ro")
    await pty.shows(b"ready")
    assert (await pty.types("v", 0, b"bad\n", a_key("w"))).reason is Reason.BAD_SIG
    assert (await pty.types("w", 0, b"bad\n")).reason is Reason.READ_ONLY
    assert (await pty.types("x", 0, b"bad\n", a_key("x"))).reason is Reason.UNKNOWN_VIEWER
    assert (await pty.types("v", 0, b"good\n")).reason is None
    await pty.shows(b"got good")
    assert b"bad" not in pty.text()
    await pty.close()


async def test_the_size_is_that_of_those_who_look(system: Siege) -> None:
    """The smallest of two; when one leaves, that of the other; who left while no daemon lived is gone as well."""
    pty = await a_pty(system, *ECHO, size_policy="smallest")
    await pty.attach("v")
    await pty.attach("w")
    await pty.looks("v", "w")
    await pty.resizes("v", 1, 20, 60)
    await pty.resizes("w", 1, 30, 50)

    async def sized(*sizes: tuple[int, int]) -> None:
        async def so() -> bool:
            return pty.sizes() == list(sizes)

        await poll(so, f"sizes {sizes}, not {pty.sizes()}")

    await sized((24, 80), (20, 60), (20, 50))
    await pty.looks("w")
    await sized((24, 80), (20, 60), (20, 50), (30, 50))
    await pty.resizes("v", 2, 10, 10)
    await sized((24, 80), (20, 60), (20, 50), (30, 50), (10, 10))
    await restarted(system)
    await pty.looks("w")
    await sized((24, 80), (20, 60), (20, 50), (30, 50), (10, 10), (30, 50))
    await pty.close()


async def test_a_flood_waits_for_who_follows_and_for_nobody_else(system: Siege) -> None:
    """1. A viewer is behind: it stops. 2. It follows: it goes on. 3. The session is gone: it runs, in a ring."""
    pty = await a_pty(system, "yes")
    await pty.attach("v")
    await pty.looks("v", seen=0)
    stands = 0

    async def stopped() -> bool:
        nonlocal stands
        before, stands = stands, written_end(pty.directory) or 0
        return before == stands > PTY_AHEAD_BYTES

    async def beyond(offset: int) -> None:
        async def there() -> bool:
            return (written_end(pty.directory) or 0) > offset

        await poll(there, f"output beyond {offset}")

    await poll(stopped, "a flood that stands still")
    held = stands
    await pty.looks("v", seen=held)
    await beyond(held + PTY_AHEAD_BYTES // 2)
    await poll(stopped, "a flood that stands still again")
    before = system.plane.sessions
    await system.plane.hang_up()
    await beyond(2 * PTY_RING_BYTES)
    await system.plane.online(before)
    kept = sum(path.stat().st_size for path in (pty.directory / "log").glob("*.seg"))
    assert kept <= PTY_RING_BYTES + PTY_SEGMENT_BYTES
    assert (await pty.close()).verdict is Verdict.STOPPED


async def test_without_a_command_it_is_a_login_shell_on_a_terminal(system: Siege) -> None:
    """With its user's names, in UTF-8, and none of the terminal that the daemon was started in."""
    pty = await a_pty(system, env={"PS1": "$ ", "INPUTRC": "/dev/null"})
    await pty.attach("v")
    line = b'echo "[$0] $(stty size) $TERM $COLORTERM $(locale charmap) $USER"; tty; exit 7\n'
    await pty.types("v", 0, line)
    ended = await system.plane.end(pty.execution)
    shown = pty.text().decode()
    assert "24 80 xterm-256color truecolor" in shown and "UTF-8" in shown and "/dev/pts/" in shown, shown
    assert "[-" in shown and (ended.verdict, ended.code) == (Verdict.EXITED, 7)
