"""Times and sizes as Slurm writes them, so that what is asked for can be held against what there is."""

import re

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
_GPU = re.compile(r"(?:gres[:/])?gpu(?:[:=](?P<kind>[A-Za-z][\w.-]*))?(?:[:=](?P<count>\d+))?(?:\(.*\))?")
# In MiB, Slurm's own unit.
_UNITS = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}

ENDLESS = float("inf")


def minutes(time: str) -> float | None:
    """Reads a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Returns:
        Minutes, infinity for UNLIMITED and for 0, or None for what Slurm would not take.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return ENDLESS
    match = _TIME.fullmatch(time.strip())
    if not match:
        return None
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is None:
        hours, mins, seconds = {1: [0, *fields, 0], 2: [0, *fields], 3: fields}[len(fields)]
    else:
        hours, mins, seconds = [*fields, 0, 0][:3]
    return (int(match["days"] or 0) * 24 + hours) * 60 + mins + seconds / 60 or ENDLESS


def mebibytes(size: str) -> float | None:
    """Reads an amount of memory: a number of MiB, or one with K, M, G or T.

    Returns:
        MiB, infinity for UNLIMITED, or None for what Slurm would not take.
    """
    if size.upper() == "UNLIMITED":
        return ENDLESS
    match = _SIZE.fullmatch(size.strip())
    return int(match["number"]) * _UNITS[match["unit"].upper()] if match else None


def gpus(resources: str) -> tuple[str, int]:
    """Reads the GPUs out of generic resources, as in `gpu:a100:4(S:0-1),nvme:1`.

    Returns:
        Their kind, empty where none is named, and how many there are.
    """
    found = [_GPU.fullmatch(each.strip()) for each in re.split(r",(?![^(]*\))", resources)]
    told = [(match["kind"] or "", int(match["count"] or 1)) for match in found if match]
    kinds = {kind for kind, _ in told}
    return (kinds.pop() if len(kinds) == 1 else ""), sum(count for _, count in told)
