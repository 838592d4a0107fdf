"""`logs`: what executions wrote, as the control plane has it, and whether that is what was signed."""

import json
import time
from typing import Any, Final

import click

from controlplane.client import Json, PlaneClient
from controlplane.follow import attempt_of, print_log
from controlplane.reach import ExitCode, Reach, pass_reach, path_id
from protocol.logproof import Proof
from terminal.logs import LogPrinter, log_options, print_proof, read_request


@click.command(short_help="Print what an execution wrote.")
@click.argument("execution_id", metavar="ID")
@log_options
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Of this attempt [default: the current one].")
@pass_reach
@click.pass_context
def logs(ctx: click.Context, reach: Reach, /, execution_id: str, attempt: int | None, **options: Any) -> None:
    """Print what an execution wrote, as the control plane has it: stdout to stdout, stderr to stderr, byte for byte.

    What is lost is named on stderr: [gap: N bytes missing]. At a terminal control characters are shown escaped,
    unless --raw, and the end is told.

    --tail counts the lines of both streams together, looks back 64 MiB at most, and with -f goes on from there.
    --verify has the control plane add streams and segments up again, and compares them with the signed settlement.

    \b
    Examples:
      runner-control logs ex_1
      runner-control logs -f --tail 20 --timestamps ex_1
      runner-control logs --since 10m --stream stderr ex_1
      runner-control logs --json ex_1 | jq -r 'select(.kind == "stdout").data'
      runner-control logs --export asciicast ex_1 > ex.cast
      runner-control logs --verify ex_1
    """
    path_id(execution_id)
    request = read_request(time.time_ns() // 1_000_000, **options)
    with reach.client() as client:
        if not request.verify:
            print_log(
                client, execution_id, request.wish, LogPrinter.of(request), follow=request.follow, attempt=attempt
            )
            return
        found = attempt_of(client, client.get(f"/executions/{execution_id}"), attempt)
        proof = _proof(client, found)
    print_proof(proof, f"{execution_id}.{found['start_token']}", as_json=request.as_json)
    ctx.exit(ExitCode.OK if proof.ok else ExitCode.REFUSED)


def _proof(client: PlaneClient, found: Json) -> Proof:
    """What the control plane found of an attempt, and whether its runner did sign what that was compared with."""
    digests = client.get(f"/executions/{found['id']}/digests", attempt=found["start_token"])
    proof = Proof(**{name: list(digests["proof"][name]) for name in ("proven", "missing", "wrong")})
    if found["settlement"] is not None:
        signer = _signer(client, found)
        if signer is None:
            proof.wrong.append("the settlement is not signed with the key of its runner")
        else:
            proof.proven.append(f"the settlement: signed with {signer}")
    return proof


def _signer(client: PlaneClient, found: Json) -> str | None:
    """The key that signed the settlement as it is shown; None where none did."""
    from protocol.errors import RemoteError
    from protocol.keys import PublicKey
    from protocol.receipt import open_settlement

    published = {one["id"]: PublicKey.from_b64url(one["x"]) for one in client.get("/keys")["runners"]}
    key = published.get(found["runner"])
    if key is None:
        return None
    for one in client.get(f"/receipts/{found['id']}")["statements"]:
        if one["kind"] != "settlement" or one["payload"] != found["settlement"]:
            continue
        try:
            signed = open_settlement(one["envelope"].encode(), {key.key_id: key})
        except RemoteError:
            continue
        if json.loads(signed.payload) == found["settlement"]:
            return key.key_id
    return None


VERBS: Final[tuple[click.Command, ...]] = (logs,)
