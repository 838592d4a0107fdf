"""`make demo`: the main job from nothing, with real processes, and everything that is promised checked on the way.

DEMO_REPO=path uses another repository (it is cloned, never touched), DEMO_CMD='…' another command.
Ends with 0 only when every promise held; leaves nothing running and nothing behind.
"""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from relay import Relay
from stage import BIN, Failure, Stage, until

PROJECT = Path(__file__).resolve().parents[2]
RUNNER = "laptop"
FAST_TESTS = f"{sys.executable} -m pytest -p no:cacheprovider --color=no -v -m 'not slow' tests/unit/protocol"
COUNTING = "i=1; while [ $i -le 300 ]; do echo line $i of 300; i=$((i+1)); sleep 0.01; done; echo counted >&2"
STUBBORN = (
    "trap '' TERM; (trap '' TERM; setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' &) ;"
    " echo ready; while :; do sleep 1; done"
)
KILLED_EXEC_STATUS = 137
FRAMES_S = 10.0
"""How long a frame through the relay may take to show its effect."""


async def main() -> int:
    """Tell the story; 1 when a promise did not hold."""
    stage = Stage()
    try:
        await story(stage)
    except (Failure, TimeoutError) as failure:
        stage.console.print(f"\n[bold red]It did not hold:[/] {failure}")
        for name in ("daemon", "plane"):
            stage.console.print(f"[dim]--- {name}.log[/]")
            stage.console.out(stage.log_tail(name))
        return 1
    finally:
        await stage.close()
    stage.console.print(f"\n[bold green]All {stage.checks} promises held. Nothing is left running.[/]")
    return 0


async def story(stage: Stage) -> None:
    """The parts in order."""
    await begin(stage)
    async with Relay(f"ws://127.0.0.1:{stage.port}/v1/runner") as relay:
        await enrol(stage, relay)
        worktree = await make_worktree(stage)
        execution = await run_through_a_crash(stage, worktree)
        await deliver_again(stage, relay)
        await forge(stage, relay)
        await stop_the_stubborn(stage)
        await show_the_end(stage, execution)
        await remove_worktree(stage, worktree)
        await finish(stage)


async def begin(stage: Stage) -> None:
    """The embedded control plane, on SQLite."""
    stage.title("A control plane on SQLite")
    await stage.start(
        "plane",
        "runner-control",
        "serve",
        "--db",
        f"{stage.home}/plane/control.db",
        "--listen",
        f"127.0.0.1:{stage.port}",
    )

    async def answers() -> bool:
        try:
            await stage.run("runner-control", "runners")
        except Failure:
            return False
        return True

    await until(answers, "the control plane")
    database = (stage.home / "plane" / "control.db").read_bytes()[:15]
    stage.check(database == b"SQLite format 3", f"it listens on 127.0.0.1:{stage.port} and keeps its state in SQLite")


async def enrol(stage: Stage, relay: Relay) -> None:
    """A runner joins with a one-time string; between the two sits a relay that nobody has to trust."""
    stage.title("A runner enrols and connects, through a relay that nobody trusts")
    made = await stage.json("runner-control", "enroll-token", "--name", RUNNER)
    join = made["join"].replace(f":{stage.port}/", f":{relay.port}/")
    token = stage.home / "join.txt"
    token.write_text(join)
    told = await stage.run("runner", "enroll", "--token-file", str(token), "--name", RUNNER, "--root", str(stage.home))
    for line in told.strip().splitlines()[:6]:
        stage.say(line)
    again = await stage.run("runner", "enroll", "--token-file", str(token), "--name", "other", "--replace", status=None)
    stage.check("rnr_" not in again or "laptop" in again, "the join string is good for one runner only")
    await connect(stage)
    stage.check(True, "the daemon proved its key, the plane proved its own, and the session is up")


async def connect(stage: Stage) -> None:
    """Start the daemon and wait for its session."""
    await stage.start("daemon", "runner", "--log-format", "json", "start")

    async def online() -> bool:
        listed = await stage.json("runner-control", "runners")
        return any(runner["online"] for runner in listed["runners"])

    await until(online, "the session")


async def make_worktree(stage: Stage) -> str:
    """A signed command makes a git worktree of a clone."""
    stage.title("A signed command makes a git worktree")
    source = stage.home / "repo"
    clone(Path(os.environ.get("DEMO_REPO") or PROJECT), source)
    made = await stage.json(
        "runner-control", "worktree", "create", RUNNER, "--repo", str(source), "--base", "HEAD", "--branch", "demo/work"
    )
    head = subprocess.run(["git", "-C", made["path"], "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    stage.check(
        made["state"] == "ready" and head.stdout.strip() == made["head"], f"{made['path']} at {made['head'][:12]}"
    )
    worktree: str = made["id"]
    return worktree


def clone(wanted: Path, target: Path) -> None:
    """A temporary clone of `wanted`, or a fresh repository where there is none with a commit."""
    run = ["git", "-c", "user.name=demo", "-c", "user.email=demo@localhost"]
    cloned = subprocess.run([*run, "clone", "--quiet", "--no-hardlinks", str(wanted), str(target)], capture_output=True)
    born = subprocess.run(["git", "-C", str(target), "rev-parse", "--verify", "HEAD"], capture_output=True)
    if cloned.returncode or born.returncode:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([*run, "init", "--quiet", str(target)], check=True)
        subprocess.run([*run, "-C", str(target), "commit", "--quiet", "--allow-empty", "-m", "Begin"], check=True)


async def run_through_a_crash(stage: Stage, worktree: str) -> dict[str, Any]:
    """Real work, streamed live; in the middle the daemon dies and another takes over."""
    here = stage.home / "state" / "worktrees" / worktree
    has_tests = any(path.is_dir() for path in here.glob("*/tests/unit/protocol"))
    command = os.environ.get("DEMO_CMD") or (FAST_TESTS if has_tests else COUNTING)
    stage.title(f"A signed command runs real work in it: {command[:90]}")
    process = await asyncio.create_subprocess_exec(
        str(BIN / "runner-control"),
        "exec", RUNNER, "--worktree", worktree, "--", "sh", "-c", command,
        env=stage.env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=2**24,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    errors = asyncio.ensure_future(process.stderr.read())
    seen, killed = bytearray(), False
    async for line in process.stdout:
        seen += line
        count = seen.count(b"\n")
        if count <= 4 or count % 100 == 0:
            stage.say(f"[white]│[/] {line.decode(errors='replace').rstrip()[:110]}")
        if count == 4 and not killed:
            killed = True
            pid = await stage.kill("daemon")
            stage.say(f"[bold red]kill -9 {pid}[/]: the daemon is dead; the command runs on under its shim")
            await connect(stage)
            stage.say("[bold]another daemon is up[/] and has taken the command back")
    status = await process.wait()
    lines = seen.count(b"\n")
    stage.say(f"[white]│[/] {seen.decode(errors='replace').rstrip().splitlines()[-1][:110] if seen else '(no output)'}")
    execution = await newest(stage)
    settlement = execution["settlement"]
    stage.check(killed or lines < 4, "the daemon was killed while the output was flowing")
    stage.check(
        settlement is not None and settlement["verdict"] == "exited", f"the command ended by itself with {status}"
    )
    stage.check(execution["exit_status"] == status, "`exec` ends with the command's own status")
    out, err = settlement["streams"]["stdout"], settlement["streams"]["stderr"]
    stage.check(
        (out["bytes"], out["sha256"]) == (len(seen), hashlib.sha256(seen).hexdigest()),
        f"{len(seen)} bytes of stdout came through the crash: none lost, none doubled",
    )
    stage.check(err["sha256"] == hashlib.sha256(await errors).hexdigest(), f"so did {err['bytes']} bytes of stderr")
    return execution


async def newest(stage: Stage) -> dict[str, Any]:
    """The execution ordered last, once its log is complete."""
    listed = await stage.json("runner-control", "ps", "--all")
    wanted = listed["executions"][0]["id"]

    async def complete() -> dict[str, Any] | None:
        shown = await stage.json("runner-control", "show", wanted)
        execution: dict[str, Any] = shown.get("execution", shown)
        return execution if execution["settlement"] and execution["log"]["complete"] else None

    found: dict[str, Any] = await until(complete, "the end of the execution")
    return found


async def deliver_again(stage: Stage, relay: Relay) -> None:
    """The relay says the last start once more."""
    stage.title("The relay delivers the same envelope again")
    before = len((await stage.json("runner", "ps", "--all"))["attempts"])
    log = stage.home / "daemon.log"
    await relay.inject(relay.commands[-1])

    async def noticed() -> bool:
        return "command.duplicated" in log.read_text(errors="replace")

    await until(noticed, "the answer to a double", FRAMES_S)
    after = len((await stage.json("runner", "ps", "--all"))["attempts"])
    stage.check(before == after, "it is answered with the stored receipt and has no second effect")


async def forge(stage: Stage, relay: Relay) -> None:
    """The relay changes one argument, and then signs with a key of its own."""
    stage.title("The relay forges")
    frame = json.loads(relay.commands[-1])
    envelope = json.loads(frame["env"])
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["args"]["argv"] = ["touch", str(stage.home / "pwned")]
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    for keyid, reason in ((envelope["signatures"][0]["keyid"], "BAD_SIG"), ("x" * 43, "UNKNOWN_KEY")):
        envelope["signatures"][0]["keyid"] = keyid
        known = len(relay.refused)
        await relay.inject(json.dumps({"t": "command", "env": json.dumps(envelope)}))
        await relay.until(lambda r, known=known: len(r.refused) > known, FRAMES_S)
        told = relay.refused[-1]["reason"]
        stage.check(told == reason and not (stage.home / "pwned").exists(), f"refused with {told}, and nothing ran")


async def stop_the_stubborn(stage: Stage) -> None:
    """A tree that ignores TERM, with a grandchild in a session of its own."""
    stage.title("A stop ends a process tree that ignores TERM")
    order = ("exec", RUNNER, "--cwd", str(stage.home), "--detach", "--json", "--", "sh", "-c", STUBBORN)
    started = json.loads(await stage.run("runner-control", *order))

    async def breeds() -> bool:
        return len(stage.carriers()) >= 3

    await until(breeds, "the tree")
    alive = len(stage.carriers())
    await stage.run("runner-control", "stop", started["id"], "--grace", "500ms")
    execution = await newest(stage)
    settlement = execution["settlement"]
    stage.check(
        settlement["verdict"] == "stopped" and execution["exit_status"] == KILLED_EXEC_STATUS, "settled as stopped"
    )
    stage.check(settlement["survivors"] == 0 and not stage.carriers(), f"{alive} processes ignored TERM; none is left")


async def show_the_end(stage: Stage, execution: dict[str, Any]) -> None:
    """What the child wrote, what the plane stored, what the runner signed, and who else can check it."""
    stage.title("What is known of the work, and by whose word")
    shown = await stage.run("runner-control", "show", execution["id"])
    for line in shown.rstrip().splitlines()[:24]:
        stage.say(line[:130])
    digests = (await stage.json("runner-control", "show", execution["id"])).get("digests")
    streams = execution["settlement"]["streams"]
    stage.check(
        digests is not None and all(digests["streams"].get(name, {"bytes": 0})["bytes"] == s["bytes"] for name, s in streams.items()),
        "the control plane stored as many bytes of each stream as the child wrote",
    )  # fmt: skip
    same = all(s["bytes"] == 0 or digests["streams"][name]["sha256"] == s["sha256"] for name, s in streams.items())
    stage.check(same, "and the same bytes, by SHA-256 on both sides")
    proof = stage.home / "proof"
    await stage.run("runner-control", "receipts", execution["id"], "--out", str(proof))
    key = next(proof.glob("*.pub"))
    for envelope in sorted(path for path in proof.iterdir() if path != key):
        script = PROJECT / "examples" / "verify_receipt.py"
        checked = subprocess.run(
            [sys.executable, str(script), str(envelope), key.read_text().strip()], capture_output=True
        )
        stage.check(checked.returncode == 0, f"openssl verifies {envelope.name}")


async def remove_worktree(stage: Stage, worktree: str) -> None:
    """The worktree goes; what it was a worktree of stays."""
    stage.title("The worktree is removed")
    await stage.run("runner-control", "worktree", "remove", worktree, "--force")
    gone = not (stage.home / "state" / "worktrees" / worktree).exists()
    branch = subprocess.run(
        ["git", "-C", str(stage.home / "repo"), "rev-parse", "--verify", "demo/work"], capture_output=True
    )
    stage.check(gone and branch.returncode == 0, "its directory is gone, its branch is kept")


async def finish(stage: Stage) -> None:
    """Both sides go quietly."""
    stage.title("The end")
    stage.check(await stage.end("daemon") == 0, "the daemon ends at SIGTERM")
    stage.check(await stage.end("plane") == 0, "so does the control plane")

    async def quiet() -> bool:
        return not stage.carriers()

    await until(quiet, "quiet")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
