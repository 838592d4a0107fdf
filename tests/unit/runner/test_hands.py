"""What the hands make of effects that concern shims, leases and the disk, with everything outside replaced by its port."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from errno import EDQUOT, EIO, EMFILE, ENOSPC
from os import strerror
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.commands import ViewerMode
from protocol.errors import Reason
from protocol.ids import Attempt, Digest
from protocol.lease import Lease
from runner.adapters.viewerfiles import admitted_viewer
from runner.core.effects import (
    AbandonAttempt,
    AdmitViewer,
    AdoptAttempt,
    CollectAttempt,
    Effect,
    EndHungShim,
    KeepIdentity,
    PrepareAttempt,
    PushLease,
    Redial,
    ScanOrphans,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    Input,
    OrphansFound,
    RemainsSwept,
    ShimSilent,
    ViewerAdmitted,
    ViewerNotAdmitted,
)
from runner.core.plans import (
    AttemptPlan,
    ExitRecord,
    LeaseAction,
    Observed,
    Orphan,
    Phase,
    ProcessIdentity,
    Swept,
    UploadedCopy,
)
from runner.errors import Broken, ConfigError
from runner.hands import UNSEEN_PAUSE_S, DaemonHands
from runner.logs import EVENTS
from runner.ports import ShimEvent
from tests.support.builders import a_key, a_lease, a_verified_keyset, an_attempt
from tests.support.engine import an_exit
from tests.support.shims import a_plan

EX = an_attempt()
SWEPT = Swept(found=1, signalled=1, remaining=0)
SHIM = ProcessIdentity(boot_id="boot-1", pid=10, start=20)
MASKED = UploadedCopy(redactor="mask-1", streams={})
DIGEST = Digest("sha256:" + "22" * 32)


@dataclass
class FakeShims:
    """The port Shims: remembers, and answers as it was told."""

    said: list[tuple[Any, ...]] = field(default_factory=list)
    fault: OSError | None = None
    end: ShimEvent = field(default_factory=lambda: AttemptLost(EX, Reason.SHIM_HUNG, SWEPT))
    answers: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    on_cut: Any = None
    hear: Any = None
    root: Path = Path("/nowhere")

    def __post_init__(self) -> None:
        self.gate.set()

    def listen(self, hear: Any) -> None:
        """See the port."""
        self.hear = hear

    def log_dir(self, name: str) -> Any:
        """Somewhere."""
        return self.root / name / "log"

    async def do(self, work: Any, *args: Any) -> Any:
        """See the adapter."""
        self._say("do", work)
        return work(*args)

    async def prepare(self, plan: AttemptPlan, _cwd: str, *, again: bool) -> ProcessIdentity:
        """See the port."""
        self._say("prepare", plan.attempt, again)
        return SHIM

    async def adopt(self, attempt: Attempt) -> bool:
        """See the port."""
        self._say("adopt", attempt)
        return self.answers

    def lease(self, *pushed: Any) -> None:
        """See the port."""
        self.said.append(("lease", *pushed))

    def collect(self, attempt: Attempt) -> None:
        """See the port."""
        self.said.append(("collect", attempt))

    async def abandon(self, attempt: Attempt) -> None:
        """See the port."""
        self._say("abandon", attempt)

    async def lose(self, attempt: Attempt) -> ShimEvent:
        """See the port."""
        self._say("lose", attempt)
        return self.end

    async def end_hung(self, attempt: Attempt, shim: ProcessIdentity | None) -> ShimEvent:
        """See the port."""
        self._say("end_hung", attempt, shim)
        return self.end

    async def sweep(self, name: str) -> Swept:
        """See the port."""
        self._say("sweep", name)
        return SWEPT

    async def scan(self) -> tuple[Orphan, ...]:
        """See the port."""
        self._say("scan")
        await self.gate.wait()
        return (Orphan(name="ex_9.1", processes=2, shim_alive=False),)

    def _say(self, *words: Any) -> None:
        self.said.append(words)
        if self.fault is not None:
            raise self.fault


class FakeKeeper:
    """The port LeaseKeeper."""

    def __init__(self) -> None:
        self.held: dict[Attempt, tuple[Lease, LeaseAction, int | None]] = {}
        self.ahead_ms = 0
        """How much further than the loop knows."""

    def hold(self, attempt: Attempt, lease: Lease, action: LeaseAction, grace_ms: int | None) -> int:
        """See the port."""
        self.held[attempt] = (lease, action, grace_ms)
        return lease.deadline_ms + self.ahead_ms

    def drop(self, attempt: Attempt) -> None:
        """See the port."""
        self.held.pop(attempt, None)


class FakeUplink:
    """Logs that are not read."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def track(self, _name: str, _directory: Path, **_: Any) -> None:
        """There is room for all."""

    def finish(self, name: str, _end: int = 0) -> None:
        """Remember it."""
        self.finished.append(name)


@dataclass
class FakeRedactor:
    """Knows of secrets what it was told, and says that everything was masked."""

    secret: set[Attempt] = field(default_factory=set)
    over: list[Attempt] = field(default_factory=list)

    def open(self, _attempt: Attempt, sealed: Mapping[str, str]) -> dict[str, bytes]:
        """They are not sealed."""
        return {name: value.encode() for name, value in sealed.items()}

    def learn(self, plan: AttemptPlan, secrets: Mapping[str, bytes]) -> None:
        """Remember whose they are."""
        if secrets:
            self.secret.add(plan.attempt)

    def forget(self, attempt: Attempt) -> None:
        """Nobody asks any more."""
        self.secret.discard(attempt)

    def ended(self, attempt: Attempt) -> None:
        """Remember it."""
        self.over.append(attempt)

    def masks(self, attempt: Attempt) -> bool:
        """Whether it has secrets."""
        return attempt in self.secret

    def completed(self, _attempt: Attempt, record: ExitRecord) -> ExitRecord:
        """As if all were masked."""
        return replace(record, uploaded=MASKED)


class FakeLink:
    """A session that only counts."""

    redials = 0

    def redial(self) -> None:
        """Count it."""
        self.redials += 1


class FullKeystore:
    """A keystore that keeps nothing."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def keep(self, *_: Any) -> None:
        """It cannot."""
        raise self.fault


@dataclass
class Scene:
    """Hands, and everything they touch."""

    shims: FakeShims = field(default_factory=FakeShims)
    keeper: FakeKeeper = field(default_factory=FakeKeeper)
    uplink: FakeUplink = field(default_factory=FakeUplink)
    link: FakeLink = field(default_factory=FakeLink)
    redactor: FakeRedactor = field(default_factory=FakeRedactor)
    keystore: FullKeystore = field(default_factory=lambda: FullKeystore(Broken(Reason.DISK_FULL, "no room")))
    put: list[Input] = field(default_factory=list)
    notes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    hands: Any = None

    async def done(self, effect: Effect) -> list[Input]:
        """Perform, and wait for what comes back."""
        before = len(self.put)
        self.hands.perform(effect)
        for _ in range(10):
            await asyncio.sleep(0)
        return self.put[before:]

    @property
    def events(self) -> list[str]:
        """What was logged; every name of it is in the registry."""
        names = [event for event, _ in self.notes]
        assert EVENTS.issuperset(names)
        return names


class Tasks:
    """A task group that a fixture can open in one task and close in another."""

    def __init__(self) -> None:
        self.running: list[asyncio.Future[Any]] = []

    def start_soon(self, work: Any, *args: Any) -> None:
        """As anyio's."""
        self.running.append(asyncio.gather(work(*args)))


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    """Hands over fakes; whatever they did must have ended without an error."""
    scene, tasks = Scene(), Tasks()
    parts: dict[str, Any] = {
        "tasks": tasks,
        "shims": scene.shims,
        "worktrees": None,
        "link": scene.link,
        "uplink": scene.uplink,
        "keeper": scene.keeper,
        "keystore": scene.keystore,
        "redactor": scene.redactor,
    }
    scene.hands = DaemonHands(put=scene.put.append, **parts)
    scene.hands.note = lambda event, fields: scene.notes.append((event, fields))
    yield scene
    await asyncio.gather(*tasks.running)


def a_push(**over: Any) -> PushLease:
    """What the engine says of a lease that is held."""
    fields: dict[str, Any] = {"grace_ms": 500, "lease": a_lease(deadline_ms=77_000)}
    return PushLease(EX, 3, 77_000, LeaseAction.STOP, **(fields | over))


# --- leases -----------------------------------------------------------------------------------------------------


async def test_a_pushed_lease_is_told_to_the_shim_with_its_grace_and_kept(scene: Scene) -> None:
    """By the keeper, for as long as it is held."""
    await scene.done(a_push())
    assert scene.shims.said == [("lease", EX, 3, 77_000, LeaseAction.STOP, 500)]
    assert scene.keeper.held == {EX: (a_lease(deadline_ms=77_000), LeaseAction.STOP, 500)}


async def test_a_shim_is_never_told_an_earlier_deadline_than_it_was_told_beside_us(scene: Scene) -> None:
    """The loop may come late to a renewal, when the keeper has the next already; a lease that is given up is another matter."""
    scene.keeper.ahead_ms = 5_000
    await scene.done(a_push())
    await scene.done(a_push(lease=None))
    assert [said[3] for said in scene.shims.said] == [82_000, 77_000]


@pytest.mark.parametrize(
    "over",
    [a_push(lease=None), CollectAttempt(EX), AbandonAttempt(EX)],
    ids=["given up", "settled", "never let go"],
)
async def test_a_lease_that_is_over_is_not_kept(scene: Scene, over: Effect) -> None:
    """Nobody would thank for its renewal."""
    await scene.done(a_push())
    await scene.done(over)
    assert scene.keeper.held == {}


@pytest.mark.parametrize("end", [AttemptExited(EX, an_exit()), AttemptLost(EX, Reason.SHIM_LOST, None)])
async def test_the_lease_of_an_attempt_that_ended_is_not_kept(scene: Scene, end: ShimEvent) -> None:
    """From the moment its shim says so, before it is settled; its log is finished then, too."""
    await scene.done(a_push())
    scene.shims.hear(end)
    assert scene.keeper.held == {} and scene.uplink.finished == [EX.name] and scene.put == [end]


async def test_a_silent_shim_keeps_its_lease_and_its_log(scene: Scene) -> None:
    """It has not ended."""
    await scene.done(a_push())
    scene.shims.hear(ShimSilent(EX))
    assert EX in scene.keeper.held and scene.uplink.finished == [] and scene.put == [ShimSilent(EX)]


# --- shims ------------------------------------------------------------------------------------------------------


async def test_a_shim_is_adopted_when_it_answers(scene: Scene) -> None:
    """That is told, and only that."""
    await scene.done(AdoptAttempt(EX))
    scene.shims.answers = False
    await scene.done(AdoptAttempt(EX))
    assert scene.events == ["attempt.adopted"]


async def test_a_connection_that_was_cut_is_made_again(scene: Scene) -> None:
    """As at a start."""
    scene.shims.on_cut(EX)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ("adopt", EX) in scene.shims.said


@pytest.mark.parametrize(
    ("effect", "said"),
    [(EndHungShim(EX, SHIM), ("end_hung", EX, SHIM)), (SweepAttempt(EX), ("lose", EX))],
)
async def test_the_end_of_a_shim_that_does_not_tell_it_comes_back(
    scene: Scene, effect: Effect, said: tuple[Any, ...]
) -> None:
    """As its files and processes say."""
    assert await scene.done(effect) == [scene.shims.end]
    assert said in scene.shims.said and scene.uplink.finished == [EX.name]


@pytest.mark.parametrize("effect", [EndHungShim(EX, None), SweepAttempt(EX)])
async def test_who_cannot_look_concludes_nothing(scene: Scene, effect: Effect, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again after a pause; a daemon without descriptors must not call its attempts lost, nor spin."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("runner.hands.anyio.sleep", pause)
    scene.shims.fault = OSError(EMFILE, strerror(EMFILE))
    assert await scene.done(effect) == [ShimSilent(EX)]
    assert scene.events == ["orphan.unseen"] and scene.uplink.finished == [] and pauses == [UNSEEN_PAUSE_S]


# --- orphans ----------------------------------------------------------------------------------------------------


async def test_processes_are_looked_at_once_at_a_time(scene: Scene) -> None:
    """A second wish is answered by the look that goes on."""
    scene.shims.gate.clear()
    assert await scene.done(ScanOrphans()) == []
    assert await scene.done(ScanOrphans()) == []
    scene.shims.gate.set()
    found = OrphansFound((Orphan(name="ex_9.1", processes=2, shim_alive=False),))
    for _ in range(10):
        await asyncio.sleep(0)
    assert scene.put == [found] and scene.shims.said == [("scan",)]
    assert await scene.done(ScanOrphans()) == [found]


async def test_a_look_that_fails_ends_no_daemon(scene: Scene) -> None:
    """The next one may see more."""
    scene.shims.fault = OSError(EMFILE, strerror(EMFILE))
    assert await scene.done(ScanOrphans()) == [] and await scene.done(SweepRemains(EX)) == []
    scene.shims.fault = None
    assert len(await scene.done(ScanOrphans())) == 1
    assert scene.events == ["orphan.unseen", "orphan.unseen"]


async def test_who_waits_for_a_sweep_hears_what_it_found(scene: Scene) -> None:
    """All who wait, once; who left is not waited for."""
    first, second, gone = (scene.hands.sweep_of(EX) for _ in range(3))
    gone.cancel()
    assert await scene.done(SweepRemains(EX)) == [RemainsSwept(EX, SWEPT)]
    assert (first.result(), second.result()) == (SWEPT, SWEPT)
    assert scene.hands._sweeps == {}


async def test_a_sleep_makes_the_link_dial(scene: Scene) -> None:
    """At once."""
    await scene.done(Redial())
    assert scene.link.redials == 1


# --- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"), [(ENOSPC, Reason.DISK_FULL), (EDQUOT, Reason.DISK_FULL), (EIO, Reason.INFRA)]
)
async def test_a_disk_that_does_not_take_an_attempt_is_our_failure_and_says_which(
    scene: Scene, number: int, reason: Reason
) -> None:
    """Not the command's doing, and nothing ran."""
    scene.shims.fault = OSError(number, strerror(number))
    (told,) = await scene.done(PrepareAttempt(a_plan(), DIGEST))
    assert told == AttemptNotPrepared(a_plan().attempt, reason, strerror(number), refused=False)


async def test_a_viewer_is_let_in_on_the_disk_before_it_is_told(scene: Scene, tmp_path: Path) -> None:
    """The file is there; a name that somebody else has is the asker's doing, a disk that is full is not."""
    scene.shims.root = tmp_path
    (tmp_path / EX.name).mkdir()
    wanted = AdmitViewer(EX, "v_1", a_key("viewer").public.x, ViewerMode.WRITE, DIGEST)
    assert await scene.done(wanted) == [ViewerAdmitted(DIGEST)]
    assert admitted_viewer(tmp_path / EX.name, "v_1") is not None
    (told,) = await scene.done(replace(wanted, mode=ViewerMode.READ))
    assert isinstance(told, ViewerNotAdmitted) and (told.reason, told.refused) == (Reason.DUPLICATE_VIEWER, True)
    scene.shims.fault = OSError(ENOSPC, strerror(ENOSPC))
    (told,) = await scene.done(replace(wanted, viewer="v_2"))
    assert told == ViewerNotAdmitted(DIGEST, Reason.DISK_FULL, strerror(ENOSPC), refused=False)


@pytest.mark.parametrize("fault", [Broken(Reason.DISK_FULL, "no room"), ConfigError("place", "", "a directory")])
async def test_an_identity_that_cannot_be_stored_counts_all_the_same(scene: Scene, fault: Exception) -> None:
    """In memory; the plane sends it again to a daemon that does not have it. The daemon goes on, and says so."""
    scene.keystore.fault = fault
    await scene.done(KeepIdentity(a_verified_keyset(), None))
    assert scene.events == ["identity.unkept"]


async def test_the_end_of_an_attempt_with_secrets_comes_with_what_its_copy_adds_up_to(scene: Scene) -> None:
    """The log is let go at once, the settlement waits for the sum; whoever has no secrets waits for nothing."""
    scene.hands.heard(AttemptExited(EX, an_exit()))
    assert scene.put == [AttemptExited(EX, an_exit())]
    scene.redactor.secret.add(EX)
    scene.hands.heard(AttemptExited(EX, an_exit()))
    assert len(scene.put) == 1 and scene.uplink.finished == [EX.name] * 2 == [each.name for each in scene.redactor.over]
    async with asyncio.timeout(10):
        while len(scene.put) == 1:
            await asyncio.sleep(0)
    assert scene.put[1] == AttemptExited(EX, an_exit(uploaded=MASKED))


async def test_what_ended_without_a_daemon_is_added_up_at_start(scene: Scene) -> None:
    """Only where a settlement is still to come, and something was masked."""
    ended = Observed(attempt=EX, same_boot=True, phase=Phase.RUNNING, lock_held=False, exit=an_exit())
    assert await scene.hands.completed([ended], [EX]) == [ended]
    scene.redactor.secret.add(EX)
    assert await scene.hands.completed([ended], []) == [ended]
    assert await scene.hands.completed([ended, replace(ended, exit=None)], [EX]) == [
        replace(ended, exit=an_exit(uploaded=MASKED)),
        replace(ended, exit=None),
    ]


async def test_secrets_are_known_before_the_first_byte_of_output(scene: Scene) -> None:
    """Learnt before the shim is let go; forgotten with the attempt."""
    plan = a_plan(secrets={"TOKEN": "tr0ub4dor"})
    scene.hands.perform(PrepareAttempt(plan, DIGEST))
    async with asyncio.timeout(10):
        while not scene.put:
            await asyncio.sleep(0)
    assert scene.redactor.secret == {plan.attempt}
    await scene.done(CollectAttempt(plan.attempt))
    assert scene.redactor.secret == set()
