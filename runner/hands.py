"""Performs what the engine decided, through the ports. What takes time runs as a task and comes back as an input."""

import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any, Final, assert_never

import structlog
from anyio.abc import TaskGroup

from protocol.errors import ProtocolError, Reason
from protocol.ids import Attempt
from protocol.secretbox import open_secret
from runner import failpoints
from runner.adapters.keystore import Keystore
from runner.adapters.shims import ShimAdapter
from runner.adapters.uplink import Uplink
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Effect,
    KeepIdentity,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    Say,
    SendBeat,
    StopAttempt,
    SweepAttempt,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    AttemptPrepared,
    Input,
    WorktreeCreated,
    WorktreeFailed,
    WorktreeRemoved,
)
from runner.core.plans import AttemptPlan
from runner.errors import Broken, Refused
from runner.link import Link
from runner.ports import Worktrees

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
WARNINGS: Final = frozenset({"alarm.raised", "attempt.lost", "lease.lost", "report.refused", "session.lost"})


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
        keystore: Keystore,
        runner: str,
        seal_seed: bytes,
    ) -> None:
        self._tasks = tasks
        self._put = put
        self._shims = shims
        self._worktrees = worktrees
        self._link = link
        self._uplink = uplink
        self._keystore = keystore
        self._runner = runner
        self._seal_seed = seal_seed
        self._secrets: dict[Attempt, dict[str, bytes]] = {}
        self._log = structlog.get_logger()
        shims.listen(self.heard)

    def heard(self, event: AttemptExited | AttemptLost) -> None:
        """An attempt has ended: its log will not grow any more."""
        self._uplink.finish(event.attempt.name)
        self._put(event)

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
                self._begin(self._shims.abandon, attempt)
            case StopAttempt(attempt, grace_ms, by):
                self._shims.stop(attempt, grace_ms, by)
            case PushLease(attempt, token, deadline_ms, action):
                self._shims.lease(attempt, token, deadline_ms, action)
            case CollectAttempt(attempt):
                self._shims.collect(attempt)
            case AdoptAttempt(attempt):
                self._begin(self._adopt, attempt)
            case SweepAttempt(attempt):
                self._begin(self._sweep, attempt)
            case CreateWorktree():
                self._begin(self._create, effect)
            case RemoveWorktree():
                self._begin(self._remove, effect)
            case KeepIdentity(keyset, certificate):
                self._keystore.keep(keyset, certificate)
            case Note(event, fields):
                self.note(event, dict(fields))
            case _:
                assert_never(effect)

    def note(self, event: str, fields: dict[str, str | int | None]) -> None:
        """Log one fact, once."""
        log = self._log.warning if event in WARNINGS else self._log.info
        log(event, **{name: value for name, value in fields.items() if value is not None})

    def _begin(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        self._tasks.start_soon(work, *args)

    # --- attempts -----------------------------------------------------------------------------------------------

    async def _prepare(self, plan: AttemptPlan, again: bool) -> None:
        attempt = plan.attempt
        try:
            secrets = {
                name: open_secret(sealed, self._seal_seed, self._runner, attempt, name)
                for name, sealed in plan.secrets.items()
            }
            shim = await self._shims.prepare(plan, self._cwd(plan), again=again)
        except ProtocolError as exc:
            self._put(AttemptNotPrepared(attempt, exc.reason, exc.detail, refused=True))
        except (Refused, Broken) as exc:
            self._put(AttemptNotPrepared(attempt, exc.reason, exc.detail, refused=isinstance(exc, Refused)))
        except OSError as exc:
            reason = Reason.DISK_FULL if exc.errno in _FULL else Reason.INFRA
            self._put(AttemptNotPrepared(attempt, reason, os.strerror(exc.errno or 0), refused=False))
        else:
            self._secrets[attempt] = secrets
            self._track(attempt)
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

    async def _adopt(self, attempt: Attempt) -> None:
        self._track(attempt)
        await self._shims.adopt(attempt)
        self.note("attempt.adopted", {"attempt": attempt.name})

    async def _sweep(self, attempt: Attempt) -> None:
        swept = await self._shims.sweep(attempt)
        self._track(attempt)
        self.heard(AttemptLost(attempt, Reason.SHIM_LOST, swept))

    def _track(self, attempt: Attempt) -> None:
        try:
            self._uplink.track(attempt.name, self._shims.log_dir(attempt.name).parent)
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
