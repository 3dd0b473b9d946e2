"""Parse times, memory sizes and GPU counts as Slurm writes them."""

import re

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
_GPU = re.compile(r"(?:gres[:/])?gpu(?:[:=](?P<kind>[A-Za-z][\w.-]*))?(?:[:=](?P<count>\d+))?(?:\(.*\))?")
# In MiB, Slurm's own unit.
_UNITS = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}

UNLIMITED = float("inf")


def minutes(time: str) -> float | None:
    """Parse a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Returns:
        Minutes, infinity for UNLIMITED and for 0, or None for a text that Slurm would reject.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return UNLIMITED
    match = _TIME.fullmatch(time.strip())
    if not match:
        return None
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is None:
        hours, mins, seconds = {1: [0, *fields, 0], 2: [0, *fields], 3: fields}[len(fields)]
    else:
        hours, mins, seconds = [*fields, 0, 0][:3]
    return (int(match["days"] or 0) * 24 + hours) * 60 + mins + seconds / 60 or UNLIMITED


def mebibytes(size: str) -> float | None:
    """Parse an amount of memory: a number of MiB, or a number with the unit K, M, G or T.

    Returns:
        MiB, infinity for UNLIMITED, or None for a text that Slurm would reject.
    """
    if size.upper() == "UNLIMITED":
        return UNLIMITED
    match = _SIZE.fullmatch(size.strip())
    return int(match["number"]) * _UNITS[match["unit"].upper()] if match else None


def gpus(resources: str) -> tuple[str, int]:
    """Parse the GPUs in a list of generic resources such as `gpu:a100:4(S:0-1),nvme:1`.

    Returns:
        Their kind, empty if there is none or more than one, and their number.
    """
    kinds, total = set(), 0
    for resource in split_resources(resources):
        match = _GPU.fullmatch(resource.strip())
        if match:
            kinds.add(match["kind"] or "")
            total += int(match["count"] or 1)
    return (kinds.pop() if len(kinds) == 1 else ""), total


def split_resources(resources: str) -> list[str]:
    """Split a list of generic resources at its commas, but not at those in parentheses as in `gpu:4(S:0,1)`."""
    return re.split(r",(?![^(]*\))", resources)
