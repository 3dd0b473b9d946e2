"""Parse and format sizes in bytes, such as 4K:256M or 64K,16M."""

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
FACTOR = 4


def parse(text: str) -> list[int]:
    """Return the sizes in bytes that a text lists, without duplicates, in ascending order.

    Args:
        text: Sizes and ranges with commas between: "64K", "4K:256M" by factors of 4, "4K:256M:2" by factors of 2.

    Raises:
        ValueError: If it is none of these; the message says what was expected.
    """
    try:
        return sorted({size for part in text.split(",") for size in _parse_range(part.strip())})
    except ValueError as error:
        raise ValueError(
            f"--sizes {text!r}: {error}. Expected sizes such as 64K, 16M or 1G with commas between, or a range "
            "such as 4K:256M, which goes by factors of 4, or 4K:256M:2 by factors of 2."
        ) from None


def format_size(size: int) -> str:
    """Return a size with its unit: 16 MiB."""
    for letter in "GMK":
        if size >= _UNITS[letter] and size % (_UNITS[letter] // 16) == 0:
            return f"{size / _UNITS[letter]:g} {letter}iB"
    return f"{size} B"


def _parse_range(text: str) -> list[int]:
    first, *rest = text.split(":")
    sizes = [_parse_size(first)]
    if not rest:
        return sizes
    high, factors = _parse_size(rest[0]), rest[1:] or [str(FACTOR)]
    if len(factors) > 1 or not factors[0].isdigit() or int(factors[0]) < 2:
        raise ValueError(f"{text!r} is not a range")
    if high < sizes[0]:
        raise ValueError(f"{text!r} ends below its beginning")
    while sizes[-1] * int(factors[0]) <= high:
        sizes.append(sizes[-1] * int(factors[0]))
    return sizes


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size")
    return int(match[1]) * _UNITS[match[2].upper()]
