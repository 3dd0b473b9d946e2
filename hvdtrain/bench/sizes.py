"""Sizes as people type them: 4K:256M, or 64K,16M."""

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
FACTOR = 4


def parse(text: str) -> list[int]:
    """Reads sizes in bytes.

    Args:
        text: Sizes and ranges with commas between: "64K", "4K:256M" by factors of 4, "4K:256M:2" by factors of 2.

    Returns:
        The sizes, each once, the smallest first.

    Raises:
        ValueError: If the text is none of these; the message says what was expected.
    """
    try:
        return sorted({size for part in text.split(",") for size in _range(part.strip())})
    except ValueError as error:
        raise ValueError(
            f"--sizes {text!r}: {error}. Expected sizes such as 64K, 16M or 1G with commas between, or a range "
            "such as 4K:256M, which goes by factors of 4, or 4K:256M:2 by factors of 2."
        ) from None


def shown(size: int) -> str:
    """Writes a size as people read it: 16 MiB."""
    for letter in "GMK":
        if size >= _UNITS[letter] and size % (_UNITS[letter] // 16) == 0:
            return f"{size / _UNITS[letter]:g} {letter}iB"
    return f"{size} B"


def _range(part: str) -> list[int]:
    first, *rest = part.split(":")
    low = _one(first)
    if not rest:
        return [low]
    high, factor = _one(rest[0]), int(rest[1]) if len(rest) > 1 and rest[1].isdigit() else FACTOR
    if len(rest) > 2 or (len(rest) == 2 and (not rest[1].isdigit() or factor < 2)):
        raise ValueError(f"{part!r} is no range")
    if high < low:
        raise ValueError(f"{part!r} ends below its beginning")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return sizes


def _one(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found or int(found[1]) == 0:
        raise ValueError(f"{text!r} is no size")
    return int(found[1]) * _UNITS[found[2].upper()]
