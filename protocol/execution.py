"""The life of an attempt, from the signed start to its one settlement.

Theory of operation. INTENT is journaled before anything happens; the shim is forked blocked; PREPARED is journaled with the shim's
identity; only then is it released. So an attempt that is not PREPARED never ran, and one that is ended by its exit record
or is lost, once.

Rule 1: every transition is in TRANSITIONS. Rule 2: SETTLED has no way out.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class AttemptState(StrEnum):
    """Where an attempt is in its life."""

    INTENT = "intent"
    PREPARED = "prepared"
    RUNNING = "running"
    STOPPING = "stopping"
    SETTLED = "settled"


class AttemptInput(StrEnum):
    """What can happen to an attempt."""

    PREPARE = "prepare"
    """Its shim waits behind the start barrier, and the journal knows it."""
    RELEASE = "release"
    STOP = "stop"
    EXIT = "exit"
    """The shim told how it ended."""
    LOSE = "lose"
    """No shim and no exit record, or another boot."""
    FAIL = "fail"
    """It could not be started."""


TRANSITIONS: Final[Mapping[tuple[AttemptState, AttemptInput], AttemptState]] = MappingProxyType(
    {
        (AttemptState.INTENT, AttemptInput.PREPARE): AttemptState.PREPARED,
        (AttemptState.INTENT, AttemptInput.FAIL): AttemptState.SETTLED,
        (AttemptState.INTENT, AttemptInput.STOP): AttemptState.STOPPING,
        (AttemptState.INTENT, AttemptInput.LOSE): AttemptState.SETTLED,
        (AttemptState.PREPARED, AttemptInput.RELEASE): AttemptState.RUNNING,
        (AttemptState.PREPARED, AttemptInput.STOP): AttemptState.STOPPING,
        (AttemptState.PREPARED, AttemptInput.EXIT): AttemptState.SETTLED,
        (AttemptState.PREPARED, AttemptInput.LOSE): AttemptState.SETTLED,
        (AttemptState.RUNNING, AttemptInput.STOP): AttemptState.STOPPING,
        (AttemptState.RUNNING, AttemptInput.EXIT): AttemptState.SETTLED,
        (AttemptState.RUNNING, AttemptInput.LOSE): AttemptState.SETTLED,
        (AttemptState.STOPPING, AttemptInput.PREPARE): AttemptState.STOPPING,
        (AttemptState.STOPPING, AttemptInput.STOP): AttemptState.STOPPING,
        (AttemptState.STOPPING, AttemptInput.EXIT): AttemptState.SETTLED,
        (AttemptState.STOPPING, AttemptInput.FAIL): AttemptState.SETTLED,
        (AttemptState.STOPPING, AttemptInput.LOSE): AttemptState.SETTLED,
    }
)


def step(state: AttemptState, happened: AttemptInput) -> AttemptState | None:
    """The state after `happened`, or None where it means nothing (a late word about a settled attempt, say)."""
    return TRANSITIONS.get((state, happened))
