"""Which reader a log gets, and what a settlement says of its copy: with secrets from the plan, from files and journal, and without."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import RemoteError
from protocol.ids import Attempt
from protocol.limits import DATA_SLICE_BYTES_MAX
from protocol.records import RecordKind, records
from protocol.secretbox import recipient_of, seal_secret
from runner.adapters.redacted import RedactedReader
from runner.adapters.redactor import Redactor
from runner.adapters.spool import Hole, LogReader, Slice, SpoolReader
from runner.core.needles import EVERYTHING, needles_of
from runner.core.plans import DroppedMiddle
from runner.core.redaction import REACH_BYTES
from runner.logs import EVENTS
from tests.support.builders import an_attempt
from tests.support.engine import an_exit
from tests.support.shims import a_plan
from tests.support.spool import Spool

EX = an_attempt()
RUNNER = "rnr_1"
SEED = bytes(range(32))
SECRET = b"tr0ub4dor"


class Scene:
    """A redactor over a directory, and what is around it."""

    def __init__(self, root: Path) -> None:
        self.directory = root / EX.name
        self.spool = Spool(self.directory / "log")
        self.sealed: Mapping[str, str] | None = {"TOKEN": self.seal(SECRET)}
        self.asked: list[Attempt] = []
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.redactor = self.made(2 * REACH_BYTES)

    def made(self, spare_bytes: int) -> Redactor:
        """A daemon's."""
        return Redactor(
            self.directory.parent,
            runner=RUNNER,
            seal_seed=SEED,
            sealed=self._sealed,
            note=lambda *note: self.notes.append(note),
            spare_bytes=spare_bytes,
        )

    def seal(self, value: bytes, seed: bytes = SEED) -> str:
        """As the control plane does."""
        return seal_secret(value, recipient_of(seed), RUNNER, EX, "TOKEN")

    def spec(self, **over: Any) -> None:
        """What a daemon wrote before the fork."""
        spec = {"v": 1, "secret_names": ["TOKEN"], "env": {"PATH": "/bin"}, **over}
        (self.directory / "spec.json").write_text(json.dumps(spec))

    def reader(self, *, ended: bool = True) -> LogReader:
        """What the uplink would read with."""
        return self.redactor.reader(EX.name, self.directory, ended=ended)

    def events(self) -> list[str]:
        """What was told; every name of it is in the registry."""
        names = [event for event, _ in self.notes]
        assert EVENTS.issuperset(names)
        return names

    def _sealed(self, attempt: Attempt) -> Mapping[str, str] | None:
        self.asked.append(attempt)
        return self.sealed


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Nothing is written yet."""
    return Scene(tmp_path)


def payloads(reader: LogReader) -> bytes:
    """All output that can be read."""
    found, offset, said = reader.read(reader.first(), DATA_SLICE_BYTES_MAX), 0, b""
    while found is not None:
        if isinstance(found, Slice):
            said += b"".join(r.payload for r in records(found.data, found.offset) if r.kind == RecordKind.STDOUT)
        offset = found.end
        found = reader.read(offset, DATA_SLICE_BYTES_MAX)
    reader.close()
    return said


def test_a_log_without_secrets_is_read_as_it_is(scene: Scene) -> None:
    """By the plain reader, and its record stays what it was; nobody is asked for secrets."""
    scene.redactor.learn(a_plan(), {})
    assert isinstance(scene.reader(), SpoolReader) and not scene.redactor.masks(EX)
    scene.redactor.forget(EX)
    scene.spec(secret_names=[])
    assert isinstance(scene.reader(), SpoolReader)
    record = an_exit()
    assert scene.redactor.completed(EX, record) is record and scene.asked == []


def test_secrets_come_from_the_plan_and_after_a_restart_from_the_journal(scene: Scene) -> None:
    """With both the same bytes are masked."""
    scene.spec()
    scene.spool.write(b"it is " + SECRET)
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    assert payloads(scene.reader()) == b"it is *********"
    scene.redactor.forget(EX)
    assert payloads(scene.reader()) == b"it is *********" and scene.asked == [EX]
    assert scene.redactor.needles(EX.name) == needles_of([SECRET]) and scene.asked == [EX]


def test_a_value_in_the_clear_under_a_secret_name_is_masked(scene: Scene) -> None:
    """By its spec; the journal is not asked."""
    scene.spec(secret_names=[], env={"LC_TOKEN": "tr0ub4dor"})
    scene.spool.write(SECRET)
    assert payloads(scene.reader()) == b"*********" and scene.asked == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scene: setattr(scene, "sealed", None),
        lambda scene: setattr(scene, "sealed", {}),
        lambda scene: setattr(scene, "sealed", {"TOKEN": scene.seal(SECRET, bytes(32))}),
        lambda scene: (scene.directory / "spec.json").unlink(),
        lambda scene: (scene.directory / "spec.json").write_text("{"),
        lambda scene: scene.spec(v=2),
        lambda scene: scene.spec(secret_names=None),
        lambda scene: scene.spec(env={"PATH": 1}),
    ],
    ids=[
        "no command",
        "another command",
        "another key",
        "no spec",
        "no JSON",
        "a later format",
        "no names",
        "no environment",
    ],
)
def test_secrets_that_cannot_be_had_hide_everything(scene: Scene, spoil: Any) -> None:
    """Whatever is missing; the owner is told, once."""
    scene.spec()
    spoil(scene)
    scene.spool.write(b"anything at all")
    assert payloads(scene.reader()) == b"*" * 15
    assert scene.redactor.needles(EX.name) is EVERYTHING and scene.events() == ["log.masked"]
    copy = scene.redactor.completed(EX, an_exit()).uploaded
    assert copy is not None and copy.redactor == "mask-1-all"


def test_the_end_of_an_attempt_lets_go_what_was_held_back(scene: Scene) -> None:
    """Until then a bell is wanted for what comes behind what was looked at, not behind what was sent."""
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    scene.spool.write(b"sent")
    held = scene.spool.end
    scene.spool.write(b"ends in tr0")
    reader = scene.reader(ended=False)
    found = reader.read(0, DATA_SLICE_BYTES_MAX)
    assert isinstance(found, Slice) and found.end == held
    assert reader.read(held, DATA_SLICE_BYTES_MAX) is None
    assert scene.redactor.looked(EX.name, held) == scene.spool.end
    scene.redactor.ended(EX)
    found = reader.read(held, DATA_SLICE_BYTES_MAX)
    assert isinstance(found, Slice) and found.end == scene.spool.end
    reader.close()


def test_what_is_looked_back_at_is_kept(scene: Scene) -> None:
    """Of a masked log, while it is on its way up, and where a spool has room for it."""
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    acked = 3 * REACH_BYTES
    assert scene.redactor.kept_from(EX.name, acked) == acked
    reader = scene.reader()
    assert scene.redactor.kept_from(EX.name, acked) == acked - REACH_BYTES
    assert scene.redactor.kept_from(EX.name, 5) == 0
    del reader
    small = scene.made(2 * REACH_BYTES - 1)
    small.learn(a_plan(), {"TOKEN": SECRET})
    reader = small.reader(EX.name, scene.directory)
    assert small.kept_from(EX.name, acked) == acked and reader.first() == 0
    assert scene.redactor.kept_from(EX.name, acked) == acked == scene.redactor.looked(EX.name, acked)


def test_a_record_names_what_its_copy_adds_up_to(scene: Scene) -> None:
    """As it is read; where nothing had to be masked it names nothing."""
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    scene.spool.write(b"plain\n")
    assert scene.redactor.completed(EX, an_exit()).uploaded is None
    scene.spool.write(SECRET + b"\n")
    copy = scene.redactor.completed(EX, an_exit()).uploaded
    said = payloads(scene.reader())
    assert said == b"plain\n*********\n"
    assert copy is not None and copy.redactor == "mask-1"
    assert copy.streams["stdout"] == (len(said), hashlib.sha256(said).hexdigest())
    assert copy.streams["stderr"] == (0, hashlib.sha256().hexdigest())


def test_the_copy_of_a_pty_is_masked_and_its_frame_is_not(scene: Scene) -> None:
    """A secret that comes in two gathers, with a resize between them; sizes and modes go up as they are, and one stream is named."""
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    modes = b'{"modes":{"2004":true},"tr0ub4dor":1}'
    scene.spool.write(b"\x18\x00\x50\x00", RecordKind.RESIZE)
    scene.spool.write(modes, RecordKind.MARKER)
    scene.spool.write(b"$ echo tr0ub", RecordKind.PTY)
    scene.spool.write(b"\x19\x00\x50\x00", RecordKind.RESIZE)
    scene.spool.write(b"4dor\r\n", RecordKind.PTY)
    found = scene.reader().read(0, DATA_SLICE_BYTES_MAX)
    assert isinstance(found, Slice)
    sent = [(record.kind, record.payload) for record in records(found.data, 0)][1:]
    assert sent == [
        (RecordKind.RESIZE, b"\x18\x00\x50\x00"),
        (RecordKind.MARKER, modes),
        (RecordKind.PTY, b"$ echo *****"),
        (RecordKind.RESIZE, b"\x19\x00\x50\x00"),
        (RecordKind.PTY, b"****\r\n"),
    ]
    copy = scene.redactor.completed(EX, an_exit(streams={"pty": (19, "00" * 32)})).uploaded
    text = b"$ echo *********\r\n"
    assert copy is not None and copy.streams == {"pty": (len(text), hashlib.sha256(text).hexdigest())}


def test_of_a_copy_that_cannot_be_added_up_no_stream_is_named(scene: Scene) -> None:
    """Its beginning or its middle made room, or it cannot be read: the copy may hold what is not here any more."""
    scene.redactor.learn(a_plan(), {"TOKEN": SECRET})
    scene.spool.write(b"x")
    gone = DroppedMiddle(start=1, end=2, segments=1, before="00" * 32, last="00" * 32)
    told = [scene.redactor.completed(EX, an_exit(dropped=gone)).uploaded]
    scene.spool.roll()
    scene.spool.write(b"y")
    scene.spool.drop(0)
    told.append(scene.redactor.completed(EX, an_exit()).uploaded)
    scene.spool.path(scene.spool.bases[1]).write_bytes(b"no log at all, but long enough")
    scene.spool.path(0).write_bytes(b"no log at all, but long enough")
    told.append(scene.redactor.completed(EX, an_exit()).uploaded)
    assert [copy is not None and (copy.redactor, copy.streams) for copy in told] == [("mask-1", {})] * 3
    assert scene.events() == ["log.failed"]


def test_reading_begins_at_records_only(scene: Scene) -> None:
    """A plane that asks from within one is refused; one that asks behind the end waits; a hole is a hole."""
    scene.spool.write(SECRET)
    scene.spool.roll(40)
    end = scene.spool.end
    hole = scene.spool.bases[1] - 40
    reader = RedactedReader(scene.directory / "log", needles_of([SECRET]), ended=True)
    with pytest.raises(RemoteError):
        reader.read(hole - 3, DATA_SLICE_BYTES_MAX)
    assert reader.read(end, DATA_SLICE_BYTES_MAX) is None
    assert reader.read(hole, DATA_SLICE_BYTES_MAX) == Hole(hole, hole + 40) and reader.read(hole + 4, 99) == Hole(
        hole + 4, hole + 40
    )
    reader.close()
