"""Define a finding, one row of `hvdtrain doctor` and of `hvdtrain submit --dry-run`, and run checks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, with the command that fixes a problem.

    Args:
        name: The subject of the check.
        status: `ok`; `note` for useful information; `wrong` if training would fail or give wrong results.
        found: The observation, as a sentence or a short fact.
        mend: The command that fixes the problem; empty if there is none.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(name, "ok", found)


def note(name: str, found: str, mend: str = "") -> Finding:
    """Return a finding that the user should know, although training would be right."""
    return Finding(name, "note", found, mend)


def wrong(name: str, found: str, mend: str) -> Finding:
    """Return a problem that makes training fail or give wrong results, and the command that fixes it."""
    return Finding(name, "wrong", found, mend)


def examine(checks: Iterable[tuple[str, Callable[[], Finding]]]) -> list[Finding]:
    """Run every check, also after one of them raised an exception.

    Args:
        checks: The name of each row and its check.

    Returns:
        One finding for each check, in order; a check that raised is a `wrong` row that names the exception.
    """
    return [_examine(name, check) for name, check in checks]


def _examine(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # an unusual machine may break a check in any way; the others must still run
        found = f"This check itself failed with {type(error).__name__}: {error}"
        return wrong(name, found, "report it, with what `hvdtrain doctor --json` prints")
