"""Every strict reader against a hostile corpus, and against anything at all."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import strict_json
from protocol.commands import Command
from protocol.errors import RemoteError
from protocol.keyset import Keyset
from protocol.limits import JSON_DEPTH_MAX, JSON_INT_MAX
from protocol.messages import decode_from_plane, decode_from_runner
from protocol.wire import JsonObject, Open
from tests.property.hostile_json import HARMLESS, HOSTILE

SIZE_MAX = 1_000_000
INTEGERS = st.integers(-JSON_INT_MAX, JSON_INT_MAX)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | INTEGERS | TEXT
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)

FIELDS = ["t", "seq", "n", "hw", "items", "env", "channel", "offset", "reason", "v_min"]
TAGS = [
    "hello",
    "proof",
    "enroll",
    "need",
    "refused",
    "report",
    "beat",
    "open",
    "gap",
    "closed",
    "bye",
    "welcome",
    "reported",
    "beaten",
    "ack",
]


def depth(value: object) -> int:
    """How deep containers are nested."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def test_no_hostile_document_is_read() -> None:
    """None of them, by any reader, and no recursion without end."""
    assert len(HOSTILE) >= 150
    for document in HOSTILE:
        with pytest.raises(strict_json.JsonRefused):
            strict_json.loads(document, SIZE_MAX)
        for model in (Command, Keyset):
            with pytest.raises(ValueError, match=r"."):
                model.parse(document)


def test_no_hostile_document_is_a_message() -> None:
    """Frames are read by the same rules."""
    for document in HOSTILE:
        text = document.decode("utf-8", "surrogateescape")
        for decode in (decode_from_runner, decode_from_plane):
            with pytest.raises(RemoteError):
                decode(text)


def test_every_harmless_document_is_read() -> None:
    """And means what it says."""
    for document, value in HARMLESS:
        assert strict_json.loads(document, SIZE_MAX) == value
        assert type(strict_json.loads(document, SIZE_MAX)) is type(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(document: bytes) -> None:
    """Nothing but JsonRefused comes out of a bad document, and only what the standard reader reads too goes in."""
    try:
        value = strict_json.loads(document, SIZE_MAX)
    except strict_json.JsonRefused:
        return
    assert json.loads(document.decode()) == value


@given(st.text(st.sampled_from('{}[]",:0123456789.eE+-\\untfalsr \n\x00é'), max_size=40))
def test_any_near_json_is_read_or_refused(text: str) -> None:
    """The same, from letters that JSON is made of."""
    try:
        value = strict_json.loads(text.encode(), SIZE_MAX)
    except strict_json.JsonRefused:
        return
    assert json.loads(text) == value


@given(DOCUMENTS)
def test_what_is_written_is_read(value: object) -> None:
    """Any document of the profile, up to the depth allowed."""
    document = strict_json.dumps(value)
    if depth(value) > JSON_DEPTH_MAX:
        with pytest.raises(strict_json.JsonRefused):
            strict_json.loads(document, SIZE_MAX)
    else:
        assert strict_json.loads(document, SIZE_MAX) == value


@given(st.floats())
def test_no_float_is_ever_read(number: float) -> None:
    """However it is written."""
    text = repr(number) if math.isfinite(number) else json.dumps(number)
    with pytest.raises(strict_json.JsonRefused):
        strict_json.loads(text.encode(), SIZE_MAX)


@given(st.text(max_size=100) | DOCUMENTS.map(lambda value: strict_json.dumps(value).decode()))
def test_any_text_is_a_message_or_refused(text: str) -> None:
    """Nothing but RemoteError comes out of a bad frame."""
    for decode in (decode_from_runner, decode_from_plane):
        try:
            decode(text)
        except RemoteError:
            continue


@given(st.dictionaries(st.sampled_from(FIELDS), DOCUMENTS), st.sampled_from(TAGS))
def test_any_fields_of_any_message_are_read_or_refused(fields: dict[str, object], kind: str) -> None:
    """The same, past the tag."""
    text = strict_json.dumps(fields | {"t": kind}).decode()
    for decode in (decode_from_runner, decode_from_plane):
        try:
            decode(text)
        except RemoteError:
            continue


class Said(Open):
    """A model that holds anything that JSON can say."""

    text: str
    more: JsonObject


@given(text=TEXT, more=st.dictionaries(TEXT, DOCUMENTS, max_size=4))
def test_a_model_is_written_as_its_document_is(text: str, more: JsonObject) -> None:
    """Byte for byte: whoever signs a model and whoever signs the same document sign the same."""
    said = Said(text=text, more=more)
    assert said.dump() == strict_json.dumps({"text": text, "more": more})
