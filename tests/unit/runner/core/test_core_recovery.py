"""The table of recovery, walked whole: every combination meets exactly one row, and the rules hold for all of them.

The table below is written from docs/shim.md §1 and the rules, not from the code. Columns are what the journal says and what is found
of an attempt; a cell is one value, several with `|`, or `*`. `spec` has no column: without one nothing was let go, and what
proves it (no `released` mark, nothing alive) has columns of its own, so the step is the same with and without it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from protocol.execution import AttemptState
from runner.core.plans import ExitRecord, Observed, Phase
from runner.core.recovery import RecoveryStep, decide
from tests.support.builders import an_attempt
from tests.support.engine import an_exit, an_unreleased_exit

TABLE = """
# journal                    exit        phase             boot   lock  shim    child  step

# What the journal does not know is cleared if it provably never ran, else left alone and told.
unknown                      ended       *                 *      *     *       *      report
unknown                      none|unrel  released|running  *      *     *       *      report
unknown                      none|unrel  none|ready        same   *     *       alive  report
unknown                      none|unrel  none|ready        same   *     *       gone   clear
unknown                      none|unrel  none|ready        other  *     *       *      clear

# Settled stays settled; a shim that lingers is let go, one that hangs is ended, what lives without one is swept.
settled                      *           *                 other  *     *       *      nothing
settled                      *           *                 same   held  answers *      collect
settled                      *           *                 same   held  silent  *      end_hung
settled                      *           *                 same   free  *       alive  sweep_remains
settled                      *           *                 same   free  *       gone   nothing

# An intent was never let go, unless its files or what lives say that it was (the journal was set back).
intent                       ended       *                 *      *     *       *      settle_exit
intent                       unrel       released|running  *      *     *       *      settle_exit
intent                       unrel       none|ready        same   *     *       alive  settle_exit
intent                       unrel       none|ready        same   *     *       gone   start_again
intent                       unrel       none|ready        other  *     *       *      start_again
intent                       none        released|running  other  *     *       *      lost_reboot
intent                       none        released|running  same   held  *       *      adopt
intent                       none        released|running  same   free  *       *      lost_shim
intent                       none        none|ready        same   held  *       alive  adopt
intent                       none        none|ready        same   free  *       alive  lost_shim
intent                       none        none|ready        same   *     *       gone   start_again
intent                       none        none|ready        other  *     *       *      start_again

# What was prepared: its record is the best witness, in any boot; then the boot; then the lock; then the marks.
prepared|running             ended       *                 *      *     *       *      settle_exit
prepared|running             unrel       released|running  *      *     *       *      settle_exit
prepared|running             unrel       none|ready        same   *     *       alive  settle_exit
prepared|running             unrel       none|ready        same   *     *       gone   start_again
prepared|running             unrel       none|ready        other  *     *       *      start_again
prepared|running             none        *                 other  *     *       *      lost_reboot
prepared|running             none        *                 same   held  *       *      adopt
prepared|running             none        released|running  same   free  *       *      lost_shim
prepared|running             none        none              same   free  *       *      lost_shim
prepared|running             none        ready             same   free  *       alive  lost_shim
prepared|running             none        ready             same   free  *       gone   start_again

# The same, but what was to end is not begun again, and a shim that hangs is not waited for.
stopping                     ended       *                 *      *     *       *      settle_exit
stopping                     unrel       released|running  *      *     *       *      settle_exit
stopping                     unrel       none|ready        same   *     *       alive  settle_exit
stopping                     unrel       none|ready        same   *     *       gone   settle_never
stopping                     unrel       none|ready        other  *     *       *      settle_never
stopping                     none        *                 other  *     *       *      lost_reboot
stopping                     none        *                 same   held  answers *      adopt
stopping                     none        *                 same   held  silent  *      end_hung
stopping                     none        released|running  same   free  *       *      lost_shim
stopping                     none        none              same   free  *       *      lost_shim
stopping                     none        ready             same   free  *       alive  lost_shim
stopping                     none        ready             same   free  *       gone   settle_never

# No directory at all.
unknown|settled              absent      -                 -      -     -       -      nothing
intent                       absent      -                 -      -     -       -      start_again
prepared|running|stopping    absent      -                 -      -     -       -      lost_shim
"""
EXITS: dict[str, ExitRecord | None] = {"none": None, "ended": an_exit(), "unrel": an_unreleased_exit()}


@dataclass(frozen=True)
class Case:
    """One combination: in words, as the table has them, and as the code takes it."""

    words: tuple[str, ...]
    state: AttemptState | None
    found: Observed | None


def all_cases() -> Iterator[Case]:
    """Six states of the journal, and a directory or none, of every spec, phase, exit, lock, boot, shim and child."""
    states = {"unknown": None, **{state.value: state for state in AttemptState}}
    for word, state in states.items():
        yield Case((word, "absent", *"-----"), state, None)
        for spec, exit_word, phase, boot, lock, shim, child in product(
            (True, False),
            EXITS,
            Phase,
            ("same", "other"),
            ("held", "free"),
            ("answers", "silent"),
            ("alive", "gone"),
        ):
            found = Observed(
                attempt=an_attempt(),
                same_boot=boot == "same",
                phase=phase,
                lock_held=lock == "held",
                exit=EXITS[exit_word],
                spec=spec,
                shim_answers=shim == "answers",
                child_alive=child == "alive",
            )
            yield Case((word, exit_word, phase.value, boot, lock, shim, child), state, found)


CASES = list(all_cases())
ROWS = [line.split() for line in TABLE.splitlines() if line and not line.startswith("#")]


def row_of(case: Case) -> list[str]:
    """The one row that a combination meets."""
    met = [
        row
        for row in ROWS
        if all(cell == "*" or word in cell.split("|") for cell, word in zip(row, case.words, strict=False))
    ]
    assert len(met) == 1, (case.words, met)
    return met[0]


@pytest.mark.parametrize("state", [None, *AttemptState])
def test_every_combination_has_the_step_of_its_row(state: AttemptState | None) -> None:
    """And meets one row, no more and no less."""
    for case in CASES:
        if case.state is state:
            assert decide(case.state, case.found) == row_of(case)[-1], case.words


def test_no_combination_is_left_out_and_no_row_and_no_step_is_dead() -> None:
    """385 things that may be found in each of six states."""
    assert len(CASES) == 6 * (1 + 2 * 3 * 4 * 2 * 2 * 2 * 2)
    assert {tuple(row_of(case)) for case in CASES} == {tuple(row) for row in ROWS}
    assert {row[-1] for row in ROWS} == set(RecoveryStep)


def may_have_run(found: Observed) -> bool:
    """A mark, a process that lives, or the word of a shim that let it go."""
    marked = found.phase in (Phase.RELEASED, Phase.RUNNING)
    told = found.exit is not None and not found.exit.unreleased
    return marked or told or (found.child_alive and found.same_boot)


def test_nothing_that_may_have_run_is_started_again_or_cleared() -> None:
    """Rule 1."""
    for case in CASES:
        if case.found is not None and may_have_run(case.found):
            step = decide(case.state, case.found)
            assert step not in (RecoveryStep.START_AGAIN, RecoveryStep.CLEAR, RecoveryStep.SETTLE_NEVER), case.words


def test_what_was_prepared_and_left_not_even_the_mark_of_that_is_never_started_again() -> None:
    """1. A shim was prepared, so it wrote `ready`. 2. The mark is gone or cannot be read. 3. Then it may have said more.

    A child of the same user can remove the file and kill its shim; without this row it would run twice.
    """
    for case in CASES:
        found, begun = case.found, case.state not in (None, AttemptState.INTENT)
        if found is not None and begun and found.phase is Phase.NONE and found.exit is None:
            assert decide(case.state, found) is not RecoveryStep.START_AGAIN, case.words


SIGNALS = (RecoveryStep.LOST_SHIM, RecoveryStep.END_HUNG, RecoveryStep.SWEEP_REMAINS, RecoveryStep.ADOPT)


def test_nothing_of_another_boot_is_adopted_or_signalled() -> None:
    """Rule 2: its pids are somebody else's by now."""
    for case in CASES:
        if case.found is not None and not case.found.same_boot:
            assert decide(case.state, case.found) not in SIGNALS, case.words


def test_an_exit_record_always_wins() -> None:
    """ "We lost it" is not said of what told its end, whatever else is found; nothing that is settled is settled anew."""
    for case in CASES:
        if case.found is not None and case.found.exit is not None and not case.found.exit.unreleased:
            step = decide(case.state, case.found)
            if case.state is None:
                assert step is RecoveryStep.REPORT
            elif case.state is not AttemptState.SETTLED:
                assert step is RecoveryStep.SETTLE_EXIT


def test_nothing_that_is_known_and_not_settled_is_forgotten() -> None:
    """Each has a step that leads to its end."""
    for case in CASES:
        if case.state not in (None, AttemptState.SETTLED):
            step = decide(case.state, case.found)
            assert step not in (RecoveryStep.NOTHING, RecoveryStep.CLEAR, RecoveryStep.COLLECT, RecoveryStep.REPORT)
