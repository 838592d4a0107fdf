"""What a shim does when its attempt is over: the record becomes durable, a daemon hears it, and the shim leaves."""

from __future__ import annotations

from runner.shim import files, report, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.guard import Guard

LINGER_MS: Final = 10_000
# A record that cannot be made durable is tried again, and given up with the shim's own life.
DURABLE_RETRY_MS: Final = 1_000
DURABLE_WAIT_MS: Final = 60_000
# A daemon that was told the end commits it at once: two syncs side by side would only delay each other.
SETTLE_WAIT_MS: Final = 20


def make_durable(guard: Guard) -> None:
    """Try once to make the log and the exit record durable."""
    assert guard.log is not None
    guard.durable_tried = True
    guard.log.sync()
    try:
        files.replace_durably(guard.dirfd, report.EXIT_NAME, guard.exit_json)
    except FileNotFoundError as exc:
        # No directory, no record and nobody who could find us: there is nothing to stay for.
        files.note_failure(guard.dirfd, exc)
        guard.done = True
    except OSError as exc:
        files.note_failure(guard.dirfd, exc)
    else:
        guard.durable = True
        guard.point("exit_durable")


def linger(guard: Guard) -> None:
    """After the end: make it durable, tell whoever comes, and leave when nobody needs this shim any more."""
    now_ms = system.boottime_ms()
    ended_ms = guard.story.ended_ms
    collected = guard.leave_ms is not None and guard.leave_ms <= now_ms
    told = not collected and guard.links.greeted() and now_ms < ended_ms + SETTLE_WAIT_MS
    # Tried at least once, also by a shim that slept or was held right after the end; no more once the end is settled.
    hopeful = not guard.durable_tried or (not collected and now_ms < ended_ms + DURABLE_WAIT_MS)
    if not guard.durable and not guard.done and not told and hopeful:
        make_durable(guard)
        return
    if collected:
        guard.done = True
    elif guard.links.greeted():
        guard.leave_ms = None
    elif guard.leave_ms is None:
        # Who lets a next attempt begin waits for this lock: where nothing ran there is nobody to tell.
        guard.leave_ms = now_ms + (LINGER_MS if guard.machine.spawned else 0)
