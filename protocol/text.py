"""Text between people and machines: durations and sizes as they are typed, and words of strangers as a terminal may show them.

Rule 1: what a peer, a child or a file said reaches a terminal only through `visible` or `Visible`: no control character, escape
sequence or change of writing direction comes out of them. Rule 2: what is typed is read exactly or refused; nothing is guessed.
"""

import codecs
import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from protocol.limits import JSON_INT_MAX

_JOINERS: Final = frozenset("\u200c\u200d")
"""Zero-width (non-)joiner: many scripts and emoji need them, and a terminal obeys neither."""
_MS: Final[Mapping[str, int]] = MappingProxyType({"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1})
_DURATION: Final = re.compile(
    r"(?:(?P<d>[0-9]{1,15})d)?(?:(?P<h>[0-9]{1,15})h)?(?:(?P<m>[0-9]{1,15})m(?!s))?"
    r"(?:(?P<s>[0-9]{1,15})s)?(?:(?P<ms>[0-9]{1,15})ms)?"
)
_BYTES: Final[Mapping[str, int]] = MappingProxyType({"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40})
_SIZE: Final = re.compile(r"(?P<count>[0-9]{1,16}) ?(?P<unit>B|KiB|MiB|GiB|TiB)?")


def duration_ms(text: str) -> int:
    """Read `500ms`, `10s`, `10m`, `2h`, `1d` or a falling sequence such as `1h30m`. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError("expected a duration such as 500ms, 10s, 10m, 2h or 1h30m")
    total = sum(int(count) * _MS[unit] for unit, count in match.groupdict().items() if count is not None)
    if total > JSON_INT_MAX:
        raise ValueError("the duration is too long")
    return total


def show_duration(ms: int) -> str:
    """A duration as `duration_ms` reads it back, exactly; a negative one with its sign."""
    if ms < 0:
        return f"-{show_duration(-ms)}"
    parts: list[str] = []
    for unit, size in _MS.items():
        count, ms = divmod(ms, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def show_age(ms: int) -> str:
    """A duration for a person: its two largest units, whole seconds unless it is shorter than one."""
    unit = next((size for size in _MS.values() if abs(ms) >= size), 1)
    fine = {86_400_000: 3_600_000, 3_600_000: 60_000}.get(unit, 1000 if unit > 1 else 1)
    return show_duration(int(ms / fine) * fine)


def size_bytes(text: str) -> int:
    """Read `4096`, `64KiB`, `8 MiB` or `2GiB`. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("expected a number of bytes such as 4096, 64KiB or 8MiB")
    size = int(match["count"]) * _BYTES[match["unit"] or "B"]
    if size > JSON_INT_MAX:
        raise ValueError("the size is too large")
    return size


def show_size(size: int) -> str:
    """A number of bytes for a person, in the largest unit of which there is at least one."""
    unit = max((name for name in _BYTES if size >= _BYTES[name]), key=_BYTES.__getitem__, default="B")
    count = size / _BYTES[unit]
    return f"{size} B" if unit == "B" else f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"


def visible(text: str, keep: str = "") -> str:
    r"""`text` with everything escaped (`\x1b`, `\u202e`) that is no visible character; those in `keep` stay as they are.

    Lone surrogates, as Python makes them of undecodable bytes in paths and arguments, are escaped too.
    """
    if text.isprintable():
        return text
    return "".join(
        char if _harmless(char) or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


def _harmless(char: str) -> bool:
    return char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs"


class Visible:
    """A stream of bytes made visible piece by piece: a character cut in two by a read comes out whole, lines stay lines."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """The next bytes; `final` also gives what was held back for its other half."""
        text = self._held + self._decoder.decode(data, final)
        # A carriage return is held until it is known whether it only ends a line, as programs at a terminal write them.
        self._held = "\r" if text.endswith("\r") and not final else ""
        text = text.removesuffix(self._held).replace("\r\n", "\n")
        return visible(text, keep="\n\t").encode("utf-8")
