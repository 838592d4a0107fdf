"""A viewer of a PTY at the shim's own socket: types with a count of its own, waits for what the terminal shows."""

from __future__ import annotations

from runner.shim import wire
from tests.support.shim import Connection, Shim


class Viewer:
    """One viewer, on a connection of its own."""

    def __init__(self, shim: Shim, name: str = "vw_1", connection: Connection | None = None) -> None:
        self.shim = shim
        self.name = name.encode()
        self.sent = 0
        self.gen = 0
        if connection is None:
            connection = shim.connect()
            connection.send(wire.VIEW)
            connection.wait(wire.WELCOME)
        self.connection = connection

    def give(self, offset: int, data: bytes) -> tuple[int, int, bool]:
        """Send one TYPE as it is; how much was taken, up to where there is room, and whether it is over."""
        self.connection.sock.sendall(wire.pack_type(self.name, offset, data))
        while True:
            viewer, received, credit, closed = wire.unpack_taken(self.connection.wait(wire.TAKEN))
            if viewer == self.name:
                return received, credit, closed

    def type(self, data: bytes) -> None:
        """Type, behind what was typed before."""
        received, _, _ = self.give(self.sent, data)
        self.sent += len(data)
        assert received == self.sent, "there is room for it"

    def resize(self, rows: int, cols: int, *, redraw: bool = False, gen: int | None = None) -> None:
        """Say the size of this viewer's window."""
        self.gen = self.gen + 1 if gen is None else gen
        self.connection.sock.sendall(wire.pack_resize(self.name, self.gen, rows, cols, redraw=redraw))

    def seen(self, offset: int | None) -> None:
        """Say how far this viewer followed."""
        self.connection.sock.sendall(wire.pack_seen(offset))

    def leave(self) -> None:
        """Say that this viewer is gone."""
        self.connection.sock.sendall(wire.pack_leave(self.name))

    def shows(self, text: bytes, count: int = 1) -> None:
        """Wait until the terminal has shown it."""
        self.shim.wait_log(lambda log: log.pty.count(text) >= count, f"{text!r} on the terminal")

    def close(self) -> None:
        """Without a word."""
        self.connection.close()
