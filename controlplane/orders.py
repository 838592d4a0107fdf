"""From intents to commands: numbering, chaining and wording, at send time. Pure.

Theory of operation. What a user asked for is stored as an unsigned intent. A number is given only when the command is about to
be sent, so what was cancelled or ran out before is never sent, and the chain has no holes.

Rule 1: an intent is worded under its own `cmd_id` every time. Rule 2: numbers rise by one, each naming the payload before.
Rule 3: only a queued, unexpired intent gets a number.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.rows import CommandRow, IntentRow, IntentState
from protocol.commands import Actor, Audience, Command, LeaseGrant, Stream
from protocol.envelope import digest_of
from protocol.limits import COMMAND_TTL_MS_MAX, SAFETY_TTL_MS_MAX
from protocol.replay import Mark

ISSUER: Final = "control-plane"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where commands go: one incarnation of a runner, and the keyset it is known to have."""

    org: str
    runner: str
    inc: int
    keyset_min: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """What became of a queue: commands to store and send, the mark after them, and intents that came too late."""

    commands: tuple[CommandRow, ...]
    ctl: Mark
    expired: tuple[IntentRow, ...]


def number(
    intents: Sequence[IntentRow], *, ctl: Mark, room: int, safety_room: int, address: Address, now_ms: int
) -> Numbered:
    """Give the next numbers to `intents`, which come in the order they were asked for."""
    commands: list[CommandRow] = []
    expired: list[IntentRow] = []
    for intent in intents:
        assert intent.state is IntentState.QUEUED, "only queued intents are numbered"
        if now_ms >= intent.expires_ms:
            expired.append(intent)
        elif intent.stream is Stream.SAFETY and safety_room > 0:
            commands.append(_word(intent, None, address, now_ms))
            safety_room -= 1
        elif intent.stream is Stream.CTL and room > 0:
            command = _word(intent, ctl, address, now_ms)
            commands.append(command)
            ctl = Mark(ctl.hw + 1, command.digest)
            room -= 1
    return Numbered(commands=tuple(commands), ctl=ctl, expired=tuple(expired))


def _word(intent: IntentRow, ctl: Mark | None, address: Address, now_ms: int) -> CommandRow:
    """The command of an intent behind the mark `ctl`, or unnumbered."""
    ttl_ms = SAFETY_TTL_MS_MAX if ctl is None else COMMAND_TTL_MS_MAX
    payload = Command(
        v=1,
        cmd_id=intent.cmd_id,
        kind=intent.kind,
        aud=Audience(org=address.org, runner=address.runner, inc=address.inc),
        iss=ISSUER,
        stream=intent.stream,
        seq=None if ctl is None else ctl.hw + 1,
        prev=None if ctl is None else ctl.head,
        iat=now_ms,
        nbf=now_ms,
        exp=now_ms + ttl_ms,
        keyset_min=address.keyset_min,
        lease=None if intent.lease is None else LeaseGrant.parse(intent.lease),
        actor=None if intent.actor is None else Actor(sub=intent.actor, via=ISSUER),
        args=json.loads(intent.args),
    ).dump()
    return CommandRow(
        digest=digest_of(payload),
        cmd_id=intent.cmd_id,
        runner_id=address.runner,
        inc=address.inc,
        seq=None if ctl is None else ctl.hw + 1,
        payload=payload,
        signed_ms=now_ms,
    )
