"""What a check found: one row of `hvdtrain doctor`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that training depends on, how it stands, and what to type where it stands badly.

    Args:
        name: What was looked at.
        status: `ok`, `note` for what is worth knowing, `wrong` for what would make training fail or lie.
        found: What was seen, as a sentence or a short fact.
        mend: The line that mends it; empty where nothing needs mending.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    """Says that nothing needs to be done."""
    return Finding(name, "ok", found)


def note(name: str, found: str, mend: str = "") -> Finding:
    """Says what is worth knowing though training would be right."""
    return Finding(name, "note", found, mend)


def wrong(name: str, found: str, mend: str) -> Finding:
    """Says what would make training fail or lie, and what mends it."""
    return Finding(name, "wrong", found, mend)


def examine(checks: Iterable[tuple[str, Callable[[], Finding]]]) -> list[Finding]:
    """Runs every check to its end, so that one broken tool never hides the other findings.

    Args:
        checks: The name of each row and the function that finds it.

    Returns:
        One finding a check, in order; a check that raised is a `wrong` row that names the exception.
    """
    return [_examine(name, check) for name, check in checks]


def _examine(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever a strange machine makes of a check, the others must still run
        found = f"This check itself failed with {type(error).__name__}: {error}"
        return wrong(name, found, "report it, with what `hvdtrain doctor --json` prints")
