"""Where the escape sequences of a terminal's output begin and end, as far as replaying it needs to know. Pure.

ESC ends whatever came before it and begins anew, so a sequence is recognised by its own bytes wherever it stands. Sequences in
8-bit form (C1) are not looked for: in UTF-8 their bytes are parts of characters.
"""

import re
from typing import Final

CONTROL: Final = rb"[\x00-\x17\x19\x1c-\x1f\x7f]*"
"""Control characters within a sequence are obeyed, and the sequence goes on; CAN, SUB and ESC end it."""
PARAMETER_BYTES_MAX: Final = 128
"""Longer parameters are played with by nobody but fuzzers; such a sequence is left as it is."""
STRING_BYTES_MAX: Final = 4096
"""Longest OSC or APC that is looked into: a query for all 256 colours is shorter, and pictures need not be held back."""
_HEAD_BYTES: Final = 160
_UNFINISHED: Final = re.compile(
    rb"\x1b%(control)s(?:[\x20-\x2f][\x20-\x2f\x00-\x17\x19\x1c-\x1f\x7f]*|\[[\x00-\x17\x19\x1c-\x1f\x20-\x3f\x7f]*"
    rb"|\][^\x07\x18\x1a\x1b]*|[PX^_][^\x18\x1a\x1b]*)?" % {b"control": CONTROL},
    re.DOTALL,
)
_ENDS: Final = re.compile(rb"[\x07\x18\x1a\x1b]")


def unfinished(data: bytes, end: int | None = None) -> bytes:
    """The sequence that is begun and not ended at `end` of `data`, shortened if it is long; nothing: all are whole.

    What is given back, with what comes behind, tells the same as all of it.
    """
    end = len(data) if end is None else end
    at = data.rfind(b"\x1b", 0, end)
    if at < 0:
        return b""
    match = _UNFINISHED.fullmatch(data, at, end)
    return b"" if match is None else data[at : min(at + _HEAD_BYTES, end)]


def whole_from(data: bytes, at: int) -> int:
    """The first place at or behind `at` that is within no character and no sequence; at worst the end of `data`."""
    while at < len(data):
        begun = unfinished(data, at)
        if begun[1:2] in (b"]", b"P", b"X", b"^", b"_"):
            match = _ENDS.search(data, at)
            at = len(data) if match is None else match.end()
        elif begun or data[at] & 0xC0 == 0x80:
            at += 1
        else:
            break
    return at
