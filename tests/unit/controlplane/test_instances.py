"""One key, one machine: what makes a hello the hello of a copy, and what never does."""

import json
from typing import Any

import pytest

from controlplane import instances
from controlplane.rows import RunnerRow
from protocol.envelope import digest_of
from protocol.identity import HelloClaims, StreamMark
from protocol.replay import Mark

HEAD = digest_of(b"head")
NOW = 1_795_000_000_000


def a_runner(**over: Any) -> RunnerRow:
    """A runner in incarnation 3 that has told of 7 commands and 20 items; daemon A has its line, Z had it before."""
    fields: dict[str, Any] = {
        "id": "rn",
        "name": "laptop",
        "x": "x",
        "seal_x": "s",
        "labels": {},
        "living": True,
        "inc": 3,
        "certificate": "",
        "ctl": Mark(9, HEAD),
        "acked_hw": 7,
        "out_hw": 20,
        "instance": "A" * 22,
        "dial": 5,
        "retired": ("Z" * 22,),
        "hostname": "desk",
        "boot_id": "b1",
    }
    return RunnerRow(**(fields | over))


def a_hello(instance: str = "A", dial: int = 6, **over: Any) -> HelloClaims:
    """A hello that goes on where the runner is."""
    fields: dict[str, Any] = {
        "org": "org",
        "runner": "rn",
        "inc": 3,
        "nonce_plane": "n" * 43,
        "nonce_runner": "n" * 43,
        "boot_id": "b1",
        "ctl": StreamMark(hw=7, head=HEAD),
        "out_head": 20,
        "keyset_version": 1,
        "policy_digest": HEAD,
        "version": "1",
        "platform": "linux",
        "hostname": "desk",
        "instance": instance * 22,
        "dial": dial,
    }
    return HelloClaims(**(fields | over))


BEHIND: list[dict[str, Any]] = [{"ctl": StreamMark(hw=6, head=HEAD)}, {"inc": 2}, {"out_head": 19}]


class TestCopies:
    """What is refused."""

    @pytest.mark.parametrize("dial", [0, 4, 5])
    def test_a_count_of_dials_comes_once(self, dial: int) -> None:
        """A memory image that was started twice counts on from the same number."""
        assert instances.judge(a_runner(), a_hello(dial=dial), other_lives=False)

    def test_whoever_was_succeeded_does_not_come_back(self) -> None:
        """It would have had to know of its successor, on one machine."""
        assert instances.judge(a_runner(), a_hello("Z", 99), other_lives=False)

    @pytest.mark.parametrize("over", BEHIND)
    def test_less_than_was_told_while_another_beats(self, over: dict[str, Any]) -> None:
        """A snapshot that was restored beside its living original: mark, incarnation or outbox recede."""
        assert instances.judge(a_runner(), a_hello("B", 1, **over), other_lives=True)


class TestNoCopies:
    """What happens to every honest runner."""

    def test_a_connection_that_broke_is_dialled_again(self) -> None:
        """A change of network: the same daemon, the next dial; the old session may still seem to live."""
        assert instances.judge(a_runner(), a_hello(dial=6), other_lives=True) is None

    @pytest.mark.parametrize("other_lives", [False, True])
    @pytest.mark.parametrize("boot_id", ["b1", "b2"])
    def test_a_restart_and_a_reboot_go_on_where_they_were(self, boot_id: str, other_lives: bool) -> None:
        """A new daemon that knows what was told."""
        assert instances.judge(a_runner(), a_hello("B", 1, boot_id=boot_id), other_lives=other_lives) is None

    @pytest.mark.parametrize("over", BEHIND)
    def test_a_machine_that_was_set_back_alone_begins_anew(self, over: dict[str, Any]) -> None:
        """Nobody else beats: a new incarnation, as ever."""
        assert instances.judge(a_runner(), a_hello("B", 1, **over), other_lives=False) is None

    def test_a_plane_from_a_backup_takes_whoever_comes(self) -> None:
        """It knows fewer dials and fewer daemons than there were."""
        assert instances.judge(a_runner(dial=2), a_hello(dial=6), other_lives=False) is None
        assert instances.judge(a_runner(retired=()), a_hello("Q", 1), other_lives=False) is None

    def test_a_runner_that_does_not_say_who_it_is_is_not_judged(self) -> None:
        """An older version."""
        assert instances.judge(a_runner(), a_hello("", 0, inc=1), other_lives=True) is None


def test_the_successor_has_the_line_and_its_predecessor_is_remembered() -> None:
    """The newest 32."""
    runner = instances.taken(a_runner(), a_hello("B", 1, hostname="new", boot_id="b2"))
    assert (runner.instance, runner.dial, runner.retired) == ("B" * 22, 1, ("Z" * 22, "A" * 22))
    assert (runner.hostname, runner.boot_id) == ("new", "b2")
    assert instances.taken(runner, a_hello("B", 2)).retired == runner.retired
    for number in range(40):
        runner = instances.taken(runner, a_hello(dial=1).model_copy(update={"instance": f"{number:022}"}))
    assert len(runner.retired) == instances.RETIRED_MAX
    assert runner.retired[-1] == f"{38:022}"


def test_a_conflict_names_both_machines_and_is_told_once() -> None:
    """However often the copy dials; another copy is another story."""
    copy = a_hello("Z", 1, hostname="clone" * 30, boot_id="b" * 64)
    first = instances.conflict(a_runner(hostname="h" * 200, boot_id="c" * 64), copy, "why", NOW)
    assert first.fresh
    assert len(first.detail) <= 500
    assert "clone" in first.detail and "hhh" in first.detail
    again = instances.conflict(first.runner, copy, "why", NOW + 1)
    assert not again.fresh
    assert json.loads(again.runner.conflict or "")["at_ms"] == NOW + 1
    assert instances.conflict(first.runner, a_hello("Y", 1), "why", NOW).fresh
