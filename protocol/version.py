"""The version of this software, told in handshakes and by `--version`; the protocol has its own number (`messages`)."""

from typing import Final

VERSION: Final = "0.1.0"
"""Semantic Versioning 2.0.0; the package's metadata read it here."""
