"""The base of everything that is written as JSON: what is refused and what is ignored.

`Closed` models are signed orders and refuse what they do not know: never run what is half understood.
`Open` models tell something and ignore what they do not know, so that a newer peer can say more.
"""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from protocol import strict_json
from protocol.ids import DIGEST_PATTERN, ID_PATTERN
from protocol.limits import DETAIL_CHARS_MAX, JSON_INT_MAX, PATH_BYTES_MAX, PAYLOAD_BYTES_MAX


class _Wire(BaseModel):
    # `defer_build` below: a model's validator is made when it is first used; all of them together are a fifth of a start.
    @classmethod
    def parse(cls, document: bytes, size_max: int = PAYLOAD_BYTES_MAX) -> Self:
        """Read strict JSON. Raises ValueError with a text that holds nothing of the document."""
        strict_json.loads_object(document, size_max)
        try:
            return cls.model_validate_json(document)
        except ValidationError as exc:
            raise ValueError(first_error(exc)) from None

    def dump(self) -> bytes:
        """Write compact JSON; these are the bytes that get signed."""
        return self.model_dump_json().encode("utf-8")


class Closed(_Wire):
    """A signed order: unknown fields are refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)


class Open(_Wire):
    """A statement: unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True, defer_build=True)


def first_error(exc: ValidationError) -> str:
    """Where and what, without the input: `args.argv: List should have at least 1 item`."""
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) if is_plain(str(part)) else "?" for part in error["loc"])
    # The message of this one error type quotes the tag as the peer wrote it, escape sequences and all.
    text = "Unknown type" if error["type"] == "union_tag_invalid" else error["msg"]
    return f"{place or 'document'}: {text}"[:DETAIL_CHARS_MAX]


def is_plain(text: str) -> bool:
    """Whether `text` can be shown in a message as it is: an id, nothing a terminal would obey."""
    return ID_PATTERN.fullmatch(text) is not None


def at_most_bytes(limit: int) -> AfterValidator:
    """A validator for text of at most `limit` bytes of UTF-8; a length of a `str` would count characters."""

    def check(text: str) -> str:
        if len(text.encode()) > limit:
            raise ValueError(f"longer than {limit} bytes")
        return text

    return AfterValidator(check)


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or len(text.encode()) > PATH_BYTES_MAX or ".." in text.split("/"):
        raise ValueError("not an absolute path without ..")
    return _no_nul(text)


def _relative(text: str) -> str:
    parts = text.split("/")
    if text.startswith("/") or len(text.encode()) > PATH_BYTES_MAX or ".." in parts or "" in parts:
        raise ValueError("not a relative path without .. and empty parts")
    return _no_nul(text)


Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN.pattern}$")]
ViewerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
"""Who looks at a PTY. Shorter than an id: the shim counts under it."""
DigestText = Annotated[str, Field(pattern=rf"^{DIGEST_PATTERN.pattern}$")]
Count = Annotated[int, Field(ge=0, le=JSON_INT_MAX)]
Positive = Annotated[int, Field(ge=1, le=JSON_INT_MAX)]
Millis = Annotated[int, Field(ge=0, le=JSON_INT_MAX)]
Text = Annotated[str, AfterValidator(_no_nul)]
FormatOne = Annotated[int, Field(ge=1, le=1)]
"""The only format there is. A literal would take `true` for 1."""
Detail = Annotated[str, Field(max_length=DETAIL_CHARS_MAX)]
AbsolutePath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
JsonObject = dict[str, Any]
"""An object that is judged later by its kind: never used past that judgement."""
