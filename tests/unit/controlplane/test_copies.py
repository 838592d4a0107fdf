"""One key in two places, on the wire: who is refused, who stays, what people are told; and everything that is no copy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controlplane.instances import BEATS_MISSED_MAX
from protocol.errors import CloseCode, Reason
from protocol.ids import Digest
from protocol.messages import Bye
from protocol.replay import Mark
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Closed, FakeRunner, Line, closing_of, dial

pytestmark = pytest.mark.slow

SILENT_MS = BEATS_MISSED_MAX * 1000
"""Beats come each second in these tests."""


async def refused(copy: FakeRunner, port: int) -> Bye:
    """A connection that is refused as a copy's."""
    with pytest.raises(Closed) as closed:
        async with copy.connect(port):
            pass
    assert closed.value.code == CloseCode.IDENTITY_CONFLICT
    (bye,) = closed.value.goodbyes
    assert bye.reason is Reason.IDENTITY_CONFLICT
    return bye


async def conflicts(cp: Running) -> list[str]:
    """Events of conflicts, newest first."""
    found = (await cp.get("/v1/events"))["events"]
    return [event["detail"] for event in found if event["kind"] == "identity.conflict"]


async def work(cp: Running, line: Line) -> None:
    """One execution, from its order to its end, and a beat that tells so."""
    await cp.start()
    command = await line.command()
    await line.report(line.runner.accepted(command), line.runner.ended(command))
    await line.beat()


async def still_serves(cp: Running, line: Line) -> None:
    """The session that was there is there."""
    await work(cp, line)
    assert (await cp.get("/v1/runners/laptop"))["online"]


class TestCopies:
    """A copy is refused, the session that is there stays, both machines are named."""

    async def test_a_restored_snapshot_beside_its_living_original(self, tmp_path: Path) -> None:
        """Story.

        1. A snapshot is taken; its original works on.
        2. The snapshot is started elsewhere, while the original beats: it knows less than was told.
        3. It is refused however often it dials, with one event; the original goes on.
        """
        async with running(tmp_path) as cp:
            first = await cp.enrol()
            original = first.started("A", hostname="desk", boot_id="b1")
            snapshot = original.started("B", hostname="cloud", boot_id="b2")
            async with original.connect(cp.port) as line:
                await work(cp, line)
                for _ in range(3):
                    bye = await refused(snapshot, cp.port)
                assert "cloud (boot b2)" in bye.detail and "desk (boot b1)" in bye.detail
                assert await conflicts(cp) == [bye.detail]
                shown = await cp.get("/v1/runners/laptop")
                assert (shown["hostname"], shown["boot_id"], shown["inc"]) == ("desk", "b1", 1)
                assert (shown["conflict"]["hostname"], shown["conflict"]["detail"]) == ("cloud", bye.detail)
                await still_serves(cp, line)

    async def test_a_copy_of_a_running_machine(self, tmp_path: Path) -> None:
        """Story.

        1. A machine is cloned with its memory: one instance, one count of dials, two places.
        2. The clone dials and has the line; the original, whose session was replaced, dials with the same count.
        3. It is refused: one key, two machines.
        """
        async with running(tmp_path) as cp:
            original = (await cp.enrol()).started("A", hostname="desk")
            async with original.connect(cp.port) as line:
                clone = replace(original, hostname="desk")
                async with clone.connect(cp.port) as theirs:
                    assert (await line.closed()).code == CloseCode.SESSION_REPLACED
                    assert clone.dial == 2
                    await refused(original, cp.port)
                    await still_serves(cp, theirs)
            assert len(await conflicts(cp)) == 1

    async def test_whoever_was_succeeded_stays_outside(self, tmp_path: Path) -> None:
        """The state moved to a new machine, and the old one is switched on again."""
        async with running(tmp_path) as cp:
            old = (await cp.enrol()).started("A", hostname="old")
            async with old.connect(cp.port) as line:
                await work(cp, line)
            new = old.started("B", hostname="new", boot_id="b2")
            async with new.connect(cp.port) as line:
                bye = await refused(old, cp.port)
                assert "old (boot boot)" in bye.detail and "new (boot b2)" in bye.detail
                await line.beat()
        async with running(tmp_path) as cp:
            cp.boot.ahead_ms += SILENT_MS
            await refused(old, cp.port)
            async with new.connect(cp.port) as line:
                await still_serves(cp, line)

    async def test_a_plane_that_starts_gives_the_one_it_knew_the_first_word(self, tmp_path: Path) -> None:
        """A copy that dials first after a restart of the plane is not let in for a while; then it is a machine set back."""
        async with running(tmp_path) as cp:
            original = (await cp.enrol()).started("A")
            snapshot = original.started("B")
            async with original.connect(cp.port) as line:
                await work(cp, line)
        async with running(tmp_path) as cp:
            await refused(snapshot, cp.port)
            cp.boot.ahead_ms += SILENT_MS
            async with snapshot.connect(cp.port):
                assert snapshot.certificate.inc == 2

    async def test_a_mark_that_only_a_beat_told_counts(self, tmp_path: Path) -> None:
        """What was consumed and has no receipt yet is known from the beats of the session that is there."""
        async with running(tmp_path) as cp:
            original = (await cp.enrol()).started("A")
            snapshot = original.started("B")
            async with original.connect(cp.port) as line:
                await cp.start()
                await line.command()
                await line.beat()
                await refused(snapshot, cp.port)


class TestNoCopies:
    """What happens to one machine is never a conflict."""

    async def test_a_restart_a_reboot_and_a_new_network(self, tmp_path: Path) -> None:
        """Each while the session before may still seem to live."""
        async with running(tmp_path) as cp:
            runner = (await cp.enrol()).started("A")
            async with dial(cp.port) as first:
                await work(cp, await runner.shake(first))
                async with dial(cp.port) as second:
                    await work(cp, await runner.shake(second))
                    for letter, boot_id in (("B", "boot"), ("C", "boot 2")):
                        runner = runner.started(letter, boot_id=boot_id)
                        async with runner.connect(cp.port) as line:
                            await work(cp, line)
                        async with runner.connect(cp.port) as line:
                            await work(cp, line)
            assert runner.certificate.inc == 1
            assert await conflicts(cp) == []

    @pytest.mark.parametrize("gone", ["by a word", "without one"])
    async def test_a_machine_that_was_set_back_alone_begins_anew(self, tmp_path: Path, gone: str) -> None:
        """At once when the daemon before it said goodbye, else when that has not beaten for three intervals."""
        async with running(tmp_path) as cp:
            runner = (await cp.enrol()).started("A")
            snapshot = runner.started("B")
            async with runner.connect(cp.port) as line:
                await work(cp, line)
                if gone == "without one":
                    line.socket.transport.abort()
            if gone == "without one":
                await refused(snapshot, cp.port)
                cp.boot.ahead_ms += SILENT_MS
            async with snapshot.connect(cp.port):
                assert snapshot.certificate.inc == 2

    async def test_a_certificate_that_got_lost_is_given_again(self, tmp_path: Path) -> None:
        """Story.

        1. A fork begins a new incarnation; the daemon dies before it has kept the certificate, and is started again.
        2. Nobody has beaten in that incarnation: there is no other, only one that knows less.
        """
        async with running(tmp_path) as cp:
            runner = (await cp.enrol()).started("A")
            async with runner.connect(cp.port) as line:
                await work(cp, line)
                await work(cp, line)
                line.socket.transport.abort()
            elsewhere = Mark(2, Digest("sha256:" + "1" * 64))
            forked = replace(runner, seen=replace(runner.seen, ctl=elsewhere))
            async with forked.connect(cp.port) as line:
                assert forked.certificate.inc == 2
                line.socket.transport.abort()
            again = runner.started("B")
            async with again.connect(cp.port) as line:
                assert again.certificate.inc == 3
                await line.beat()
            assert await conflicts(cp) == []

    async def test_a_handshake_that_was_overtaken_is_no_copy(self, tmp_path: Path) -> None:
        """Story.

        1. A runner is about to prove itself when its network changes; it dials again, and has the line.
        2. The proof of the first connection arrives after all, with the lower count: an old connection, and nothing else.
        """
        async with running(tmp_path) as cp:
            runner = (await cp.enrol()).started("A")
            async with dial(cp.port) as first:
                proof = await runner.prepare(first)
                async with runner.connect(cp.port) as line:
                    await first.send(proof)
                    closed = await closing_of(first)
                    assert (closed.code, closed.goodbyes[0].reason) == (4409, Reason.SESSION_REPLACED)
                    await still_serves(cp, line)
            assert await conflicts(cp) == []

    async def test_a_runner_of_an_older_version_is_not_judged(self, tmp_path: Path) -> None:
        """It has no instance to tell: two of them replace each other, as ever."""
        async with running(tmp_path) as cp:
            one = await cp.enrol()
            other: Any = replace(one, outbox=[], answered=[])
            async with one.connect(cp.port) as line, other.connect(cp.port):
                assert (await line.closed()).code == CloseCode.SESSION_REPLACED
            assert await conflicts(cp) == []
