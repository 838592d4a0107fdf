"""Connections that carry renewals and nothing else: how a runner keeps its leases while its session is starved.

Rule 1: they change no row and replace no session. Rule 2: they are few and short, and only of the daemon that has the line.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.beats import Beats
from controlplane.ledger import Ledger
from controlplane.limits import RENEWALS_PER_RUNNER_MAX
from protocol.errors import CloseCode, Reason, RemoteError
from protocol.handshake import seal_welcome
from protocol.identity import HelloClaims
from protocol.ids import Digest
from protocol.messages import Beat, Beaten, Welcome
from protocol.replay import Mark


class Renewals:
    """The connections that are open, by runner."""

    def __init__(self, ledger: Ledger, beats: Beats) -> None:
        self._ledger = ledger
        self._beats = beats
        self._open: Counter[str] = Counter()

    @contextmanager
    def line(self, claims: HelloClaims) -> Iterator[Welcome]:
        """The welcome of one connection, while it lasts. Raises RemoteError when it may not be."""
        runner_id = claims.runner
        self._admit(claims)
        self._open[runner_id] += 1
        try:
            yield self._welcome(claims)
        finally:
            self._open[runner_id] -= 1
            if not self._open[runner_id]:
                del self._open[runner_id]

    def answer(self, claims: HelloClaims, beat: Beat) -> Beaten:
        """Renew what may be renewed: no hints, no dispatch, no marks."""
        ledger = self._ledger
        ledger.last_seen_ms[claims.runner] = ledger.clock()
        self._beats.heard(claims.runner, claims.instance, claims.inc)
        return self._beats.answer(claims.runner, beat, renewals_only=True)

    def _admit(self, claims: HelloClaims) -> None:
        row = self._ledger.runners[claims.runner]
        if claims.instance and claims.instance in row.retired:
            raise RemoteError(Reason.IDENTITY_CONFLICT, "another daemon has succeeded it", CloseCode.IDENTITY_CONFLICT)
        if (claims.instance, claims.inc) != (row.instance, row.inc):
            # Not a copy for certain, but nobody whose leases we know: the session comes first.
            raise RemoteError(Reason.GOING_AWAY, "there is no session to renew for", CloseCode.GOING_AWAY)
        if self._open[claims.runner] >= RENEWALS_PER_RUNNER_MAX:
            raise RemoteError(Reason.RATE_LIMITED, "too many connections for renewals", CloseCode.GOING_AWAY)

    def _welcome(self, claims: HelloClaims) -> Welcome:
        ledger, keys = self._ledger, self._ledger.keys
        env = seal_welcome(
            claims,
            inc=claims.inc,
            session=ledger.new_id("se"),
            now_ms=ledger.clock(),
            beat_ms=ledger.beat_ms,
            ctl=Mark(claims.ctl.hw, Digest(claims.ctl.head)),
            out_hw=claims.out_head,
            key=keys.command,
        )
        stale = claims.keyset_version < keys.keyset.value.version
        return Welcome(env=env, keyset=keys.keyset.envelope.decode() if stale else None)
