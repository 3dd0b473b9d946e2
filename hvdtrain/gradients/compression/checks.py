"""Check the arguments of schemes."""

from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless a value is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}. Received: {name}={value!r}.")


def check_ratio(value: Any) -> None:
    """Raise ValueError unless a value is a number in (0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(
            "ratio is the part of the elements that is sent, a number above 0 and at most 1. Received: "
            f"ratio={value!r}."
        )
