"""Enrolment over the runner's WebSocket."""

from pathlib import Path

import pytest

from controlplane import tables
from controlplane.keys import token_hash
from protocol.envelope import PayloadType, seal
from protocol.errors import Reason
from protocol.identity import JoinString
from protocol.keys import PrivateKey
from protocol.limits import JOIN_TOKEN_TTL_MS
from protocol.messages import Enroll, encode
from tests.support.control_plane import Moved, running
from tests.support.fake_runner import Closed, FakeRunner, closing_of, dial, enrolment

pytestmark = pytest.mark.slow


async def test_a_join_string_makes_a_runner_with_a_certificate(tmp_path: Path) -> None:
    """Incarnation one, under the name it asked for."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol("laptop")
        assert (runner.certificate.inc, runner.certificate.name) == (1, "laptop")
        (listed,) = (await cp.get("/v1/runners"))["runners"]
        assert (listed["id"], listed["online"], listed["key_id"]) == (runner.id, False, runner.key.key_id)


async def test_the_token_is_stored_hashed(tmp_path: Path) -> None:
    """Neither the token nor the join string is in any file."""
    async with running(tmp_path) as cp:
        answer = await cp.post("/v1/join-tokens", {"name": "laptop"})
        token = JoinString.parse(answer.json()["join"]).token
        reader = cp.plane._ledger.db.reader
        assert tables.join_token(reader, token_hash(token)) is not None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@pytest.mark.parametrize("case", ["unknown", "expired", "used", "name", "labels"])
async def test_a_bad_token_takes_nobody_in(tmp_path: Path, case: str) -> None:
    """Unknown, expired, used by another key, for another name, for other labels: one answer, BAD_JOIN_TOKEN and 4401."""
    clock = Moved()
    async with running(tmp_path, clock=clock) as cp:
        labels = {"team": "blue"} if case == "labels" else {}
        join = (await cp.plane.join_token("desktop" if case == "name" else None, labels)).join
        if case == "unknown":
            join = str(JoinString.parse(join)._replace(token="A" * 22))
        if case == "expired":
            clock.ahead_ms = JOIN_TOKEN_TTL_MS
        if case == "used":
            await FakeRunner.enrol(join, "first", b"1" * 32)
        with pytest.raises(Closed) as closed:
            await FakeRunner.enrol(join, "laptop", b"2" * 32, {"team": "red"} if labels else None)
        assert closed.value.code == 4401
        assert [bye.reason for bye in closed.value.goodbyes] == [Reason.BAD_JOIN_TOKEN]
        assert [row["name"] for row in (await cp.get("/v1/runners"))["runners"]] == (
            ["first"] if case == "used" else []
        )


async def test_a_lost_answer_can_be_asked_for_again(tmp_path: Path) -> None:
    """Same key, same token, within its time: the same certificate, and one runner."""
    async with running(tmp_path) as cp:
        join = await cp.join()
        first, second = await FakeRunner.enrol(join), await FakeRunner.enrol(join)
        assert first.certificate == second.certificate
        assert len((await cp.get("/v1/runners"))["runners"]) == 1


async def test_a_new_key_under_an_old_name_is_another_runner(tmp_path: Path) -> None:
    """The old one's session ends, its queued work is called back, and it may not come in again."""
    async with running(tmp_path) as cp:
        old = await cp.enrol("laptop", b"1" * 32)
        waiting = await cp.start()
        async with old.connect(cp.port) as line:
            new = await cp.enrol("laptop", b"2" * 32)
            closed = await line.closed()
        assert (closed.code, closed.goodbyes[0].reason) == (4404, Reason.UNKNOWN_RUNNER)
        assert new.id != old.id
        assert [row["id"] for row in (await cp.get("/v1/runners"))["runners"]] == [new.id]
        assert (await cp.get(f"/v1/executions/{waiting['id']}"))["state"] in ("cancelled", "sent")
        with pytest.raises(Closed) as refused:
            async with old.connect(cp.port):
                pass
        assert refused.value.code == 4404


async def test_a_token_with_labels_gives_them(tmp_path: Path) -> None:
    """The certificate carries what the token says."""
    async with running(tmp_path) as cp:
        join = (await cp.plane.join_token(labels={"team": "blue"})).join
        assert (await FakeRunner.enrol(join)).certificate.labels == {"team": "blue"}


@pytest.mark.parametrize("case", ["garbage", "other key", "other type"])
async def test_an_enrolment_without_proof_is_refused(tmp_path: Path, case: str) -> None:
    """It must be signed by the very key it names; the token is not spent."""
    async with running(tmp_path) as cp:
        join = await cp.join()
        token, mine, other = JoinString.parse(join).token, PrivateKey(b"1" * 32), PrivateKey(b"2" * 32)
        good = enrolment(token, mine, "laptop", {})
        env = {
            "garbage": '{"payload":"!","payloadType":"","signatures":[]}',
            "other key": good.replace(mine.key_id, other.key_id),
            "other type": seal(b"{}", PayloadType.HELLO, [mine]).decode(),
        }[case]
        async with dial(cp.port) as socket:
            await socket.send(encode(Enroll(env=env)))
            closed = await closing_of(socket)
        assert (closed.code, closed.goodbyes[0].reason) == (4401, Reason.BAD_PROOF)
        assert (await FakeRunner.enrol(join)).id
