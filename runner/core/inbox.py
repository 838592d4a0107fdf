"""Envelopes: from bytes off the wire to a command whose number is consumed, or to the reason why it is not.

Rule: nothing past this door is unverified, and nothing before it changes what the engine keeps.
"""

from typing import TYPE_CHECKING, Final, assert_never

from protocol.commands import Command
from protocol.envelope import PayloadType, Verified, digest_of, open_envelope
from protocol.errors import EnvelopeError, Reason
from protocol.ids import Digest
from protocol.messages import Need, Refused
from protocol.replay import Advance, Duplicate, Gap, NotConsumed, judge
from runner.core.admission import Refusal
from runner.core.effects import Effect, Note, ReportAgain, Say
from runner.core.inputs import Now

if TYPE_CHECKING:
    from runner.core.engine import Engine

NEED_AGAIN_MS: Final = 1000
"""A gap is asked for once a second at most: every command behind it would ask again."""


class Inbox:
    """Signature, address, dedupe, number: the first half of the order of judgement."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._needed: tuple[int, int] = (0, -NEED_AGAIN_MS)
        self._keyset: Final = engine.keyset

    def received(self, env: bytes, now: Now) -> list[Effect]:
        """Judge an envelope that is not yet believed."""
        engine = self._engine
        try:
            command = open_envelope(env, PayloadType.COMMAND, engine.keys, Command.parse)
        except EnvelopeError as exc:
            return _unconsumed(digest_of(env), exc.reason, exc.detail, None)
        judgement = judge(command, engine.me, engine.keyset.value, engine.ledger.seen())
        match judgement:
            case NotConsumed(reason):
                return _unconsumed(digest_of(env), reason, "", command)
            case Gap(need):
                return self._gap(need, now)
            case Duplicate(digest):
                receipt = engine.ledger.commands[digest].receipt_seq
                again: list[Effect] = [] if receipt is None else [ReportAgain((receipt,))]
                return [Note("command.duplicated", {"cmd_id": command.value.cmd_id}), *again]
            case Advance():
                return engine.consumed(command, judgement, now)
            case _:
                assert_never(judgement)

    def distrusted(self, digest: Digest) -> Refusal | None:
        """Why a command that was consumed under an older keyset must not have its effect any more."""
        if self._engine.keyset is self._keyset:
            return None
        reopened = self._engine.reopen(digest)
        return reopened if isinstance(reopened, Refusal) else None

    def _gap(self, need: int, now: Now) -> list[Effect]:
        asked, at_ms = self._needed
        if asked == need and now.boot_ms - at_ms < NEED_AGAIN_MS:
            return []
        self._needed = (need, now.boot_ms)
        return [Note("stream.gap_found", {"seq": need}), Say(Need(seq=need))]


def _unconsumed(digest: Digest, reason: Reason, detail: str, command: Verified[Command] | None) -> list[Effect]:
    cmd_id = None if command is None else command.value.cmd_id
    event = "alarm.raised" if reason is Reason.CHAIN_FORK else "command.refused"
    return [
        Note(event, {"reason": reason, "envelope": digest, "cmd_id": cmd_id}),
        Say(Refused(digest=digest, reason=reason, detail=detail, cmd_id=cmd_id)),
    ]
