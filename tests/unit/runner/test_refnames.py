"""The profile of names that reach git."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.core.refnames import base_fault, branch_fault, checkout_name, is_object_id

GOOD = [
    "main",
    "feat/x",
    "vk/ab12-fix",
    "v1.2",
    "user/a_b",
    "a@b",
    "UPPER",
    "1",
    "x" * 200,
    "release-1.0/rc+2",
    "headless",
    "a#1",
]
BAD = [
    "", "x" * 201, "-x", "--upload-pack=touch", "a/-b", "HEAD", "head", "@", "FETCH_HEAD", "ORIG_HEAD", "MERGE_HEAD", "stash",
    "refs/heads/x", "refs", "REFS/x", "a..b", "a//b", "/a", "a/", ".a", "a/.b", "a.", "a./b", "a.lock", "a.lock/b", "a.LOCK",
    "a b", "a~1", "a^", "a:b", "a?b", "a*", "a[b", "a\\b", "a@{1}", "a\tb", "a\nb", "a\x00b", "a\x7f", "ä", "a\u202eb",
    "a;b", "a$b", "$(id)", "a`b", "a|b", "a<b", "a'b", 'a"b', "a&b", "deadbeef", "0" * 40, "../../etc/passwd", "..", ".",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_plain_branch_name_is_taken(name: str) -> None:
    """What people and products call branches."""
    assert branch_fault(name) is None


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_branch_name_outside_the_profile_is_not_taken(name: str) -> None:
    """What git forbids, and what git allows and nobody should meet."""
    assert branch_fault(name)


@given(st.text(alphabet="abz09/.-_@{}~^:*?[\\ lock+=#HEAD", max_size=30))
def test_what_the_profile_takes_git_takes(name: str) -> None:
    """The profile is narrower than git's own check, never wider."""
    if branch_fault(name) is None:
        done = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False, cwd="/")
        assert done.returncode == 0, name


@given(st.text(max_size=60))
def test_a_checkout_name_is_one_plain_component(path: str) -> None:
    """It is not hidden, no option, and never leads anywhere."""
    name = checkout_name("/src/" + path)
    assert name and "/" not in name and name[0] not in ".-" and len(name) <= 100 and name.isascii()


CALLED = {
    "/s/repo": "repo",
    "/s/repo.git": "repo",
    "/s/.git": "repo",
    "/s/a b": "a-b",
    "/s/.dot": "dot",
    "/": "repo",
    "/s/..": "repo",
}


@pytest.mark.parametrize(("path", "name"), CALLED.items())
def test_a_checkout_is_called_like_its_repository(path: str, name: str) -> None:
    """As far as that is a safe name."""
    assert checkout_name(path) == name


def test_a_base_is_never_an_option_nor_invisible() -> None:
    """git judges the rest."""
    assert all(map(base_fault, ["", "-x", "--all", "a\nb", "a\x00", "x" * 257]))
    assert not any(map(base_fault, ["HEAD~1", "v1", "origin/main", "a" * 40, "main@{1}", "ü"]))


def test_an_object_id_is_forty_small_hex_digits() -> None:
    """Nothing shorter, nothing else."""
    assert is_object_id("0123456789" * 4)
    assert not any(map(is_object_id, ["", "0" * 39, "0" * 41, "A" * 40, "0" * 40 + "\n"]))
