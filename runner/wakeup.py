"""One waiter's alarm clock: an event with a deadline, cheap enough for the daemon's innermost loops."""

import asyncio


class Wakeup:
    """Set by anybody in the event loop, waited for by one task.

    A cancel scope around an event does the same, and costs more than a whole turn of the loops that wait here.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def due(self) -> bool:
        """Whether it was set since it was cleared last."""
        return self._event.is_set()

    def set(self) -> None:
        """Wake the waiter, now or as soon as it waits."""
        self._event.set()

    def clear(self) -> None:
        """Forget what was set so far; the waiter looks at everything after this."""
        self._event.clear()

    async def wait(self, seconds: float | None = None) -> None:
        """Until it is set, at the latest after `seconds`; None waits for ever."""
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
