"""The alarm clock of the daemon's loops."""

import asyncio

from runner.wakeup import Wakeup

LONG_S = 60.0


async def test_what_was_set_before_the_wait_is_not_lost() -> None:
    """Whoever sets it between clear and wait wakes the waiter at once."""
    wakeup = Wakeup()
    wakeup.clear()
    wakeup.set()
    await asyncio.wait_for(wakeup.wait(LONG_S), 5)
    assert wakeup.due


async def test_a_deadline_wakes_as_well() -> None:
    """Nobody sets it, and the wait ends; without a deadline it would not."""
    wakeup = Wakeup()
    await asyncio.wait_for(wakeup.wait(0.001), 5)
    forever = asyncio.ensure_future(Wakeup().wait())
    done, _ = await asyncio.wait([forever], timeout=0.01)
    assert not done
    forever.cancel()


async def test_a_wait_that_ended_leaves_no_alarm_behind() -> None:
    """The deadline of an earlier wait does not wake a later one."""
    wakeup = Wakeup()
    early = asyncio.ensure_future(wakeup.wait(0.01))
    await asyncio.sleep(0)
    wakeup.set()
    await early
    wakeup.clear()
    later = asyncio.ensure_future(wakeup.wait())
    done, _ = await asyncio.wait([later], timeout=0.05)
    assert not done
    later.cancel()
