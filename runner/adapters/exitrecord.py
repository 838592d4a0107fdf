"""`exit.json` and the body of EXIT, read with suspicion: another process wrote them (docs/shim.md §1.3)."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.limits import DETAIL_CHARS_MAX, JSON_INT_MAX
from runner.core.plans import DroppedMiddle, ExitRecord, ProcessLeft

Count = Annotated[int, Field(ge=0, le=JSON_INT_MAX)]
Nanos = Annotated[int, Field(ge=0, lt=2**63)]
"""Wall time; more than a double can hold, which is why it never crosses the protocol."""
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_NS_PER_MS = 1_000_000
LEFT_MAX: Final = 32
"""A shim tells of no more processes than these."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True, defer_build=True)


class _Cause(_Part):
    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    by: Annotated[str, Field(max_length=DETAIL_CHARS_MAX)] = ""
    reason: Annotated[str, Field(max_length=64)] | None = None
    detail: Annotated[str, Field(max_length=4096)] = ""


class _Rusage(_Part):
    utime_us: Count = 0
    stime_us: Count = 0
    maxrss_kib: Count = 0


class _Stream(_Part):
    bytes: Count
    sha256: Hex


class _Swept(_Part):
    tier: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    signal: Annotated[int, Field(ge=0, le=64)]
    count: Count


class _Left(_Part):
    pid: Annotated[int, Field(ge=1, le=JSON_INT_MAX)]
    start: Count
    name: Annotated[str, Field(max_length=64)]
    state: Annotated[str, Field(max_length=8)] = ""
    wchan: Annotated[str, Field(max_length=64)] = ""
    why: Annotated[str, Field(pattern=r"^[a-z_]{0,32}$")] = ""


class _Dropped(_Part):
    start: Count
    end: Count
    segments: Count
    before: Hex
    last: Hex


class _Log(_Part):
    end: Count
    segments: Count
    chain: Hex
    dropped: _Dropped | None = None


class _Exit(_Part):
    v: Annotated[int, Field(ge=1, le=1)]
    """A number: to a `Literal`, true would be 1."""
    attempt: str
    boot_id: Annotated[str, Field(max_length=64)]
    verdict: Literal["exited", "signalled", "stopped", "timed_out", "never_started"]
    code: Annotated[int, Field(ge=0, le=255)] | None
    signal: Annotated[int, Field(ge=1, le=64)] | None
    core: bool
    cause: _Cause
    started_ns: Nanos
    ended_ns: Nanos
    duration_ms: Count
    rusage: _Rusage
    streams: dict[Literal["stdout", "stderr", "pty", "events"], _Stream]
    drain: Annotated[str, Field(max_length=32)]
    swept: Annotated[list[_Swept], Field(max_length=256)]
    survivors: Count
    tiers: Annotated[list[Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]], Field(max_length=8)] = []
    remains: Annotated[list[_Left], Field(max_length=LEFT_MAX)] = []
    outlived: Annotated[list[_Left], Field(max_length=LEFT_MAX)] = []
    """The last three came later: a shim of an older runner does not tell them."""
    log: _Log


def parse_exit(attempt: str, found: dict[str, Any]) -> ExitRecord | None:
    """The record, or None when it is none of this attempt's: a damaged record is no record, never a success."""
    try:
        told = _Exit.model_validate(found)
    except ValidationError:
        return None
    if told.attempt != attempt:
        return None
    return ExitRecord(
        verdict=told.verdict,
        code=told.code,
        signal=told.signal,
        core=told.core,
        cause_kind=told.cause.kind,
        cause_by=told.cause.by,
        cause_reason=told.cause.reason,
        cause_detail=told.cause.detail[:DETAIL_CHARS_MAX],
        started_ms=told.started_ns // _NS_PER_MS or None,
        ended_ms=told.ended_ns // _NS_PER_MS or None,
        duration_ms=told.duration_ms,
        utime_us=told.rusage.utime_us,
        stime_us=told.rusage.stime_us,
        maxrss_kib=told.rusage.maxrss_kib,
        streams={name: (stream.bytes, stream.sha256) for name, stream in told.streams.items()},
        log_end=told.log.end,
        log_segments=told.log.segments,
        log_chain=told.log.chain,
        drain=told.drain,
        swept=tuple((step.tier, step.signal, step.count) for step in told.swept),
        survivors=told.survivors,
        boot_id=told.boot_id,
        unreleased=told.cause.kind == "unreleased",
        tiers=tuple(told.tiers),
        remains=tuple(_left(each) for each in told.remains),
        outlived=tuple(_left(each) for each in told.outlived),
        dropped=None if told.log.dropped is None else DroppedMiddle(**told.log.dropped.model_dump()),
    )


def _left(told: _Left) -> ProcessLeft:
    return ProcessLeft(pid=told.pid, start=told.start, name=told.name, state=told.state, wchan=told.wchan, why=told.why)
