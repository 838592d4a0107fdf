"""Envelopes: every flipped bit and every replaced byte is noticed, and no bytes break the door."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.commands import Command
from protocol.envelope import PayloadType, open_envelope, seal
from protocol.errors import EnvelopeError
from protocol.keyset import open_keyset
from protocol.receipt import open_receipt, open_settlement
from tests.support.builders import a_key, a_root, a_sealed_command

KEY = a_key()
KEYS = {KEY.key_id: KEY.public}
GOLDEN = a_sealed_command()


def opens(envelope: bytes) -> bool:
    """Whether the door takes it; any error but its own breaks the test."""
    try:
        open_envelope(envelope, PayloadType.COMMAND, KEYS, Command.parse)
    except EnvelopeError:
        return False
    return True


def test_the_golden_envelope_opens() -> None:
    """Else the others would prove nothing."""
    assert opens(GOLDEN)


def test_any_flipped_bit_is_noticed() -> None:
    """All of them, one by one."""
    for at in range(len(GOLDEN)):
        for bit in range(8):
            changed = bytearray(GOLDEN)
            changed[at] ^= 1 << bit
            assert not opens(bytes(changed)), (at, bit)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_any_replaced_byte_is_noticed(at: int, byte: int) -> None:
    """Any byte for any other."""
    changed = bytearray(GOLDEN)
    changed[at] = byte
    assert opens(bytes(changed)) == (bytes(changed) == GOLDEN)


@given(st.integers(0, len(GOLDEN)), st.integers(0, 40))
def test_a_cut_envelope_is_noticed(at: int, count: int) -> None:
    """Bytes taken out anywhere."""
    changed = GOLDEN[:at] + GOLDEN[at + count :]
    assert opens(changed) == (changed == GOLDEN)


@given(st.binary(max_size=300))
def test_any_bytes_open_or_are_refused(envelope: bytes) -> None:
    """By every door, with EnvelopeError alone."""
    assert not opens(envelope)
    for door in (open_receipt, open_settlement):
        with pytest.raises(EnvelopeError):
            door(envelope, KEYS)
    with pytest.raises(EnvelopeError):
        open_keyset(envelope, a_root())


@given(st.binary(max_size=300))
def test_any_signed_bytes_are_read_or_refused(payload: bytes) -> None:
    """A good signature over nonsense is still nonsense."""
    assert not opens(seal(payload, PayloadType.COMMAND, [KEY]))


@given(st.binary(max_size=2000), st.sampled_from(PayloadType), st.integers(1, 8))
def test_whatever_is_sealed_opens(payload: bytes, kind: PayloadType, count: int) -> None:
    """To the byte, under as many keys as signed it."""
    keys = [a_key(str(n)) for n in range(count)]
    opened = open_envelope(seal(payload, kind, keys), kind, {k.key_id: k.public for k in keys}, bytes, count)
    assert opened.payload == opened.value == payload
    assert len(opened.key_ids) == count
