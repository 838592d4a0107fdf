"""Which private modes of a terminal the output has set so far: what a log must tell when its beginning is gone. Pure.

Only what is looked for is looked at: a flood without such sequences costs a few scans at memory speed.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.files import Json

# What a terminal that was just reset has set.
ON_AT_FIRST: Final = (7, 25)
# What a soft reset (DECSTR) puts back: cursor keys, origin, cursor shown, keypad.
SOFT: Final = (1, 6, 25, 66)
# Saving the cursor is an act and no state.
_ACTS: Final = (1048,)
# A program that sets more than this is playing; what is longer than this is no sequence of ours.
MODES_MAX: Final = 64
SEQUENCE_BYTES_MAX: Final = 64
_PRIVATE, _SOFT, _FULL = b"\x1b[?", b"\x1b[!p", b"\x1bc"
_KEYPAD_ON, _KEYPAD_OFF = b"\x1b=", b"\x1b>"
_WANTED: Final = (_PRIVATE, _SOFT, _FULL, _KEYPAD_ON, _KEYPAD_OFF)
_PARAMETERS: Final = b"0123456789;"


class Modes:
    """The modes that differ from those of a terminal that was just reset."""

    def __init__(self) -> None:
        self.changed: dict[int, bool] = {}
        self.keypad = False
        self._rest = b""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take output as it comes, cut anywhere."""
        text = self._rest + bytes(data)
        whole = _whole(text)
        self._rest = text[whole:]
        places: list[int] = []
        for wanted in _WANTED:
            at = text.find(wanted, 0, whole)
            while at >= 0:
                places.append(at)
                at = text.find(wanted, at + 1, whole)
        places.sort()
        for at in places:
            self._obey(text, at, whole)

    def told(self) -> dict[str, Json]:
        """The payload of a marker."""
        return {"modes": {str(mode): on for mode, on in self.changed.items()}, "keypad": self.keypad}

    def _obey(self, text: bytes, at: int, whole: int) -> None:
        if text.startswith(_PRIVATE, at):
            end = at + len(_PRIVATE)
            while end < whole and text[end] in _PARAMETERS:
                end += 1
            # What is longer is no sequence, cut or whole.
            if end < whole and text[end] in b"hl" and end - at < SEQUENCE_BYTES_MAX:
                for number in text[at + len(_PRIVATE) : end].split(b";"):
                    if number:
                        self._set(int(number[:8]), text[end] == ord("h"))
        elif text.startswith((_KEYPAD_ON, _KEYPAD_OFF), at):
            self.keypad = text.startswith(_KEYPAD_ON, at)
        elif text.startswith(_SOFT, at):
            self.keypad = False
            for mode in SOFT:
                self.changed.pop(mode, None)
        else:
            self.keypad = False
            self.changed.clear()

    def _set(self, mode: int, on: bool) -> None:
        if mode in _ACTS:
            return
        if on == (mode in ON_AT_FIRST):
            self.changed.pop(mode, None)
        elif mode in self.changed or len(self.changed) < MODES_MAX:
            self.changed[mode] = on


def _whole(text: bytes) -> int:
    """Up to where no sequence is cut off; what lies behind comes again with more."""
    at = text.rfind(b"\x1b", max(0, len(text) - SEQUENCE_BYTES_MAX))
    if at < 0:
        return len(text)
    begun = text[at : at + 3]
    if len(begun) < len(_PRIVATE):
        return at if any(wanted.startswith(begun) for wanted in _WANTED) and begun not in _WANTED else len(text)
    if begun == _PRIVATE and all(each in _PARAMETERS for each in text[at + len(_PRIVATE) :]):
        return at
    return at if begun == _SOFT[:3] and len(text) == at + 3 else len(text)
