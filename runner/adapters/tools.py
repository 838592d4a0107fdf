"""Tools: programs of ours that write (git), each run to its end under a shim like an attempt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import Reason
from protocol.records import RecordKind, records
from runner.adapters.attemptdir import clear, exit_of, still_held, tool_spec
from runner.adapters.attemptfiles import LOG_DIR
from runner.adapters.shims import ShimAdapter
from runner.adapters.spool import Hole, SpoolReader
from runner.core.plans import ExitRecord
from runner.errors import Broken
from runner.ports import ToolExit

TOOL_OUTPUT_BYTES_MAX: Final = 1024 * 1024
"""Of each stream of a tool: git's own messages; what is longer is cut and said to be."""
TOOL_GRACE_MS: Final = 5_000
"""Git removes its lock files on TERM; that takes milliseconds."""
CHUNK_BYTES: Final = 65_552


@dataclass(frozen=True, slots=True)
class ShimTools:
    """Implements the port Tools on the shims of the daemon."""

    shims: ShimAdapter

    async def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        locks: Sequence[int],
        timeout_ms: int,
    ) -> ToolExit:
        """See the port."""
        settings, do = self.shims.settings, self.shims.do
        directory = settings.root / name
        await self._await_earlier(name, directory, timeout_ms)
        spec = tool_spec(settings, name, argv, cwd, env, timeout_ms, TOOL_GRACE_MS)
        record = await self.shims.run_to_end(name, spec, locks)
        if record is None:
            # Its shim is gone, and what it ran may go on: not after the caller gives its locks back.
            await self.shims.sweep(name)
        ended = await do(_tool_exit, directory, record)
        self.shims.let_go(name)
        await do(clear, directory)
        return ended

    async def _await_earlier(self, name: str, directory: Path, timeout_ms: int) -> None:
        """A tool that an earlier daemon started under this name is left to finish; its result is found in the world."""
        if not directory.exists():  # noqa: ASYNC240 - one stat of a local directory
            return
        if await self.shims.do(still_held, directory, timeout_ms / 1000):
            raise Broken(Reason.INFRA, "a tool of an earlier daemon does not end")
        if await self.shims.do(exit_of, directory) is None:
            await self.shims.sweep(name)
        await self.shims.do(clear, directory)


def _tool_exit(directory: Path, record: ExitRecord | None) -> ToolExit:
    """What a tool left in its log. Raises Broken when it did not come to an end of its own."""
    record = record if record is not None else exit_of(directory)
    if record is None:
        raise Broken(Reason.SHIM_LOST, "the shim of a tool was lost")
    if record.verdict != "exited" or record.code is None:
        reason = Reason.GIT_FAILED if record.verdict != "never_started" else Reason.SPAWN_FAILED
        raise Broken(reason, f"a tool did not end by itself: {record.verdict} {record.cause_detail}"[:200])
    stdout, stderr, truncated = _streams(directory / LOG_DIR)
    return ToolExit(record.code, stdout, stderr, truncated)


def _streams(log: Path) -> tuple[bytes, bytes, bool]:
    """Both streams, and whether something of them is missing here."""
    streams = {RecordKind.STDOUT: bytearray(), RecordKind.STDERR: bytearray()}
    truncated = False
    reader = SpoolReader(log)
    offset = 0
    try:
        while (found := reader.read(offset, CHUNK_BYTES)) is not None:
            if isinstance(found, Hole):
                truncated, offset = True, found.end
                continue
            for entry in records(found.data, found.offset):
                kept = streams.get(RecordKind(entry.kind)) if entry.kind in (1, 2) else None
                if kept is not None:
                    room = TOOL_OUTPUT_BYTES_MAX - len(kept)
                    truncated = truncated or len(entry.payload) > room
                    kept += entry.payload[: max(room, 0)]
            offset = found.end
    finally:
        reader.close()
    return bytes(streams[RecordKind.STDOUT]), bytes(streams[RecordKind.STDERR]), truncated
