"""Define a finding, one row of `hvdtrain doctor` and of `hvdtrain submit --dry-run`."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, with the command that fixes a problem."""

    name: str  # the subject of the check
    status: Status
    found: str  # the observation, as a sentence or a short fact
    mend: str = ""  # the command that fixes the problem; empty if there is none


def ok(name: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(name, "ok", found)


def note(name: str, found: str, mend: str = "") -> Finding:
    """Return a finding that the user should know, although training would be right."""
    return Finding(name, "note", found, mend)


def wrong(name: str, found: str, mend: str) -> Finding:
    """Return a problem that makes training fail or give wrong results, and the command that fixes it."""
    return Finding(name, "wrong", found, mend)
