"""The vectors are what the code writes, and the code does what the vectors say."""

import json
from typing import Any

import pytest

from protocol import strict_json
from protocol.commands import ArgsRefused, Audience, Command, parse_args
from protocol.envelope import PayloadType, digest_of, open_envelope, pae
from protocol.errors import EnvelopeError, RemoteError
from protocol.frames import decode_data
from protocol.identity import JoinString
from protocol.keys import PrivateKey, is_weak_point
from protocol.keyset import Keyset, Role, Root, open_keyset
from protocol.messages import decode_from_plane, decode_from_runner, encode
from protocol.records import decode_segment_header, records
from protocol.replay import Adopt, Mark, Seen, freshness, judge, reconcile
from tests.vectors.documents import replaces, verdict_of
from tests.vectors.generate import FILES, VECTORS, main, stale, text_of


def vectors(name: str) -> dict[str, Any]:
    """A file of vectors, as another implementation would read it."""
    document = strict_json.loads_object((VECTORS / f"{name}.json").read_bytes(), 1_000_000)
    assert document["format"] == 1
    return document


def key_of(name: str) -> PrivateKey:
    """A key of the vectors, from its seed."""
    entry = vectors("envelope")["keys"][name]
    key = PrivateKey(bytes.fromhex(entry["seed"]))
    assert (key.public.x, key.key_id) == (entry["x"], entry["keyid"])
    return key


def outcome(case: dict[str, Any]) -> str | None:
    """Why the envelope of a case does not open, or None."""
    keys = {key_of(name).key_id: key_of(name).public for name in case["keys"]}
    try:
        open_envelope(case["envelope"].encode(), PayloadType(case["payload_type"]), keys, parsed, case["threshold"])
    except EnvelopeError as refused:
        return str(refused.reason)
    return None


def parsed(payload: bytes) -> dict[str, Any]:
    """Strict JSON, as the payload of every type is."""
    return strict_json.loads_object(payload, len(payload))


def test_vectors_are_what_the_code_writes() -> None:
    """To the byte, and twice the same."""
    assert stale() == []
    assert main(["--check"]) == 0
    for name in FILES:
        assert text_of(name) == text_of(name)


def test_a_changed_vector_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--check` fails when a file is not what the code writes."""
    monkeypatch.setitem(FILES, "frames", dict)
    assert main(["--check"]) == 1


def test_envelopes() -> None:
    """Good ones open, bad ones say their reason."""
    document = vectors("envelope")
    for case in document["good"]:
        assert outcome(case) is None
    for case in document["bad"]:
        assert outcome(case) == case["reason"] is not None, case["name"]
    for case in document["pae"]:
        assert pae(case["type"], case["payload"].encode()).hex() == case["hex"]
    assert all(is_weak_point(bytes.fromhex(point)) for point in document["weak_points"])
    assert document["payload_types"] == list(PayloadType)


def test_commands() -> None:
    """Header and arguments are judged as stated."""
    for case in vectors("command")["cases"]:
        payload = case["payload"].encode()
        assert digest_of(payload) == case["digest"]
        if case["header"] is not None:
            with pytest.raises(ValueError, match=r"."):
                Command.parse(payload)
        elif case["args"] is not None:
            with pytest.raises(ArgsRefused) as refused:
                parse_args(Command.parse(payload))
            assert refused.value.reason == case["args"], case["name"]
        else:
            parse_args(Command.parse(payload))


def test_keysets() -> None:
    """Fingerprints, updates, rights and join strings."""
    document = vectors("keyset")
    roots = [Root.parse(strict_json.dumps(case["root"])) for case in document["roots"]]
    assert [root.fingerprint for root in roots] == [case["fingerprint"] for case in document["roots"]]
    opened = {name: open_keyset(text.encode(), roots[0]) for name, text in document["sealed"].items()}
    for case in document["updates"]:
        assert replaces(document["sealed"][case["current"]], document["sealed"][case["candidate"]]) == case["reason"]
    for case in document["admits"]:
        keyset = opened[case["keyset"]].value
        assert keyset.admits(key_of(case["key"]).key_id, Role(case["role"]), case["issued_ms"]) == case["reason"]
    for case in document["join"]:
        if case["url"] is None:
            with pytest.raises(ValueError, match=r"join string|base64url"):
                JoinString.parse(case["text"])
        else:
            assert JoinString.parse(case["text"]).url == case["url"]


def test_frames() -> None:
    """Data frames."""
    document = vectors("frames")
    for case in document["good"]:
        frame = decode_data(bytes.fromhex(case["frame"]))
        assert (frame.channel, str(frame.offset), bytes(frame.data).hex(), frame.goes_on) == (
            case["channel"],
            case["offset"],
            case["data"],
            case["goes_on"],
        )
    for case in document["bad"]:
        with pytest.raises(RemoteError) as refused:
            decode_data(bytes.fromhex(case["frame"]))
        assert refused.value.reason == case["reason"]


def test_records() -> None:
    """Segments, their chain, and damage."""
    document = vectors("records")
    for segment in document["segments"]:
        read = list(records(bytes.fromhex(segment["hex"]), segment["base"]))
        assert [(r.offset, r.kind, str(r.unix_ns), r.payload.hex()) for r in read] == [
            (r["offset"], r["kind"], r["unix_ns"], r["payload"]) for r in segment["records"]
        ]
    header = decode_segment_header(bytes.fromhex(document["segments"][1]["records"][0]["payload"]))
    assert header.previous.hex() == document["segments"][0]["sha256"]
    assert header.base == document["gap"]["end"]
    for case in document["damaged"]:
        with pytest.raises(RemoteError):
            list(records(bytes.fromhex(case["hex"]), 0))
    for case in document["headers"]:
        with pytest.raises(RemoteError) as refused:
            decode_segment_header(bytes.fromhex(case["hex"]))
        assert refused.value.reason == case["reason"]


def test_conversations() -> None:
    """Every message is read, and would be written the same way."""
    for transcript in vectors("session")["transcripts"]:
        for message in transcript["messages"]:
            if message["from"] == "runner":
                assert encode(decode_from_runner(message["text"])) == message["text"]
            else:
                assert encode(decode_from_plane(message["text"])) == message["text"]


def test_judgements() -> None:
    """The order of judgement, the window, and reconciliation."""
    document = vectors("replay")
    me, keyset = Audience(**document["me"]), Keyset.parse(strict_json.dumps(document["keyset"]))
    keys = {**keyset.keys_for(*Role)}
    for case in document["cases"]:
        command = open_envelope(case["envelope"].encode(), PayloadType.COMMAND, keys, Command.parse)
        said = case["seen"]
        seen = Seen(ctl=Mark(said["hw"], said["head"]), digests=said["digests"], receipted=frozenset(said["receipted"]))
        assert json.loads(json.dumps(verdict_of(judge(command, me, keyset, seen)))) == case["verdict"], case["name"]
    for case in document["freshness"]:
        assert freshness(Command.parse(strict_json.dumps(case["command"])), case["now_ms"]) == case["reason"]
    for case in document["reconcile"]:
        known = {int(seq): digest for seq, digest in case["plane"].items()}
        mark = Mark(case["runner"]["hw"], case["runner"]["head"])
        verdict = reconcile(
            known,
            case["plane_hw"],
            case["acked_hw"],
            mark,
            unanswered=case["unanswered"],
            out_hw=case["out_hw"],
            out_head=case["out_head"],
        )
        expected = "fork" if not isinstance(verdict, Adopt) else {"adopt": verdict.mark.hw, "lost": verdict.lost}
        assert expected == case["verdict"]
