"""Parse and format sizes in bytes, such as 4K:256M or 64K,16M."""

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
FACTOR = 4


def parse(text: str) -> list[int]:
    """Return the sizes that a text lists.

    Args:
        text: Sizes and ranges with commas between: "64K", "4K:256M" by factors of 4, "4K:256M:2" by factors of 2.

    Returns:
        The sizes in bytes, without duplicates, in ascending order.

    Raises:
        ValueError: If the text is none of these; the message says what was expected.
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
    low = _parse_size(first)
    if not rest:
        return [low]
    high, factor = _parse_size(rest[0]), int(rest[1]) if len(rest) > 1 and rest[1].isdigit() else FACTOR
    if len(rest) > 2 or (len(rest) == 2 and (not rest[1].isdigit() or factor < 2)):
        raise ValueError(f"{text!r} is not a range")
    if high < low:
        raise ValueError(f"{text!r} ends below its beginning")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return sizes


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size")
    return int(match[1]) * _UNITS[match[2].upper()]
