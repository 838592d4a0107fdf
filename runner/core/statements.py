"""What the runner signs: receipts, settlements, and the events beside them, as numbered report items."""

from dataclasses import dataclass
from typing import Final

from protocol.envelope import PayloadType, seal
from protocol.errors import Reason
from protocol.events import Event
from protocol.keys import PrivateKey
from protocol.limits import DETAIL_CHARS_MAX
from protocol.messages import ItemKind, ReportItem
from protocol.receipt import (
    Cause,
    Dropped,
    LogEnd,
    Outcome,
    Process,
    Receipt,
    Settlement,
    StreamDigest,
    Sweep,
    Uploaded,
    Usage,
    Verdict,
)
from protocol.wire import JsonObject
from runner.core.inputs import Now
from runner.core.journaling import SUPERSEDED_BY, AttemptRow
from runner.core.plans import CommandRow, ExitRecord, ProcessLeft, Swept, UploadedCopy

NAME_CHARS_MAX: Final = 64
STATE_CHARS_MAX: Final = 8
WHY_CHARS_MAX: Final = 32
LINE_CHARS_MAX: Final = 160
"""Of a process that was left alive: bounded by the protocol, named by somebody else."""


@dataclass(slots=True, kw_only=True)
class Statements:
    """Numbers and signs. Ed25519 is deterministic, so this is as pure as the rest."""

    org: str
    runner: str
    inc: int
    key: PrivateKey
    boot_id: str
    out_head: int
    """Highest `out_seq` given so far."""

    def receipt(
        self,
        row: CommandRow,
        outcome: Outcome,
        *,
        keyset_version: int,
        at_ms: int,
        reason: Reason | None = None,
        detail: str = "",
        result: JsonObject | None = None,
    ) -> ReportItem:
        """The signed fate of `row`."""
        statement = Receipt(
            org=self.org,
            runner=self.runner,
            inc=self.inc,
            cmd_id=row.cmd_id,
            cmd_digest=row.digest,
            kind=row.kind,
            seq=row.seq,
            outcome=outcome,
            reason=reason,
            detail=_plain(detail, DETAIL_CHARS_MAX),
            policy_digest=row.policy_digest,
            keyset_version=keyset_version,
            at_ms=at_ms,
            result=result or {},
        )
        return self._item(ItemKind.RECEIPT, seal(statement.dump(), PayloadType.RECEIPT, [self.key]))

    def settlement(self, attempt: AttemptRow, row: CommandRow, exit_record: ExitRecord, now: Now) -> ReportItem:
        """The signed last word on an attempt that has an exit record."""
        fenced = _was_fenced(attempt, exit_record)
        statement = Settlement(
            **self._head(attempt, row, now),
            verdict=Verdict.FENCED if fenced else Verdict(exit_record.verdict),
            code=exit_record.code,
            signal=exit_record.signal,
            core=exit_record.core,
            cause=_cause(exit_record, fenced=fenced),
            started_ms=exit_record.started_ms,
            ended_ms=exit_record.ended_ms,
            duration_ms=exit_record.duration_ms,
            usage=Usage(
                utime_us=exit_record.utime_us,
                stime_us=exit_record.stime_us,
                maxrss_kib=exit_record.maxrss_kib,
            ),
            streams={
                name: StreamDigest(bytes=size, sha256=digest) for name, (size, digest) in exit_record.streams.items()
            },
            log=_log_end(exit_record),
            drain=exit_record.drain,
            swept=[Sweep(tier=tier, signal=number, count=count) for tier, number, count in exit_record.swept],
            survivors=exit_record.survivors,
            remains=[_left(each) for each in exit_record.remains],
            outlived=[_left(each) for each in exit_record.outlived],
            tiers=list(exit_record.tiers),
            boot_id=exit_record.boot_id,
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def lost(
        self, attempt: AttemptRow, row: CommandRow, reason: Reason, evidence: Swept | None, now: Now
    ) -> ReportItem:
        """The signed last word on an attempt that left no exit record."""
        statement = Settlement(
            **self._head(attempt, row, now),
            verdict=Verdict.LOST,
            cause=Cause(kind=reason.lower(), reason=reason),
            boot_id=self.boot_id,
            **({} if evidence is None else _found(evidence)),
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def never_started(self, attempt: AttemptRow, row: CommandRow, reason: Reason, detail: str, now: Now) -> ReportItem:
        """The signed last word on an attempt that was accepted and then provably never let go."""
        statement = Settlement(
            **self._head(attempt, row, now),
            verdict=Verdict.FENCED if reason is Reason.FENCED else Verdict.NEVER_STARTED,
            cause=Cause(kind="unreleased", reason=reason, detail=_plain(detail, DETAIL_CHARS_MAX)),
            boot_id=self.boot_id,
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def event(self, event: Event) -> ReportItem:
        """A numbered event."""
        return self._item(ItemKind.EVENT, event.dump())

    def _head(self, attempt: AttemptRow, row: CommandRow, now: Now) -> JsonObject:
        return {
            "org": self.org,
            "runner": self.runner,
            "inc": self.inc,
            "execution_id": attempt.attempt.execution_id,
            "start_token": attempt.attempt.start_token,
            "cmd_id": row.cmd_id,
            "cmd_digest": row.digest,
            "policy_digest": row.policy_digest,
            "token": None if attempt.lease is None else attempt.lease.token,
            "at_ms": now.wall_ms,
        }

    def _item(self, kind: ItemKind, body: bytes) -> ReportItem:
        self.out_head += 1
        return ReportItem(out_seq=self.out_head, kind=kind, body=body.decode("utf-8"))


def _was_fenced(attempt: AttemptRow, exit_record: ExitRecord) -> bool:
    """Whether the first cause of the end was its successor, or the fence that stands behind one."""
    if exit_record.cause_kind == "fenced":
        return True
    stopped_for_it = exit_record.cause_kind == "stop" and exit_record.cause_by.startswith(SUPERSEDED_BY)
    return attempt.fenced_by is not None and exit_record.verdict == Verdict.STOPPED and stopped_for_it


def _log_end(exit_record: ExitRecord) -> LogEnd:
    gone = exit_record.dropped
    dropped = None
    if gone is not None:
        dropped = Dropped(start=gone.start, end=gone.end, segments=gone.segments, before=gone.before, last=gone.last)
    return LogEnd(
        end=exit_record.log_end,
        segments=exit_record.log_segments,
        chain=exit_record.log_chain,
        dropped=dropped,
        uploaded=_uploaded(exit_record.uploaded),
    )


def _uploaded(copy: UploadedCopy | None) -> Uploaded | None:
    if copy is None:
        return None
    streams = {name: StreamDigest(bytes=size, sha256=digest) for name, (size, digest) in copy.streams.items()}
    return Uploaded(redactor=copy.redactor, streams=streams)


def _cause(exit_record: ExitRecord, *, fenced: bool) -> Cause:
    known = exit_record.cause_reason in Reason.__members__
    reason = Reason(exit_record.cause_reason) if known and exit_record.cause_reason else None
    return Cause(
        kind="fenced" if fenced else exit_record.cause_kind,
        by=_plain(exit_record.cause_by, 200),
        reason=Reason.FENCED if fenced else reason,
        detail=_plain(exit_record.cause_detail, DETAIL_CHARS_MAX),
    )


def _found(evidence: Swept) -> JsonObject:
    """What a sweep found and did, as fields of a settlement; lines name processes, for a person."""
    lines = {"seen": evidence.seen, "remains": evidence.remains, "outlived": evidence.outlived}
    return {
        "survivors": evidence.remaining,
        "swept": [{"tier": tier, "signal": number, "count": count} for tier, number, count in evidence.tiers],
        "tiers": list(dict.fromkeys(tier for tier, _, _ in evidence.tiers)),
        "evidence": {
            "found": evidence.found,
            "signalled": evidence.signalled,
            "remaining": evidence.remaining,
            **{name: [_plain(line, LINE_CHARS_MAX) for line in told] for name, told in lines.items() if told},
        },
    }


def _left(process: ProcessLeft) -> Process:
    return Process(
        pid=process.pid,
        name=_plain(process.name, NAME_CHARS_MAX),
        state=_plain(process.state, STATE_CHARS_MAX),
        wchan=_plain(process.wchan, NAME_CHARS_MAX),
        why=_plain(process.why, WHY_CHARS_MAX),
    )


def _plain(text: str, chars_max: int) -> str:
    """Text of a program or a file system as JSON can carry it: bounded, and without lone surrogates."""
    return text[:chars_max].encode("utf-8", "replace").decode("utf-8")
