"""People: users who ask the control plane for things and ask again until they are answered, and owners of machines.

A request keeps its Idempotency-Key however often it is sent, so it may take effect once. What is asked is drawn when it is asked: the
stop of an execution may come before its start was sent, while it runs, long after its end, or twice.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from controlplane.plane import ControlPlane
from controlplane.requests import ExecutionRequest, RemoveRequest, RerunRequest, StopRequest, WorktreeRequest
from controlplane.store import Idempotency
from protocol.commands import OnLoss
from runner.core.inputs import OwnerAdmission, OwnerStop, OwnerSweep
from runner.core.plans import Admission
from tests.sim.host import Host, Program
from tests.sim.timeline import MS_US, SECOND_US

if TYPE_CHECKING:
    from tests.sim.world import World

OWNER = "uid 1000"
RETRY_US = (1 * SECOND_US, 6 * SECOND_US)
REPOS = ("/srv/repos/a", "/srv/repos/b")
ON_LOSS = (OnLoss.CONTINUE, OnLoss.FREEZE, OnLoss.STOP, OnLoss.STOP)


@dataclass(slots=True)
class Request:
    """Something that is asked until it is answered."""

    key: str
    make: Callable[[ControlPlane, Idempotency], Any]
    what: str
    then: Callable[[Any], None]
    tries: int = 0
    answer: Any = None


@dataclass
class Users:
    """Everybody who asks."""

    world: "World"
    rng: Random
    executions: list[str] = field(default_factory=list)
    worktrees: list[tuple[str, Host]] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)
    _programs: int = 0
    _keys: int = 0

    # --- what may be asked --------------------------------------------------------------------------------------

    def act(self) -> None:
        """Do one of the things that people do."""
        choices: list[tuple[int, Callable[[], None]]] = [
            (10, self.start),
            (6, self.stop),
            (2, self.rerun),
            (2, self.create_worktree),
            (1, self.remove_worktree),
            (2, self.owner),
        ]
        total = sum(weight for weight, _ in choices)
        drawn = self.rng.randrange(total)
        for weight, do in choices:
            drawn -= weight
            if drawn < 0:
                do()
                return

    def start(self) -> None:
        """Run something."""
        longest_ms = 20_000 if self.world.short else 120_000
        rng = self.rng
        run_ms = rng.choice([rng.randrange(10, 500), rng.randrange(500, 10_000), rng.randrange(10_000, longest_ms)])
        self.start_on(rng.choice(self.world.hosts), on_loss=rng.choice(ON_LOSS), run_ms=run_ms)

    def start_on(
        self,
        host: Host,
        *,
        on_loss: OnLoss,
        run_ms: int,
        plain: bool = False,
        then: Callable[[Any], None] = lambda _answer: None,
    ) -> None:
        """Run something there; `then` hears the answer. `plain`: it starts, and nothing but its lease ends it."""
        program = self._program(run_ms, plain=plain)
        where: dict[str, Any] = {"cwd": "/srv/work"}
        mine = [worktree for worktree, at in self.worktrees if at is host]
        if mine and not plain and self.rng.random() < 0.4:
            where = {"worktree": self.rng.choice(mine)}
        request = ExecutionRequest(
            argv=["prog", program],
            on_loss=on_loss,
            grace_ms=self.rng.choice([None, 0, 500, 5_000, 40_000]),
            timeout_ms=None if plain else self.rng.choice([None, None, None, self.rng.randrange(1_000, 60_000)]),
            **where,
        )

        def answered(answer: Any) -> None:
            self.executions.append(answer["id"])
            then(answer)

        self._ask(
            f"start {program} on {host.name} ({request.on_loss})",
            lambda up, key: up.ask_execution(host.name, request, key),
            answered,
        )

    def _program(self, run_ms: int, *, plain: bool) -> str:
        rng = self.rng
        self._programs += 1
        name = f"p{self._programs}"
        escapees = tuple(
            (rng.randrange(1_000, 400_000), rng.random() < 0.6) for _ in range(rng.choice([0, 0, 0, 1, 2]))
        )
        self.world.programs[name] = Program(
            run_ms=run_ms,
            code=rng.choice([0, 0, 0, 1, 3]),
            stubborn=rng.random() < 0.2,
            polite=rng.random() < 0.3,
            fails=None if plain or rng.random() < 0.9 else "EXEC_NOT_FOUND",
            escapees=escapees,
        )
        return name

    def stop(self) -> None:
        """End something: mostly the newest."""
        if not self.executions:
            return
        execution = self.executions[-1] if self.rng.random() < 0.5 else self.rng.choice(self.executions)
        self.stop_one(execution)

    def stop_one(self, execution: str) -> None:
        """End an execution."""
        request = StopRequest(grace_ms=self.rng.choice([None, 0, 2_000]))
        self._ask(f"stop {execution[-4:]}", lambda up, key: up.ask_stop(execution, request, key), lambda _answer: None)

    def rerun(self) -> None:
        """Once more, here or elsewhere."""
        if not self.executions:
            return
        elsewhere = self.rng.choice(self.world.hosts) if self.rng.random() < 0.5 else None
        self.rerun_on(self.rng.choice(self.executions), elsewhere)

    def rerun_on(self, execution: str, elsewhere: Host | None) -> None:
        """Once more; None: where it was."""
        request = RerunRequest(runner=None if elsewhere is None else elsewhere.name)
        self._ask(
            f"rerun {execution[-4:]} on {request.runner}",
            lambda up, key: up.ask_rerun(execution, request, key),
            lambda _answer: None,
        )

    def create_worktree(self) -> None:
        """Make one; now and then under an id that is taken."""
        host = self.rng.choice(self.world.hosts)
        worktree = self.rng.choice(["wt_1", "wt_2", f"wt_{len(self.worktrees) + 3}"])
        request = WorktreeRequest(repo=self.rng.choice(REPOS), base="main", id=worktree)
        self._ask(
            f"make {worktree} on {host.name}",
            lambda up, key: up.ask_worktree(host.name, request, key),
            lambda answer: self.worktrees.append((answer["id"], host)),
        )

    def remove_worktree(self) -> None:
        """Remove one."""
        if not self.worktrees:
            return
        worktree, _ = self.rng.choice(self.worktrees)
        request = RemoveRequest(force=self.rng.random() < 0.5)
        self._ask(f"remove {worktree}", lambda up, key: up.ask_removal(worktree, request, key), lambda _answer: None)

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask(
        self,
        what: str,
        make: Callable[[ControlPlane, Idempotency], Any],
        then: Callable[[Any], None],
    ) -> None:
        self._keys += 1
        request = Request(f"key-{self._keys}", make, what, then)
        self.pending.append(request)
        self._send(request)
        if self.rng.random() < 0.1:
            # A proxy that sends it twice.
            self.world.timeline.after(None, self.rng.randrange(500) * MS_US, self._send, request)

    def _send(self, request: Request) -> None:
        request.tries += 1
        self.world.story.say("user", "asks: %s", request.what)
        asked = Idempotency(key=request.key, request=request.what)
        self.world.plane.ask(lambda up: request.make(up, asked), lambda answer: self._answered(request, answer))
        self.world.timeline.after(None, self.rng.randrange(*RETRY_US), self._impatient, request)

    def _impatient(self, request: Request) -> None:
        if request.answer is None:
            self._send(request)

    def _answered(self, request: Request, answer: Any) -> None:
        if isinstance(answer, Exception):
            if str(getattr(answer, "reason", "")) == "STORE_FAILED":
                return
            said: Any = {"refused": str(getattr(answer, "reason", answer))}
        else:
            said = json.loads(answer.body)
        first = request.answer is None
        if not first:
            # A refusal takes no effect and is not kept: what comes later may find things otherwise.
            refused = "refused" in said or "refused" in request.answer
            same = request.answer.get("id") == said.get("id") or refused or self.world.plane.restored > 0
            self.world.story.must(same, "%s was answered twice, differently", request.what)
            return
        request.answer = said
        self.pending.remove(request)
        self.world.story.say("user", "is answered: %s: %s", request.what, said.get("refused") or said.get("state"))
        if "refused" not in said:
            request.then(said)

    # --- owners -------------------------------------------------------------------------------------------------

    def owner(self) -> None:
        """Whoever sits at the machine."""
        host = self.rng.choice(self.world.hosts)
        daemon = self.world.daemons.get(host.name)
        if daemon is None or not host.awake:
            return
        self.world.witness.owner_words.add(OWNER)
        kind = self.rng.randrange(6)
        said: Any
        if kind <= 1 and self.executions:
            said = OwnerStop(self.rng.choice(self.executions), self.rng.choice([None, 1_000]), OWNER)
        elif kind == 2:
            said = OwnerAdmission(Admission.PAUSED, OWNER)
        elif kind == 3:
            deadline_ms = host.boot_ms + self.rng.randrange(60_000)
            said = OwnerAdmission(Admission.DRAINING, OWNER, self.rng.choice([None, deadline_ms]))
        elif kind == 4 and host.directories:
            said = OwnerSweep(self.rng.choice(list(host.directories)), OWNER)
        else:
            said = OwnerAdmission(Admission.OPEN, OWNER)
        self.world.story.say(
            "owner", "of %s: %s", host.name, type(said).__name__ + " " + str(getattr(said, "admission", ""))
        )
        daemon.put(said)
