"""How an attempt ends, seen from outside: real shims, real children."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.shim import records, wire
from runner.shim.spec import Spec, SpecError
from tests.support.shim import BOOT_ID, ForkServer, Shim, default_spec

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]


def sh(script: str) -> list[str]:
    """argv of a shell script."""
    return ["/bin/sh", "-c", script]


def test_an_exit_code_is_kept(start_shim: StartShim) -> None:
    """The child's own status is told, in EXIT, in the file and in the log alike."""
    shim = start_shim(argv=sh("exit 7"))
    record = shim.run()
    assert (record["verdict"], record["code"], record["signal"]) == ("exited", 7, None)
    assert record["cause"] == {"kind": "none", "by": "", "reason": None, "detail": ""}
    assert (record["drain"], record["swept"], record["survivors"]) == ("eof", [], 0)
    assert record["boot_id"] == BOOT_ID
    assert record["started_ns"] <= record["ended_ns"]
    assert shim.exit_file() == record
    log = shim.log()
    assert log.exit == {key: value for key, value in record.items() if key != "log"}
    assert record["log"] == {"end": log.end, "segments": 1, "chain": log.chain}


def test_a_signal_is_not_an_exit_code(start_shim: StartShim) -> None:
    """A child that dies of a signal has no code."""
    record = start_shim(argv=sh("kill -9 $$")).run()
    assert (record["verdict"], record["code"], record["signal"], record["core"]) == ("signalled", None, 9, False)


def test_a_core_dump_is_flagged(start_shim: StartShim, tmp_path: Path) -> None:
    """The core flag of the wait status is told apart from the signal."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith("|") or "/" in pattern:
        pytest.skip("core_pattern does not write into the working directory")
    unlimited = {"4": [-1, -1]} if os.geteuid() == 0 else {}
    record = start_shim(argv=sh("ulimit -c unlimited; kill -ABRT $$"), cwd=str(tmp_path), rlimits=unlimited).run()
    assert (record["signal"], record["core"]) == (signal.SIGABRT, True)


def test_streams_are_apart_and_byte_exact(start_shim: StartShim, tmp_path: Path) -> None:
    """Five random megabytes on each stream come out as they went in, with their digests."""
    data = random.Random(5).randbytes(5_000_000)
    (tmp_path / "data").write_bytes(data)
    shim = start_shim(argv=sh("cat data >&2; cat data data"), cwd=str(tmp_path))
    record = shim.run()
    log = shim.log()
    assert log.stderr == data
    assert log.stdout == data + data
    assert record["streams"] == {
        "stdout": {"bytes": 10_000_000, "sha256": hashlib.sha256(data + data).hexdigest()},
        "stderr": {"bytes": 5_000_000, "sha256": hashlib.sha256(data).hexdigest()},
    }
    assert record["log"]["chain"] == log.chain


def test_records_keep_the_order_of_arrival(start_shim: StartShim) -> None:
    """What was read first stands first in the log, across streams."""
    shim = start_shim(argv=sh("for i in 1 2 3; do echo o; sleep .05; echo e >&2; sleep .05; done"))
    shim.run()
    order = [records.STDOUT, records.STDERR] * 3
    assert shim.log().kinds == [records.SEGMENT, *order, records.EXIT]


@pytest.mark.parametrize("segment_bytes", [1024, 20_000, 200_000])
def test_segments_form_a_chain(start_shim: StartShim, tmp_path: Path, segment_bytes: int) -> None:
    """Every segment stays within its size and names the digest of the one before."""
    data = random.Random(6).randbytes(300_000)
    (tmp_path / "data").write_bytes(data)
    shim = start_shim(argv=["cat", "data"], cwd=str(tmp_path), segment_bytes=segment_bytes)
    record = shim.run()
    log = shim.log()
    assert log.stdout == data
    assert log.holes == []
    assert record["log"] == {"end": log.end, "segments": len(log.segments), "chain": log.chain}
    assert max(size for _base, size in log.segments[:-1]) <= segment_bytes


def test_an_attempt_without_release_never_runs(start_shim: StartShim, tmp_path: Path) -> None:
    """EOF before the release ends the shim, and the child was never started."""
    shim = start_shim(argv=["touch", str(tmp_path / "ran")])
    shim.controller.wait(wire.WELCOME)
    shim.controller.close()
    record = shim.exit_file()
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "unreleased")
    assert record["cause"]["reason"] == "NOT_RELEASED"
    assert shim.meta()["phase"] == "ready"
    assert shim.log().exit["verdict"] == "never_started"
    assert not (tmp_path / "ran").exists()


def test_a_stop_before_the_release_never_runs(start_shim: StartShim, tmp_path: Path) -> None:
    """A stop that overtakes the release ends the attempt; the release that follows is ignored."""
    shim = start_shim(argv=["touch", str(tmp_path / "ran")])
    shim.stop()
    shim.release()
    record = shim.exit()
    assert (record["verdict"], record["cause"]["kind"], record["cause"]["by"]) == ("never_started", "stop", "tester")
    assert not (tmp_path / "ran").exists()


def test_secrets_reach_the_environment_and_no_file(start_shim: StartShim) -> None:
    """The child sees the secret, bytes and all; no file of the directory ever does."""
    secret = b"s3cr3t-\n\xff"
    shim = start_shim(argv=sh('printf %s "$TOKEN" | sha256sum'), secret_names=["TOKEN"])
    assert shim.run({"TOKEN": secret})["code"] == 0
    shim.exit_file()
    assert shim.log().stdout.split()[0].decode() == hashlib.sha256(secret).hexdigest()
    for path in shim.dir.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


@pytest.mark.parametrize("given", [{}, {"TOKEN": b"a", "OTHER": b"b"}, {"token": b"a"}, {"TOKEN": b"a\0"}])
def test_secrets_must_match_their_names(start_shim: StartShim, given: dict[str, bytes]) -> None:
    """A release with other secrets than announced starts nothing and tells no value."""
    record = start_shim(secret_names=["TOKEN"]).run(given)
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "shim_failed")
    assert "release" in record["cause"]["detail"]


EXEC_ERRORS = {
    "not_found": (["no-such-program"], "EXEC_NOT_FOUND"),
    "path_not_found": (["./nothing"], "EXEC_NOT_FOUND"),
    "not_executable": (["./plain"], "EXEC_NOT_EXECUTABLE"),
    "a_directory": (["/tmp"], "EXEC_NOT_EXECUTABLE"),
    "bad_interpreter": (["./script"], "EXEC_NOT_EXECUTABLE"),
    "no_format": (["./garbage"], "EXEC_NOT_EXECUTABLE"),
    "too_long": (["true", "x" * 200_000], "SPAWN_FAILED"),
}


@pytest.mark.parametrize("case", EXEC_ERRORS)
def test_an_exec_error_is_no_exit_code(start_shim: StartShim, tmp_path: Path, case: str) -> None:
    """What keeps a program from starting has a reason and no code."""
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "garbage").write_bytes(b"\x01\x02\x03")
    for name in ("script", "garbage"):
        (tmp_path / name).chmod(0o755)
    argv, reason = EXEC_ERRORS[case]
    shim = start_shim(argv=argv, cwd=str(tmp_path))
    record = shim.run()
    assert (record["verdict"], record["code"], record["signal"]) == ("never_started", None, None)
    assert (record["cause"]["kind"], record["cause"]["reason"]) == ("exec_failed", reason)
    assert record["cause"]["detail"]
    assert shim.meta()["phase"] == "released"


def test_a_missing_cwd_is_its_own_reason(start_shim: StartShim, tmp_path: Path) -> None:
    """The directory is checked before the program."""
    record = start_shim(argv=["no-such-program"], cwd=str(tmp_path / "gone")).run()
    assert (record["cause"]["kind"], record["cause"]["reason"]) == ("exec_failed", "CWD_MISSING")


def test_a_program_is_found_in_the_childs_path(start_shim: StartShim, tmp_path: Path) -> None:
    """The child's PATH counts, seen from the child's directory, and the first fit wins."""
    for folder, code in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "b" / "tool").chmod(0o755)
    record = start_shim(argv=["tool"], cwd=str(tmp_path), env={"PATH": "missing:a:b"}).run()
    assert record["code"] == 2


def test_the_environment_is_exactly_the_specs(start_shim: StartShim) -> None:
    """Nothing of the runner's own environment reaches the child."""
    shim = start_shim(argv=["/usr/bin/env"], env={"A": "1", "ODD": "\udcff"})
    shim.run()
    lines = set(shim.log().stdout.split(b"\n")) - {b""}
    cookie = f"LOCAL_RUNNER_COOKIE={shim.spec['cookie']}".encode()
    assert lines == {b"A=1", b"ODD=\xff", cookie, f"LOCAL_RUNNER_ATTEMPT={shim.attempt}".encode()}


PROBE = """
import json, os, signal, sys, resource
fds = {fd: os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in map(int, os.listdir("/proc/self/fd"))
       if os.path.exists(f"/proc/self/fd/{fd}")}
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({"fds": fds, "umask": status["Umask"], "mask": int(status["SigBlk"], 16),
  "ignored": int(status["SigIgn"], 16), "sid": os.getsid(0) == os.getpid(), "cwd": os.getcwd(),
  "nofile": resource.getrlimit(resource.RLIMIT_NOFILE), "core": resource.getrlimit(resource.RLIMIT_CORE),
  "oom": open("/proc/self/oom_score_adj").read().strip()}))
"""


def test_the_child_inherits_nothing_of_the_shim(start_shim: StartShim, tmp_path: Path) -> None:
    """No descriptor, signal disposition, mask, umask or limit of the shim leaks; it leads its own session."""
    shim = start_shim(
        argv=[sys.executable, "-I", "-S", "-c", PROBE],
        cwd=str(tmp_path),
        umask=0o027,
        rlimits={"7": [512, 4096], "4": [0, 0]},
    )
    shim.run()
    seen = json.loads(shim.log().stdout)
    # Python itself ignores PIPE and XFSZ in the probe; 32 and 33 are the C library's own and cannot be reset.
    ignored = {number for number in range(1, 65) if seen["ignored"] >> (number - 1) & 1} - {32, 33}
    assert seen["fds"] == {"0": "/dev/null", "1": "pipe", "2": "pipe"}
    assert (seen["umask"], seen["mask"], ignored) == ("0027", 0, {signal.SIGPIPE, signal.SIGXFSZ})
    assert (seen["sid"], seen["cwd"], seen["oom"]) == (True, str(tmp_path), "0")
    assert (seen["nofile"], seen["core"]) == ([512, 4096], [0, 0])


def test_the_shim_takes_its_own_limits_back(start_shim: StartShim) -> None:
    """After the spawn the shim has the umask and limits it had before."""
    shim = start_shim(argv=["sleep", "60"], rlimits={"7": [64, 4096], "1": [4096, -1]}, umask=0)
    shim.start()
    limits = Path(f"/proc/{shim.pid}/limits").read_text()
    assert f"Max file size             {'unlimited':20}" in limits
    assert "Umask:\t0077" in Path(f"/proc/{shim.pid}/status").read_text()
    assert os.readlink(f"/proc/{shim.pid}/cwd") == "/"


def test_a_background_holder_is_swept_and_its_output_kept(start_shim: StartShim) -> None:
    """Who holds stdout after the leader's end is ended by the ladder, and what it wrote is in the log."""
    script = "(trap 'echo bye; exit 0' TERM; echo hold; while :; do sleep .05; done) & sleep .3; exit 5"
    shim = start_shim(argv=sh(script))
    record = shim.run()
    assert (record["verdict"], record["code"], record["cause"]["kind"]) == ("exited", 5, "none")
    assert shim.log().stdout == b"hold\nbye\n"
    assert record["drain"] == "eof"
    (first, *_rest) = record["swept"]
    assert (first["tier"], first["signal"]) == ("descendants", signal.SIGTERM)
    assert record["survivors"] == 0


def test_two_megabytes_need_no_listener(start_shim: StartShim) -> None:
    """The log is written with nobody connected, and the exit waits in the file."""
    shim = start_shim(argv=["head", "-c", "2000000", "/dev/zero"])
    shim.start()
    shim.controller.close()
    record = shim.exit_file()
    assert record["streams"]["stdout"]["bytes"] == 2_000_000
    assert shim.log().stdout == bytes(2_000_000)


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "higher_version": ({"v": 2}, "version"),
    "true_is_no_version": ({"v": True}, "version"),
    "empty_argv": ({"argv": []}, "argv"),
    "nul_in_argv": ({"argv": ["a\0b"]}, "argv"),
    "relative_cwd": ({"cwd": "tmp"}, "cwd"),
    "bad_limit": ({"rlimits": {"7": [1]}}, "rlimits"),
    "bad_lease": ({"lease": {"token": 1, "deadline_ms": 5, "action": "explode"}}, "lease"),
    "too_large": ({"env": {"A": "x" * 300_000}}, "bytes"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_spec_that_cannot_be_run_is_told(start_shim: StartShim, case: str) -> None:
    """A bad spec ends in an exit record of its own kind, with a detail that names the key."""
    change, named = BAD_SPECS[case]
    shim = start_shim(**change)
    record = shim.exit()
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "shim_failed")
    assert named in record["cause"]["detail"]
    assert record["attempt"] == shim.attempt
    assert shim.exit_file() == record


@pytest.mark.parametrize("key", sorted(default_spec("ex_9.1").keys() - {"v"}))
def test_every_key_of_the_spec_is_required(key: str) -> None:
    """A spec without one of the contract's keys is refused by name."""
    whole = default_spec("ex_9.1")
    Spec(dict(whole))
    del whole[key]
    with pytest.raises(SpecError, match=key):
        Spec(whole)


def test_the_keys_that_came_later_may_be_absent_or_null() -> None:
    """A spec of an earlier daemon runs without fence, leaf, floor and points."""
    later = ("execution", "token", "cgroup", "outlive", "floor_bytes", "fail")
    for whole in (default_spec("ex_9.1"), default_spec("ex_9.1") | dict.fromkeys(later)):
        read = Spec(whole)
        assert (read.execution, read.token, read.cgroup) == (None, 0, None)
        assert (read.outlive, read.floor_bytes, read.fail) == ([], 0, {})
    lease = {"token": 1, "deadline_ms": 5, "action": "stop"}
    for told, grace_ms in ((lease, None), (lease | {"grace_ms": None}, None), (lease | {"grace_ms": 7}, 7)):
        held = Spec(default_spec("ex_9.1") | {"lease": told}).lease
        assert held is not None
        assert (held.token, held.deadline_ms, held.grace_ms) == (1, 5, grace_ms)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("execution", ""),
        ("execution", ".."),
        ("execution", "../ex_1"),
        ("execution", "x" * 256),
        ("execution", 1),
        ("token", -1),
        ("token", True),
        ("cgroup", "relative"),
        ("cgroup", ""),
        ("outlive", "gradle"),
        ("outlive", [""]),
        ("outlive", ["x"] * 65),
        ("floor_bytes", -1),
        ("fail", []),
        ("fail", {"nowhere": "kill"}),
        ("fail", {"ready": "laugh"}),
        ("grace_ms", -1),
    ],
)
def test_a_later_key_that_makes_no_sense_is_refused_by_name(key: str, value: object) -> None:
    """Optional is not unchecked; above all the name of a file stays within its directory."""
    change = (
        {"lease": {"token": 1, "deadline_ms": 5, "action": "stop", key: value}} if key == "grace_ms" else {key: value}
    )
    with pytest.raises(SpecError, match=key):
        Spec(default_spec("ex_9.1") | change)


def test_a_missing_spec_is_told(start_shim: StartShim) -> None:
    """A shim without a spec says so under the directory's name."""
    shim = start_shim(write_spec=False)
    record = shim.exit()
    assert (record["attempt"], record["verdict"]) == (shim.attempt, "never_started")
    assert record["cause"]["detail"].startswith("spec.json: ")


@pytest.mark.parametrize("released", [True, False])
def test_a_directory_is_used_once(start_shim: StartShim, fork_server: ForkServer, released: bool) -> None:
    """A second shim over a directory that was released or has ended runs nothing and changes no record."""
    shim = start_shim(argv=["true"])
    if released:
        shim.release()
    else:
        shim.stop()
    record = shim.exit()
    shim.controller.send(wire.COLLECTED)
    shim.wait_gone()
    dirfd = os.open(shim.dir, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    fork_server.fork(dirfd, theirs.fileno())
    theirs.close()
    os.close(dirfd)
    ours.settimeout(10)
    assert ours.recv(100) == b""
    ours.close()
    assert shim.exit_file() == record
    assert "UsedDirectoryError" in (shim.dir / "shim.err").read_text()
