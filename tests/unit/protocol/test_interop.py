"""Others verify what we sign: openssl by the script we ship, and the WebCrypto of Node."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.envelope import PayloadType, pae, seal
from tests.support.builders import a_key, a_receipt, a_settlement

SCRIPT = Path(__file__).parents[3] / "examples" / "verify_receipt.py"
KEY = a_key("runner")
NODE = """
const [raw, pae, sig] = process.argv.slice(1).map((hex) => Buffer.from(hex, "hex"));
const subtle = crypto.webcrypto ? crypto.webcrypto.subtle : crypto.subtle;
subtle.importKey("raw", raw, { name: "Ed25519" }, false, ["verify"])
  .then((key) => subtle.verify("Ed25519", key, sig, pae))
  .then((good) => process.stdout.write(String(good)));
"""


def verify(envelope: bytes, x: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run the shipped script."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    path = place / "envelope.json"
    path.write_bytes(envelope)
    return subprocess.run([sys.executable, "-I", str(SCRIPT), str(path), x], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("kind", "payload"), [(PayloadType.RECEIPT, a_receipt().dump()), (PayloadType.SETTLEMENT, a_settlement().dump())]
)
def test_openssl_verifies_what_a_runner_signed(kind: PayloadType, payload: bytes, tmp_path: Path) -> None:
    """The script prints the very payload."""
    done = verify(seal(payload, kind, [KEY]), KEY.public.x, tmp_path)
    assert (done.returncode, done.stdout) == (0, payload.decode() + "\n")


def test_openssl_refuses_what_was_changed_or_signed_by_another(tmp_path: Path) -> None:
    """A payload of another envelope, another type, another key, two signatures."""
    good = json.loads(seal(a_receipt().dump(), PayloadType.RECEIPT, [KEY]))
    other = json.loads(seal(a_receipt(cmd_id="cmd_2").dump(), PayloadType.RECEIPT, [KEY]))
    changed = [
        good | {"payload": other["payload"]},
        good | {"payloadType": PayloadType.SETTLEMENT},
        good | {"payloadType": PayloadType.COMMAND},
        good | {"signatures": good["signatures"] * 2},
    ]
    for envelope in changed:
        done = verify(json.dumps(envelope).encode(), KEY.public.x, tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
    assert verify(json.dumps(good).encode(), a_key("other").public.x, tmp_path).returncode == 1
    assert verify(json.dumps(good).encode(), KEY.public.x, tmp_path).returncode == 0


def test_node_verifies_what_a_runner_signed() -> None:
    """WebCrypto takes the same PAE, key and signature, and refuses a changed one."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    message = pae(PayloadType.RECEIPT, a_receipt().dump())
    for signed, answer in ((message, "true"), (message + b" ", "false")):
        arguments = [KEY.public.raw.hex(), signed.hex(), KEY.sign(message).hex()]
        done = subprocess.run(
            [node, "--no-warnings", "-e", NODE, *arguments], capture_output=True, text=True, timeout=30
        )
        if "NotSupportedError" in done.stderr or "Unrecognized" in done.stderr:
            pytest.skip("this node's WebCrypto knows no Ed25519")
        assert (done.stdout, done.returncode) == (answer, 0), done.stderr
