"""What a command's secrets look like in a log: each value, each of its lines, and every spelling that encoders give them. Pure."""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from runner.core.environment import looks_secret

MASK_ID: Final = "mask-1"
"""Names these rules in a settlement: another way to mask gets another name."""
MASK_ALL_ID: Final = "mask-1-all"
"""Every payload byte is masked: the secrets were not to be had."""
NEEDLE_BYTES_MIN: Final = 6
"""Shorter values are common words and numbers: masked, they would spoil a log and tell what the secret is."""
PIECE_BYTES: Final = 1024
"""A longer value is looked for in pieces of this: it bounds what is held back, and a spelling is at most six times as long."""
NEEDLES_MAX: Final = 8192
"""As thirty private keys in lines have; each costs memory and time at every look, so beyond it everything is masked."""
_WORD: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."
_URI_PLAIN: Final = tuple(
    frozenset(_WORD + more)
    for more in (b"", b"~", b"*", b"~/", b"!~*'()", b"~$&+:=@", b"~$&+,/:;=@", b"!~*'();,/?:@&=+$#")
)
"""What encoders leave alone: PHP's, RFC 3986, forms, Python's quote, encodeURIComponent, Go's for parts and whole of paths, encodeURI."""
_SHELL_PLAIN: Final = frozenset(_WORD + b"@%+=:,/")
_ANSI_C: Final = {
    7: "\\a",
    8: "\\b",
    9: "\\t",
    10: "\\n",
    11: "\\v",
    12: "\\f",
    13: "\\r",
    27: "\\E",
    39: "\\'",
    92: "\\\\",
}
_GO_JSON: Final = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True, slots=True)
class Needles:
    """What is looked for; with `everything` all words of the child are masked without a look."""

    spellings: tuple[bytes, ...] = ()
    everything: bool = False

    @property
    def longest(self) -> int:
        """Length of the longest spelling."""
        return max(map(len, self.spellings), default=0)

    @property
    def redactor(self) -> str:
        """The name of what they do to a log."""
        return MASK_ALL_ID if self.everything else MASK_ID

    def __bool__(self) -> bool:
        return self.everything or bool(self.spellings)

    def __repr__(self) -> str:
        return f"Needles({len(self.spellings)} spellings, everything={self.everything})"


EVERYTHING: Final = Needles(everything=True)


def secret_values(env: Mapping[str, str], secrets: Mapping[str, bytes]) -> list[bytes]:
    """What must not be shown: every secret, and what is in the clear under a name that looks like one."""
    named = (value.encode("utf-8", "surrogateescape") for name, value in env.items() if looks_secret(name))
    return [*secrets.values(), *named]


def needles_of(values: Iterable[bytes]) -> Needles:
    """Every spelling of every value, whole and by line. Too many of them: EVERYTHING."""
    found: dict[bytes, None] = {}
    for value in values:
        parts = (value.strip(), *(line.strip() for line in value.splitlines()))
        for piece in (piece for part in dict.fromkeys(parts) for piece in _pieces(part)):
            found.update((spelling, None) for spelling in spellings(piece) if len(spelling) >= NEEDLE_BYTES_MIN)
            if len(found) > NEEDLES_MAX:
                return EVERYTHING
    return Needles(tuple(found))


def _pieces(value: bytes) -> Iterator[bytes]:
    if len(value) < NEEDLE_BYTES_MIN:
        return
    at = 0
    while at < len(value):
        end = at + PIECE_BYTES
        if len(value) - end < NEEDLE_BYTES_MIN:
            # What is left would be too short to be looked for by itself.
            end = len(value)
        while end < len(value) and value[end] & 0xC0 == 0x80 and end > at + PIECE_BYTES - 4:
            # Not within a character: some spellings are of characters.
            end -= 1
        yield value[at:end]
        at = end


def spellings(value: bytes) -> Iterator[bytes]:
    """`value` as it is, and as encoders write it inside whatever else they encode."""
    yield value
    yield from _base64(value)
    yield from (value.hex().encode(), value.hex().upper().encode())
    for plain in _URI_PLAIN:
        for form in (b"%%%02X", b"%%%02x"):
            quoted = b"".join(bytes((one,)) if one in plain else form % one for one in value)
            yield from (quoted, quoted.replace(b"%20", b"+"))
    yield from _shell(value)
    for quote, apostrophe in ((b"&quot;", b"&apos;"), (b"&quot;", b"&#x27;"), (b"&#34;", b"&#39;")):
        markup = value.replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;")
        yield from (markup, markup.replace(b'"', quote).replace(b"'", apostrophe))
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return
    for ascii_only in (True, False):
        escaped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        for written in (escaped, escaped.replace("/", "\\/"), escaped.translate(_GO_JSON)):
            yield written.encode()


def _base64(value: bytes) -> Iterator[bytes]:
    """The characters that depend on `value` alone, for each of the three places it can begin at in what is encoded."""
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + value)
        own = encoded[(0, 2, 3)[shift] : (shift + len(value)) * 8 // 6]
        yield from (own, own.translate(_URL_SAFE))


_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")


def _shell(value: bytes) -> Iterator[bytes]:
    """Inside '…' (as sh and as Python's shlex write it), inside "…", with backslashes, and inside $'…'."""
    yield value.replace(b"'", b"'\\''")
    yield value.replace(b"'", b"'\"'\"'")
    yield re.sub(rb'([$`"\\!])', rb"\\\1", value)
    yield re.sub(rb'([$`"\\])', rb"\\\1", value)
    yield b"".join(bytes((one,)) if one in _SHELL_PLAIN or one >= 128 else b"\\%c" % one for one in value)
    for high in (False, True):
        yield "".join(_ansi_c(one, high=high) for one in value).encode("latin-1")


def _ansi_c(one: int, *, high: bool) -> str:
    """One byte inside $'…', as bash writes it; `high`: bytes of no character of its locale are in octal, too."""
    if one in _ANSI_C:
        return _ANSI_C[one]
    return f"\\{one:03o}" if one < 32 or one == 127 or (high and one >= 128) else chr(one)


__all__ = [
    "EVERYTHING",
    "MASK_ALL_ID",
    "MASK_ID",
    "NEEDLES_MAX",
    "NEEDLE_BYTES_MIN",
    "PIECE_BYTES",
    "Needles",
    "needles_of",
    "secret_values",
    "spellings",
]
