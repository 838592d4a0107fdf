"""What a runner tells beside receipts and settlements. Unknown kinds and fields are stored and otherwise ignored."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.errors import Reason
from protocol.wire import Count, Detail, FormatOne, Id, Millis, Open, Positive


class EventKind(StrEnum):
    """The kinds this version tells."""

    ALARM_RAISED = "alarm.raised"
    ATTEMPT_ADOPTED = "attempt.adopted"
    ORPHAN_SWEPT = "orphan.swept"
    POLICY_CHANGED = "policy.changed"
    ATTEMPT_UNKNOWN = "attempt.unknown"
    """The control plane does not know an attempt that lives here."""
    ATTEMPT_UNKILLABLE = "attempt.unkillable"
    SHIM_HUNG = "shim.hung"
    ADMISSION_CHANGED = "admission.changed"
    IDENTITY_CONFLICT = "identity.conflict"
    LEASE_LOST = "lease.lost"


class Event(Open):
    """Something that happened on the runner, for people and dashboards; nothing is settled by an event."""

    v: FormatOne = 1
    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,32}(\.[a-z_]{1,32}){1,3}$")]
    at_ms: Millis
    reason: Reason | None = None
    detail: Detail = ""
    cmd_id: Id | None = None
    execution_id: Id | None = None
    start_token: Positive | None = None
    count: Count | None = None
