"""Names that reach git: which branches we make, which bases we look up, and what a checkout directory is called.

git's own rules (git-check-ref-format) let through bidirectional overrides, `@{…}` look-alikes and pseudo refs, so our profile is
narrower: what passes here means the same to every git command, shell listing and reviewer.
"""

import re
from typing import Final

BRANCH_CHARS_MAX: Final = 200
"""Leaves room for `.lock` and the reflog's own directory in a 255-byte file name."""
BASE_CHARS_MAX: Final = 256
CHECKOUT_CHARS_MAX: Final = 100
"""A directory name in every prompt and every path below it."""
CHECKOUT_FALLBACK: Final = "repo"

_SAFE_COMPONENT: Final = re.compile(r"[A-Za-z0-9._+=#@-]+")
_PSEUDO_REF: Final = re.compile(r"@|HEAD|[A-Z_]+_HEAD|refs|stash", re.IGNORECASE)
_OBJECT_ID: Final = re.compile(r"[0-9a-f]{7,64}", re.IGNORECASE)
_UNSAFE_IN_CHECKOUT: Final = re.compile(r"[^A-Za-z0-9._-]+")


def branch_fault(name: str) -> str | None:
    """Why `name` (without `refs/heads/`) may not be made as a branch, or None when it may."""
    if not 0 < len(name) <= BRANCH_CHARS_MAX:
        return f"must have 1 to {BRANCH_CHARS_MAX} characters"
    if not name.isascii() or not name.isprintable() or " " in name:
        return "must be printable ASCII without spaces"
    if name.startswith("-"):
        return "must not begin with '-'"
    if _OBJECT_ID.fullmatch(name):
        return "must not look like an object id"
    if ".." in name or "@{" in name:
        return "must not contain '..' or '@{'"
    components = name.split("/")
    if _PSEUDO_REF.fullmatch(components[0]) and (len(components) == 1 or components[0].lower() == "refs"):
        return "must not be a name that git gives a meaning"
    return next((fault for part in components if (fault := _component_fault(part))), None)


def base_fault(base: str) -> str | None:
    """Why `base` cannot be looked up as a revision, or None: git decides the rest behind `--end-of-options`."""
    if not 0 < len(base) <= BASE_CHARS_MAX:
        return f"must have 1 to {BASE_CHARS_MAX} characters"
    if not base.isprintable():
        return "must be printable"
    if base.startswith("-"):
        return "must not begin with '-'"
    return None


def is_object_id(text: str) -> bool:
    """Whether `text` is a full SHA-1 object id as git prints it."""
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def checkout_name(repo_path: str) -> str:
    """The checkout's directory name for a repository: its own name made of [A-Za-z0-9._-], never hidden, never empty."""
    name = repo_path.rstrip("/").rpartition("/")[2]
    name = _UNSAFE_IN_CHECKOUT.sub("-", name.removesuffix(".git"))
    # A leading dot would hide it, and could make it `.`, `..`, `.git` or the ownership marker; a leading dash is an option.
    return name.lstrip(".-")[:CHECKOUT_CHARS_MAX] or CHECKOUT_FALLBACK


def _component_fault(part: str) -> str | None:
    if not part:
        return "must not contain empty components"
    if part[0] in ".-" or part.endswith("."):
        return "components must not begin with '.' or '-', nor end with '.'"
    if part.lower().endswith(".lock"):
        return "components must not end with '.lock'"
    if not _SAFE_COMPONENT.fullmatch(part):
        return "components are made of letters, digits and ._+=#@-"
    return None
