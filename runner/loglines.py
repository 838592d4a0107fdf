"""A line of the daemon's log as text: JSON for programs, words for people.

Rule: nothing that is logged can break a line or move a cursor, whatever bytes are in it.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

VALUE_CHARS_MAX: Final = 4096
"""One value in a line; longer ones are cut and say so: a log is no place for payloads."""
_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:@+-*%,")
_FIRST: Final = ("timestamp", "level", "event")

Line = Mapping[str, Any]


def plain_line(line: Line) -> dict[str, Any]:
    """The line as JSON can say it."""
    return {_cut(key): plain_value(value) for key, value in line.items()}


def plain_value(value: object) -> Any:
    """`value` as JSON can say it; secrets and foreign objects as their text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_cut(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(inner) for inner in value]
    return _cut(value)


def json_text(line: Line) -> str:
    """One JSON object on one line, in ASCII."""
    return encoded(plain_line(line))


def console_text(line: Line) -> str:
    """For people: time, level, event, then `key=value`; whatever is not plain is quoted and escaped."""
    rest = [f"{_word(key)}={_word(value)}" for key, value in line.items() if key not in (*_FIRST, "exception")]
    trace = line.get("exception")
    tail = [f"    {encoded(part)[1:-1]}" for part in str(trace).splitlines()] if trace else []
    return "\n".join([" ".join([*(_word(line[key]) for key in _FIRST if key in line), *rest]), *tail])


def field_text(value: object) -> str:
    """One value by itself: a text as it is, anything else as JSON."""
    value = plain_value(value)
    return value if isinstance(value, str) else encoded(value)


def encoded(value: object) -> str:
    """What is plain already, as JSON."""
    # JSON in ASCII escapes everything that a terminal obeys, DEL and the C1 controls among it.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def _cut(value: object) -> str:
    """The text of `value`, no longer than a line may hold."""
    text = str(value)
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"


def _word(value: object) -> str:
    value = plain_value(value)
    if isinstance(value, str):
        return value if value and _PLAIN.issuperset(value) else encoded(value)
    return encoded(value)
