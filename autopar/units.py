"""Units. Base units are SI; scaled units appear only at input and display.

GB is 10^9 bytes (data sheets, links), GiB is 2^30 bytes (drivers, allocators).
"""

from __future__ import annotations

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40


def format_bytes(num_bytes: float) -> str:
    """Binary size with three significant digits, e.g. `1.50 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Time with four significant digits in the largest unit below it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.4g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.4g} ns"


def format_joules(joules: float) -> str:
    """Energy with four significant digits."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3)):
        if abs(joules) >= size:
            return f"{joules / size:.4g} {unit}"
    return f"{joules:.4g} J"


def format_watts(watts: float) -> str:
    """Power with four significant digits."""
    return f"{watts / 1e3:.4g} kW" if abs(watts) >= 1e4 else f"{watts:.4g} W"
