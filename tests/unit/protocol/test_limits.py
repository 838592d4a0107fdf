"""Every bound has a reason, and the bounds fit each other."""

import ast
from pathlib import Path

import protocol.limits
from protocol import limits
from protocol.identity import EnrollClaims
from protocol.session import OUTBOX_ROOM

UNITS = ("_BYTES", "_MS", "_MAX", "_MIN", "KIB", "MIB", "_BYTES_MAX", "_PER_EXECUTION", "_PER_HOST")
EXEMPT = {"KIB", "MIB"}


def undocumented() -> set[str]:
    """Constants without a docstring below or a documented neighbour of the same stem above."""
    body = ast.parse(Path(protocol.limits.__file__).read_text()).body
    bare = set()
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if not documented:
                bare.add(node.target.id)
    return bare - EXEMPT


def test_every_bound_says_why() -> None:
    """A docstring stands under each constant."""
    assert undocumented() == set()


def test_every_bound_has_its_unit_in_its_name() -> None:
    """Bytes, milliseconds, or a count with MAX."""
    for name in vars(limits):
        if name.isupper():
            assert any(name.endswith(unit) for unit in UNITS), name


def test_bounds_fit_each_other() -> None:
    """What must hold between them for the protocol to work at all."""
    assert limits.RETRY_MS < limits.COMMAND_TTL_MS_MAX
    assert limits.BEAT_INTERVAL_MS_MIN <= limits.BEAT_INTERVAL_MS <= limits.BEAT_INTERVAL_MS_MAX
    assert limits.LEASE_TTL_MS_MIN <= limits.LEASE_TTL_MS <= limits.LEASE_TTL_MS_MAX
    assert limits.BEAT_INTERVAL_MS < limits.LEASE_TTL_MS // 3
    assert limits.LEASE_TTL_MS // 3 + limits.KILL_WAIT_MS + limits.LEASE_MARGIN_MS < limits.LEASE_TTL_MS
    assert limits.GRACE_MS <= limits.GRACE_MS_MAX
    # A lease of the usual ttl is renewed before a reconciliation has to save it, and a plane grants anew after it is over.
    assert limits.LEASE_TTL_MS // 3 * 11 // 10 < limits.RECONCILE_MS < limits.LEASE_TTL_MS
    assert limits.LEASE_MARGIN_MS < limits.REGRANT_DELAY_MS
    # A plane has the time to give back what it took, before what is frozen is ended.
    assert limits.FROZEN_MS_MAX > limits.LEASE_TTL_MS + limits.REGRANT_DELAY_MS + limits.RECONCILE_MS
    assert limits.SECRET_BYTES_MAX * 4 // 3 + 200 <= 32768
    assert limits.COMMAND_TTL_MS_MAX <= limits.SAFETY_TTL_MS_MAX
    assert OUTBOX_ROOM == limits.REPORTS_IN_FLIGHT_MAX * limits.REPORT_ITEMS_MAX
    assert EnrollClaims.model_fields["labels"].metadata[0].max_length == limits.LABELS_MAX
