"""Check a Slurm job, submit it with sbatch, and follow it: `hvdtrain submit`."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hvdtrain.batch.cluster_profile import Profile, read_profile
from hvdtrain.batch.follow import follow
from hvdtrain.batch.partition_limits import examine_limits, read_partitions
from hvdtrain.batch.preflight import examine_job, trials_of
from hvdtrain.batch.sbatch_command import Batch, compose
from hvdtrain.batch.site_script import Site, compose_site
from hvdtrain.batch.submit_options import SubmitOptions
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.program import Result, run_program
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run_options import RunOptions, check_wrapping

SECONDS = 120  # the time limit of sbatch

_ASSOCIATIONS = "sacctmgr show assoc user=$USER format=account,partition,qos"

# Error messages of Slurm, and what to type.
_HINTS = {
    r"invalid partition": "sinfo",
    r"[Ii]nvalid account|InvalidAccount": f"--account=… with one of yours: {_ASSOCIATIONS}",
    r"[Ii]nvalid qos": f"--sbatch='--qos=…' with one of yours: {_ASSOCIATIONS}",
    r"node configuration is not available": "sinfo -N -l, for the resources of the nodes; see also --sbatch",
    r"[Tt]ime limit": "scontrol show partition, for MaxTime",
    r"generic resource|gres": "sinfo -o '%P %G', for the GPUs there are",
    r"group not permitted": "scontrol show partition, for AllowGroups",
    r"[Pp]olicy|[Ll]imit": f"{_ASSOCIATIONS},maxsubmit,maxjobs; squeue --me",
    r"contact slurm|[Cc]onnection refused|[Tt]imed out|configuration source": "scontrol ping",
    r"unrecognized option|ambiguous|doesn't allow an argument|requires an argument": "sbatch --help",
}


def submit(options: SubmitOptions) -> int:
    """Submit a script to Slurm, after checks that find most reasons for which the job would fail or never start.

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


def _submit(options: SubmitOptions, environ: dict[str, str]) -> int:
    wrap, scale_batch, as_horovod = (
        flag in options.flags for flag in ("--wrap", "--scale-batch", "--as-horovod")
    )
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
    number = _run_sbatch(batch, environ | batch.settings)
    print(f"Submitted batch job {number}", flush=True)
    return follow(number, batch.template, environ, stay=options.follow)


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
    findings = [ok("profile", str(profile.path or "none")), *examine_job(batch, environ)]
    sbatch = shutil.which("sbatch", path=environ.get("PATH"))
    if sbatch:
        findings += [ok("sbatch", sbatch), *examine_limits(batch, read_partitions(environ))]
        findings += _check_pmi(profile, environ)
    else:
        found = "There is no sbatch on PATH: this is not a login node of Slurm, or its module is not loaded."
        if dry_run:
            findings.append(note("sbatch", f"{found} So the checks that need Slurm were skipped."))
        else:
            findings.append(wrong("sbatch", found, "on one machine: hvdtrain run -np 2 train.py"))
    yield from findings
    if sbatch and not any(finding.status == "wrong" for finding in findings):
        waits = any(finding.name == "waiting" for finding in findings)
        yield _test_sbatch(batch, {**environ, **batch.settings}, waits)


def _check_pmi(profile: Profile, environ: Mapping[str, str]) -> Iterator[Finding]:
    if not profile.pmi or not shutil.which("srun", path=environ.get("PATH")):
        return
    supported = slurm.pmi_types(environ)
    if supported and profile.pmi not in supported:
        found = f"The profile asks for srun --mpi={profile.pmi}, which this srun does not list."
        yield note("PMI", found, "srun --mpi=list")


def _test_sbatch(batch: Batch, environ: Mapping[str, str], waits: bool) -> Finding:
    """Ask sbatch whether it would accept a job, and when and where the job would start.

    If `waits`, nodes that the job needs are known to be down, and `sbatch --test-only` refuses a job that sbatch
    itself would accept.
    """
    result = run_program(batch.command("--test-only"), environ, SECONDS)
    message = _message(result)
    if result.code == 0:
        start = re.search(r"to start at (\S+) using .*? on nodes (\S+)", message)
        found = f"it would start at {start[1]} on {start[2]}" if start else "sbatch would accept the job"
        return ok("sbatch --test-only", found)
    if waits and "not available" in message:
        return note("sbatch --test-only", f"While these nodes are missing, sbatch prints: {message}")
    return wrong("sbatch --test-only", f"sbatch would refuse this job: {message}", _hint(message))


def _run_sbatch(batch: Batch, environ: Mapping[str, str]) -> str:
    """Submit a job and return its ID, or raise a LaunchError with the error message of sbatch."""
    result = run_program(batch.command("--parsable"), environ, SECONDS)
    number = re.search(r"^(\d+)(;\S*)?$", result.out, re.MULTILINE)
    if result.code is None:
        raise LaunchError(
            f"sbatch has not answered within {SECONDS} s. Check with `squeue --me` whether the job was submitted."
        )
    if result.code or not number:
        message = _message(result)
        raise LaunchError(f"sbatch refused the job: {message}\n  -> {_hint(message)}")
    return number[1]


def _hint(message: str) -> str:
    """Return what to type after an error message of Slurm."""
    for pattern, advice in _HINTS.items():
        if re.search(pattern, message):
            return advice
    return "sbatch --help, or send this message to the administrators of the cluster"


def _message(result: Result) -> str:
    """Join the lines that sbatch printed, without the prefix `sbatch: error:`."""
    if result.code is None:
        return f"nothing within {result.seconds:g} s"
    printed = (result.err or result.out).splitlines()
    lines = [re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in printed]
    return " ".join(dict.fromkeys(line for line in lines if line)) or f"nothing, with exit code {result.code}"


def _report(findings: Iterator[Finding], options: SubmitOptions) -> int:
    """Print the notes and problems, in a dry run all findings, and return the number of problems."""
    problems = 0
    for finding in findings:
        problems += finding.status == "wrong"
        if options.dry_run:
            _print(_comment(finding))
        elif finding.status != "ok":
            advice = f"\n  -> {finding.mend}" if finding.mend else ""
            print(f"hvdtrain: {finding.found}{advice}", file=sys.stderr)
    return problems


def _comment(finding: Finding) -> str:
    """Return a finding as a shell comment on one line, so that the whole output can be pasted into a shell."""
    mark = "WRONG" if finding.status == "wrong" else finding.status
    text = f"{finding.name}: {finding.found}" + (f" -> {finding.mend}" if finding.mend else "")
    return f"# {mark:5} " + " ".join(text.split())


def _print(line: str) -> None:
    """Print a line as bytes, because it may contain a file name that is not valid text."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.buffer.flush()
