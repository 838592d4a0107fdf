"""What is typed to a viewer itself: `~` at the beginning of a line, then one character, as with ssh. Pure."""

from collections.abc import Iterator
from enum import Enum
from typing import Final


class Act(Enum):
    """What was asked for."""

    DETACH = "."
    HELP = "?"
    SUSPEND = "\x1a"


HELP: Final = (
    "Supported behind Enter: ~. leave, the PTY goes on; ~^Z suspend this viewer; ~~ the character itself; ~? this list."
)
_ESCAPE: Final = ord("~")
_ACTS: Final = {ord(act.value): act for act in Act}
_LINE_ENDS: Final = b"\r\n"


class Escapes:
    """Sorts what is typed, in any pieces, into what is for the PTY and what is for its viewer."""

    def __init__(self) -> None:
        self._line_begins = True
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes | Act]:
        """Bytes and acts, in order."""
        passed = bytearray()
        for byte in data:
            if self._begun:
                self._begun = False
                if (act := _ACTS.get(byte)) is not None:
                    if passed:
                        yield bytes(passed)
                        passed.clear()
                    yield act
                    continue
                if byte != _ESCAPE:
                    passed.append(_ESCAPE)
            elif self._line_begins and byte == _ESCAPE:
                self._begun = True
                continue
            passed.append(byte)
            self._line_begins = byte in _LINE_ENDS
        if passed:
            yield bytes(passed)

    def flush(self) -> bytes:
        """What was held back, at the end."""
        held, self._begun = self._begun, False
        return b"~" if held else b""
