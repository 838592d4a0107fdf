"""The daemon's answers to its owner: admission is durable before it is answered, and what is told is what the engine knows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import Reason
from runner.adapters.control import ControlCall
from runner.core.inputs import AttemptExited, Input, OwnerAdmission
from runner.core.plans import Admission, Headroom
from runner.desk import NAMED_MAX, Desk
from runner.errors import Refused
from runner.logdesk import LogDesk
from runner.logsink import Sink
from tests.support.builders import an_attempt
from tests.support.engine import World, a_policy, an_exit
from tests.unit.runner.test_pump import Clock

MINUTE_MS = 60_000


class Owner:
    """Somebody at the control socket of a daemon whose disk is as slow as the test wants."""

    def __init__(self, **policy: Any) -> None:
        self.world = World(policy=a_policy(**policy))
        self.settled: list[Input] = []
        self.ended = 0
        self.room = Headroom(disk_free=10, disk_total=100)
        link = SimpleNamespace(
            status=SimpleNamespace(up=True, since_ms=1, url="ws://plane", reason=""), unanswered=False
        )
        shims = SimpleNamespace(settings=SimpleNamespace(state_dir=Path("/s"), cgroups=Path("/c")), server_pid=7)
        self.desk = Desk(
            version="1",
            name="laptop",
            engine=self.world.engine,
            shims=shims,  # type: ignore[arg-type]
            uplink=SimpleNamespace(backlog_bytes=0),  # type: ignore[arg-type]
            link=link,  # type: ignore[arg-type]
            clock=Clock(self.world.now),
            put=lambda happened: self.world.step(happened),
            settle=self.settle,
            measure=lambda: self.room,
            end=self.end,
            orphans=self.nobody,
            logs=LogDesk(Sink(None)),
            retention=SimpleNamespace(),  # type: ignore[arg-type]
        )

    async def settle(self, happened: Input) -> None:
        """Durable now."""
        self.settled.append(happened)
        self.world.step(happened)

    async def nobody(self, _call: ControlCall) -> dict[str, Any]:
        """No orphans."""
        return {"attempts": []}

    def end(self) -> None:
        """The end of the daemon begins."""
        self.ended += 1

    async def ask(self, verb: str, **args: Any) -> dict[str, Any]:
        """One question of uid 7."""
        return await self.desk.answer(ControlCall(verb=verb, args=args, uid=7, pid=1))


async def test_what_the_owner_says_of_admission_is_durable_before_it_is_answered() -> None:
    """Paused, drained until a moment, opened again: each is one input, and the answer says how it stands."""
    owner = Owner()
    owner.world.running()
    boot_ms = owner.world.now.boot_ms
    assert await owner.ask("admission", state="paused") == {
        "state": "paused",
        "stops_in_ms": None,
        "attempts": 1,
        "living": ["ex_1.1"],
    }
    draining = await owner.ask("admission", state="draining", deadline_ms=MINUTE_MS)
    assert (draining["state"], draining["stops_in_ms"]) == ("draining", MINUTE_MS)
    assert (await owner.ask("admission"))["state"] == "draining"
    assert (await owner.ask("admission", state="open"))["stops_in_ms"] is None
    assert owner.settled == [
        OwnerAdmission(Admission.PAUSED, "owner:7"),
        OwnerAdmission(Admission.DRAINING, "owner:7", boot_ms + MINUTE_MS),
        OwnerAdmission(Admission.OPEN, "owner:7"),
    ]
    assert owner.world.journal.admission == (Admission.OPEN, None)


@pytest.mark.parametrize(
    "args",
    [
        {"state": "shut"},
        {"state": 1},
        {"state": "draining", "deadline_ms": -1},
        {"state": "draining", "deadline_ms": True},
        {"state": "draining", "deadline_ms": 2**60},
    ],
)
async def test_a_word_that_is_none_changes_nothing(args: dict[str, Any]) -> None:
    """It is refused, with its reason."""
    owner = Owner()
    with pytest.raises(Refused) as caught:
        await owner.ask("admission", **args)
    assert caught.value.reason is Reason.BAD_ARGS and not owner.settled


async def test_few_are_named_and_all_are_counted() -> None:
    """An answer stays an answer for a person."""
    owner = Owner(concurrent_max=100)
    for number in range(NAMED_MAX + 3):
        owner.world.running(f"ex_{number}")
    said = await owner.ask("admission")
    assert (said["attempts"], len(said["living"])) == (NAMED_MAX + 3, NAMED_MAX)


async def test_the_end_is_begun_and_answered() -> None:
    """The asker has its answer before the daemon is gone."""
    owner = Owner()
    assert "pid" in await owner.ask("shutdown") and owner.ended == 1


async def test_status_tells_what_there_is_too_little_of() -> None:
    """As it is now, by the owner's minimums."""
    owner = Owner(disk_free_percent_min=20)
    assert (await owner.ask("status"))["headroom"]["short"] == "DISK_LOW"
    owner.room = Headroom(disk_free=30, disk_total=100)
    said = await owner.ask("status")
    assert (said["headroom"]["short"], said["headroom"]["disk_free"], said["cgroups"]) == (None, 30, "/c")


async def test_status_counts_ptys() -> None:
    """Those that live."""
    owner = Owner()
    args = {"execution_id": "ex_1", "start_token": 1, "argv": [], "cwd": {"type": "path", "path": "/srv/work"}}
    fields = owner.world.fields("pty.open", args | {"size": {"rows": 24, "cols": 80}})
    owner.world.running(env=owner.world.seal(fields))
    owner.world.running("ex_2")
    said = await owner.ask("status")
    assert (said["attempts"], said["ptys"]) == (2, 1)
    owner.world.exit()
    assert (await owner.ask("status"))["ptys"] == 0


async def test_status_counts_leases_that_are_late_and_lost() -> None:
    """1. Just granted. 2. Its renewal is overdue. 3. Its deadline is past. 4. The attempt is over."""
    owner = Owner()
    lease = {"res": "exec:ex_1", "token": 1, "ttl_ms": MINUTE_MS, "on_loss": "freeze"}
    owner.world.running(lease=lease)

    async def leases(later_ms: int) -> dict[str, Any]:
        owner.world.pass_time(later_ms)
        owner.desk._clock = Clock(owner.world.now)
        found: dict[str, Any] = (await owner.ask("status"))["leases"]
        return found

    assert await leases(0) == {"held": 1, "lost": 0, "late": 0, "soonest_ms": MINUTE_MS}
    assert (await leases(45_000))["late"] == 1
    owner.world.pass_time(20_000)
    owner.world.take(owner.world.engine.leases.tick(owner.world.now))
    assert await leases(0) == {"held": 0, "lost": 1, "late": 0, "soonest_ms": None}
    owner.world.step(AttemptExited(an_attempt(), an_exit()))
    assert (await leases(0))["lost"] == 0


async def test_what_the_daemon_does_not_know_is_refused() -> None:
    """A tool of a later version."""
    with pytest.raises(Refused):
        await Owner().ask("juggle")
