"""Every bound of the protocol: its value, its unit (last in the name) and why it is that.

Both sides hold them; `docs/protocol.md` quotes them. The relations between them are asserted at import.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- what crosses the wire -------------------------------------------------------------------------------------
FRAME_BYTES_MAX: Final = 128 * KIB
"""One WebSocket message. Larger ones are refused by the transport before anything is parsed."""
ENVELOPE_BYTES_MAX: Final = 96 * KIB
"""A sealed envelope: a payload of the maximum size grows by a third in base64, plus eight signatures."""
PAYLOAD_BYTES_MAX: Final = 64 * KIB
"""A signed payload; also what fits a document of the cloud backend several times over."""
REPORT_BYTES_MAX: Final = 96 * KIB
"""One `report`: small enough that a heartbeat never waits long behind it."""
REPORT_ITEMS_MAX: Final = 64
"""Items in one `report`: one transaction of the control plane."""
RECORD_HEADER_BYTES: Final = 16
"""Length, kind, flags, check and time of one record; see docs/shim.md §3."""
RECORD_PAYLOAD_BYTES_MAX: Final = 64 * KIB
"""One gather of the shim, hence a real arrival time."""
DATA_HEADER_BYTES: Final = 16
"""Type, version, channel and offset of one data frame: as long as a record's header, so slices stay aligned."""
DATA_SLICE_BYTES_MAX: Final = RECORD_HEADER_BYTES + RECORD_PAYLOAD_BYTES_MAX
"""One data frame: 64 KiB frames are the fastest measured, and one whole record always fits."""

# --- what a payload may hold -----------------------------------------------------------------------------------
JSON_DEPTH_MAX: Final = 16
"""Nesting; the cloud backend stores no deeper document."""
JSON_INT_MAX: Final = 2**53 - 1
"""Integers that every JSON implementation reads alike."""
SIGNATURES_MAX: Final = 8
"""Signatures in an envelope: enough for any t-of-n we issue, few enough to verify at once."""
ID_LENGTH_MAX: Final = 64
"""An id of ours has 30 characters; the rest is room for ids of others."""
ARGV_ITEMS_MAX: Final = 1024
"""Arguments of one child: more belong into a file."""
ARGV_ITEM_BYTES_MAX: Final = 32 * KIB
"""Linux itself stops at 128 KiB for one string; the payload bound stops us earlier."""
ENV_ITEMS_MAX: Final = 512
"""Variables that a command may set."""
ENV_VALUE_BYTES_MAX: Final = 32 * KIB
"""One variable: as one argument, since the kernel counts both alike."""
SECRETS_ITEMS_MAX: Final = 64
"""Sealed values of one start; they cross to the shim in one message."""
SECRET_BYTES_MAX: Final = 16 * KIB
"""One sealed value: room for a key with its chain; in base64 it fits a quarter of the payload."""
PATH_BYTES_MAX: Final = 4096
"""PATH_MAX."""
LABELS_MAX: Final = 32
"""Labels of a runner: for people who choose one, never an address."""
DETAIL_CHARS_MAX: Final = 500
"""Free text in a receipt or event: for a person, never parsed."""

# --- time ------------------------------------------------------------------------------------------------------
COMMAND_TTL_MS_MAX: Final = 10 * 60 * 1000
"""`exp - iat` of a command that starts something: longer ones are forgotten promises."""
SAFETY_TTL_MS_MAX: Final = 24 * 60 * 60 * 1000
"""`exp - iat` of a stop: it may have to wait for a laptop to wake."""
CLOCK_SKEW_MS: Final = 60 * 1000
"""Tolerated on `nbf` and `exp`: the runner judges by the control plane's own clock, so this covers transit."""
HANDSHAKE_TIMEOUT_MS: Final = 10 * 1000
"""From the connection to the welcome: a peer that says nothing holds a socket no longer."""
BEAT_INTERVAL_MS: Final = 10 * 1000
"""Default heartbeat; the control plane dictates the real one in `beaten`."""
BEAT_INTERVAL_MS_MIN: Final = 1000
"""A plane cannot ask for a flood."""
BEAT_INTERVAL_MS_MAX: Final = 10 * 60 * 1000
"""A plane cannot silence a runner for longer."""
LEASE_TTL_MS: Final = 60 * 1000
"""Six beats: a lease outlives a short loss of the connection."""
LEASE_TTL_MS_MIN: Final = 1000
"""Below this a renewal could not arrive in time."""
LEASE_TTL_MS_MAX: Final = 24 * 60 * 60 * 1000
"""A holder that is gone blocks its resource no longer than a day."""
LEASE_MARGIN_MS: Final = 5 * 1000
"""Stopping at lease loss is over this long before the deadline."""
RECONCILE_MS: Final = 30 * 1000
"""Both sides compare their full lists this often, on connecting and after a wake: no lost message matters for longer."""
WAKE_GAP_MS: Final = 5 * 1000
"""CLOCK_BOOTTIME ahead of CLOCK_MONOTONIC by this much more than before: the machine slept."""
WAKE_WAIT_MS: Final = 30 * 1000
"""After a wake leases are renewed first; what cannot be taken back waits for so long."""
FROZEN_MS_MAX: Final = 15 * 60 * 1000
"""A frozen attempt whose lease nobody gives back is ended: its memory is wanted by others."""
REGRANT_DELAY_MS: Final = 15 * 1000
"""The control plane grants a resource anew no earlier than this after its own grant ran out."""
GRACE_MS: Final = 10 * 1000
"""From TERM to KILL when a command does not say."""
GRACE_MS_MAX: Final = 300 * 1000
"""Longest time a command may give; the owner's policy may allow less."""
KILL_WAIT_MS: Final = 5 * 1000
"""From KILL until what still lives is told as a survivor."""
TIMEOUT_MS_MAX: Final = 30 * 24 * 60 * 60 * 1000
"""Longest run-time limit of an attempt, 30 days; null means none."""
KEYSET_TTL_MS_MAX: Final = 90 * 24 * 60 * 60 * 1000
"""A keyset that nobody renews for 90 days stops counting: a frozen plane cannot hold old keys alive."""
JOIN_TOKEN_TTL_MS: Final = 10 * 60 * 1000
"""A join string is used at once or not at all."""

# --- how much may be under way ---------------------------------------------------------------------------------
COMMANDS_UNACKED_MAX: Final = 256
"""Commands sent and not yet answered by a receipt: bounds the runner's memory and a resend after a reconnect."""
REPORTS_IN_FLIGHT_MAX: Final = 4
"""`report`s sent and not yet answered: a slow control plane slows us instead of filling memory."""
RETRY_MS: Final = 10 * 1000
"""A command or report without any answer for this long is sent again; both sides take doubles without harm."""
CHANNELS_MAX: Final = 4096
"""Logs that are open on one connection; above the attempts a machine can run."""
CHANNEL_WINDOW_BYTES: Final = 256 * KIB
"""Credit ahead of the receiver's end, per channel, to begin with: on one machine it is never the bound. Absolute, so a lost or
doubled grant is harmless."""
CHANNEL_WINDOW_BYTES_MAX: Final = 4 * MIB
"""What it grows to, by doubling, while the sender says that it is blocked: 40 MB/s at 100 ms."""
CONNECTION_WINDOW_BYTES: Final = 8 * MIB
"""Data of all channels together that may be on its way: what a receiver that stalls has to hold."""
PIECE_BYTES_MIN: Final = 16 * KIB
"""Least data in a frame while there is more, however slow the line: 13 ms at 10 Mbit/s, for whatever waits behind it."""
QUANTUM_BYTES: Final = 16 * KIB
"""What a channel may send before the next one of its class has its turn; a longer frame is paid for later."""
SEGMENT_BYTES: Final = 8 * MIB
"""One file of a log: what a digest covers and what is deleted at once."""
SPOOL_BYTES_PER_EXECUTION: Final = 1024 * MIB
"""Output kept while the plane does not take it; beyond it head, tail and a gap are kept."""
INPUT_PIECE_BYTES_MAX: Final = 32 * KIB
"""Bytes for a stdin in one message: in base64 and with its signature half a frame."""
SPOOL_BYTES_PER_HOST: Final = 10 * 1024 * MIB
"""All logs that are kept on a machine; above it what the plane has goes, oldest first."""
HEAD_BYTES: Final = 64 * MIB
"""Kept from the beginning of a log whose middle has to go: where a build says what it is and how it was called."""
TERMINAL_CELLS_MAX: Final = 1000
"""Rows and columns of a PTY: more is a mistake, and programs allocate by it."""
TYPED_BYTES_MAX: Final = 16 * KIB
"""Bytes that a viewer types in one message: a paste is many of them, and a keystroke of another viewer fits between."""
VIEWERS_MAX: Final = 256
"""Viewers that may ever be let in to one PTY: the shim keeps a count for each."""
PTY_SEGMENT_BYTES: Final = 1 * MIB
"""One file of a PTY's log: what the ring gives up at once."""
PTY_RING_BYTES: Final = 8 * MIB
"""What a runner keeps of the output of a PTY: hours of a shell, seconds of a flood."""
PTY_AHEAD_BYTES: Final = 256 * KIB
"""A PTY that is this far ahead of every viewer that may type is not read until one has followed: an interrupt acts at once."""
PTY_AHEAD_BYTES_MIN: Final = 64 * KIB
"""And it is read again from here on."""
BEAT_LEASES_MAX: Final = 1024
"""Leases and attempts that one beat can name, and one answer can renew."""
HINTS_MAX: Final = 512
"""Hints in one answer: with the longest names they fill half a frame; the rest comes with the next."""
FETCH_ITEMS_MAX: Final = 64
"""Commands that one `fetch` names; whatever else is missing is asked for after the next answer."""

assert PAYLOAD_BYTES_MAX * 4 // 3 + SIGNATURES_MAX * 256 <= ENVELOPE_BYTES_MAX < FRAME_BYTES_MAX
assert REPORT_BYTES_MAX < FRAME_BYTES_MAX
assert DATA_HEADER_BYTES + DATA_SLICE_BYTES_MAX < FRAME_BYTES_MAX
assert LEASE_MARGIN_MS + KILL_WAIT_MS < LEASE_TTL_MS
assert INPUT_PIECE_BYTES_MAX * 4 // 3 + 1024 < FRAME_BYTES_MAX
assert TYPED_BYTES_MAX * 4 // 3 + 1024 < FRAME_BYTES_MAX
assert PTY_AHEAD_BYTES_MIN < PTY_AHEAD_BYTES < PTY_SEGMENT_BYTES < PTY_RING_BYTES
assert 2 * DATA_SLICE_BYTES_MAX <= CHANNEL_WINDOW_BYTES <= CHANNEL_WINDOW_BYTES_MAX <= CONNECTION_WINDOW_BYTES
