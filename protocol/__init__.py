"""The language that runners and control planes speak: pure, typed, specified in docs/protocol.md."""

from protocol.messages import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
