"""Enrolling from the command line with a real control plane, and what doctor then says of it."""

import asyncio
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.support.control_plane import running

pytestmark = pytest.mark.slow


async def shell(tmp_path: Path, *args: str, said: str = "") -> tuple[int, str, str]:
    """The command line as a process: status, stdout, stderr."""
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner.cli", *args, stdin=pipe, stdout=pipe, stderr=pipe, env=environ
    )
    out, err = await asyncio.wait_for(process.communicate(said.encode()), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_enrolling_by_standard_input(tmp_path: Path) -> None:
    """Keys, certificate and policy are there, what to compare is printed, and the token is nowhere in the output."""
    (tmp_path / "src").mkdir()
    async with running(tmp_path / "plane") as plane:
        join = await plane.join("laptop")
        status, out, err = await shell(
            tmp_path,
            "enroll",
            "-",
            "--name",
            "laptop",
            "--label",
            "team=web",
            "--root",
            str(tmp_path / "src"),
            said=join,
        )
        assert (status, err) == (0, "")
        listed = (await plane.get("/v1/runners"))["runners"]
        assert [(one["name"], one["labels"]["team"]) for one in listed] == [("laptop", "web")]
        for words in (listed[0]["id"], listed[0]["key_id"], plane.plane.keys.root.fingerprint, "next: runner"):
            assert words in out
        assert join.rpartition("/")[2][:22] not in out
        policy = tmp_path / ".config" / "runner" / "policy.toml"
        assert str(tmp_path / "src") in policy.read_text() and "#" in policy.read_text()
        assert stat.S_IMODE((tmp_path / ".local" / "state" / "runner").stat().st_mode) == 0o700

        again, _, err = await shell(tmp_path, "enroll", "-", said=await plane.join())
        assert again == 1 and "next: runner enroll --replace" in err

        wanted = ("R001", "R002", "R004", "R005", "R006", "R008")
        only = [word for name in wanted for word in ("--only", name)]
        status, out, err = await shell(tmp_path, "doctor", "--json", *only)
        findings = json.loads(out)["findings"]
        assert [(one["id"], one["verdict"]) for one in findings] == [(name, "ok") for name in wanted], findings
        assert status == 0

        status, out, _ = await shell(tmp_path, "status")
        assert status == 1 and listed[0]["id"] in out
    status, out, _ = await shell(tmp_path, "doctor", "--only", "R008")
    assert status == 9 and "fix: curl" in out


async def test_what_can_go_wrong_has_its_code(tmp_path: Path) -> None:
    """A used token; a plane that is gone."""
    async with running(tmp_path / "plane") as plane:
        join = await plane.join()
        await shell(tmp_path, "enroll", join, "--name", "one")
        status, _, err = await shell(tmp_path, "--state-dir", str(tmp_path / "b"), "enroll", join, "--name", "two")
        assert status == 1 and "BAD_JOIN_TOKEN" in err and "next: runner-control enroll-token" in err
        join = await plane.join()
    (tmp_path / "join").write_text(join)
    status, _, err = await shell(
        tmp_path, "--state-dir", str(tmp_path / "c"), "enroll", "--token-file", str(tmp_path / "join")
    )
    assert status == 6 and "next:" in err and join.rpartition("/")[2][:22] not in err
