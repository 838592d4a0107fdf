"""The owner's policy as a value: what may be asked of this machine, whatever is signed. Read from policy.toml at the edge."""

from dataclasses import dataclass

from protocol.ids import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The owner's word. Everything not named is denied."""

    digest: Digest
    """Of the file's bytes; of nothing when there is no readable file."""
    kinds: frozenset[str] = frozenset()
    """Kinds that are admitted; kinds of the safety stream always are."""
    signals: frozenset[str] = frozenset()
    """Signals that a command may send to what it started."""
    roots: tuple[str, ...] = ()
    """Directories that hold what commands may use: working directories and repositories. Real paths."""
    env_allow: tuple[str, ...] = ()
    """Names, or prefixes ending in `*`, that a command may set; the fixed deny-list still applies."""
    env_deny: tuple[str, ...] = ()
    concurrent_max: int = 0
    """Living attempts at a time."""
    grace_ms_max: int = 0
    outlive: tuple[str, ...] = ()
    """Names of processes that may outlive an execution: a program, or the last part of a Java main class."""
    on_daemon_stop: str = "leave"
    """What the first SIGTERM does to what runs: leave it under its shims, drain, or stop."""
    disk_free_min: int = 0
    """Bytes that must be free for new work, at least; together with the percentage, whichever is more."""
    disk_free_percent_min: int = 0
    inodes_free_percent_min: int = 0
    memory_available_min: int = 0
    """Bytes."""
    fds_free_min: int = 0
