"""The daemon's answers on the local control socket: what it is doing, for the owner of the machine."""

import os
from collections.abc import Callable
from typing import Any, Final

from protocol.errors import Reason
from protocol.execution import AttemptState
from runner.adapters.attemptfiles import AttemptFiles, read_attempt, written_end
from runner.adapters.control import ControlCall
from runner.adapters.exitrecord import parse_exit
from runner.adapters.shims import ShimAdapter
from runner.adapters.uplink import Uplink, read_ack
from runner.core.engine import Engine
from runner.core.inputs import Input, OwnerStop
from runner.core.journaling import AttemptRow
from runner.core.plans import Phase
from runner.errors import Refused
from runner.link import Link
from runner.ports import Clock

LISTED_MAX: Final = 200
"""Attempts in one answer of `ps`: it must fit a line of the control socket."""


class Desk:
    """Answers `status`, `ps` and `stop`."""

    def __init__(
        self,
        *,
        version: str,
        name: str,
        engine: Engine,
        shims: ShimAdapter,
        uplink: Uplink,
        link: Link,
        clock: Clock,
        put: Callable[[Input], None],
    ) -> None:
        self._version = version
        self._name = name
        self._engine = engine
        self._shims = shims
        self._uplink = uplink
        self._link = link
        self._clock = clock
        self._put = put
        self._started_ms = clock.now().boot_ms

    async def answer(self, call: ControlCall) -> dict[str, Any]:
        """Answer one call. Raises Refused."""
        match call.verb:
            case "status":
                return self._status()
            case "ps":
                return self._ps(everything=call.args.get("all") is True)
            case "stop":
                return self._stop(call)
            case _:
                raise Refused(Reason.UNSUPPORTED_KIND, "the daemon does not know this verb")

    def _status(self) -> dict[str, Any]:
        engine, link, now = self._engine, self._link.status, self._clock.now()
        offset = engine.plane_offset_ms
        return {
            "pid": os.getpid(),
            "state_dir": str(self._shims.settings.state_dir),
            "fork_server_pid": self._shims.server_pid,
            "uptime_s": (now.boot_ms - self._started_ms) // 1000,
            "version": self._version,
            "runner": engine.me.runner,
            "name": self._name,
            "org": engine.me.org,
            "inc": engine.me.inc,
            "key_id": engine.statements.key.key_id,
            "session": {
                "state": "up" if link.up else "down",
                "since_ms": link.since_ms,
                "url": link.url,
                "reason": link.reason,
            },
            "clock_offset_ms": None if offset is None else now.boot_ms + offset - now.wall_ms,
            "attempts": engine.attempts.living,
            "policy_digest": engine.policy.digest,
            "keyset_version": engine.keyset.value.version,
            "outbox": {"head": engine.statements.out_head, "unanswered": self._link.unanswered},
            "log_backlog_bytes": self._uplink.backlog_bytes,
        }

    def _ps(self, *, everything: bool) -> dict[str, Any]:
        rows = [
            row for row in self._engine.attempts.rows.values() if everything or row.state is not AttemptState.SETTLED
        ]
        return {"attempts": [self._row(row) for row in rows[-LISTED_MAX:]], "omitted": max(len(rows) - LISTED_MAX, 0)}

    def _row(self, row: AttemptRow) -> dict[str, Any]:
        name = row.attempt.name
        directory = self._shims.log_dir(name).parent
        seen = read_attempt(directory)
        pid, started_ms = self._shims.child_of(name)
        record = None if seen.exit is None else parse_exit(name, seen.exit)
        lease = row.lease
        return {
            "attempt": name,
            "execution_id": row.attempt.execution_id,
            "start_token": row.attempt.start_token,
            "state": _shown_state(row, seen),
            "argv": list(seen.argv[:8]),
            "cwd": seen.cwd,
            "pid": pid or seen.child_pid,
            "started_ms": started_ms or seen.started_ms,
            "ended_ms": None if record is None else record.ended_ms,
            "verdict": None if record is None else record.verdict,
            "exit_status": _status(record.code, record.signal) if record is not None else None,
            "log_end": written_end(directory) if record is None else record.log_end,
            "acked": self._uplink.acked(name) or read_ack(directory),
            "lease": None
            if lease is None
            else {
                "res": lease.res,
                "token": lease.token,
                "state": lease.state.value,
                "on_loss": lease.on_loss.value,
                "deadline_in_ms": lease.deadline_ms - self._clock.now().boot_ms,
            },
        }

    def _stop(self, call: ControlCall) -> dict[str, Any]:
        wanted, grace_ms = call.args.get("execution_id"), call.args.get("grace_ms")
        if not isinstance(wanted, str) or not (grace_ms is None or (isinstance(grace_ms, int) and grace_ms >= 0)):
            raise Refused(Reason.BAD_ARGS, "stop takes execution_id and grace_ms")
        rows = [
            row for row in self._engine.attempts.rows.values() if wanted in (row.attempt.execution_id, row.attempt.name)
        ]
        if not rows:
            raise Refused(Reason.UNKNOWN_TARGET, "no such execution on this machine")
        newest = max(rows, key=lambda row: row.attempt.start_token)
        if newest.state is not AttemptState.SETTLED:
            self._put(OwnerStop(newest.attempt.execution_id, grace_ms, f"owner:{call.uid}"))
        state = "ended" if newest.state is AttemptState.SETTLED else "stopping"
        return {"attempt": newest.attempt.name, "state": state}


def _shown_state(row: AttemptRow, seen: AttemptFiles) -> str:
    # That it was let go is not journaled: after a restart only the shim's files say that it runs.
    runs = row.state is AttemptState.PREPARED and seen.phase in (Phase.RELEASED, Phase.RUNNING)
    return AttemptState.RUNNING.value if runs else row.state.value


def _status(code: int | None, signal: int | None) -> int | None:
    return 128 + signal if signal is not None else code
