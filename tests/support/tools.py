"""The `Tools` port without shims: a plain process that holds the locks, as a shim would."""

import subprocess
from collections.abc import Mapping, Sequence
from functools import partial

import anyio.to_thread

from runner.ports import ToolExit


class DirectTools:
    """Runs each tool to its end in a worker thread and remembers their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

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
        """Run `argv`; its output is whole."""
        assert locks, "a tool that writes holds a lock"
        self.names.append(name)
        return await anyio.to_thread.run_sync(partial(_run, argv, cwd, env, locks, timeout_ms))


def _run(argv: Sequence[str], cwd: str, env: Mapping[str, str], locks: Sequence[int], timeout_ms: int) -> ToolExit:
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=dict(env),
        pass_fds=locks,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=timeout_ms / 1000,
    )
    return ToolExit(status=done.returncode, stdout=done.stdout, stderr=done.stderr)
