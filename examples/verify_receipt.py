#!/usr/bin/env python3
"""Verify a receipt or settlement without any of our code: Python's standard library and `openssl` 3.

    verify_receipt.py ENVELOPE_FILE X

X is the `x` of the runner's certificate (base64url). Prints the payload and exits 0, or exits 1 when the signature does not fit.
"""

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TYPES = ("application/vnd.local-runner.receipt.v1+json", "application/vnd.local-runner.settlement.v1+json")
SPKI_ED25519 = bytes.fromhex("302a300506032b6570032100")  # RFC 8410: what stands before the 32 bytes of a key

envelope = json.loads(Path(sys.argv[1]).read_bytes())
key = base64.urlsafe_b64decode(sys.argv[2] + "=")
payload = base64.b64decode(envelope["payload"], validate=True)
kind = envelope["payloadType"]
if kind not in TYPES or len(envelope["signatures"]) != 1 or len(key) != 32:
    sys.exit("neither a receipt nor a settlement of one runner")
pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
pem = b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n" % base64.b64encode(SPKI_ED25519 + key)
with tempfile.TemporaryDirectory() as place:
    files = {"key": pem, "pae": pae, "sig": base64.b64decode(envelope["signatures"][0]["sig"], validate=True)}
    for name, data in files.items():
        Path(place, name).write_bytes(data)
    verify = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "key", "-in", "pae", "-sigfile", "sig"]
    if subprocess.run(verify, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
        sys.exit("the signature does not fit")
print(payload.decode())
