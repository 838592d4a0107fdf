"""JSON as both sides agree to read it: one meaning for every document, or none.

Refused: duplicate keys, floats, NaN and infinities, integers beyond 2^53-1, nesting past 16, a byte order mark, lone surrogates,
bytes that are not UTF-8. `dumps` writes the compact form that we sign; it is never re-derived from a parsed document.
"""

import json
from typing import Any, Final, NoReturn

import pydantic_core

from protocol.limits import JSON_DEPTH_MAX, JSON_INT_MAX

_INT_DIGITS_MAX: Final = 16
"""Digits of 2^53-1; longer literals are not even converted."""


class JsonRefused(ValueError):
    """The document is not strict JSON; the text says which rule it breaks and holds none of its bytes."""


def loads(document: bytes, size_max: int) -> Any:
    """Parse `document` (UTF-8, at most `size_max` bytes). Raises JsonRefused."""
    if len(document) > size_max:
        raise JsonRefused(f"longer than {size_max} bytes")
    try:
        if b"\\u" in document:
            # Lone surrogates, the one thing that the standard parser lets through, can be written in no other way.
            pydantic_core.from_json(document, allow_inf_nan=False)
        text = document.decode("utf-8")
    except ValueError as exc:
        raise JsonRefused("not well-formed JSON in UTF-8") from exc
    try:
        value = _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise JsonRefused("not well-formed JSON in UTF-8") from exc
    _check_depth(value, 1)
    return value


def loads_object(document: bytes, size_max: int) -> dict[str, Any]:
    """Parse a document that must be an object. Raises JsonRefused."""
    value = loads(document, size_max)
    if not isinstance(value, dict):
        raise JsonRefused("not an object")
    return value


def dumps(value: object) -> bytes:
    """Write `value` compactly as UTF-8. Raises ValueError for NaN and infinities."""
    return _ENCODER.encode(value).encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise JsonRefused("duplicate key")
    return value


def _int(literal: str) -> int:
    if len(literal) > _INT_DIGITS_MAX + 1:
        raise JsonRefused("integer out of range")
    number = int(literal)
    if abs(number) > JSON_INT_MAX:
        raise JsonRefused("integer out of range")
    return number


def _no_float(_literal: str) -> NoReturn:
    raise JsonRefused("floating point number")


def _no_constant(_literal: str) -> NoReturn:
    raise JsonRefused("not well-formed JSON in UTF-8")


def _check_depth(value: object, depth: int) -> None:
    if not isinstance(value, dict | list):
        return
    if depth > JSON_DEPTH_MAX:
        raise JsonRefused(f"nested deeper than {JSON_DEPTH_MAX}")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, depth + 1)


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_no_float, parse_int=_int, parse_constant=_no_constant, strict=True
)
