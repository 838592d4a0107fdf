"""Which private modes the output of a terminal has set: told by a marker, followed from there, and set again elsewhere. Pure.

The shim follows them with code of its own (`runner/shim/modes.py`, it may import nothing); a test holds the two together.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Self

ON_AT_FIRST: Final = frozenset({7, 25})
"""What a terminal that was just reset has set: lines wrap, the cursor is shown."""
SOFT: Final = (1, 6, 25, 66)
"""What a soft reset (DECSTR) puts back, beside the keypad: cursor keys, origin, cursor shown."""
ALTERNATE: Final = (47, 1047, 1049)
CURSOR_SHOWN: Final = 25
ACTS: Final = frozenset({1048})
"""Saving the cursor is an act and no state."""
MODES_MAX: Final = 64
"""A program that sets more than this is playing."""
NUMBER_DIGITS_MAX: Final = 8
PARAMETER_BYTES_MAX: Final = 60
MARKER_BYTES_MAX: Final = 4096
_SEQUENCE: Final = re.compile(rb"\x1b(?:\[\?([0-9;]{0,%d})([hl])|\[(!)p|([=>c]))" % PARAMETER_BYTES_MAX)
_BEGUN: Final = re.compile(rb"\x1b(?:\[(?:!|\?[0-9;]{0,%d})?)?\Z" % PARAMETER_BYTES_MAX)


class Modes:
    """The modes that differ from those of a terminal that was just reset; `changed` has them in the order of their setting."""

    def __init__(self, changed: Mapping[int, bool] | None = None, *, keypad: bool = False) -> None:
        self.changed: dict[int, bool] = dict(changed or {})
        self.keypad = keypad
        self._rest = b""

    @classmethod
    def from_marker(cls, payload: bytes) -> Self:
        """What the payload of a marker says; what is no mode in it is passed over."""
        try:
            told: Any = json.loads(payload) if len(payload) <= MARKER_BYTES_MAX else None
        except (ValueError, RecursionError):
            told = None
        modes = cls()
        if isinstance(told, dict):
            found = told.get("modes")
            for name, on in found.items() if isinstance(found, dict) else ():
                if name.isascii() and name.isdigit() and isinstance(on, bool):
                    modes._set(int(name[:NUMBER_DIGITS_MAX]), on=on)
            modes.keypad = told.get("keypad") is True
        return modes

    @property
    def alternate(self) -> bool:
        """Whether the alternate screen is shown."""
        return any(self.changed.get(mode, False) for mode in ALTERNATE)

    def copy(self) -> "Modes":
        """As they are now."""
        return Modes(self.changed, keypad=self.keypad)

    def feed(self, data: bytes) -> None:
        """Take output as it comes, cut anywhere."""
        text = self._rest + data
        for match in _SEQUENCE.finditer(text):
            self._obey(match)
        begun = _BEGUN.search(text, max(0, len(text) - PARAMETER_BYTES_MAX - 3))
        self._rest = b"" if begun is None else begun[0]

    def setting(self) -> bytes:
        """What makes a terminal that was just reset have these modes: its screen first, whether its cursor shows last."""
        modes = sorted(self.changed.items(), key=lambda item: (item[0] not in ALTERNATE, item[0] == CURSOR_SHOWN))
        keypad = [b"\x1b="] if self.keypad else []
        said = [_worded(mode, on=on) for mode, on in modes]
        hidden = said[-1:] if CURSOR_SHOWN in self.changed else []
        return b"".join([*said[: len(said) - len(hidden)], *keypad, *hidden])

    def undoing(self) -> bytes:
        """What takes these modes back, the screen last, so that nothing else is done to the one that was there before."""
        modes = sorted(self.changed.items(), key=lambda item: item[0] in ALTERNATE)
        return b"".join([b"\x1b>" if self.keypad else b"", *(_worded(mode, on=not on) for mode, on in modes)])

    def _obey(self, match: "re.Match[bytes]") -> None:
        numbers, letter, soft, single = match.groups()
        if letter:
            for number in numbers.split(b";"):
                if number:
                    self._set(int(number[:NUMBER_DIGITS_MAX]), on=letter == b"h")
        elif soft or single == b"c":
            self.keypad = False
            for mode in SOFT if soft else list(self.changed):
                self.changed.pop(mode, None)
        else:
            self.keypad = single == b"="

    def _set(self, mode: int, *, on: bool) -> None:
        if mode in ACTS:
            return
        known = self.changed.pop(mode, None) is not None
        if on != (mode in ON_AT_FIRST) and (known or len(self.changed) < MODES_MAX):
            self.changed[mode] = on


def _worded(mode: int, *, on: bool) -> bytes:
    return b"\x1b[?%d%c" % (mode, b"h" if on else b"l")
