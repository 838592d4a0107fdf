"""`make demo`: the main job from nothing, with real processes, and everything that is promised checked on the way.

DEMO_REPO=path uses another repository (it is cloned, never touched), DEMO_CMD='…' another command.
Ends with 0 only when every promise held; leaves nothing running and nothing behind, also on ^C.
"""

import asyncio
import base64
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo.relay import Relay
from examples.demo.stage import Failure, Stage, until
from examples.demo.work import (
    PROJECT,
    RUNNER,
    connect,
    make_worktree,
    newest,
    remove_worktree,
    run_through_a_crash,
    traces,
)

STUBBORN = (
    "trap '' TERM; (trap '' TERM; setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' &) ;"
    " echo ready; while :; do sleep 1; done"
)
TREE_SIZE = 3
KILLED_EXEC_STATUS = 137
INTERRUPTED_STATUS = 130
FRAMES_S = 10.0
"""How long a frame through the relay may take to show its effect."""


async def main() -> int:
    """Tell the story; 1 when a promise did not hold, 130 when it was interrupted."""
    stage = Stage()
    telling = asyncio.ensure_future(story(stage))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, telling.cancel)
    status = INTERRUPTED_STATUS
    try:
        await telling
        status = 0
    except asyncio.CancelledError:
        stage.console.print()
        stage.say("Interrupted.", "bold red")
    except Exception as failure:
        status = 1
        stage.console.print()
        stage.say(f"It did not hold: {failure or type(failure).__name__}", "bold red")
        for name in ("daemon", "plane"):
            stage.say(f"--- the end of {name}.log", "dim")
            stage.console.out(stage.log_tail(name))
        if not isinstance(failure, Failure | TimeoutError):
            raise
    finally:
        left = await stage.close()
    if left or stage.home.exists():
        stage.say(f"{len(left)} processes could not be ended, or {stage.home} not removed", "bold red")
        return status or 1
    if status == 0:
        stage.console.print()
        stage.say(f"All {stage.checks} promises held. Nothing is left running, nothing is left behind.", "bold green")
    return status


async def story(stage: Stage) -> None:
    """The parts in order."""
    before = await asyncio.to_thread(traces)
    await begin(stage)
    async with Relay(f"ws://127.0.0.1:{stage.port}/v1/runner") as relay:
        await enrol(stage, relay)
        worktree = await make_worktree(stage)
        execution = await run_through_a_crash(stage, worktree)
        await deliver_again(stage, relay, execution)
        await forge(stage, relay)
        await stop_the_stubborn(stage)
        await show_the_end(stage, execution)
        await remove_worktree(stage, worktree, before)
        await finish(stage)


async def begin(stage: Stage) -> None:
    """The embedded control plane, on SQLite."""
    stage.title("A control plane on SQLite")
    listen, db = f"127.0.0.1:{stage.port}", stage.home / "plane" / "control.db"
    plane = await stage.start("plane", "runner-control", "serve", "--db", str(db), "--listen", listen)

    async def answers() -> bool:
        if plane.returncode is not None:
            raise Failure(f"the control plane ended with {plane.returncode}")
        return (await stage.finished("runner-control", "runners"))[0] == 0

    await until(answers, "the control plane")
    stage.check(db.read_bytes()[:15] == b"SQLite format 3", f"it listens on {listen} and keeps its state in SQLite")


async def enrol(stage: Stage, relay: Relay) -> None:
    """A runner joins with a one-time string; between the two sits a relay that nobody has to trust."""
    stage.title("A runner enrols and connects, through a relay that nobody trusts")
    made = await stage.json("runner-control", "enroll-token", "--name", RUNNER)
    join = made["join"].replace(f":{stage.port}/", f":{relay.port}/")
    token = stage.home / "join.txt"
    token.write_text(join)
    order = ("enroll", "--token-file", str(token), "--name", RUNNER, "--root", str(stage.home))
    for line in (await stage.run("runner", *order)).strip().splitlines()[:4]:
        stage.say(line)
    ended, _, complaint = await stage.finished("runner", "--state-dir", str(stage.home / "thief"), *order)
    stage.check(ended != 0 and "BAD_JOIN_TOKEN" in complaint, "nobody else enrols with the same string: BAD_JOIN_TOKEN")
    await connect(stage)
    (listed,) = (await stage.json("runner-control", "runners"))["runners"]
    key_id = (await stage.json("runner", "status"))["key_id"]
    hello, challenge, proof, welcome = (relay.passed[kind][-1] for kind in ("hello", "challenge", "proof", "welcome"))
    said = signed(proof["env"])
    stage.check(
        key_id == listed["key_id"] == signer(proof["env"]) and said["nonce_plane"] == challenge["nonce"],
        f"the runner proved its key {key_id[:12]}… over the plane's nonce",
    )
    said = signed(welcome["env"])
    stage.check(
        said["nonce_runner"] == hello["nonce"] and said["now_ms"] > 0,
        "the plane proved its own over the runner's nonce, and the session is up",
    )


def signed(envelope: str) -> dict[str, Any]:
    """What an envelope says."""
    payload: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return payload


def signer(envelope: str) -> str:
    """The key id of an envelope's one signature."""
    (signature,) = json.loads(envelope)["signatures"]
    return str(signature["keyid"])


async def deliver_again(stage: Stage, relay: Relay, execution: dict[str, Any]) -> None:
    """The relay says the start once more."""
    stage.title("The relay delivers the same envelope again")
    (start,) = {frame for frame in relay.commands if signed(json.loads(frame)["env"])["cmd_id"] == execution["cmd_id"]}
    before = await effects(stage, execution)
    stored = {one["envelope"] for one in before[1] if one["kind"] == "receipt"}
    told = len(relay.passed["report"])
    await relay.inject(start)
    await relay.until(
        lambda r: any(item["body"] in stored for report in r.passed["report"][told:] for item in report["items"]),
        FRAMES_S,
    )
    stage.check(len(stored) == 1, "it is answered with the stored receipt, byte for byte")
    stage.check(
        await effects(stage, execution) == before, "it has no second effect: as many attempts and statements as before"
    )


async def effects(stage: Stage, execution: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """What could be more after a second effect."""
    statements = (await stage.json("runner-control", "receipts", execution["id"]))["statements"]
    return await known_attempts(stage), statements


async def known_attempts(stage: Stage) -> list[str]:
    """The names of all attempts the runner knows."""
    return [attempt["attempt"] for attempt in (await stage.json("runner", "ps", "--all"))["attempts"]]


async def forge(stage: Stage, relay: Relay) -> None:
    """The relay changes one argument, and then claims a key of its own."""
    stage.title("The relay forges")
    pwned = stage.home / "pwned"
    frame = json.loads(relay.commands[-1])
    envelope = json.loads(frame["env"])
    payload = signed(frame["env"])
    payload["args"]["argv"] = ["touch", str(pwned)]
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    attempts = await known_attempts(stage)
    for keyid, reason in ((envelope["signatures"][0]["keyid"], "BAD_SIG"), ("x" * 43, "UNKNOWN_KEY")):
        envelope["signatures"][0]["keyid"] = keyid
        relay.passed["refused"].clear()
        await relay.inject(json.dumps({"t": "command", "env": json.dumps(envelope)}))
        await relay.until(lambda r: bool(r.passed["refused"]), FRAMES_S)
        told = relay.passed["refused"][-1]["reason"]
        stage.check(told == reason, f"refused with {told}")
    stage.check(await known_attempts(stage) == attempts and not pwned.exists(), "and nothing ran")


async def stop_the_stubborn(stage: Stage) -> None:
    """A tree that ignores TERM, with a grandchild in a session of its own."""
    stage.title("A stop ends a process tree that ignores TERM")
    order = ("exec", RUNNER, "--cwd", str(stage.home), "--detach", "--json", "--", "sh", "-c", STUBBORN)
    started = json.loads(await stage.run("runner-control", *order))

    async def breeds() -> bool:
        return len(stage.carriers()) >= TREE_SIZE

    await until(breeds, "the tree")
    alive = len(stage.carriers())
    await stage.run("runner-control", "stop", started["id"], "--grace", "500ms")
    execution = await newest(stage)
    settlement = execution["settlement"]
    stage.check(
        settlement["verdict"] == "stopped" and execution["exit_status"] == KILLED_EXEC_STATUS,
        f"settled as stopped, by signal {settlement['signal']}",
    )
    stage.check(settlement["survivors"] == 0 and not stage.carriers(), f"{alive} processes ignored TERM; none is left")


async def show_the_end(stage: Stage, execution: dict[str, Any]) -> None:
    """What the child wrote, what the plane stored, what the runner signed, and who else can check it."""
    stage.title("What is known of the work, and by whose word")
    shown = await stage.run("runner-control", "show", execution["id"])
    for line in shown.rstrip().splitlines():
        stage.say(line[:130])
    digests = (await stage.json("runner-control", "show", execution["id"]))["digests"]
    stage.check(
        digests["streams"] == execution["settlement"]["streams"] and digests["complete"] and digests["chain_ok"],
        "the control plane stored the very bytes the child wrote, by length and SHA-256 of each stream",
    )
    proof = stage.home / "proof"
    for line in (await stage.run("runner-control", "receipts", execution["id"], "--out", str(proof))).splitlines():
        stage.say(line[:130])
    (key,) = proof.glob("*.pub")
    files = sorted(path for path in proof.iterdir() if path != key)
    kinds = ["receipt", "settlement"]
    stage.check([path.name.split("-")[1] for path in files] == kinds, "one signed receipt and one signed settlement")
    for envelope in files:
        stage.check(verified(envelope, key), f"openssl verifies {envelope.name} with the runner's key alone")
    tampered = proof / "tampered.json"
    whole = json.loads(files[-1].read_bytes())
    payload = base64.b64decode(whole["payload"]).replace(b'"exited"', b'"lost"')
    tampered.write_text(json.dumps({**whole, "payload": base64.b64encode(payload).decode()}))
    stage.check(not verified(tampered, key), "and not a settlement with another verdict in it")


def verified(envelope: Path, key: Path) -> bool:
    """Whether the short script in `examples/` takes it."""
    script = PROJECT / "examples" / "verify_receipt.py"
    argv = [sys.executable, str(script), str(envelope), key.read_text().strip()]
    return subprocess.run(argv, capture_output=True).returncode == 0


async def finish(stage: Stage) -> None:
    """Both sides go quietly."""
    stage.title("The end")
    stage.check(await stage.end("daemon") == 0, "the daemon ends at SIGTERM")
    stage.check(await stage.end("plane") == 0, "so does the control plane")

    async def quiet() -> bool:
        return not stage.belongings()

    await until(quiet, "quiet")
    stage.check(True, "nothing of them is left running")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
