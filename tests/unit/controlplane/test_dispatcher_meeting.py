"""How a session begins: what becomes of the plane's history and the runner's."""

from typing import Any

import pytest

from controlplane import dispatcher
from controlplane.dispatcher import Meeting
from controlplane.rows import RunnerRow
from protocol.envelope import digest_of
from protocol.identity import HelloClaims, StreamMark
from protocol.ids import Digest
from protocol.replay import Mark

A, B, C = (Digest(digest_of(name)) for name in (b"a", b"b", b"c"))


def a_runner(**over: Any) -> RunnerRow:
    """A runner in incarnation 3, sent up to 7 = A."""
    fields: dict[str, Any] = {
        "id": "rn",
        "name": "laptop",
        "x": "x",
        "seal_x": "s",
        "labels": {},
        "living": True,
        "inc": 3,
        "certificate": "",
        "ctl": Mark(7, A),
        "acked_hw": 5,
        "out_hw": 20,
    }
    return RunnerRow(**(fields | over))


def a_hello(hw: int, head: str, inc: int = 3, out_head: int = 20) -> HelloClaims:
    """A hello with this mark."""
    return HelloClaims(
        org="org",
        runner="rn",
        inc=inc,
        nonce_plane="n" * 43,
        nonce_runner="n" * 43,
        boot_id="b",
        ctl=StreamMark(hw=hw, head=head),
        out_head=out_head,
        keyset_version=1,
        policy_digest=A,
        version="1",
        platform="linux",
    )


def meet(runner: RunnerRow, claims: HelloClaims, there: Digest | None, *, unanswered: bool = False) -> Meeting:
    """A hello is judged; all that was numbered has its receipt."""
    return dispatcher.meet(runner, claims, there, unanswered=unanswered)


class TestMeeting:
    """What becomes of two histories."""

    def test_the_same_history_goes_on(self) -> None:
        """The runner is behind, the plane keeps its own mark and tells the runner's."""
        meeting = meet(a_runner(), a_hello(6, B), B)
        assert (meeting.inc, meeting.told, meeting.ctl) == (3, Mark(6, B), Mark(7, A))
        assert not meeting.reborn
        assert not meeting.requeue

    def test_a_plane_from_a_backup_jumps_to_the_runners_mark(self) -> None:
        """Numbers it does not know are the runner's word, signed."""
        meeting = meet(a_runner(), a_hello(9, C), None)
        assert (meeting.told, meeting.ctl, meeting.reborn) == (Mark(9, C), Mark(9, C), False)

    def test_a_mark_above_ours_is_not_adopted_over_what_waits_for_its_receipt(self) -> None:
        """The runner may have consumed other bytes under that number: under a new incarnation they are asked again."""
        meeting = meet(a_runner(), a_hello(9, C), None, unanswered=True)
        assert (meeting.reborn, meeting.requeue) == (True, True)
        assert not meet(a_runner(), a_hello(6, B), B, unanswered=True).reborn

    def test_another_digest_under_a_known_number_is_a_fork(self) -> None:
        """A new incarnation begins at zero, and what was sent is asked again."""
        meeting = meet(a_runner(), a_hello(7, C), A)
        assert (meeting.inc, meeting.told, meeting.ctl) == (4, Mark(), Mark())
        assert meeting.reborn
        assert meeting.requeue

    def test_a_runner_that_forgot_what_it_acked_is_a_fork(self) -> None:
        """A restored snapshot: below its own word."""
        assert meet(a_runner(), a_hello(4, B), B).reborn

    def test_a_runner_that_missed_its_new_certificate_gets_another(self) -> None:
        """An older incarnation can only be told to begin anew."""
        meeting = meet(a_runner(), a_hello(7, A, inc=2), None)
        assert (meeting.inc, meeting.reborn) == (4, True)

    def test_a_plane_from_before_a_fork_takes_the_runners_incarnation(self) -> None:
        """Only our certificate can have raised it."""
        meeting = meet(a_runner(), a_hello(2, C, inc=5), None)
        assert (meeting.inc, meeting.told, meeting.ctl, meeting.reborn) == (5, Mark(2, C), Mark(2, C), False)
        assert meeting.requeue

    @pytest.mark.parametrize("inc", [3, 4])
    def test_a_shorter_outbox_is_asked_for_from_its_beginning(self, inc: int) -> None:
        """1. Items 5 to 20 are stored. 2. The machine is set back to 3 and gives the number 4 to another item. 3. That one comes, too."""
        assert meet(a_runner(), a_hello(7, A, inc=inc, out_head=4), A).out_hw == 0

    def test_a_runner_that_was_set_back_behind_its_reports_begins_anew(self) -> None:
        """Its mark is right and its outbox is not: what it says from here on is of another history."""
        meeting = meet(a_runner(), a_hello(7, A, out_head=19), A)
        assert (meeting.inc, meeting.reborn, meeting.requeue) == (4, True, True)
        assert not meet(a_runner(), a_hello(7, A, out_head=20), A).reborn
