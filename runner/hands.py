"""Performs what the engine decided, through the ports. What takes time runs as a task and comes back as an input."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, assert_never

import anyio
import structlog
from anyio.abc import TaskGroup

from protocol.errors import ProtocolError, Reason
from protocol.ids import Attempt
from runner import failpoints
from runner.adapters.keystore import Keystore
from runner.adapters.redactor import Redactor
from runner.adapters.shims import ShimAdapter
from runner.adapters.uplink import Uplink
from runner.adapters.viewerfiles import admit_viewer
from runner.core.effects import (
    AbandonAttempt,
    AdmitViewer,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Effect,
    EndHungShim,
    KeepIdentity,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    PushLease,
    Redial,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    Say,
    ScanOrphans,
    SendBeat,
    SignalAttempt,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    Input,
    OrphansFound,
    RemainsSwept,
    ShimSilent,
    ViewerAdmitted,
    ViewerNotAdmitted,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.plans import AttemptPlan, Observed, ProcessIdentity, Swept
from runner.errors import Broken, ConfigError, NotEnrolled, Refused
from runner.link import Link
from runner.ports import LeaseKeeper, ShimEvent, Worktrees

UNSEEN_PAUSE_S: Final = 10.0
"""After a look that failed for want of descriptors or memory: others need a moment to give theirs back."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
WARNINGS: Final = frozenset(
    {
        "alarm.raised",
        "attempt.lost",
        "attempt.unknown",
        "attempt.unkillable",
        "identity.unkept",
        "lease.lost",
        "lease.neglected",
        "orphan.found",
        "orphan.swept",
        "orphan.unseen",
        "report.refused",
        "session.lost",
        "shim.hung",
    }
)


class DaemonHands:
    """Implements `pump.Hands`. `put` is how results come back."""

    def __init__(
        self,
        *,
        tasks: TaskGroup,
        put: Callable[[Input], None],
        shims: ShimAdapter,
        worktrees: Worktrees,
        link: Link,
        uplink: Uplink,
        keeper: LeaseKeeper,
        keystore: Keystore,
        redactor: Redactor,
    ) -> None:
        self._tasks = tasks
        self._put = put
        self._shims = shims
        self._worktrees = worktrees
        self._link = link
        self._uplink = uplink
        self._keeper = keeper
        self._keystore = keystore
        self._redactor = redactor
        self._secrets: dict[Attempt, dict[str, bytes]] = {}
        self._scanning = False
        self._sweeps: dict[Attempt, list[asyncio.Future[Swept]]] = {}
        self._log = structlog.get_logger()
        shims.listen(self.heard)
        shims.on_cut = lambda attempt: self._begin(self._adopt, attempt)

    def heard(self, event: ShimEvent) -> None:
        """What became of an attempt; when it has ended, its log will not grow any more and its lease is not wanted."""
        if isinstance(event, AttemptExited | AttemptLost):
            self._keeper.drop(event.attempt)
            self._redactor.ended(event.attempt)
            self._uplink.finish(event.attempt.name, event.exit.log_end if isinstance(event, AttemptExited) else 0)
        if isinstance(event, AttemptExited) and self._redactor.masks(event.attempt):
            self._begin(self._complete, event)
        else:
            self._put(event)

    async def _complete(self, event: AttemptExited) -> None:
        """Its log goes up otherwise than it is: it is read once more, for what the settlement says of that."""
        record = await anyio.to_thread.run_sync(self._redactor.completed, event.attempt, event.exit)
        self._put(AttemptExited(event.attempt, record))

    async def completed(self, found: Sequence[Observed], living: Collection[Attempt]) -> list[Observed]:
        """What was found at start, with what the settlements of those that ended meanwhile say of their uploaded copies."""
        whole = []
        for each in found:
            if each.exit is not None and each.attempt in living and self._redactor.masks(each.attempt):
                record = await anyio.to_thread.run_sync(self._redactor.completed, each.attempt, each.exit)
                each = replace(each, exit=record)
            whole.append(each)
        return whole

    def sweep_of(self, attempt: Attempt) -> "asyncio.Future[Swept]":
        """The evidence of the next sweep of what is left of an attempt; cancel it when nobody waits any more."""
        waiting: asyncio.Future[Swept] = asyncio.get_running_loop().create_future()
        self._sweeps.setdefault(attempt, []).append(waiting)
        waiting.add_done_callback(lambda done: self._forget_sweep(attempt, done))
        return waiting

    def _forget_sweep(self, attempt: Attempt, done: "asyncio.Future[Swept]") -> None:
        left = [waiting for waiting in self._sweeps.pop(attempt, ()) if waiting is not done]
        if left:
            self._sweeps[attempt] = left

    def perform(self, effect: Effect) -> None:
        """See the port."""
        match effect:
            case Persist():
                raise AssertionError("the pump persists")
            case Say(message):
                self._link.say(message)
            case SendBeat():
                self._link.beat(effect)
            case Offer(items):
                self._link.offer(items)
            case ReportAgain(out_seqs):
                self._link.report_again(out_seqs)
            case PrepareAttempt(plan, _digest, again):
                self._begin(self._prepare, plan, again)
            case ReleaseAttempt(attempt):
                self._begin(self._release, attempt)
            case AbandonAttempt(attempt):
                self._secrets.pop(attempt, None)
                self._redactor.forget(attempt)
                self._keeper.drop(attempt)
                self._begin(self._shims.abandon, attempt)
            case StopAttempt(attempt, grace_ms, by):
                self._shims.stop(attempt, grace_ms, by)
                failpoints.hit("stop.said")
            case SignalAttempt(attempt, name, signal, tree):
                self._shims.signal(attempt, name, signal, tree=tree)
            case AdmitViewer():
                self._begin(self._admit_viewer, effect)
            case PushLease():
                self._push_lease(effect)
                failpoints.hit("lease.pushed")
            case CollectAttempt(attempt):
                self._keeper.drop(attempt)
                self._redactor.forget(attempt)
                self._shims.collect(attempt)
            case AdoptAttempt(attempt, terminal):
                self._begin(self._adopt, attempt, terminal)
            case SweepAttempt(attempt):
                self._begin(self._sweep, attempt)
            case SweepRemains(attempt):
                self._begin(self._sweep_remains, attempt)
            case EndHungShim(attempt, shim):
                self._begin(self._end_hung, attempt, shim)
            case ScanOrphans():
                self._scan()
            case Redial():
                self._link.redial()
            case CreateWorktree():
                self._begin(self._create, effect)
            case RemoveWorktree():
                self._begin(self._remove, effect)
            case KeepIdentity():
                self._keep_identity(effect)
            case Note(event, fields):
                self.note(event, dict(fields))
            case _:
                assert_never(effect)

    def note(self, event: str, fields: dict[str, str | int | None]) -> None:
        """Log one fact, once."""
        log = self._log.warning if event in WARNINGS else self._log.info
        log(event, **{name: value for name, value in fields.items() if value is not None})

    def _push_lease(self, push: PushLease) -> None:
        deadline_ms = push.deadline_ms
        if push.lease is None:
            self._keeper.drop(push.attempt)
        else:
            deadline_ms = self._keeper.hold(push.attempt, push.lease, push.action, push.grace_ms)
        self._shims.lease(push.attempt, push.token, deadline_ms, push.action, push.grace_ms)

    def _keep_identity(self, effect: KeepIdentity) -> None:
        try:
            self._keystore.keep(effect.keyset, effect.certificate)
            failpoints.hit("identity.kept")
        except (Refused, Broken, ConfigError, NotEnrolled) as exc:
            # It counts in memory, and the control plane sends it again to a daemon that does not have it.
            self.note("identity.unkept", {"detail": str(exc)})

    def _begin(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        self._tasks.start_soon(work, *args)

    # --- attempts -----------------------------------------------------------------------------------------------

    async def _prepare(self, plan: AttemptPlan, again: bool) -> None:
        attempt = plan.attempt
        try:
            secrets = self._redactor.open(attempt, plan.secrets)
            shim = await self._shims.prepare(plan, self._cwd(plan), again=again)
        except ProtocolError as exc:
            self._put(AttemptNotPrepared(attempt, exc.reason, exc.detail, refused=True))
        except (Refused, Broken) as exc:
            self._put(AttemptNotPrepared(attempt, exc.reason, exc.detail, refused=isinstance(exc, Refused)))
        except OSError as exc:
            self._put(AttemptNotPrepared(attempt, *_of_disk(exc), refused=False))
        else:
            self._secrets[attempt] = secrets
            if secrets:
                await anyio.to_thread.run_sync(self._redactor.learn, plan, secrets)
            else:
                self._redactor.learn(plan, secrets)
            self._track(attempt, interactive=plan.terminal is not None)
            failpoints.hit("attempt.prepared")
            self._put(AttemptPrepared(attempt, shim))

    def _cwd(self, plan: AttemptPlan) -> str:
        """The working directory; a worktree's is looked up now, since it may have been made a moment ago."""
        if plan.worktree_id is None:
            assert plan.cwd is not None, "a plan has one or the other"
            return plan.cwd
        path = self._worktrees.path(plan.worktree_id)
        if path is None:
            raise Refused(Reason.WORKTREE_UNKNOWN, "there is no such worktree")
        if plan.pre_head is not None and self._worktrees.head(plan.worktree_id) != plan.pre_head:
            raise Refused(Reason.PRECONDITION_FAILED, "the worktree's HEAD is elsewhere")
        return path if plan.subdir is None else os.path.join(path, plan.subdir)

    async def _release(self, attempt: Attempt) -> None:
        await self._shims.release(attempt, self._secrets.pop(attempt, {}))

    async def _adopt(self, attempt: Attempt, terminal: bool = False) -> None:
        self._track(attempt, interactive=terminal)
        if await self._shims.adopt(attempt):
            self.note("attempt.adopted", {"attempt": attempt.name})

    async def _admit_viewer(self, effect: AdmitViewer) -> None:
        directory, digest = self._shims.log_dir(effect.attempt.name).parent, effect.digest
        try:
            await self._shims.do(admit_viewer, directory, effect.viewer, effect.key, effect.mode)
            failpoints.hit("viewer.admitted")
        except (Refused, Broken) as exc:
            self._put(ViewerNotAdmitted(digest, exc.reason, exc.detail, refused=isinstance(exc, Refused)))
        except OSError as exc:
            self._put(ViewerNotAdmitted(digest, *_of_disk(exc), refused=False))
        else:
            self._put(ViewerAdmitted(digest))

    async def _sweep(self, attempt: Attempt) -> None:
        await self._end(attempt, self._shims.lose(attempt))

    async def _end_hung(self, attempt: Attempt, shim: ProcessIdentity | None) -> None:
        await self._end(attempt, self._shims.end_hung(attempt, shim))

    async def _end(self, attempt: Attempt, ending: Awaitable[ShimEvent]) -> None:
        self._track(attempt)
        try:
            ended = await ending
            failpoints.hit("sweep.ended")
            self.heard(ended)
        except OSError as exc:
            # Who could not look knows nothing: it is asked again, when there may be room to look.
            self._unseen(exc)
            await anyio.sleep(UNSEEN_PAUSE_S)
            self._put(ShimSilent(attempt))

    async def _sweep_remains(self, attempt: Attempt) -> None:
        try:
            swept = await self._shims.sweep(attempt.name)
        except OSError as exc:
            self._unseen(exc)
            return
        self._put(RemainsSwept(attempt, swept))
        for waiting in self._sweeps.pop(attempt, ()):
            if not waiting.done():
                waiting.set_result(swept)

    def _scan(self) -> None:
        """Look at all processes, once at a time: who asks meanwhile has the answer of the one that goes on."""
        if not self._scanning:
            self._scanning = True
            self._begin(self._look_around)

    async def _look_around(self) -> None:
        try:
            self._put(OrphansFound(await self._shims.scan()))
        except OSError as exc:
            self._unseen(exc)
        finally:
            self._scanning = False

    def _unseen(self, exc: OSError) -> None:
        self.note("orphan.unseen", {"detail": exc.strerror})

    def _track(self, attempt: Attempt, *, interactive: bool = False) -> None:
        try:
            directory = self._shims.log_dir(attempt.name).parent
            self._uplink.track(
                attempt.name,
                directory,
                reader=lambda: self._redactor.reader(attempt.name, directory),
                interactive=interactive,
            )
        except Broken as exc:
            self.note("log.failed", {"attempt": attempt.name, "reason": exc.reason})

    # --- worktrees ----------------------------------------------------------------------------------------------

    async def _create(self, effect: CreateWorktree) -> None:
        try:
            made = await self._worktrees.create(effect.plan)
        except (Refused, Broken) as exc:
            self._put(WorktreeFailed(effect.digest, exc.reason, exc.detail, refused=isinstance(exc, Refused)))
        else:
            self._put(WorktreeCreated(effect.digest, made))

    async def _remove(self, effect: RemoveWorktree) -> None:
        try:
            head = effect.plan.pre_head
            if head is not None and self._worktrees.head(effect.plan.worktree_id) != head:
                raise Refused(Reason.PRECONDITION_FAILED, "the worktree's HEAD is elsewhere")
            gone = await self._worktrees.remove(effect.plan)
        except (Refused, Broken) as exc:
            self._put(WorktreeFailed(effect.digest, exc.reason, exc.detail, refused=isinstance(exc, Refused)))
        else:
            self._put(WorktreeRemoved(effect.digest, gone))


def _of_disk(exc: OSError) -> tuple[Reason, str]:
    return Reason.DISK_FULL if exc.errno in _FULL else Reason.INFRA, os.strerror(exc.errno or 0)
