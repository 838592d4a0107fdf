"""`runner logs --verify`: an attempt's files against their last word, and what options of `logs` do not go together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from protocol.logproof import claim_of
from protocol.records import RecordKind
from runner.adapters.logproof import signed_word, sums_of
from runner.cli import cli
from tests.support.attempts import AttemptDir


def run(tmp_path: Path, *args: str) -> Result:
    """`runner logs` on this state directory."""
    environ = {"LOCAL_RUNNER_STATE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    return CliRunner().invoke(cli, ["logs", *args], env=environ)


def sealed(tmp_path: Path) -> AttemptDir:
    """A log of three segments that has ended."""
    made = AttemptDir(tmp_path)
    for n in range(3):
        made.roll()
        made.write(b"line %d\n" % n)
        made.write(b"error %d\n" % n, RecordKind.STDERR)
    made.seal()
    return made


def test_a_log_is_proven_from_its_files(tmp_path: Path) -> None:
    """Without a daemon or a journal, and that is said: then exit.json is what it is compared with."""
    sealed(tmp_path)
    done = run(tmp_path, "--verify", "ex_1")
    assert done.exit_code == 0, done.output
    assert "what is stored is what was signed" in done.stdout and "compared with exit.json" in done.stdout
    told = json.loads(run(tmp_path, "--verify", "--json", "ex_1").stdout)
    assert (told["ok"], told["wrong"]) == (True, [])


def flip_payload(segments: list[Path]) -> None:
    """The last byte of the first segment, which is output."""
    data = bytearray(segments[0].read_bytes())
    data[-1] ^= 1
    segments[0].write_bytes(data)


def flip_header(segments: list[Path]) -> None:
    """A byte that opens a segment."""
    data = bytearray(segments[1].read_bytes())
    data[3] ^= 1
    segments[1].write_bytes(data)


def cut_off(segments: list[Path]) -> None:
    """A file that ends early."""
    segments[-1].write_bytes(segments[-1].read_bytes()[:-3])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip_payload, "is not the one that was written"),
        (flip_header, "is no record"),
        (cut_off, "cut short"),
        (lambda segments: segments[1].unlink(), "are gone"),
        (lambda segments: segments[0].unlink(), "are gone"),
        (lambda segments: segments[-1].unlink(), "cut short"),
        (lambda segments: [each.unlink() for each in segments], "none of 3 segments"),
        (lambda segments: segments[1].write_bytes(segments[1].read_bytes() * 2), "longer than its place"),
    ],
)
def test_a_store_that_was_touched_is_seen(tmp_path: Path, spoil: Callable[[list[Path]], Any], words: str) -> None:
    """Status 1, and in words what is wrong."""
    made = sealed(tmp_path)
    spoil(sorted((made.path / "log").iterdir()))
    done = run(tmp_path, "--verify", "ex_1")
    assert done.exit_code == 1 and words in done.stdout, done.stdout
    assert done.stdout.endswith("ex_1.1: NOT proven\n")


def test_what_has_not_ended_is_not_proven(tmp_path: Path) -> None:
    """There is nothing to compare it with."""
    made = AttemptDir(tmp_path)
    made.write(b"so far")
    with made.held():
        assert run(tmp_path, "--verify", "ex_1").exit_code == 1


def test_records_longer_than_a_read_are_added_up(tmp_path: Path) -> None:
    """Blocks end where they like."""
    made = AttemptDir(tmp_path)
    for n in range(40):
        made.write(bytes([n]) * 65_000)
    made.seal()
    claim = claim_of(json.loads((made.path / "exit.json").read_text()))
    assert claim is not None
    sums = sums_of(made.path / "log", "ex_1.1", claim)
    assert (sums.streams, sums.chain, sums.end) == (claim.streams, claim.chain, claim.end)


def test_a_journal_that_is_none_tells_nothing(tmp_path: Path) -> None:
    """Missing, or damaged."""
    assert signed_word(tmp_path, "ex_1.1") is None
    (tmp_path / "journal.db").write_bytes(b"noise" * 1000)
    assert signed_word(tmp_path, "ex_1.1") is None


@pytest.mark.parametrize(
    "args",
    [
        ["--json", "--raw"], ["--json", "--timestamps"], ["--json", "--export", "cri"], ["--export", "cri", "--raw"],
        ["--export", "asciicast", "-t"], ["--export", "csv"], ["--offset", "5", "--tail", "1"], ["--offset", "5", "--since", "1m"],
        ["--verify", "-f"], ["--verify", "--tail", "1"], ["--verify", "--stream", "stdout"], ["--tail", "-1"],
        ["--since", "yesterday"], ["--stream", "pty"],
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, args: list[str]) -> None:
    """As wrong usage, before anything is read."""
    done = run(tmp_path, *args, "ex_404")
    assert done.exit_code == 2 and "Error" in done.stderr


def test_formats_are_printed_from_files(tmp_path: Path) -> None:
    """Each to stdout, holes and the end in it."""
    made = AttemptDir(tmp_path)
    made.write(b"a\nb\n")
    made.roll(skip=30)
    made.write(b"c", RecordKind.STDERR)
    made.add(RecordKind.EXIT, b'{"verdict": "exited", "code": 4}')
    made.finish(code=4)
    lines = [json.loads(line) for line in run(tmp_path, "--json", "ex_1").stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["stdout", "gap", "stderr", "exit"]
    assert lines[-1]["exit"]["code"] == 4
    tail = run(tmp_path, "--json", "--tail", "2", "--stream", "stdout", "ex_1").stdout.splitlines()
    assert next(json.loads(line).get("data") for line in tail) == "a\nb\n"
    assert run(tmp_path, "--tail", "2", "--timestamps", "ex_1").stdout == "1970-01-01T00:00:00.000000001Z b\n"
    assert "[gap: 30 bytes missing]" in run(tmp_path, "--export", "cri", "ex_1").stdout
    assert run(tmp_path, "--export", "asciicast", "ex_1").stdout.splitlines()[-1] == '[0.000000, "x", "4"]'
    made.put("exit.json", {})
    (made.path / "exit.json").unlink()
    lost = run(tmp_path, "--json", "--since", "1m", "ex_1").stdout
    assert json.loads(lost)["exit"] == {"verdict": "lost", "code": None, "signal": None, "cause": None}
