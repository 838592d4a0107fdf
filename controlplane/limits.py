"""Bounds of the reference control plane itself; what crosses the wire is bounded in `protocol.limits`."""

from typing import Final

from protocol.limits import CHANNEL_WINDOW_BYTES_MAX, KIB, MIB, PTY_AHEAD_BYTES, PTY_AHEAD_BYTES_MIN

INTENT_TTL_MS: Final = 24 * 60 * 60 * 1000
"""A request that no runner took in a day is a forgotten one."""
IDEMPOTENCY_TTL_MS: Final = 24 * 60 * 60 * 1000
"""How long an Idempotency-Key answers with the first response: clients give up long before."""
INTENTS_QUEUED_MAX: Final = 10_000
"""Unsigned intents of one runner: a laptop that is asleep must not collect work without end."""
SAFETY_AT_ONCE_MAX: Final = 256
"""Stops signed in one transaction, beside the room of `ctl`: a stop waits for nobody."""
KEYSET_TTL_MS: Final = 30 * 24 * 60 * 60 * 1000
"""Short enough that a stolen key set dies by itself, long enough for a machine in a drawer over a holiday."""
LAST_SEEN_FLUSH_MS: Final = 30 * 1000
"""How stale `last_seen` may be on the disk: a beat costs no transaction."""
EXPIRY_SWEEP_MS: Final = 60 * 1000
KEYSET_CHECK_MS: Final = 24 * 60 * 60 * 1000
OUTBOX_PATIENCE_MS: Final = 60 * 1000
"""How long a session waits for items that its hello announced and that may have been pruned on the runner."""
FIRST_BEAT_MS: Final = 2 * 1000
"""How long new work waits for the first beat of a session, which says whether it is taken: it comes with the welcome."""
FETCH_AGAIN_MS: Final = 1000
"""A safety command that is asked for by name goes again at once, and not more often than this."""
FETCHED_MAX: Final = 1024
"""Commands of a session remembered as asked for: past it the oldest may be asked for again."""
UNKNOWN_EVENTS_MAX: Final = 64
"""Events of one session about attempts that we do not know: a runner that names new ones for ever must not fill the disk."""
RENEWALS_PER_RUNNER_MAX: Final = 4
"""Connections of one runner that carry renewals only: each thread of it that is starved needs one, for a moment."""
RENEWAL_MS_MAX: Final = 60 * 1000
"""How long such a connection lasts: a lease is renewed three times in it."""
EVENTS_PER_RUNNER_MAX: Final = 1000
"""Refusals and events kept of one runner: a loop of bad envelopes must not fill the disk."""

BODY_BYTES_MAX: Final = 128 * KIB
"""One REST body: a payload of the maximum size, and secrets that grow when they are sealed."""
PAYLOAD_HEADER_BYTES_MAX: Final = 2 * KIB
"""What a command's header adds to its arguments, at most; asked for room before an intent is taken."""
WAIT_MS_MAX: Final = 30 * 1000
"""`wait_ms`: below the idle timeout of every proxy we know."""
LIST_LIMIT: Final = 50
LIST_LIMIT_MAX: Final = 500
IDEMPOTENCY_KEY_CHARS_MAX: Final = 200

TRANSACTION_CLOSURES_MAX: Final = 256
"""Closures in one commit: past this, waiting for the slowest costs more than the saved fsync."""
SAID_MESSAGES_MAX: Final = 2048
"""Messages that wait for a slow runner's socket before its session ends: two full rooms of commands and their answers."""
REPORTS_QUEUED_MAX: Final = 8
"""Reports read and not yet stored: twice what an honest runner has in flight; then reading waits."""
SEND_TIMEOUT_S: Final = 30.0
"""A peer that takes nothing for this long is gone."""
CLOSE_TIMEOUT_S: Final = 2.0
SHUTDOWN_GRACE_S: Final = 3
WS_PING_S: Final = 20.0

SYNC_AFTER_BYTES: Final = 16 * MIB
"""fdatasync per 16 MiB costs nothing measurable, per 4 MiB it halves the throughput."""
SYNC_IDLE_MS: Final = 100
"""A tail that rests is durable after this."""
SYNC_AGE_MS: Final = 1000
"""A trickle that never rests is durable after this."""
SYNC_TICK_MS: Final = 25
"""How often the deadlines above are looked at while something is unsynced."""
SYNCS_AT_ONCE_MAX: Final = 4
"""Logs synced side by side: more only queue in the disk."""
READ_BLOCK_BYTES: Final = 256 * KIB
"""One read of a log for a client; several records always fit."""
DIGEST_BLOCK_BYTES: Final = 1 * MIB
PTY_LOG_BYTES: Final = 64 * MIB
"""Kept of the log of a PTY, the newest: weeks of a shell, and a shell that lives for years must not fill the disk."""
PTY_TRIM_BYTES: Final = 16 * MIB
"""By so much it may be longer: what is looked for and given up at once is worth a transaction."""
PTY_SKIP_BYTES: Final = 1 * MIB
"""A viewer of a PTY that is this far behind is shown its end: nobody reads what rushes by at that speed."""
PTY_UNSEEN_BYTES: Final = 2 * PTY_AHEAD_BYTES
"""Sent to a viewer and not told to be shown: twice what a PTY runs ahead of whom it waits for, so that this is never the bound."""
PTY_SEEN_STEP_BYTES: Final = 32 * KIB
"""How far the foremost viewer follows before its runner is told: half of the least that a paused PTY has to go on."""
PTY_HELD_BYTES: Final = 256 * KIB
"""Typed by one viewer and not taken yet: as much as a shim holds for a program that does not read."""
PTY_HELD_PIECES: Final = 1024
"""The same in pieces, which may be single keystrokes."""
PTY_PIECES_IN_FLIGHT: Final = 64
"""Of them sent to the runner and not answered: 200 keystrokes a second at 300 ms, and few enough for a session's queue."""
PTY_RESEND_S: Final = 1.0
"""A piece without an answer for this long goes again; answers come within one round trip."""
PTY_TAKEN_HELD_MAX: Final = 64
"""Answers that wait for a viewer's socket, each with another reason; later ones say more."""
PTY_CONNECTIONS_MAX: Final = 1024
"""Viewers that are connected, in all: each has a log open and half a megabyte under way."""
PTY_BEGIN_S: Final = 10.0
"""From the connection of a viewer to its first word."""
PTY_ATTACH_WAIT_S: Final = 20.0
"""How long an attach waits for its runner: below the patience of every proxy we know."""
TICKET_TTL_MS: Final = 30 * 1000
"""A ticket is used by the next request of the same program or never."""
TICKETS_MAX: Final = 4096
"""Tickets that are good at a time."""
LOG_END_MAX: Final = 2**50
"""Where a log ends at the latest: a petabyte, so that every offset and credit stays an integer of every JSON."""
GAPS_MAX: Final = 10_000
"""Holes remembered of one log."""

assert SYNC_AFTER_BYTES > CHANNEL_WINDOW_BYTES_MAX
assert PTY_SEEN_STEP_BYTES < PTY_AHEAD_BYTES_MIN
assert PTY_UNSEEN_BYTES < PTY_SKIP_BYTES
