"""Points in time as RFC 3339 says them, in UTC and to the nanosecond; a time is an integer of nanoseconds since 1970 throughout."""

import re
from typing import Final

_NS_PER_S: Final = 1_000_000_000
_S_PER_DAY: Final = 86_400
_MOMENT: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)


def show_moment(unix_ns: int) -> str:
    """`2026-11-21T21:30:00.123456789Z`: always nine digits, so that moments sort as text."""
    seconds, ns = divmod(unix_ns, _NS_PER_S)
    days, second = divmod(seconds, _S_PER_DAY)
    year, month, day = _date(days)
    clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    return f"{year:04d}-{month:02d}-{day:02d}T{clock}.{ns:09d}Z"


def moment_ns(text: str) -> int:
    """Read an RFC 3339 time with its offset from UTC. Raises ValueError."""
    match = _MOMENT.fullmatch(text)
    if match is None:
        raise ValueError("expected a time such as 2026-11-21T21:30:00Z or 2026-11-21T22:30:00.5+01:00")
    year, month, day, hour, minute, second = (int(match[n]) for n in range(1, 7))
    ahead = int(f"{match[8]}1") * (int(match[9]) * 3600 + int(match[10]) * 60) if match[8] else 0
    days = _days(year, month, day)
    # 60 is a leap second: as POSIX counts, it is the first of the next minute.
    off_clock = hour > 23 or minute > 59 or second > 60 or (match[8] and (int(match[9]) > 23 or int(match[10]) > 59))
    if not 1 <= month <= 12 or day < 1 or _date(days) != (year, month, day) or off_clock:
        raise ValueError("there is no such time")
    whole = days * _S_PER_DAY + hour * 3600 + minute * 60 + second - ahead
    if whole < 0:
        raise ValueError("a time before 1970 means nothing here")
    return whole * _NS_PER_S + int((match[7] or "").ljust(9, "0"))


# The calendar repeats every 400 years; a year that begins in March has its leap day last. Written out here because
# `datetime` knows no nanoseconds.


def _date(days: int) -> tuple[int, int, int]:
    era, day_of_era = divmod(days + 719_468, 146_097)
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    month = shifted + 3 if shifted < 10 else shifted - 9
    return era * 400 + year_of_era + (month <= 2), month, day_of_year - (153 * shifted + 2) // 5 + 1


def _days(year: int, month: int, day: int) -> int:
    year -= month <= 2
    era, year_of_era = divmod(year, 400)
    day_of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return era * 146_097 + year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year - 719_468
