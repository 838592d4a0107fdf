"""The identity on disk: private from the first byte, whole at every moment, verified at every start."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.errors import Reason
from protocol.keys import b64url
from protocol.keyset import KeyEntry, Role
from runner.adapters import keystore as module
from runner.adapters.keystore import Keystore
from runner.errors import Broken, ConfigError, NotEnrolled, Refused
from tests.unit.runner.planekeys import NEVER_MS, PlaneKeys, key

URL = "ws://127.0.0.1:8470/v1/runner"
PLANE = PlaneKeys()
FILES = (
    "runner.key",
    "seal.key",
    "root.json",
    "keyset.json",
    "certificate.json",
    "certificate.keyset.json",
    "plane.json",
)


def enrolled(directory: Path, plane: PlaneKeys = PLANE) -> Keystore:
    """A store after an enrolment."""
    store = Keystore(directory)
    keys = store.create_keys()
    store.keep_enrolment(plane.root, plane.keyset(), plane.certificate(*keys), URL)
    return store


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the identity will be."""
    return tmp_path / "state" / "identity"


def test_an_enrolment_is_loaded_as_it_was_kept(directory: Path) -> None:
    """Keys, root, keyset, certificate and address."""
    store = enrolled(directory)
    found = store.load()
    mine, seal_seed = store.create_keys()
    assert store.enrolled
    assert (found.key.seed, found.seal_seed, found.url, found.root) == (mine.seed, seal_seed, URL, PLANE.root)
    assert found.keyset.envelope == PLANE.keyset()
    assert found.certificate.value.runner == "rnr_1"
    assert b64url(mine.seed) not in repr(found)


def test_everything_is_private(directory: Path) -> None:
    """0700 and 0600, also under a lax umask; no temporary file stays."""
    old = os.umask(0)
    try:
        enrolled(directory)
    finally:
        os.umask(old)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(FILES, 0o600)


def test_keys_are_made_once(directory: Path) -> None:
    """A second try uses them; half of a pair is made whole; the two are not the same."""
    first = Keystore(directory).create_keys()
    assert first[0].seed != first[1]
    (directory / "seal.key").unlink()
    again = Keystore(directory).create_keys()
    assert again[0].seed == first[0].seed
    assert again[1] != first[1]
    assert (directory / "runner.key").read_text() == b64url(first[0].seed) + "\n"


def _seed(directory: str) -> bytes:
    return Keystore(Path(directory)).create_keys()[0].seed


@pytest.mark.slow
def test_many_that_make_keys_at_once_have_one(directory: Path) -> None:
    """The first one counts for all."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_seed, [str(directory)] * 16, chunksize=1))) == 1


@pytest.mark.parametrize("name", FILES)
def test_without_one_of_its_files_there_is_no_enrolment(directory: Path, name: str) -> None:
    """Half an enrolment is none."""
    store = enrolled(directory)
    (directory / name).unlink()
    with pytest.raises(NotEnrolled, match=name):
        store.load()


def test_without_a_directory_there_is_no_enrolment(directory: Path) -> None:
    """And looking makes none."""
    store = Keystore(directory)
    assert not store.enrolled
    with pytest.raises(NotEnrolled):
        store.load()
    assert not directory.exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", [0o604, 0o640, 0o700])
def test_a_file_open_to_others_is_refused_with_the_way_out(directory: Path, name: str, mode: int) -> None:
    """File, found and expected mode, and the command that puts it right."""
    store = enrolled(directory)
    path = directory / name
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        store.load()
    assert caught.value.place == str(path)
    assert all(part in caught.value.expected for part in (f"{mode:04o}", "0600", f"chmod 600 {path}"))
    path.chmod(0o600)
    store.load()


def test_a_directory_open_to_others_is_refused(directory: Path) -> None:
    """Also for making keys."""
    store = enrolled(directory)
    directory.chmod(0o755)
    for doing in (store.load, store.create_keys):
        with pytest.raises(ConfigError, match=f"chmod 700 {directory}"):
            doing()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["", "runner.key"])
def test_a_file_of_somebody_else_is_refused(directory: Path, name: str) -> None:
    """Nobody else makes our identity."""
    store = enrolled(directory)
    os.chown(directory / name, 12345, 12345)
    with pytest.raises(ConfigError, match="found 12345"):
        store.load()


def _as_link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def _as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("spoil", [_as_link, _as_fifo, lambda path: (path.unlink(), path.mkdir())])
def test_what_is_no_plain_file_is_refused(directory: Path, spoil: Callable[[Path], object]) -> None:
    """A link, a pipe, a directory."""
    store = enrolled(directory)
    spoil(directory / "runner.key")
    with pytest.raises(ConfigError, match=r"runner\.key"):
        store.load()


def test_a_linked_directory_is_refused(directory: Path) -> None:
    """Whoever can move the link would choose the identity."""
    store = enrolled(directory)
    _as_link(directory)
    with pytest.raises(ConfigError, match="no link"):
        store.load()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"x" * 300_000])
def test_damage_is_named_and_shows_nothing_of_the_file(directory: Path, name: str, content: bytes) -> None:
    """Whatever is damaged, the error names it."""
    store = enrolled(directory)
    (directory / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        store.load()
    assert caught.value.place == str(directory / name)


def test_files_of_another_plane_do_not_fit(directory: Path) -> None:
    """Root, keyset, certificate and key hold together."""
    store = enrolled(directory)
    other = PlaneKeys(2)
    for name, content in (
        ("root.json", other.root.dump()),
        ("keyset.json", other.keyset()),
        ("certificate.json", other.certificate(*store.create_keys())),
        ("certificate.json", PLANE.certificate(key(7), b"s" * 32)),
    ):
        kept = (directory / name).read_bytes()
        (directory / name).write_bytes(content)
        with pytest.raises(ConfigError):
            store.load()
        (directory / name).write_bytes(kept)
    store.load()


def test_a_full_disk_says_so_and_changes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyset of before is there, and no temporary file."""
    store = enrolled(directory)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Broken) as caught:
        store.keep(PLANE.opened_keyset(2), None)
    assert caught.value.reason is Reason.DISK_FULL
    assert store.load().keyset.value.version == 1
    assert {path.name for path in directory.iterdir()} == set(FILES)


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    """Before any key is made."""
    (tmp_path / "identity").touch()
    with pytest.raises(ConfigError, match="directory"):
        Keystore(tmp_path / "identity").create_keys()


def test_an_expired_keyset_is_loaded(directory: Path) -> None:
    """Expiry is judged by the plane's clock, elsewhere."""
    assert enrolled(directory).load().keyset.value.exp == 2000


def test_a_newer_keyset_is_kept_and_an_older_one_refused(directory: Path) -> None:
    """Also a twin under the same version."""
    store = enrolled(directory)
    store.keep(PLANE.opened_keyset(3), None)
    store.keep(PLANE.opened_keyset(3), None)
    for keyset in (PLANE.opened_keyset(2), PLANE.opened_keyset(3, exp=3000)):
        with pytest.raises(Refused) as caught:
            store.keep(keyset, None)
        assert caught.value.reason is Reason.KEYSET_TOO_OLD
    assert store.load().keyset.value.version == 3


def test_a_certificate_outlives_the_key_that_signed_it(directory: Path) -> None:
    """A keyset without the enrol key of then makes no runner homeless."""
    store = enrolled(directory)
    entry = KeyEntry(x=key(50).public.x, roles=[Role.ENROL], nbf=0, naf=NEVER_MS)
    store.keep(PLANE.opened_keyset(2, keys=[entry]), None)
    found = store.load()
    assert (found.keyset.value.version, found.certificate.value.inc) == (2, 1)


def test_a_new_incarnation_is_kept_and_an_earlier_one_refused(directory: Path) -> None:
    """Incarnations only rise."""
    store = enrolled(directory)
    keys = store.create_keys()
    store.keep(PLANE.opened_keyset(2), PLANE.opened_certificate(*keys, inc=3))
    assert store.load().certificate.value.inc == 3
    with pytest.raises(Refused) as caught:
        store.keep(PLANE.opened_keyset(3), PLANE.opened_certificate(*keys, inc=2))
    assert caught.value.reason is Reason.STALE_INC
    found = store.load()
    assert (found.keyset.value.version, found.certificate.value.inc) == (2, 3)


@pytest.mark.parametrize("dies_at", range(1, 4))
def test_a_crash_inside_keep_leaves_an_identity(directory: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    """Die before each rename: the old or the new certificate, always one that opens."""
    store = enrolled(directory)
    keys = store.create_keys()
    renames = 0
    rename = os.rename

    def dying(*args: object, **kwargs: object) -> None:
        nonlocal renames
        renames += 1
        if renames == dies_at:
            raise KeyboardInterrupt
        rename(*args, **kwargs)  # type: ignore[arg-type]

    newer = PlaneKeys()
    newer.enrol_key = key(60)
    keyset = newer.opened_keyset(2)
    certificate = module.open_certificate(newer.certificate(*keys, inc=2), keyset.value)
    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        store.keep(keyset, certificate)
    monkeypatch.undo()
    found = store.load()
    assert (found.keyset.value.version, found.certificate.value.inc) == {1: (1, 1), 2: (2, 1), 3: (2, 2)}[dies_at]
    store.keep(keyset, certificate)
    assert store.load().certificate.value.inc == 2


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_a_crash_inside_an_enrolment_leaves_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Never a mixture of two planes; the same keys can enrol again."""
    store = enrolled(directory)
    keys, other = store.create_keys(), PlaneKeys(2)
    writes = 0
    write = Keystore._replace

    def dying(self: Keystore, fd: int, name: str, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == dies_at:
            raise KeyboardInterrupt
        write(self, fd, name, content)

    monkeypatch.setattr(Keystore, "_replace", dying)
    with pytest.raises(KeyboardInterrupt):
        store.keep_enrolment(other.root, other.keyset(), other.certificate(*keys), URL)
    monkeypatch.undo()
    assert not store.enrolled
    with pytest.raises(NotEnrolled):
        store.load()
    store.keep_enrolment(other.root, other.keyset(), other.certificate(*keys), URL)
    assert store.load().root == other.root
