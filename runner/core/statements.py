"""What the runner signs: receipts, settlements, and the events beside them, as numbered report items."""

from dataclasses import dataclass

from protocol.envelope import PayloadType, seal
from protocol.errors import Reason
from protocol.events import Event
from protocol.ids import Attempt, CommandId, Digest
from protocol.keys import PrivateKey
from protocol.limits import DETAIL_CHARS_MAX
from protocol.messages import ItemKind, ReportItem
from protocol.receipt import Cause, LogEnd, Outcome, Receipt, Settlement, StreamDigest, Sweep, Usage, Verdict
from protocol.wire import JsonObject
from runner.core.plans import CommandRow, ExitRecord, Swept


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

    def settlement(self, attempt: Attempt, row: CommandRow, exit_record: ExitRecord, at_ms: int) -> ReportItem:
        """The signed last word on an attempt that has an exit record."""
        statement = Settlement(
            **self._head(attempt, row.cmd_id, row.digest, row.policy_digest, at_ms),
            verdict=Verdict(exit_record.verdict),
            code=exit_record.code,
            signal=exit_record.signal,
            core=exit_record.core,
            cause=_cause(exit_record),
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
            log=LogEnd(end=exit_record.log_end, segments=exit_record.log_segments, chain=exit_record.log_chain),
            drain=exit_record.drain,
            swept=[Sweep(tier=tier, signal=number, count=count) for tier, number, count in exit_record.swept],
            survivors=exit_record.survivors,
            boot_id=exit_record.boot_id,
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def lost(self, attempt: Attempt, row: CommandRow, reason: Reason, evidence: Swept | None, at_ms: int) -> ReportItem:
        """The signed last word on an attempt that left no exit record."""
        found = (
            {}
            if evidence is None
            else {
                "found": evidence.found,
                "signalled": evidence.signalled,
                "remaining": evidence.remaining,
            }
        )
        statement = Settlement(
            **self._head(attempt, row.cmd_id, row.digest, row.policy_digest, at_ms),
            verdict=Verdict.LOST,
            cause=Cause(kind=reason.lower(), reason=reason),
            survivors=0 if evidence is None else evidence.remaining,
            boot_id=self.boot_id,
            evidence=found,
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def never_started(self, attempt: Attempt, row: CommandRow, reason: Reason, detail: str, at_ms: int) -> ReportItem:
        """The signed last word on an attempt that was accepted and then provably never let go."""
        statement = Settlement(
            **self._head(attempt, row.cmd_id, row.digest, row.policy_digest, at_ms),
            verdict=Verdict.NEVER_STARTED,
            cause=Cause(kind="unreleased", reason=reason, detail=_plain(detail, DETAIL_CHARS_MAX)),
            boot_id=self.boot_id,
        )
        return self._item(ItemKind.SETTLEMENT, seal(statement.dump(), PayloadType.SETTLEMENT, [self.key]))

    def event(self, event: Event) -> ReportItem:
        """A numbered event."""
        return self._item(ItemKind.EVENT, event.dump())

    def _head(
        self, attempt: Attempt, cmd_id: CommandId, digest: Digest, policy_digest: Digest, at_ms: int
    ) -> JsonObject:
        return {
            "org": self.org,
            "runner": self.runner,
            "inc": self.inc,
            "execution_id": attempt.execution_id,
            "start_token": attempt.start_token,
            "cmd_id": cmd_id,
            "cmd_digest": digest,
            "policy_digest": policy_digest,
            "at_ms": at_ms,
        }

    def _item(self, kind: ItemKind, body: bytes) -> ReportItem:
        self.out_head += 1
        return ReportItem(out_seq=self.out_head, kind=kind, body=body.decode("utf-8"))


def _cause(exit_record: ExitRecord) -> Cause:
    known = exit_record.cause_reason in Reason.__members__
    return Cause(
        kind=exit_record.cause_kind,
        by=_plain(exit_record.cause_by, 200),
        reason=Reason(exit_record.cause_reason) if known and exit_record.cause_reason else None,
        detail=_plain(exit_record.cause_detail, DETAIL_CHARS_MAX),
    )


def _plain(text: str, chars_max: int) -> str:
    """Text of a program or a file system as JSON can carry it: bounded, and without lone surrogates."""
    return text[:chars_max].encode("utf-8", "replace").decode("utf-8")
