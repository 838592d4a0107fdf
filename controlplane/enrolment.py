"""Enrolment: a join token and a proof of possession become a runner with a certificate.

Rule 1: the token counts once, for one key; the same key with the same token gets the same answer again while the token lives.
Rule 2: a name belongs to one living runner; whoever enrols under it takes it over under an id of its own.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace

from controlplane import tables
from controlplane.keys import token_hash
from controlplane.rows import STARTS, ExecutionState, IntentRow, IntentState, JoinTokenRow, RunnerRow, WorktreeState
from controlplane.tables import Db
from protocol import strict_json
from protocol.commands import Kind
from protocol.envelope import PayloadType, Verified, open_envelope, seal
from protocol.errors import CloseCode, EnvelopeError, Reason, RemoteError
from protocol.identity import Certificate, EnrollClaims
from protocol.keys import PrivateKey, PublicKey, b64url_decode
from protocol.limits import ENVELOPE_BYTES_MAX

Certifier = Callable[[RunnerRow, int], str]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A runner that may come in, and the ids of those whose name it took."""

    runner: RunnerRow
    replaced: tuple[str, ...]
    touched: tuple[str, ...] = ()


def open_enrolment(envelope: str) -> Verified[EnrollClaims]:
    """Open an enrolment with the key that it names itself: a proof of possession, nothing more.

    Raises:
        RemoteError: BAD_PROOF; the connection closes.
    """
    try:
        key = PublicKey.from_b64url(_named_key(envelope))
        opened = open_envelope(envelope.encode(), PayloadType.ENROLL, {key.key_id: key}, EnrollClaims.parse)
        b64url_decode(opened.value.seal_x, 32)
    except (EnvelopeError, ValueError) as exc:
        detail = str(exc) if isinstance(exc, EnvelopeError) else "the enrolment does not parse"
        raise RemoteError(Reason.BAD_PROOF, detail, CloseCode.BAD_PROOF) from exc
    # The names were read before the signature was checked: now compare what was signed.
    if opened.value.x != key.x:
        raise RemoteError(Reason.BAD_PROOF, "signed by another key than it names", CloseCode.BAD_PROOF)
    return opened


def _named_key(envelope: str) -> str:
    wrapper = strict_json.loads_object(envelope.encode(), ENVELOPE_BYTES_MAX)
    payload = wrapper.get("payload")
    if not isinstance(payload, str):
        raise ValueError("no payload")
    return EnrollClaims.parse(base64.b64decode(payload.encode("ascii"), validate=True)).x


def certify(runner: RunnerRow, inc: int, *, org: str, key: PrivateKey, now_ms: int) -> str:
    """The certificate of a runner in an incarnation, signed by the enrol key."""
    certificate = Certificate(
        org=org,
        runner=runner.id,
        inc=inc,
        name=runner.name,
        x=runner.x,
        seal_x=runner.seal_x,
        labels=runner.labels,
        iat=now_ms,
    )
    return seal(certificate.dump(), PayloadType.CERTIFICATE, [key]).decode()


def admit(db: Db, claims: EnrollClaims, runner_id: str, certifier: Certifier, now_ms: int) -> Admitted:
    """Take a runner in, or repeat the answer it did not get. Raises RemoteError(BAD_JOIN_TOKEN)."""
    token = tables.join_token(db, token_hash(claims.token))
    if token is None or now_ms >= token.expires_ms:
        raise _bad_token("the join token is not known or has expired")
    if token.used_by is not None:
        before = tables.runner(db, token.runner_id or "")
        if token.used_by != claims.x or before is None or not before.living:
            raise _bad_token("the join token was used")
        return Admitted(before, ())
    if token.name is not None and token.name != claims.name:
        raise _bad_token("the join token is for another name")
    if token.labels and any(token.labels.get(name) != value for name, value in claims.labels.items()):
        raise _bad_token("the join token is for other labels")
    replaced, touched = _replace(db, claims)
    runner = RunnerRow(
        id=runner_id,
        name=claims.name,
        x=claims.x,
        seal_x=claims.seal_x,
        labels=dict(token.labels or claims.labels),
        living=True,
        inc=1,
        certificate="",
        enrolled_ms=now_ms,
        last_seen_ms=now_ms,
        version=claims.version,
        platform=claims.platform,
        hostname=claims.hostname,
    )
    runner = replace(runner, certificate=certifier(runner, runner.inc))
    tables.put_runner(db, runner)
    tables.put_join_token(db, replace(token, used_by=claims.x, runner_id=runner.id))
    return Admitted(runner, replaced, touched)


def add_join_token(db: Db, row: JoinTokenRow) -> None:
    """Remember a join token."""
    tables.put_join_token(db, row)


def _replace(db: Db, claims: EnrollClaims) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Retire whoever has the name or the key. What was never sent to it never will be."""
    older = {row.id: row for row in tables.living_keyed(db, claims.x)}
    named = tables.living_named(db, claims.name)
    if named is not None:
        older[named.id] = named
    touched: list[str] = []
    for row in older.values():
        tables.put_runner(db, replace(row, living=False, session=""))
        for state in (IntentState.QUEUED, IntentState.HELD):
            for intent in tables.intents_in(db, row.id, state):
                _call_back(db, intent)
                touched.append(intent.subject)
    return tuple(older), tuple(touched)


def _call_back(db: Db, intent: IntentRow) -> None:
    """Give up an intent whose runner is gone; what may have been sent in an earlier form keeps its state."""
    tables.put_intent_state(db, replace(intent, state=IntentState.CANCELLED))
    detail = "its runner was replaced"
    start = intent.kind in STARTS
    execution = tables.attempt(db, intent.subject, intent.start_token) if start else None
    if execution is not None and not execution.state.final and intent.signed_times == 0:
        tables.put_execution(db, replace(execution, state=ExecutionState.CANCELLED, detail=detail))
    worktree = tables.worktree(db, intent.subject) if intent.kind == Kind.WORKTREE_CREATE else None
    if worktree is not None and not worktree.state.final and intent.signed_times == 0:
        tables.put_worktree(db, replace(worktree, state=WorktreeState.REFUSED, detail=detail))


def _bad_token(detail: str) -> RemoteError:
    return RemoteError(Reason.BAD_JOIN_TOKEN, detail, CloseCode.BAD_PROOF)
