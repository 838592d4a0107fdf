"""The language that runners and control planes speak: pure, typed, specified in docs/protocol.md."""
