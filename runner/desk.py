"""The daemon's answers on the local control socket: what it is doing, for the owner of the machine."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import structlog

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.lease import LeaseState
from protocol.limits import TIMEOUT_MS_MAX
from runner.adapters.attemptfiles import AttemptFiles, read_attempt, shown_size, written_end
from runner.adapters.control import ControlCall
from runner.adapters.exitrecord import parse_exit
from runner.adapters.retention import Retention
from runner.adapters.shims import ShimAdapter
from runner.adapters.uplink import Uplink, read_ack
from runner.core.engine import Engine
from runner.core.gate import shortage
from runner.core.inputs import Input, OwnerAdmission, OwnerStop
from runner.core.journaling import AttemptRow
from runner.core.plans import Admission, Headroom, Phase
from runner.core.viewers import has_terminal
from runner.errors import Refused
from runner.link import Link
from runner.logdesk import LogDesk
from runner.ports import Clock

LISTED_MAX: Final = 200
"""Attempts in one answer of `ps`: it must fit a line of the control socket."""
NAMED_MAX: Final = 20
"""Living attempts that an answer about admission names: for a person who waits for their end."""


class Desk:
    """Answers `status`, `ps`, `stop`, `admission`, `orphans`, `gc`, `log`, `log_level` and `shutdown`.

    `settle` puts an input and returns when what follows from it is durable; `end` begins the end of the daemon.
    """

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
        settle: Callable[[Input], Awaitable[None]],
        measure: Callable[[], Headroom],
        end: Callable[[], None],
        orphans: Callable[[ControlCall], Awaitable[dict[str, Any]]],
        logs: LogDesk,
        retention: Retention,
    ) -> None:
        self._version = version
        self._name = name
        self._engine = engine
        self._shims = shims
        self._uplink = uplink
        self._link = link
        self._clock = clock
        self._put = put
        self._settle = settle
        self._measure = measure
        self._end = end
        self._orphans = orphans
        self._logs = logs
        self._retention = retention
        self._log = structlog.get_logger()
        self._started_ms = clock.now().boot_ms

    async def answer(self, call: ControlCall) -> dict[str, Any]:
        """Answer one call. Raises Refused."""
        if call.verb == "log":
            return await self._logs.lines(call)
        # Those who read the log are not told of in it: each line would have them ask for the next.
        self._log.debug("owner.asked", verb=call.verb, uid=call.uid, pid=call.pid)
        match call.verb:
            case "status":
                return self._status()
            case "ps":
                return self._ps(everything=call.args.get("all") is True)
            case "stop":
                return self._stop(call)
            case "admission":
                return await self._admit(call)
            case "orphans":
                return await self._orphans(call)
            case "gc":
                return await self._prune(call)
            case "log_level":
                return await self._logs.level(call)
            case "shutdown":
                self._end()
                return {"pid": os.getpid()}
            case _:
                raise Refused(Reason.UNSUPPORTED_KIND, "the daemon does not know this verb")

    def _status(self) -> dict[str, Any]:
        engine, link, now = self._engine, self._link.status, self._clock.now()
        offset = engine.rhythm.plane_offset_ms
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
            "ptys": sum(has_terminal(engine, row) for row in engine.attempts.living_rows()),
            "policy_digest": engine.policy.digest,
            "keyset_version": engine.keyset.value.version,
            "outbox": {"head": engine.statements.out_head, "unanswered": self._link.unanswered},
            "log_backlog_bytes": self._uplink.backlog_bytes,
            "admission": self._admission(),
            "headroom": self._headroom(),
            "leases": self._leases(),
            "survivors": sum(engine.orphans.survivors.values()),
            "cgroups": _text(self._shims.settings.cgroups),
            "log": self._logs.state(),
        }

    # --- admission ----------------------------------------------------------------------------------------------

    async def _admit(self, call: ControlCall) -> dict[str, Any]:
        """Open or close the machine for new work, durably; without a state: how it stands, and what lives."""
        wanted, in_ms = call.args.get("state"), call.args.get("deadline_ms")
        if wanted is not None:
            if wanted not in list(Admission) or not (in_ms is None or _is_duration(in_ms)):
                raise Refused(Reason.BAD_ARGS, "admission takes state and deadline_ms")
            deadline_ms = None if in_ms is None else self._clock.now().boot_ms + in_ms
            await self._settle(OwnerAdmission(Admission(wanted), f"owner:{call.uid}", deadline_ms))
        living = self._engine.attempts.living_names()
        return {
            **self._admission(),
            "attempts": len(living),
            "living": [attempt.name for attempt in living[:NAMED_MAX]],
        }

    def _admission(self) -> dict[str, Any]:
        gate = self._engine.gate
        left_ms = None if gate.drain_deadline_ms is None else gate.drain_deadline_ms - self._clock.now().boot_ms
        return {"state": gate.admission.value, "stops_in_ms": left_ms}

    def _headroom(self) -> dict[str, Any]:
        room = self._measure()
        short = shortage(room, self._engine.policy)
        return {**asdict(room), "short": None if short is None else short[0].value, "detail": short[1] if short else ""}

    def _leases(self) -> dict[str, Any]:
        leases = [row.lease for row in self._engine.attempts.living_rows() if row.lease is not None]
        held = [lease for lease in leases if lease.state is LeaseState.HELD]
        lost = sum(1 for lease in leases if lease.state is LeaseState.LOST)
        now_ms = self._clock.now().boot_ms
        # Half of what was left when its renewal came due has gone by, too.
        late = sum(1 for lease in held if now_ms > (lease.renew_at_ms + lease.deadline_ms) // 2)
        soonest_ms = min((lease.deadline_ms - now_ms for lease in held), default=None)
        return {"held": len(held), "lost": lost, "late": late, "soonest_ms": soonest_ms}

    async def _prune(self, call: ControlCall) -> dict[str, Any]:
        try:
            return await self._retention.prune(by=f"owner:{call.uid}", dry_run=call.args.get("dry_run") is True)
        except OSError as exc:
            raise Refused(Reason.INFRA, f"the attempts' directories cannot be looked at: {exc.strerror}") from exc

    # --- attempts -----------------------------------------------------------------------------------------------

    def _ps(self, *, everything: bool) -> dict[str, Any]:
        rows = [
            row for row in self._engine.attempts.rows.values() if everything or row.state is not AttemptState.SETTLED
        ]
        return {
            "attempts": [self._row(row) for row in rows[-LISTED_MAX:]],
            "omitted": max(len(rows) - LISTED_MAX, 0),
            "admission": self._admission(),
        }

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
            "terminal": shown_size(seen),
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


def _text(place: Path | None) -> str | None:
    return None if place is None else str(place)


def _is_duration(value: object) -> bool:
    return type(value) is int and 0 <= value <= TIMEOUT_MS_MAX


def _status(code: int | None, signal: int | None) -> int | None:
    return 128 + signal if signal is not None else code
