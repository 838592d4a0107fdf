"""Words that a command chooses from, apart from the models that hold them: a command line offers them and loads no validators."""

from enum import StrEnum


class Overflow(StrEnum):
    """What happens to the log of an attempt that reaches its limit."""

    HEAD_TAIL = "head_tail"
    """The beginning and the newest are kept, what was between is dropped."""
    BLOCK = "block"
    """Whoever writes waits until the control plane has taken some."""
    DISCARD = "discard"
    """The newest is not kept."""


class SizePolicy(StrEnum):
    """Whose size a PTY has."""

    LATEST = "latest"
    """Of the viewer that told its size last."""
    SMALLEST = "smallest"
    """So many rows and columns as every viewer has."""
    FIXED = "fixed"
    """The one it was opened with."""


class Background(StrEnum):
    """What becomes of processes that live on when the leader of a PTY has ended."""

    SWEEP = "sweep"
    LEAVE = "leave"
    """They live on, and the settlement names them."""


class SignalName(StrEnum):
    """Signals that a command may send; what ends an attempt is a stop."""

    HUP = "HUP"
    INT = "INT"
    USR1 = "USR1"
    USR2 = "USR2"
    WINCH = "WINCH"
