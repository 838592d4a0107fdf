"""The daemon's answer to `runner orphans`: who lives of ours, which of it no shim guards, and ending that on its owner's word."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio

from protocol.execution import AttemptState
from protocol.ids import Attempt
from runner.adapters.control import ControlCall
from runner.adapters.remains import GUARDED, SETTLED, UNGUARDED, UNKNOWN, Stray, told_sweep
from runner.adapters.shims import ShimAdapter
from runner.core.engine import Engine
from runner.core.inputs import Input, OwnerSweep
from runner.core.plans import Swept

SWEEP_WAIT_S: Final = 8.0
"""All sweeps of one answer: a sweep that takes longer goes on, and is told of by the next look."""


class StrayDesk:
    """Answers `orphans`. `settle` puts an input and waits until it is durable; `sweep_of` hears what a sweep found."""

    def __init__(
        self,
        *,
        engine: Engine,
        shims: ShimAdapter,
        settle: Callable[[Input], Awaitable[None]],
        sweep_of: Callable[[Attempt], "asyncio.Future[Swept]"],
    ) -> None:
        self._engine = engine
        self._shims = shims
        self._settle = settle
        self._sweep_of = sweep_of

    async def answer(self, call: ControlCall) -> dict[str, Any]:
        """Look now; with `kill`, end what is settled or unknown."""
        strays = await self._shims.strays()
        told = [stray.told(self._state(stray)) for stray in strays]
        if call.args.get("kill") is not True:
            return {"attempts": told}
        wanted = [Attempt.parse(one["attempt"]) for one in told if one["state"] in (SETTLED, UNKNOWN)]
        return {"attempts": told, "swept": await self._sweep(wanted, f"owner:{call.uid}")}

    async def _sweep(self, wanted: list[Attempt], by: str) -> list[dict[str, Any]]:
        ends = {attempt: self._sweep_of(attempt) for attempt in wanted}
        try:
            with anyio.move_on_after(SWEEP_WAIT_S):
                for attempt in wanted:
                    await self._settle(OwnerSweep(attempt, by))
                for end in ends.values():
                    await asyncio.shield(end)
            return [told_sweep(attempt.name, end.result() if end.done() else None) for attempt, end in ends.items()]
        finally:
            for end in ends.values():
                end.cancel()

    def _state(self, stray: Stray) -> str:
        if stray.guarded:
            return GUARDED
        row = self._engine.attempts.rows.get(Attempt.parse(stray.name))
        if row is None:
            return UNKNOWN
        return SETTLED if row.state is AttemptState.SETTLED else UNGUARDED
