"""What a terminal would answer, taken out of output that is shown a second time: the answers would be typed into the shell. Pure.

Taken out: ENQ; DECID; CSI: DSR, DA, DECRQM, XTVERSION, kitty's keyboard flags, window reports, terminal parameters, locator,
checksums and other reports of state; OSC: colours, clipboard, fonts and features that are asked for; DCS: DECRQSS, XTGETTCAP;
APC: kitty's graphics probe. Everything else is left as it is, byte for byte.
"""

import re
from typing import Final

from terminal.sequences import CONTROL, PARAMETER_BYTES_MAX, STRING_BYTES_MAX, unfinished

_BOUNDS: Final = {
    b"c": CONTROL,
    # Parameters, intermediates, and control characters among them.
    b"csi": rb"[\x00-\x17\x19\x1c-\x1f\x20-\x3f\x7f]{0,%d}+" % PARAMETER_BYTES_MAX,
    b"dcs": rb"[\x00-\x17\x19\x1c-\x1f0-9:;\x7f]{0,%d}+" % PARAMETER_BYTES_MAX,
    b"osc": rb"[^\x07\x18\x1a\x1b]{0,%d}+" % STRING_BYTES_MAX,
    b"string": rb"[^\x18\x1a\x1b]{0,%d}+" % STRING_BYTES_MAX,
    # A string is over at its terminator, or where ESC begins something else; that is left.
    b"end": rb"(?:\x1b\\|(?=\x1b))",
}
_SUSPECT: Final = re.compile(
    rb"\x05|\x1b%(c)s(?:Z|\[(?P<csi>%(csi)s[cnpqtuxvwy|]|%(c)s\?%(csi)s[Sm])|\](?P<osc>%(osc)s)(?:\x07|%(end)s)"
    rb"|P%(dcs)s[$+]%(c)sq%(string)s%(end)s|_%(c)sG(?P<apc>%(string)s)%(end)s)" % _BOUNDS
)
_PENDING: Final = re.compile(
    rb"\x1b%(c)s(?:\[%(csi)s|\]%(osc)s\x1b?|P%(dcs)s(?:[$+]%(c)s(?:q%(string)s\x1b?)?)?"
    rb"|_%(c)s(?:G%(string)s\x1b?)?)?\Z" % _BOUNDS
)
_PENDING_BYTES_MAX: Final = STRING_BYTES_MAX + 2 * PARAMETER_BYTES_MAX
_CONTROLS: Final = re.compile(rb"[\x00-\x17\x19\x1c-\x1f\x7f]+")
_CSI_QUERY: Final = re.compile(
    rb"(?:[56]|\?[0-9;]*)n|[>=]?[0-9;]*c|\??[0-9;]*\$p|>[0-9;]*q|\?[0-9;]*u|[0-9;]*[$&]u|(?:1[1345689]|2[01])(?:;[0-9;]*)?t"
    rb"|[01]?x|\?[0-9;]*[Sm]|[0-9]*\"v|[0-9]*\$w|[0-9;]*\*y|[0-9;]*#\||[0-9]*'\|"
)
_OSC_ASKS: Final = re.compile(
    rb"(?:4|5|1[0-9]|21|22|50|52|99)(?:;[^;]*)*?;(?:[^;]*=)?\?[^;]*(?:;.*)?|(?:60|61|62)(?:;.*)?|1337;Report.*",
    re.DOTALL,
)
_APC_ASKS: Final = re.compile(rb"(?:[^;]*,)?a=q(?:[,;].*)?", re.DOTALL)
_NOTHING: Final = b"\x1b\\"
"""A terminator of nothing: ends what a query would have ended, and does nothing else."""


class Stripper:
    """Takes queries out of output that comes in pieces, cut anywhere; holds back at most what may yet become one."""

    def __init__(self) -> None:
        self._held = b""
        self._open = b""
        """The sequence that what was given out has begun and not ended."""

    def feed(self, data: bytes) -> bytes:
        """What can be shown of it."""
        text = self._held + data
        pending = _PENDING.search(text, max(0, len(text) - _PENDING_BYTES_MAX))
        whole = len(text) if pending is None else pending.start()
        self._held = text[whole:]
        return self._give(text, whole)

    def flush(self) -> bytes:
        """What was held back, at the end."""
        held, self._held = self._held, b""
        return self._give(held, len(held))

    def _give(self, text: bytes, whole: int) -> bytes:
        """What can be shown of `text` up to `whole`; what is behind it tells where a string ends."""
        parts: list[bytes] = []
        at = 0
        for match in _SUSPECT.finditer(text):
            if match.start() >= whole:
                break
            if (left := _left_of(match)) is not None:
                parts.append(text[at : match.start()])
                self._open = unfinished(self._open + parts[-1])
                # What the ESC of the query would have ended must not be completed by what comes behind it.
                ends = match[0][0] == 0x1B and self._open
                parts.append((_NOTHING if ends else b"") + left)
                self._open = b"" if ends else self._open
                at = match.end()
        parts.append(text[at:whole])
        self._open = unfinished(self._open + parts[-1])
        return b"".join(parts)


def _left_of(match: "re.Match[bytes]") -> bytes | None:
    """What stays of a sequence that looks like a query: its control characters, if it is one; None: it is none."""
    csi, osc, apc = match["csi"], match["osc"], match["apc"]
    if csi is not None and not _CSI_QUERY.fullmatch(_CONTROLS.sub(b"", csi)):
        return None if b"\x05" not in match[0] else match[0].replace(b"\x05", b"")
    if osc is not None and not _OSC_ASKS.fullmatch(_CONTROLS.sub(b"", osc)):
        return None
    if apc is not None and not _APC_ASKS.fullmatch(_CONTROLS.sub(b"", apc)):
        return None
    if match[0] == b"\x05" or csi is None:
        return b""
    return b"".join(_CONTROLS.findall(csi)).replace(b"\x05", b"")
