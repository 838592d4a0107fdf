"""Vectors of signed documents: envelopes, commands, keysets, and the order of judgement."""

import base64
import json
from typing import Any

from protocol import strict_json
from protocol.commands import Command, parse_args
from protocol.envelope import PayloadType, digest_of, open_envelope, pae, seal
from protocol.errors import ProtocolError, Reason
from protocol.identity import JoinString, join_token
from protocol.keys import SMALL_ORDER_Y, fingerprint
from protocol.keyset import Keyset, Revocation, RevokedFor, Role, newer, open_keyset
from protocol.limits import COMMAND_TTL_MS_MAX
from protocol.replay import Adopt, Advance, Duplicate, Gap, Mark, NotConsumed, Seen, freshness, judge, reconcile
from tests.support import builders as make

NAMES = ("command", "safety", "approver", "enrol", "root", "root2", "runner", "stranger")
STOP = "execution.stop"


def key_table() -> dict[str, object]:
    """The keys of all vectors."""
    keys = {name: make.a_key(name) for name in NAMES}
    return {
        name: {
            "seed": key.seed.hex(),
            "x": key.public.x,
            "keyid": key.key_id,
            "fingerprint": fingerprint(key.public.raw),
        }
        for name, key in keys.items()
    }


def opened(envelope: str, kind: PayloadType, names: list[str], threshold: int) -> str | None:
    """Why an envelope does not open, or None."""
    keys = {make.a_key(name).key_id: make.a_key(name).public for name in names}
    try:
        open_envelope(envelope.encode(), kind, keys, strict_json_object, threshold)
    except ProtocolError as refused:
        return str(refused.reason)
    return None


def strict_json_object(payload: bytes) -> dict[str, Any]:
    """The least a payload must be."""
    return strict_json.loads_object(payload, len(payload))


def bad_wrappers() -> dict[str, str]:
    """Envelopes that break one rule each, by name."""
    kind = PayloadType.RECEIPT
    text = seal(b'{"a":1}', kind, [make.a_key("runner")]).decode()
    good: dict[str, Any] = json.loads(text)
    first = good["signatures"][0]
    two = json.loads(seal(b'{"a":1}', kind, [make.a_key("runner"), make.a_key("stranger")]))
    other = base64.b64encode(make.a_key("runner").sign(b"x")).decode()
    changed: dict[str, dict[str, Any]] = {
        "unknown field": good | {"v": 1},
        "missing field": {"payload": good["payload"], "signatures": good["signatures"]},
        "no signature": good | {"signatures": []},
        "nine signatures": good | {"signatures": [first] * 9},
        "two signatures by one key": good | {"signatures": [first, first]},
        "algorithm in a signature": good | {"signatures": [first | {"alg": "Ed25519"}]},
        "short signature": good | {"signatures": [first | {"sig": "AAAA"}]},
        "unpadded base64": good | {"payload": good["payload"].rstrip("=")},
        "url base64": good | {"signatures": [first | {"sig": first["sig"].replace("/", "_").replace("+", "-")}]},
        "stray bits in base64": good | {"payload": "YR=="},
        "payload is not text": good | {"payload": 1},
        "another payload": good | {"payload": base64.b64encode(b'{"a":2}').decode()},
        "signature of another message": good | {"signatures": [first | {"sig": other}]},
        "one of two keys is unknown": two,
        "relabelled": good | {"payloadType": PayloadType.COMMAND},
    }
    wrappers = {name: strict_json.dumps(value).decode() for name, value in changed.items()}
    signed = {
        "payload is no JSON": b"{",
        "duplicate key in the payload": b'{"a":1,"a":1}',
        "float in the payload": b'{"a":1.0}',
    }
    wrappers |= {name: seal(payload, kind, [make.a_key("runner")]).decode() for name, payload in signed.items()}
    wrappers["duplicate key in the wrapper"] = '{"payload":"",' + text[1:]
    wrappers["byte order mark"] = "\ufeff" + text
    wrappers["trailing garbage"] = text + "x"
    return wrappers


def bad_case(name: str, kind: PayloadType, keys: list[str], threshold: int, envelope: str) -> dict[str, object]:
    """An envelope that does not open, and why."""
    reason = opened(envelope, kind, keys, threshold)
    return {
        "name": name,
        "payload_type": kind,
        "keys": keys,
        "threshold": threshold,
        "envelope": envelope,
        "reason": reason,
    }


def envelopes() -> dict[str, object]:
    """Keys and their ids, the pre-authentication encoding, envelopes that open and that do not."""
    kinds = [
        (PayloadType.RECEIPT, ["runner"], 1),
        (PayloadType.COMMAND, ["command"], 1),
        (PayloadType.KEYSET, ["root", "root2"], 2),
    ]
    paes = [("http://example.com/HelloWorld", "hello world"), (str(PayloadType.COMMAND), "{}"), ("é", "")]
    good = []
    for kind, names, threshold in kinds:
        envelope = seal('{"a":"é"}'.encode(), kind, [make.a_key(name) for name in names]).decode()
        assert opened(envelope, kind, names, threshold) is None
        digest = digest_of('{"a":"é"}'.encode())
        good.append(
            {"payload_type": kind, "keys": names, "threshold": threshold, "envelope": envelope, "digest": digest}
        )
    one_of_two = seal(b"{}", PayloadType.KEYSET, [make.a_key("root")]).decode()
    bad = [bad_case(name, PayloadType.RECEIPT, ["runner"], 1, envelope) for name, envelope in bad_wrappers().items()]
    bad.append(bad_case("one signature of two", PayloadType.KEYSET, ["root", "root2"], 2, one_of_two))
    weak = [(y | sign << 255).to_bytes(32, "little").hex() for y in sorted(SMALL_ORDER_Y) for sign in (0, 1)]
    return {
        "keys": key_table(),
        "payload_types": list(PayloadType),
        "weak_points": weak,
        "pae": [{"type": kind, "payload": text, "hex": pae(kind, text.encode()).hex()} for kind, text in paes],
        "good": good,
        "bad": bad,
    }


def fate(fields: dict[str, Any]) -> dict[str, object]:
    """What becomes of a command payload: header and arguments."""
    payload = strict_json.dumps(fields)
    case: dict[str, object] = {"payload": payload.decode(), "digest": digest_of(payload), "header": None, "args": None}
    try:
        command = Command.parse(payload)
    except ValueError:
        return case | {"header": str(Reason.BAD_PAYLOAD)}
    try:
        parse_args(command)
    except ProtocolError as refused:
        case["args"] = str(refused.reason)
    return case


def commands() -> dict[str, object]:
    """Command payloads; `header` and `args` name the reason of the part that is refused, null where it is good."""
    second = "sha256:" + "aa" * 32
    lease = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "continue"}
    worktree = {"worktree_id": "wt_1", "repo": "/srv/repo", "base": "main", "branch": "topic"}
    fields, start = make.command_fields, make.start_fields
    cases = {
        "execution.start": fields(),
        "execution.start with everything": fields(
            seq=2, prev=second, lease=lease, pre={"head": "0" * 40}, actor={"sub": "u", "via": "web"},
            need={"approvals": 1, "of": "g"}, supersedes="cmd_0", trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            args=start(
                cwd={"type": "worktree", "worktree_id": "wt_1", "subdir": "src"}, env={"A": "é"},
                secrets=[{"name": "T", "sealed": "AAAA"}], timeout_ms=1000, grace_ms=0,
            ),
        ),
        "execution.stop of an attempt": fields(kind=STOP),
        "execution.stop of a command": fields(kind=STOP, args={"target": {"type": "command", "cmd_id": "cmd_0"}, "grace_ms": 0}),
        "worktree.create": fields(kind="worktree.create", args=worktree),
        "worktree.remove": fields(kind="worktree.remove", args={"worktree_id": "wt_1", "force": True}),
        "lease.release": fields(kind="lease.release", args={"res": "exec:ex_1", "token": 1}),
        "lease.acquire": fields(kind="lease.acquire", lease=lease | {"token": 2}, args={"execution_id": "ex_1", "start_token": 1}),
        "lease.acquire on safety": fields(kind="lease.acquire", stream="safety", seq=None, prev=None,
                                          args={"execution_id": "ex_1", "start_token": 1}),
        "unknown header field": fields(extra=1),
        "version is true": fields(v=True),
        "version 2": fields(v=2),
        "ctl without seq": fields(seq=None),
        "ctl without prev": fields(prev=None),
        "first with a prev": fields(prev=second),
        "safety with seq": fields(kind=STOP, seq=1),
        "seq is zero": fields(seq=0),
        "id with a space": fields(cmd_id="a b"),
        "id with a line end": fields(cmd_id="cmd_1\n"),
        "args is a list": fields(args=[]),
        "negative time": fields(iat=-1, nbf=0, exp=0),
        "unknown kind": fields(kind="disk.format", args={}),
        "start on safety": fields(stream="safety", seq=None, prev=None),
        "stop on ctl": fields(kind=STOP, stream="ctl", seq=1, prev=fields()["prev"]),
        "unknown argument": fields(args=start(shell=True)),
        "empty argv": fields(args=start(argv=[])),
        "empty argv[0]": fields(args=start(argv=[""])),
        "NUL in argv": fields(args=start(argv=["a\0"])),
        "relative cwd": fields(args=start(cwd={"type": "path", "path": "srv"})),
        "cwd with ..": fields(args=start(cwd={"type": "path", "path": "/srv/../etc"})),
        "name with =": fields(args=start(env={"A=B": "x"})),
        "name twice": fields(args=start(env={"A": "x"}, secrets=[{"name": "A", "sealed": "x"}])),
        "no timeout": fields(args=start(timeout_ms=0)),
    }  # fmt: skip
    return {"cases": [{"name": name, **fate(case)} for name, case in cases.items()]}


def keysets() -> dict[str, object]:
    """Roots and fingerprints, keysets that open, what replaces what, who counts when, and join strings."""
    roots = [make.a_root(), make.a_root(threshold=2, names=("root", "root2", "stranger"))]
    kid = make.a_key("command").key_id
    revoked = [
        Revocation(kid=kid, at=make.NOW_MS, reason=RevokedFor.SUPERSEDED),
        Revocation(kid=make.a_key("safety").key_id, at=make.NOW_MS, reason=RevokedFor.COMPROMISED),
    ]
    documents = {
        "first": make.a_keyset(),
        "second": make.a_keyset(version=2, revoked=revoked),
        "twin": make.a_keyset(exp=make.NOW_MS + make.DAY_MS),
        "another organisation": make.a_keyset(version=3, org="org_2"),
    }
    sealed = {name: make.a_sealed_keyset(keyset=keyset).decode() for name, keyset in documents.items()}
    queries = [("command", "command", -1), ("command", "command", 0), ("safety", "safety", -1), ("enrol", "enrol", 0)]
    queries += [("enrol", "command", 0), ("stranger", "command", 0), ("approver", "approver", -make.DAY_MS)]
    return {
        "roots": [{"root": json.loads(root.dump()), "fingerprint": root.fingerprint} for root in roots],
        "sealed": sealed,
        "updates": [
            {"current": a, "candidate": b, "reason": replaces(sealed[a], sealed[b])} for a in sealed for b in sealed
        ],
        "admits": [
            admission(documents["second"], key, role, make.NOW_MS + at)
            for key, role, at in queries
        ],
        "join": joins(),
    }  # fmt: skip


def replaces(current: str, candidate: str) -> str | None:
    """Why one keyset does not replace another."""
    root = make.a_root()
    try:
        newer(open_keyset(current.encode(), root), open_keyset(candidate.encode(), root))
    except ProtocolError as refused:
        return str(refused.reason)
    return None


def admission(keyset: Keyset, key: str, role: str, issued_ms: int) -> dict[str, object]:
    """Whether a key may sign, and why not."""
    reason = keyset.admits(make.a_key(key).key_id, Role(role), issued_ms)
    return {"keyset": "second", "key": key, "role": role, "issued_ms": issued_ms, "reason": reason}


def joins() -> list[dict[str, object]]:
    """Join strings with what they say, null where they say nothing."""
    token, root = join_token(bytes(range(16))), make.a_root().fingerprint
    good = [
        f"rj1://127.0.0.1:8443/{token}#{root}",
        f"rj1s://plane.example:443/{token}#{root}",
        f"rj1://[::1]:1/{token}#{root}",
    ]
    bad = [
        "",
        good[0][:-1],
        good[0] + "x",
        good[0].replace("8443", "0"),
        good[0].replace("8443", "65536"),
        good[0].replace("rj1", "rj2"),
    ]
    bad += [good[0].replace(token, token[:-1] + "B"), good[0].replace("127.0.0.1", "user@host")]
    return [{"text": text, "url": said_url(text)} for text in [*good, *bad]]


def said_url(text: str) -> str | None:
    """Where a join string leads."""
    try:
        return JoinString.parse(text).url
    except ValueError:
        return None


def judgements() -> dict[str, object]:
    """The order of judgement: a runner that remembers, a sealed command, and the verdict."""
    first, mark = make.a_verified_command(), make.a_mark(3)
    own = {"org": make.ORG, "runner": make.RUNNER, "inc": 1}
    fresh: Seen = Seen()
    remembers = Seen(ctl=Mark(1, first.digest), digests={"cmd_1": first.digest}, receipted=frozenset({first.digest}))  # type: ignore[dict-item]
    forgot = Seen(ctl=Mark(1, first.digest))
    other = "sha256:" + "cc" * 32
    cases: list[tuple[str, Seen, dict[str, Any]]] = [
        ("next number", fresh, {}),
        ("next number on the chain", remembers, {"cmd_id": "cmd_2", "seq": 2, "prev": first.digest}),
        ("the same bytes again", remembers, {}),
        ("the same bytes, forgotten", forgot, {}),
        ("the same bytes for another incarnation", remembers, {"aud": own | {"inc": 2}}),
        ("another runner", fresh, {"aud": own | {"runner": "rnr_2"}}),
        ("another organisation, and a gap", fresh, {"aud": own | {"org": "org_2"}, "seq": 5, "prev": other}),
        ("a keyset to come", fresh, {"keyset_min": 2}),
        ("a key of another role", fresh, {"key": make.a_key("enrol")}),
        ("a safety key on ctl", fresh, {"key": make.a_key("safety")}),
        ("a safety key on safety", fresh, {"key": make.a_key("safety"), "kind": STOP}),
        ("a command key on safety", fresh, {"kind": STOP}),
        ("a gap", Seen(ctl=mark), {"seq": 6, "prev": other}),
        ("another history at the mark", Seen(ctl=mark), {"seq": 3, "prev": other}),
        ("below the mark", Seen(ctl=mark), {"seq": 2, "prev": other}),
        ("another history behind the mark", Seen(ctl=mark), {"seq": 4, "prev": other}),
        ("an id with other bytes", remembers, {"seq": 2, "prev": first.digest}),
        ("an id with other bytes on safety", remembers, {"kind": STOP}),
        ("expired, and all else good", fresh, {"iat": make.NOW_MS, "exp": make.NOW_MS}),
        ("an unknown kind", fresh, {"kind": "disk.format", "args": {}}),
    ]
    windows: list[tuple[dict[str, Any], int]] = [({}, 0), ({}, 120_000), ({}, 120_001), ({}, -60_000), ({}, -60_001)]
    windows += [
        ({"exp": make.NOW_MS + COMMAND_TTL_MS_MAX + 1}, 0),
        ({"kind": STOP, "exp": make.NOW_MS + COMMAND_TTL_MS_MAX + 1}, 0),
    ]
    return {
        "me": own,
        "keyset": json.loads(make.a_keyset().dump()),
        "cases": [judgement(name, seen, over) for name, seen, over in cases],
        "freshness": [
            window(make.a_command(**over), make.NOW_MS + at)
            for over, at in windows
        ],
        "reconcile": reconciliations(),
    }  # fmt: skip


def window(command: Command, now_ms: int) -> dict[str, object]:
    """Whether a command is judged in time."""
    return {"command": json.loads(command.dump()), "now_ms": now_ms, "reason": freshness(command, now_ms)}


def judgement(name: str, seen: Seen, over: dict[str, Any]) -> dict[str, object]:
    """One case of judgement as JSON."""
    command = make.a_verified_command(**over)
    return {
        "name": name,
        "seen": {
            "hw": seen.ctl.hw,
            "head": seen.ctl.head,
            "digests": dict(seen.digests),
            "receipted": sorted(seen.receipted),
        },
        "envelope": command.envelope.decode(),
        "verdict": verdict_of(judge(command, make.ME, make.a_keyset(), seen)),
    }


def verdict_of(verdict: Duplicate | Gap | NotConsumed | Advance) -> dict[str, object]:
    """A judgement as JSON."""
    match verdict:
        case Duplicate(digest):
            return {"duplicate": digest}
        case Gap(need):
            return {"need": need}
        case NotConsumed(reason):
            return {"refused": reason}
        case Advance(mark, refuse):
            return {"hw": mark.hw, "head": mark.head, "refuse": refuse}


def reconciliations() -> list[dict[str, object]]:
    """What a plane does with the mark of a hello."""
    known = {n: make.a_mark(n, f"{n:02x}").head for n in range(1, 6)}
    cases: list[tuple[int, int, Mark, bool, int, int]] = [
        (5, 3, Mark(5, known[5]), True, 0, 0),
        (5, 3, Mark(3, known[3]), True, 0, 0),
        (5, 3, Mark(2, known[2]), True, 0, 0),
        (5, 3, make.a_mark(4, "ee"), True, 0, 0),
        (5, 3, make.a_mark(8, "ee"), False, 0, 0),
        (5, 3, make.a_mark(8, "ee"), True, 0, 0),
        (5, 0, Mark(), True, 0, 0),
        (5, 3, Mark(5, known[5]), False, 7, 6),
        (5, 3, Mark(5, known[5]), False, 7, 9),
    ]
    told = []
    for plane_hw, acked_hw, mark, unanswered, out_hw, out_head in cases:
        verdict = reconcile(known, plane_hw, acked_hw, mark, unanswered=unanswered, out_hw=out_hw, out_head=out_head)
        answer: object = {"adopt": mark.hw, "lost": verdict.lost} if isinstance(verdict, Adopt) else "fork"
        said = {"plane": known, "plane_hw": plane_hw, "acked_hw": acked_hw, "unanswered": unanswered}
        said |= {"out_hw": out_hw, "out_head": out_head}
        told.append(said | {"runner": {"hw": mark.hw, "head": mark.head}, "verdict": answer})
    return told
