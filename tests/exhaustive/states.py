"""Copying an engine and naming its state, both without knowing what is in it: whatever the engine keeps is copied and compared.

Frozen values are shared. Of numbers in the outbox only whether there is one counts: they name items, and no decision hangs on them.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Final
from unittest import mock

from pydantic import BaseModel

from protocol import envelope
from protocol.envelope import Verified
from protocol.ids import Digest
from protocol.messages import ItemKind, ReportItem
from runner.core import engine as engine_module
from runner.core import inbox, statements
from runner.core.engine import Engine
from runner.core.journaling import AttemptRow
from runner.core.plans import CommandRow
from tests.support.engine import JournalModel, opened_receipt, opened_settlement

SHARED: Final = frozenset({"key", "keys", "keyset", "certificate", "me", "policy", "base_env"})
"""What is replaced as a whole or never."""
KEPT_OUT: Final = frozenset({*SHARED, "_engine", "out_head", "_needed", "_told", "_unknown"})
"""What the name of a state leaves out: keys (who explores a revocation counts it), the owner's policy, the way back, numbers of
items, and what was asked for or told to people already."""
UNORDERED: Final = frozenset({"first", "tombstones"})
"""Where the order of arrival means nothing."""
NUMBERS: Final = frozenset({"receipt_seq", "settled_seq"})


def clone(engine: Engine) -> Engine:
    """A deep copy of what is mutable in the core; everything else is shared."""
    copied: Engine = _clone(engine, {})
    return copied


def _clone(thing: Any, seen: dict[int, Any]) -> Any:
    kind = type(thing)
    if kind is dict:
        if not thing or not _copied(type(next(iter(thing.values())))):
            return thing.copy()
        return {name: _clone(value, seen) for name, value in thing.items()}
    if kind is set or kind is list:
        assert not any(_copied(type(value)) for value in thing), "the core keeps values in lists and sets"
        return thing.copy()
    made = seen.get(id(thing))
    if made is None:
        made = seen[id(thing)] = kind.__new__(kind)
        for name in _names(kind, thing):
            value = getattr(thing, name)
            if name not in SHARED and _copied(type(value)):
                value = _clone(value, seen)
            object.__setattr__(made, name, value)
    return made


def state_of(thing: Any) -> Hashable:
    """Everything that a copy would have, as a value; equal states act alike."""
    kind: Any = type(thing)
    if not _told_by_parts(kind):
        return thing  # type: ignore[no-any-return]
    if kind is dict:
        return tuple([(name, state_of(value)) for name, value in thing.items()])
    if kind is list or kind is tuple:
        return tuple([state_of(value) for value in thing])
    if kind is set:
        return frozenset(thing)
    if kind is Verified:
        return str(thing.digest)
    if kind is CommandRow or kind is AttemptRow:
        return _projected(thing)
    if issubclass(kind, BaseModel):
        return str(thing.model_dump_json())
    parts = [(name, getattr(thing, name)) for name in _counted(kind, _names(kind, thing))]
    return tuple([_commands(its) if name == "commands" else _part(name, its) for name, its in parts])


def _part(name: str, its: Any) -> Hashable:
    return frozenset(its.items()) if name in UNORDERED else state_of(its)


def _commands(commands: dict[Digest, CommandRow]) -> Hashable:
    """Who waits for a receipt is taken up in the order of arrival; of who has one, order means nothing."""
    done = frozenset(_projected(row) for row in commands.values() if row.receipt_seq is not None)
    return tuple([row.digest for row in commands.values() if row.receipt_seq is None]), done


@cache
def _changes(kind: type) -> bool:
    """Whether values of this class change: parts of the engine do, frozen values and names do not."""
    if not kind.__module__.startswith("runner.core") or issubclass(kind, Enum | tuple):
        return False
    return not (is_dataclass(kind) and kind.__dataclass_params__.frozen)  # type: ignore[attr-defined]


@cache
def _copied(kind: type) -> bool:
    return kind in (dict, list, set) or _changes(kind)


@cache
def _told_by_parts(kind: type) -> bool:
    return _copied(kind) or kind in (tuple, Verified, CommandRow, AttemptRow) or issubclass(kind, BaseModel)


_NAMES: Final[dict[type, tuple[str, ...]]] = {}


def _names(kind: type, thing: Any) -> tuple[str, ...]:
    """What an instance has: the same for all of its class, which set it when they are made."""
    if kind not in _NAMES:
        _NAMES[kind] = tuple(thing.__dict__) if hasattr(thing, "__dict__") else tuple(kind.__slots__)  # type: ignore[attr-defined]
    return _NAMES[kind]


@cache
def _counted(kind: type, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in KEPT_OUT)


@cache
def _fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((each.name, each.name in NUMBERS) for each in fields(kind))


@cache
def _projected(row: CommandRow | AttemptRow) -> Hashable:
    return tuple(
        getattr(row, name) is not None if number else getattr(row, name) for name, number in _fields(row.__class__)
    )


# --- the journal ------------------------------------------------------------------------------------------------------


def cloned(journal: JournalModel) -> JournalModel:
    """Another journal with the same past."""
    parts: dict[str, Any] = vars(journal)
    return JournalModel(**{name: its if type(its) is tuple else its.copy() for name, its in parts.items()})


def journal_state(journal: JournalModel) -> Hashable:
    """What the next daemon would be told, and what was said for ever."""
    return (
        tuple(journal.marks.items()),
        _commands(journal.commands),
        tuple([_projected(row) for row in journal.attempts.values()]),
        frozenset(journal.tombstones.items()),
        journal.admission,
        frozenset(label(item.kind, item.body) for item in journal.items.values()),
    )


@cache
def label(kind: ItemKind, body: str) -> tuple[str, ...]:
    """What an item says, without its number and its moment."""
    item = ReportItem.model_construct(out_seq=1, kind=kind, body=body)
    if kind is ItemKind.RECEIPT:
        receipt = opened_receipt(item)
        return ("receipt", str(Digest(receipt.cmd_digest)), str(receipt.outcome), str(receipt.reason))
    if kind is ItemKind.SETTLEMENT:
        said = opened_settlement(item)
        return ("settlement", said.attempt.name, str(said.verdict), said.cause.kind)
    return ("event",)


# --- pure functions, remembered ------------------------------------------------------------------------------------------


@contextmanager
def remembered() -> Iterator[None]:
    """While it lasts, signatures that were made or judged once are looked up: both are functions of their bytes and keys."""
    opened: dict[tuple[bytes, tuple[str, ...]], Any] = {}
    sealed: dict[tuple[bytes, str], bytes] = {}

    def open_once(env: bytes, kind: Any, keys: Any, parse: Any) -> Any:
        if (name := (env, tuple(keys))) not in opened:
            opened[name] = envelope.open_envelope(env, kind, keys, parse)
        return opened[name]

    def seal_once(payload: bytes, kind: Any, keys: Any) -> bytes:
        if (payload, kind) not in sealed:
            sealed[payload, kind] = envelope.seal(payload, kind, keys)
        return sealed[payload, kind]

    with (
        mock.patch.object(inbox, "open_envelope", open_once),
        mock.patch.object(engine_module, "open_envelope", open_once),
        mock.patch.object(statements, "seal", seal_once),
    ):
        yield
