"""A log whose shim deletes segments while it is read."""

from pathlib import Path

import pytest

from runner.adapters import spool
from runner.adapters.spool import Hole, SpoolReader
from tests.support.spool import Spool


def test_a_segment_that_goes_before_it_is_opened_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, and gone: the next listing shows what is missing."""
    log = Spool(tmp_path / "log")
    for _ in range(3):
        log.roll()
        log.write(b"x" * 100)
    list_bases = spool.segment_bases

    def late(directory: Path) -> list[int]:
        found = list_bases(directory)
        log.path(log.bases[1]).unlink(missing_ok=True)
        return found

    reader = SpoolReader(tmp_path / "log")
    monkeypatch.setattr(spool, "segment_bases", late)
    found = reader.read(log.bases[1], 1 << 20)
    assert found == Hole(log.bases[1], log.bases[2])
    reader.close()


def test_segments_that_always_go_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for a bounded number of times."""
    log = Spool(tmp_path / "log")
    log.write(b"x")
    looks = []
    monkeypatch.setattr(spool, "segment_bases", lambda _: looks.append(1) or [0])
    log.path(0).unlink()
    with pytest.raises(FileNotFoundError):
        SpoolReader(tmp_path / "log").read(0, 1 << 20)
    assert 0 < len(looks) <= spool.LOOKS_MAX * 2
