"""How a daemon ends: at a signal or at its owner's word, and what becomes of what runs.

Theory of operation. The first SIGTERM or SIGINT, or the owner's own word, begins the end. What the policy says of executions is done
while everything still works; whatever is not over when patience is, is left under its shims, and the next daemon takes it up. The
second signal is not caught: it ends the process at once, as a crash would, from which nothing that is durable is lost.

Rule: every wait has a bound, and an end that was begun is carried out whatever the wait brought.
"""

import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

import anyio
import structlog

from runner.adapters.system import sd_notify
from runner.core.engine import Engine
from runner.core.inputs import OwnerAdmission
from runner.core.plans import Admission
from runner.ports import Clock
from runner.pump import Pump

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
PATIENCE_S: Final = 80.0
"""How long a drain or a stop is waited for: ten seconds less than TimeoutStopSec in runner/units, for the rest of the end."""
REST_S: Final = 10.0
TELL_S: Final = 5.0
"""The control plane is given so long to hear of the last ends; what it missed it is told by the next daemon."""
LOOK_S: Final = 0.1
LEAVE: Final = "leave"
STOP: Final = "stop"
BY: Final = "daemon:stop"


class Ending:
    """Waits for the end of the daemon, and brings it about. `owing`: whether the control plane still has something to hear."""

    def __init__(self, *, engine: Engine, pump: Pump, clock: Clock, owing: Callable[[], bool]) -> None:
        self._engine = engine
        self._pump = pump
        self._clock = clock
        self._owing = owing
        self._begun = anyio.Event()
        self._on_stop: str | None = None
        self._log = structlog.get_logger()

    def ask(self) -> None:
        """The owner wants the daemon to end, and what runs to be left."""
        self._on_stop = LEAVE
        self._begun.set()

    async def told(self) -> None:
        """Wait for the first signal, or for the owner's word."""
        with anyio.open_signal_receiver(*SIGNALS) as signals:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._hear, signals)
                await self._begun.wait()
                tasks.cancel_scope.cancel()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    async def _hear(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for _number in signals:
            self._begun.set()

    async def carry_out(self) -> None:
        """Do with executions what is to be done; return when the daemon may go."""
        asked = self._on_stop is not None
        on_stop = self._on_stop or self._engine.policy.on_daemon_stop
        sd_notify("STOPPING=1")
        self._log.info("daemon.stopping", on_stop=on_stop, living=self._engine.attempts.living)
        if on_stop != LEAVE:
            # Wherever the unit gives less: it is asked for once, and is enough for all of it.
            sd_notify(f"EXTEND_TIMEOUT_USEC={int((PATIENCE_S + REST_S) * 1_000_000)}")
            await self._close_down(stop=on_stop == STOP)
        if asked or on_stop != LEAVE:
            await _none_left(lambda: int(self._owing()), TELL_S, "the control plane is told")

    async def _close_down(self, *, stop: bool) -> None:
        """Take nothing new, and wait until nothing lives."""
        deadline_ms = self._clock.now().boot_ms if stop else self._engine.gate.drain_deadline_ms
        await self._pump.put_and_wait(OwnerAdmission(Admission.DRAINING, BY, deadline_ms, keep=False))
        await _none_left(lambda: self._engine.attempts.living, PATIENCE_S, "executions are waited for")


async def _none_left(left: Callable[[], int], seconds: float, doing: str) -> None:
    """Until nothing is left, at the latest after `seconds`; a service manager is told how many there are."""
    said = 0
    with anyio.move_on_after(seconds):
        while number := left():
            if number != said:
                said = number
                sd_notify(f"STATUS={doing}: {number} left")
            await anyio.sleep(LOOK_S)
