"""Names of things: what an id may look like, and the types that keep them apart."""

import re
from typing import Final, NamedTuple, NewType

from protocol.limits import ID_LENGTH_MAX

OrgId = NewType("OrgId", str)
RunnerId = NewType("RunnerId", str)
ExecutionId = NewType("ExecutionId", str)
WorktreeId = NewType("WorktreeId", str)
CommandId = NewType("CommandId", str)
SessionId = NewType("SessionId", str)
KeyId = NewType("KeyId", str)
Digest = NewType("Digest", str)
"""`sha256:` and 64 hex digits."""
FencingToken = NewType("FencingToken", int)

ID_PATTERN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{ID_LENGTH_MAX}}}")
DIGEST_PATTERN: Final = re.compile(r"sha256:[0-9a-f]{64}")
GENESIS: Final = Digest("sha256:" + "0" * 64)
"""`prev` of the first command of a stream."""

_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARS: Final = 10
_RANDOM_CHARS: Final = 16
ENTROPY_BYTES: Final = 10
"""What `new_id` wants: 80 random bits, as in a ULID."""


class Attempt(NamedTuple):
    """One try of an execution, fixed for life; every statement about it carries both parts."""

    execution_id: ExecutionId
    start_token: FencingToken

    @property
    def name(self) -> str:
        """The attempt as one word: directory name and log channel key."""
        return f"{self.execution_id}.{self.start_token}"

    @classmethod
    def parse(cls, name: str) -> "Attempt":
        """Read `name` back. Raises ValueError when it is no attempt's name."""
        execution_id, dot, token = name.rpartition(".")
        if not dot or not ID_PATTERN.fullmatch(execution_id) or not re.fullmatch(r"[1-9][0-9]{0,15}", token):
            raise ValueError("not an attempt name")
        return cls(ExecutionId(execution_id), FencingToken(int(token)))


def is_id(text: str) -> bool:
    """Whether `text` may name anything: ASCII letters, digits, `_` and `-`, 1 to 64 of them."""
    return ID_PATTERN.fullmatch(text) is not None


def new_id(prefix: str, now_ms: int, entropy: bytes) -> str:
    """Make an id that sorts by time: `prefix_` and a ULID in lower case. `entropy` is 10 random bytes."""
    if len(entropy) != ENTROPY_BYTES:
        raise ValueError("new_id wants 10 bytes of entropy")
    moment = _base32(now_ms, _TIME_CHARS)
    return f"{prefix}_{moment}{_base32(int.from_bytes(entropy, 'big'), _RANDOM_CHARS)}"


def _base32(number: int, width: int) -> str:
    return "".join(_CROCKFORD[(number >> shift) & 31] for shift in range(5 * (width - 1), -1, -5))
