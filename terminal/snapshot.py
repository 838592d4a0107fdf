"""The screen of a PTY drawn once, as an emulator has it behind its log. Takes tenths of a second: never on a loop."""

from collections.abc import Iterable

from protocol.records import Record
from terminal.emulator import Emulator
from terminal.replay import output_of, plan, size_of


def draw(records: Iterable[Record], rows: int, cols: int) -> bytes:
    """What makes a terminal of `rows` and `cols` show the screen behind `records`: the newest of a log, as `plan` wants them.

    Of them no more is looked at than a replay would show.
    """
    found = list(records)
    end = found[-1].end if found else 0
    begun = plan(found, end=end)
    emulator = Emulator(begun.rows, begun.cols)
    emulator.feed(begun.preamble)
    for record in found:
        if record.end > begun.cut:
            emulator.feed(output_of(record, begun.cut))
            if (size := size_of(record)) is not None and record.offset >= begun.cut:
                emulator.resize(*size)
    emulator.resize(rows, cols)
    return emulator.draw()
