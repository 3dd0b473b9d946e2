"""Check a Slurm job, submit it, and follow it: `hvdtrain submit`."""

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

# Options of sbatch that `hvdtrain submit` has as options too, and options passed to `hvdtrain run`.
_OPTIONS = ["nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "time", "mem"]
_OPTIONS += ["gpus-per-task", "cpus-per-gpu", "mem-per-gpu"]
_OPTIONS += ["partition", "account", "qos", "job-name", "array"]
_FLAGS = ("wrap", "scale_batch", "as_horovod")
_FOR_SRUN = ("cpu_bind", "gpu_bind")


def submit(options: SubmitOptions) -> int:
    """Submit a script to Slurm, after checks that find most reasons for which the job would fail or never start.

    Args:
        options: The options of the command.

    Returns:
        0 if the job is submitted, or with `follow` if it succeeded; 2 if it is not submitted; with `follow` the
        exit code of the failed job, or 130 after Ctrl-C.
    """
    try:
        return _submit(options, dict(os.environ))
    except LaunchError as error:
        print(f"hvdtrain: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of standard output has ended. Python would raise the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def read_typed(typed: Mapping[str, Any]) -> SubmitOptions:
    """Sort the options of the command line into those of sbatch, of `hvdtrain run`, and of submit itself."""
    names = {field.name for field in fields(SubmitOptions)}
    own = {name: value for name, value in typed.items() if name in names}
    flags = tuple(_dashed(name) for name in _FLAGS if typed.get(name))
    flags += tuple(f"{_dashed(name)}={typed[name]}" for name in _FOR_SRUN if typed.get(name))
    values = {name: typed[name.replace("-", "_")] for name in _OPTIONS}
    asked = {name: str(value) for name, value in values.items() if value is not None}
    return SubmitOptions(**own, flags=flags, asked=asked)


def _submit(options: SubmitOptions, environ: dict[str, str]) -> int:
    wrap, scale_batch, as_horovod = (_dashed(name) in options.flags for name in _FLAGS)
    check_wrapping(RunOptions(1, "", wrap=wrap, scale_batch=scale_batch, as_horovod=as_horovod))
    profile = read_profile(options.cluster, environ)
    site = compose_site(profile, environ)
    batch = _add_site_and_array(compose(options, profile, environ), site)
    problems = _report(_examine(batch, profile, environ, options.dry_run), options)
    if options.dry_run:
        # A dry run writes no file; it prints the shell command that writes the site file if it is missing.
        if site and not site.path.exists():
            _print(str(site))
        _print(str(batch))
    if problems and not options.force:
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


def _add_site_and_array(batch: Batch, site: Site | None) -> Batch:
    """Add the options that depend on files: the site file for the nodes, and the task numbers of a sweep."""
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
    """Run all checks, the cheapest first; `sbatch --test-only` runs only if the others found no problem."""
    slurm_found = examine_programs(environ)
    findings = [ok("profile", str(profile.path or "none")), *examine_job(batch, environ)]
    if slurm_found.status == "ok":
        limits = examine_limits(batch, read_partitions(environ))
        findings += [slurm_found, *limits, *_check_pmi(profile, environ)]
    elif dry_run:
        findings.append(note("sbatch", f"{slurm_found.found} So the checks that need Slurm were skipped."))
    else:
        findings.append(slurm_found)
    yield from findings
    if slurm_found.status == "ok" and not any(finding.status == "wrong" for finding in findings):
        waits = any(finding.name == "waiting" for finding in findings)
        yield examine_test(batch, {**environ, **batch.settings}, waits)


def _check_pmi(profile: Profile, environ: Mapping[str, str]) -> Iterator[Finding]:
    if not profile.pmi or not shutil.which("srun", path=environ.get("PATH")):
        return
    supported = slurm.pmi_types(environ)
    if supported and profile.pmi not in supported:
        found = f"The profile asks for srun --mpi={profile.pmi}, which this srun does not list."
        yield note("PMI", found, "srun --mpi=list")


def _report(findings: Iterator[Finding], options: SubmitOptions) -> int:
    """Print the notes and problems, in a dry run all findings, and return the number of problems."""
    problems = 0
    for finding in findings:
        problems += finding.status == "wrong"
        if options.dry_run:
            _print(_comment(finding))
        elif finding.status != "ok":
            print(f"hvdtrain: {_sentence(finding)}", file=sys.stderr)
    return problems


def _sentence(finding: Finding) -> str:
    return finding.found + (f"\n  -> {finding.mend}" if finding.mend else "")


def _comment(finding: Finding) -> str:
    """Return a finding as a shell comment on one line, so that the whole output can be pasted into a shell."""
    mark = {"ok": "ok", "note": "note", "wrong": "WRONG"}[finding.status]
    text = f"{finding.name}: {finding.found}" + (f" -> {finding.mend}" if finding.mend else "")
    return f"# {mark:5} " + " ".join(text.split())


def _print(line: str) -> None:
    """Print a line as bytes, because it may contain a file name that is not valid text."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.buffer.flush()
