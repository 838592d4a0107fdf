"""Secrets on disk."""

import os
import stat
from pathlib import Path

import pytest

from controlplane.errors import StartRefused
from controlplane.keys import lock_directory, open_keys
from controlplane.limits import KEYSET_TTL_MS
from protocol.keyset import Role, newer, open_keyset

NOW = 1_795_000_000_000
SECRETS = ["root.key", "command.key", "join.key", "admin.token"]


def test_the_first_start_makes_every_secret_private(tmp_path: Path) -> None:
    """0600, and the key set opens under the root."""
    keys = open_keys(tmp_path, NOW, os.urandom)
    assert keys.first_start
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in SECRETS)
    keyset = open_keyset(keys.keyset.envelope, keys.root).value
    assert set(keyset.keys_for(Role.COMMAND, Role.SAFETY, Role.ENROL)) == {keys.command.key_id}


def test_the_second_start_finds_the_same(tmp_path: Path) -> None:
    """Nothing is made again."""
    first, second = open_keys(tmp_path, NOW, os.urandom), open_keys(tmp_path, NOW + 1000, os.urandom)
    assert not second.first_start
    assert (first.root, first.admin_token, first.org) == (second.root, second.admin_token, second.org)
    assert first.keyset.digest == second.keyset.digest


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    """With the file, its mode and what to do."""
    open_keys(tmp_path, NOW, os.urandom)
    (tmp_path / name).chmod(mode)
    with pytest.raises(StartRefused, match=rf"{name} has mode {mode:04o}"):
        open_keys(tmp_path, NOW, os.urandom)


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    """It is not replaced by a new one."""
    open_keys(tmp_path, NOW, os.urandom)
    (tmp_path / "root.key").write_text("short")
    with pytest.raises(StartRefused, match=r"root\.key"):
        open_keys(tmp_path, NOW, os.urandom)


def test_a_keyset_of_another_root_is_refused(tmp_path: Path) -> None:
    """Files of two control planes do not mix."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        open_keys(tmp_path / name, NOW, os.urandom)
    (tmp_path / "a" / "keyset.json").write_bytes((tmp_path / "b" / "keyset.json").read_bytes())
    with pytest.raises(StartRefused, match=r"keyset\.json"):
        open_keys(tmp_path / "a", NOW, os.urandom)


def test_a_keyset_is_renewed_when_a_third_of_its_life_is_left(tmp_path: Path) -> None:
    """The next version is one that a runner takes; before that nothing happens."""
    first = open_keys(tmp_path, NOW, os.urandom)
    early = open_keys(tmp_path, NOW + KEYSET_TTL_MS // 2, os.urandom)
    late = open_keys(tmp_path, NOW + KEYSET_TTL_MS * 3 // 4, os.urandom)
    assert early.keyset.value.version == 1
    assert newer(first.keyset, late.keyset).value.version == 2
    assert open_keys(tmp_path, NOW + KEYSET_TTL_MS * 3 // 4, os.urandom).keyset.digest == late.keyset.digest


def test_a_command_signed_before_the_renewal_still_counts(tmp_path: Path) -> None:
    """The key's window is kept, so an `iat` of yesterday lies inside it."""
    first = open_keys(tmp_path, NOW, os.urandom)
    second = first.renewed(NOW + KEYSET_TTL_MS // 2)
    assert second.keyset.value.admits(first.command.key_id, Role.COMMAND, NOW) is None


def test_a_join_token_comes_back_from_its_salt_only_here(tmp_path: Path) -> None:
    """Another plane's seed makes another token."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two = (open_keys(tmp_path / name, NOW, os.urandom) for name in ("a", "b"))
    assert one.join_token(b"s" * 16) == one.join_token(b"s" * 16) != two.join_token(b"s" * 16)


def test_one_process_has_the_directory(tmp_path: Path) -> None:
    """The second is told who is in the way."""
    held = lock_directory(tmp_path / "data")
    try:
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        with pytest.raises(StartRefused, match="another control plane"):
            lock_directory(tmp_path / "data")
    finally:
        os.close(held)
