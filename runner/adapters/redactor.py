"""Who masks what: the needles of every attempt whose log is on its way up, and the reader each log is read with.

Theory of operation. A plan that is prepared brings its secrets. A daemon that starts has none: the spec of an attempt tells whether there
are any, the signed command in the journal has them sealed. Secrets that cannot be had any more mean that every word of the child is masked:
less is shown than could be, never more.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from protocol.errors import ProtocolError, RemoteError
from protocol.ids import Attempt
from protocol.secretbox import open_secret
from runner.adapters.attemptfiles import LOG_DIR, read_spec
from runner.adapters.redacted import RedactedReader, uploaded
from runner.adapters.spool import LogReader, SpoolReader
from runner.core.needles import EVERYTHING, Needles, needles_of, secret_values
from runner.core.plans import AttemptPlan, ExitRecord, UploadedCopy
from runner.core.redaction import REACH_BYTES

Sealed = Callable[[Attempt], Mapping[str, str] | None]
"""The sealed secrets of an attempt's command, by name; None when the command is not to be had."""


class Redactor:
    """All attempts of this daemon. `note` is called for a log that nothing is shown of."""

    def __init__(
        self,
        root: Path,
        *,
        runner: str,
        seal_seed: bytes,
        sealed: Sealed,
        note: Callable[[str, dict[str, Any]], None],
        spare_bytes: int,
    ) -> None:
        """`spare_bytes`: what a spool holds beside the segments that are in use; with too little of it nothing is kept to look back at."""
        self._root: Final = root
        self._runner = runner
        self._seal_seed = seal_seed
        self._sealed = sealed
        self._note = note
        self._looks_back = spare_bytes >= 2 * REACH_BYTES
        self._needles: dict[str, Needles] = {}
        """Of attempts that have not ended; empty needles too, so that each is asked for once."""
        self._readers: WeakValueDictionary[str, RedactedReader] = WeakValueDictionary()
        """Of logs that are on their way up: the uplink keeps them."""

    # --- needles ------------------------------------------------------------------------------------------------

    def open(self, attempt: Attempt, sealed: Mapping[str, str]) -> dict[str, bytes]:
        """The secrets of an attempt. Raises SecretRefused."""
        return {
            name: open_secret(value, self._seal_seed, self._runner, attempt, name) for name, value in sealed.items()
        }

    def learn(self, plan: AttemptPlan, secrets: Mapping[str, bytes]) -> None:
        """What is to be masked in the log of an attempt that is about to begin. May take milliseconds."""
        self._needles[plan.attempt.name] = needles_of(secret_values(plan.env, secrets))

    def forget(self, attempt: Attempt) -> None:
        """It will never run, or it is settled: its log has a reader by now, and another daemon's are found again."""
        self._needles.pop(attempt.name, None)

    def needles(self, name: str) -> Needles:
        """What is masked in the log of an attempt, asked from its files and the journal when this daemon did not begin it."""
        known = self._needles.get(name)
        if known is None:
            known = self._needles[name] = self._recovered(name)
            if known.everything:
                self._note(
                    "log.masked", {"attempt": name, "detail": "its secrets are not to be had, all of its log is masked"}
                )
        return known

    def _recovered(self, name: str) -> Needles:
        clear = _clear(self._root / name)
        if clear is None:
            return EVERYTHING
        names, env = clear
        if not names:
            return needles_of(secret_values(env, {}))
        attempt = Attempt.parse(name)
        sealed = self._sealed(attempt)
        if sealed is None or not set(names) <= set(sealed):
            return EVERYTHING
        try:
            return needles_of(secret_values(env, self.open(attempt, sealed)))
        except ProtocolError:
            return EVERYTHING

    # --- reading ------------------------------------------------------------------------------------------------

    def reader(self, name: str, directory: Path, *, ended: bool = False) -> LogReader:
        """What the log of an attempt is to be read with on its way up: plain where there is nothing to mask."""
        needles = self.needles(name)
        if not needles:
            return SpoolReader(directory / LOG_DIR)
        reader = self._readers[name] = RedactedReader(directory / LOG_DIR, needles, ended=ended)
        return reader

    def ended(self, attempt: Attempt) -> None:
        """Its log will not grow any more: nothing of it is held back."""
        reader = self._readers.get(attempt.name)
        if reader is not None:
            reader.ended = True

    def looked(self, name: str, end: int) -> int:
        """Up to where a log was read of which everything below `end` could be sent: a bell is wanted for what comes behind it."""
        reader = self._readers.get(name)
        return end if reader is None else max(end, reader.looked)

    def kept_from(self, name: str, acked: int) -> int:
        """What its shim may delete when everything below `acked` is safe at the plane."""
        masked = self._readers.get(name) is not None
        return max(0, acked - REACH_BYTES) if masked and self._looks_back else acked

    def masks(self, attempt: Attempt) -> bool:
        """Whether the log of an attempt goes up otherwise than it is."""
        return bool(self.needles(attempt.name))

    def completed(self, attempt: Attempt, record: ExitRecord) -> ExitRecord:
        """The record of an attempt that has ended, with what its uploaded copy adds up to. Blocking: reads the whole log."""
        needles = self.needles(attempt.name)
        if not needles:
            return record
        unknown = UploadedCopy(redactor=needles.redactor, streams={})
        if record.dropped is not None:
            # What made room may be at the plane, and cannot be read here any more.
            return replace(record, uploaded=unknown)
        try:
            names = ("pty",) if "pty" in record.streams else ("stdout", "stderr")
            return replace(record, uploaded=uploaded(self._root / attempt.name / LOG_DIR, needles, names))
        except (OSError, RemoteError) as exc:
            detail = exc.detail if isinstance(exc, RemoteError) else exc.strerror or "unknown"
            self._note("log.failed", {"attempt": attempt.name, "detail": detail})
            return replace(record, uploaded=unknown)


def _clear(directory: Path) -> tuple[list[str], dict[str, str]] | None:
    """The names of the secrets of an attempt, and its environment in the clear, as its spec has them; None: it cannot be told."""
    try:
        spec = read_spec(directory)
    except OSError:
        return None
    names, env = (None, None) if spec is None else (spec.get("secret_names"), spec.get("env"))
    if not isinstance(names, list) or not isinstance(env, dict):
        return None
    return (names, env) if all(isinstance(text, str) for text in (*names, *env, *env.values())) else None
