"""Values of the protocol with sane defaults; a test names only what it is about."""

import hashlib
from collections.abc import Sequence
from typing import Any

from protocol import strict_json
from protocol.commands import Audience, Command, Kind, OnLoss
from protocol.envelope import PayloadType, Verified, open_envelope, seal
from protocol.identity import Certificate, EnrollClaims, HelloClaims, StreamMark
from protocol.ids import GENESIS, Attempt, Digest, ExecutionId, FencingToken
from protocol.keys import PrivateKey, b64url
from protocol.keyset import KeyEntry, Keyset, Role, Root, open_keyset
from protocol.lease import Lease
from protocol.limits import CLOCK_SKEW_MS
from protocol.messages import ItemKind, ReportItem
from protocol.receipt import Cause, Outcome, Receipt, Settlement, Verdict
from protocol.replay import Mark

ORG = "org_1"
RUNNER = "rnr_1"
NOW_MS = 1_795_000_000_000
HOUR_MS = 60 * 60 * 1000
DAY_MS = 24 * HOUR_MS
POLICY_DIGEST = Digest("sha256:" + "11" * 32)
ME = Audience(org=ORG, runner=RUNNER, inc=1)


def a_key(name: str = "command") -> PrivateKey:
    """A key for ever the same under one name."""
    return PrivateKey(hashlib.sha256(b"test key " + name.encode()).digest())


def a_nonce(name: str = "runner") -> str:
    """32 bytes in base64url, for ever the same under one name."""
    return b64url(hashlib.sha256(b"test nonce " + name.encode()).digest())


def command_fields(**over: Any) -> dict[str, Any]:
    """A command as JSON values: an execution start, first of its stream."""
    kind = over.get("kind", Kind.EXECUTION_START)
    stream = over.get("stream", "safety" if kind in (Kind.EXECUTION_STOP, Kind.LEASE_RELEASE) else "ctl")
    iat = over.get("iat", NOW_MS)
    fields = {
        "v": 1,
        "cmd_id": "cmd_1",
        "kind": str(kind),
        "aud": {"org": ORG, "runner": RUNNER, "inc": 1},
        "iss": "https://plane.test",
        "stream": stream,
        "seq": 1 if stream == "ctl" else None,
        "prev": GENESIS if stream == "ctl" else None,
        "iat": iat,
        "nbf": iat,
        "exp": iat + 60_000,
        "keyset_min": 1,
        "args": start_fields() if kind == Kind.EXECUTION_START else stop_fields(),
    }
    return fields | over


def start_fields(**over: Any) -> dict[str, Any]:
    """Arguments of an execution start."""
    fields = {
        "execution_id": "ex_1",
        "start_token": 1,
        "argv": ["make", "test"],
        "cwd": {"type": "path", "path": "/srv/work"},
    }
    return fields | over


def stop_fields(**over: Any) -> dict[str, Any]:
    """Arguments of an execution stop."""
    return {"target": {"type": "attempt", "execution_id": "ex_1", "start_token": 1}} | over


def a_command(**over: Any) -> Command:
    """A command's header and arguments."""
    return Command.parse(strict_json.dumps(command_fields(**over)))


def a_sealed_command(*, key: PrivateKey | None = None, **over: Any) -> bytes:
    """A command in its envelope."""
    return seal(strict_json.dumps(command_fields(**over)), PayloadType.COMMAND, [key or a_key()])


def a_verified_command(*, key: PrivateKey | None = None, **over: Any) -> Verified[Command]:
    """A command through the door."""
    key = key or a_key()
    return open_envelope(
        a_sealed_command(key=key, **over), PayloadType.COMMAND, {key.key_id: key.public}, Command.parse
    )


def a_key_entry(key: PrivateKey, *roles: Role, **over: Any) -> KeyEntry:
    """An entry of a keyset: any of `roles`, an hour before now until 30 days after."""
    fields: dict[str, Any] = {
        "x": key.public.x,
        "roles": list(roles),
        "nbf": NOW_MS - HOUR_MS,
        "naf": NOW_MS + 30 * DAY_MS,
    }
    return KeyEntry(**(fields | over))


def a_keyset(**over: Any) -> Keyset:
    """A keyset with one key for each role, named as the role."""
    fields: dict[str, Any] = {
        "org": ORG,
        "version": 1,
        "iat": NOW_MS - HOUR_MS,
        "exp": NOW_MS + 30 * DAY_MS,
        "keys": [a_key_entry(a_key(role), role) for role in Role],
    }
    return Keyset(**(fields | over))


def a_root(*, threshold: int = 1, names: Sequence[str] = ("root",)) -> Root:
    """A root of the keys with these names."""
    return Root(threshold=threshold, keys=[a_key(name).public.x for name in names])


def a_sealed_keyset(*, keyset: Keyset | None = None, names: Sequence[str] = ("root",)) -> bytes:
    """A keyset in its envelope, signed by the keys with these names."""
    return seal((keyset or a_keyset()).dump(), PayloadType.KEYSET, [a_key(name) for name in names])


def a_verified_keyset(*, keyset: Keyset | None = None) -> Verified[Keyset]:
    """A keyset through the door, under the root of `a_root()`."""
    return open_keyset(a_sealed_keyset(keyset=keyset), a_root())


def a_certificate(**over: Any) -> Certificate:
    """The certificate of the key named `runner`."""
    fields: dict[str, Any] = {
        "org": ORG,
        "runner": RUNNER,
        "inc": 1,
        "name": "laptop",
        "x": a_key("runner").public.x,
        "seal_x": a_nonce("seal"),
        "iat": NOW_MS,
    }
    return Certificate(**(fields | over))


def a_sealed_certificate(*, key: PrivateKey | None = None, **over: Any) -> bytes:
    """A certificate in its envelope, signed by the enrol key."""
    return seal(a_certificate(**over).dump(), PayloadType.CERTIFICATE, [key or a_key("enrol")])


def an_enrolment(**over: Any) -> EnrollClaims:
    """What a runner says to be enrolled."""
    fields: dict[str, Any] = {
        "token": "A" * 22,
        "name": "laptop",
        "x": a_key("runner").public.x,
        "seal_x": a_nonce("seal"),
        "boot_id": "boot-1",
        "hostname": "laptop",
        "platform": "linux",
        "version": "0.1.0",
    }
    return EnrollClaims(**(fields | over))


def hello_claims(**over: Any) -> HelloClaims:
    """What a runner signs in its proof."""
    fields: dict[str, Any] = {
        "org": ORG,
        "runner": RUNNER,
        "inc": 1,
        "nonce_plane": a_nonce("plane"),
        "nonce_runner": a_nonce("runner"),
        "boot_id": "boot-1",
        "ctl": StreamMark(hw=0, head=GENESIS),
        "out_head": 0,
        "keyset_version": 1,
        "policy_digest": POLICY_DIGEST,
        "version": "0.1.0",
        "platform": "linux",
    }
    return HelloClaims(**(fields | over))


def a_lease(**over: Any) -> Lease:
    """A held lease of 60 s that began at 0."""
    fields: dict[str, Any] = {
        "res": "exec:ex_1",
        "token": 1,
        "ttl_ms": 60_000,
        "on_loss": OnLoss.STOP,
        "deadline_ms": 60_000,
    }
    return Lease(**(fields | over))


def a_receipt(**over: Any) -> Receipt:
    """A receipt of the command `cmd_1`."""
    fields: dict[str, Any] = {
        "org": ORG,
        "runner": RUNNER,
        "inc": 1,
        "cmd_id": "cmd_1",
        "cmd_digest": Digest("sha256:" + "22" * 32),
        "kind": "execution.start",
        "seq": 1,
        "outcome": Outcome.ACCEPTED,
        "policy_digest": POLICY_DIGEST,
        "keyset_version": 1,
        "at_ms": NOW_MS,
    }
    return Receipt(**(fields | over))


def a_settlement(**over: Any) -> Settlement:
    """The settlement of attempt `ex_1.1`, which exited with 0."""
    fields: dict[str, Any] = {
        "org": ORG,
        "runner": RUNNER,
        "inc": 1,
        "execution_id": "ex_1",
        "start_token": 1,
        "cmd_id": "cmd_1",
        "cmd_digest": Digest("sha256:" + "22" * 32),
        "verdict": Verdict.EXITED,
        "code": 0,
        "cause": Cause(kind="none"),
        "policy_digest": POLICY_DIGEST,
        "at_ms": NOW_MS,
    }
    return Settlement(**(fields | over))


def an_item(out_seq: int, body: str = "{}", kind: ItemKind = ItemKind.EVENT) -> ReportItem:
    """A report item."""
    return ReportItem(out_seq=out_seq, kind=kind, body=body)


def an_attempt(execution_id: str = "ex_1", start_token: int = 1) -> Attempt:
    """An attempt by name."""
    return Attempt(ExecutionId(execution_id), FencingToken(start_token))


def a_mark(hw: int, filler: str = "aa") -> Mark:
    """A mark at `hw` with a head of nothing but `filler`."""
    return Mark(hw, Digest("sha256:" + filler * 32)) if hw else Mark()


ACROSS_SKEW_MS = CLOCK_SKEW_MS + 1
"""One more than the tolerated skew."""
