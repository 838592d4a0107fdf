"""Strict JSON: what it refuses, what it takes, and that its errors tell nothing of the document."""

import pytest

from protocol import strict_json
from protocol.limits import JSON_DEPTH_MAX, JSON_INT_MAX


def nested(depth: int) -> bytes:
    """Arrays in arrays."""
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        (b'{"a":1,"a":1}', "duplicate key"),
        (b'{"a":[{"b":1,"\\u0062":2}]}', "duplicate key"),
        (b"1.0", "floating point number"),
        (b"-0.0", "floating point number"),
        (b"1e3", "floating point number"),
        (str(JSON_INT_MAX + 1).encode(), "integer out of range"),
        (str(-JSON_INT_MAX - 1).encode(), "integer out of range"),
        (b"1" * 400, "integer out of range"),
        (b"NaN", "not well-formed"),
        (b"\xef\xbb\xbf{}", "not well-formed"),
        (b'"\\ud800"', "not well-formed"),
        (b'"\xed\xa0\x80"', "not well-formed"),
        (nested(JSON_DEPTH_MAX + 1), "nested deeper"),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused_by_its_name(document: bytes, rule: str) -> None:
    """The error names the rule."""
    with pytest.raises(strict_json.JsonRefused, match=rule):
        strict_json.loads(document, 1000)


def test_the_bounds_themselves_are_inside() -> None:
    """The largest integer, the deepest document, the longest document."""
    assert strict_json.loads(str(JSON_INT_MAX).encode(), 100) == JSON_INT_MAX
    assert strict_json.loads(str(-JSON_INT_MAX).encode(), 100) == -JSON_INT_MAX
    strict_json.loads(nested(JSON_DEPTH_MAX), 100)
    assert strict_json.loads(b'"ab"', 4) == "ab"
    with pytest.raises(strict_json.JsonRefused, match="longer than 3 bytes"):
        strict_json.loads(b'"ab"', 3)


def test_a_refusal_holds_nothing_of_the_document() -> None:
    """A secret in a broken document does not leak through the error."""
    for document in (b'{"hunter2":1,"hunter2":2}', b'{"hunter2":', b'["hunter2",1.5]'):
        with pytest.raises(strict_json.JsonRefused) as refused:
            strict_json.loads(document, 1000)
        assert "hunter2" not in str(refused.value)


def test_an_object_is_asked_for_by_name() -> None:
    """Anything but an object is refused by `loads_object`."""
    assert strict_json.loads_object(b'{"a":[]}', 10) == {"a": []}
    with pytest.raises(strict_json.JsonRefused, match="not an object"):
        strict_json.loads_object(b"[]", 10)


def test_what_is_written_is_compact_utf8() -> None:
    """No spaces, no escapes for what UTF-8 can say, no NaN."""
    assert strict_json.dumps({"a": [1, "é"], "b": None}) == '{"a":[1,"é"],"b":null}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        strict_json.dumps(float("nan"))
    with pytest.raises(ValueError, match="surrogates"):
        strict_json.dumps("\ud800")
