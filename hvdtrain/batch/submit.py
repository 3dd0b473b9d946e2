"""`hvdtrain submit`: from a laptop's command line to a Slurm job, checked before it waits in a queue."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hvdtrain.batch.cluster_profile import Profile, read_profile
from hvdtrain.batch.follow import follow
from hvdtrain.batch.partition_limits import examine_limits
from hvdtrain.batch.partitions import read_partitions
from hvdtrain.batch.preflight import examine_job, examine_programs, trials_of
from hvdtrain.batch.sbatch import examine_test, submit_batch
from hvdtrain.batch.sbatch_command import Batch, compose
from hvdtrain.batch.site_script import Site, compose_site
from hvdtrain.batch.submit_options import SubmitOptions
from hvdtrain.doctor.finding import Finding, note, ok
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run_options import RunOptions, check_wrapping

__all__ = ["SubmitOptions", "read_typed", "submit"]

# sbatch's options that have an option of their own, and those handed to `hvdtrain run`.
_OPTIONS = ["nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "time", "mem"]
_OPTIONS += ["gpus-per-task", "cpus-per-gpu", "mem-per-gpu"]
_OPTIONS += ["partition", "account", "qos", "job-name", "array"]
_FLAGS = ("wrap", "scale_batch", "as_horovod")
_FOR_SRUN = ("cpu_bind", "gpu_bind")


def submit(options: SubmitOptions) -> int:
    """Submits a script to Slurm: what would fail in the night is said now, and nothing in its words is executed.

    Args:
        options: What was asked for.

    Returns:
        0 when the job is submitted, or with `follow` when it has proved its success; 2 when it was not submitted;
        with `follow` the failed job's exit code, or 130 when Ctrl-C ended the following.
    """
    try:
        return _submit(options, dict(os.environ))
    except LaunchError as error:
        print(f"hvdtrain: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Nobody reads what is printed. Python must not try once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def read_typed(typed: Mapping[str, Any]) -> SubmitOptions:
    """Sorts what was typed: options of sbatch's, those for `hvdtrain run`, and submit's own."""
    names = {field.name for field in fields(SubmitOptions)}
    own = {name: value for name, value in typed.items() if name in names}
    flags = tuple(_dashed(name) for name in _FLAGS if typed.get(name))
    flags += tuple(f"{_dashed(name)}={typed[name]}" for name in _FOR_SRUN if typed.get(name))
    said = {name: typed[name.replace("-", "_")] for name in _OPTIONS}
    asked = {name: str(value) for name, value in said.items() if value is not None}
    return SubmitOptions(**own, flags=flags, asked=asked)


def _submit(options: SubmitOptions, environ: dict[str, str]) -> int:
    wrap, scale_batch, as_horovod = (_dashed(name) in options.flags for name in _FLAGS)
    check_wrapping(RunOptions(1, "", wrap=wrap, scale_batch=scale_batch, as_horovod=as_horovod))
    profile = read_profile(options.cluster, environ)
    site = compose_site(profile, environ)
    batch = _settled(compose(options, profile, environ), site)
    objections = _tell(_examine(batch, profile, environ, options.dry_run), options)
    if options.dry_run:
        # Nothing is written here; what is printed writes it where it is missing.
        if site and not site.path.exists():
            _print(str(site))
        _print(str(batch))
    if objections and not options.force:
        print("hvdtrain: nothing was submitted.", file=sys.stderr)
        return 2
    if options.dry_run:
        return 0
    if site:
        site.write()
    number = submit_batch(batch, environ | batch.settings)
    print(f"Submitted batch job {number}", flush=True)
    return follow(number, batch.template, environ, stay=options.follow)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settled(batch: Batch, site: Site | None) -> Batch:
    """Adds what depends on files: the site's for the nodes, and a sweep's numbers."""
    if site:
        batch = replace(batch, settings={"HVDTRAIN_SITE": str(site.path), **batch.settings})
    if batch.template.name == "array_sweep" and "array" not in batch.options:
        try:
            last = len(trials_of(Path(batch.options.get("chdir") or ".", *batch.words[:1]))) - 1
        except OSError:
            return batch
        array: dict[str, str | None] = {"array": f"0-{max(last, 0)}"}
        batch = replace(batch, given=batch.given | array, options=batch.options | array)
    return batch


def _examine(batch: Batch, profile: Profile, environ: Mapping[str, str], dry_run: bool) -> Iterator[Finding]:
    """Looks at everything, the cheapest first; sbatch is asked about what has passed."""
    here = examine_programs(environ)
    findings = [ok("profile", str(profile.path or "none")), *examine_job(batch, environ)]
    if here.status == "ok":
        findings += [here, *examine_limits(batch, read_partitions(environ)), *_pmi(profile, environ)]
    elif dry_run:
        findings.append(note("sbatch", f"{here.found} So nothing was asked of Slurm."))
    else:
        findings.append(here)
    yield from findings
    if here.status == "ok" and not any(finding.status == "wrong" for finding in findings):
        waits = any(finding.name == "waiting" for finding in findings)
        yield examine_test(batch, {**environ, **batch.settings}, waits)


def _pmi(profile: Profile, environ: Mapping[str, str]) -> Iterator[Finding]:
    offered = (
        slurm.pmi_types(environ) if profile.pmi and shutil.which("srun", path=environ.get("PATH")) else set()
    )
    if offered and profile.pmi not in offered:
        found = f"The profile asks for srun --mpi={profile.pmi}, which this srun does not list."
        yield note("PMI", found, "srun --mpi=list")


def _tell(findings: Iterator[Finding], options: SubmitOptions) -> int:
    """Says what was found, all of it in a dry run, and counts the objections."""
    told: list[Finding] = []
    for finding in findings:
        told.append(finding)
        if options.dry_run:
            _print(_comment(finding))
        elif finding.status != "ok":
            print(f"hvdtrain: {_sentence(finding)}", file=sys.stderr)
    return sum(finding.status == "wrong" for finding in told)


def _sentence(finding: Finding) -> str:
    return finding.found + (f"\n  -> {finding.mend}" if finding.mend else "")


def _comment(finding: Finding) -> str:
    """Writes a finding as a comment of a shell, on one line: what is printed may be pasted as a whole."""
    mark = {"ok": "ok", "note": "note", "wrong": "WRONG"}[finding.status]
    text = f"{finding.name}: {finding.found}" + (f" -> {finding.mend}" if finding.mend else "")
    return f"# {mark:5} " + " ".join(text.split())


def _print(line: str) -> None:
    """Prints a line whose words may be those of a file name that is no text."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.buffer.flush()
