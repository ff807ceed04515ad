"""Amounts of memory as users write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_memory(amount: str | int) -> int:
    """Bytes of "512MiB", "1GiB", "2 GB" or a plain number.

    Raises
    ------
    ValueError
        The text is no amount of memory, or none above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", str(amount).upper())
    number = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if number < 1:
        raise ValueError(f"memory: got {amount!r}; give an amount such as 512MiB or 2GiB")
    return int(number)
