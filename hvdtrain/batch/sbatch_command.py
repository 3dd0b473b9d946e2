"""Compose the sbatch command of a job from the command line, the environment, the profile and the template."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain import settings
from hvdtrain.batch.cluster_profile import Profile
from hvdtrain.batch.sbatch_options import (
    Options,
    Template,
    find_template,
    first_number,
    gpus,
    read_options,
    write_option,
)
from hvdtrain.batch.submit_options import SubmitOptions, gpus_as_gres, read_asked
from hvdtrain.launch.hosts import LaunchError

# The variables that set options of sbatch; they override the profile and the template.
_VARIABLES = {
    "account": "SBATCH_ACCOUNT",
    "array": "SBATCH_ARRAY_INX",
    "export": "SBATCH_EXPORT",
    "gres": "SBATCH_GRES",
    "job-name": "SBATCH_JOB_NAME",
    "mem": "SBATCH_MEM_PER_NODE",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "time": "SBATCH_TIMELIMIT",
}


@dataclass(frozen=True)
class Batch:
    """A job to submit."""

    template: Template
    given: Options  # those on the command line of sbatch
    options: Options  # all in effect, including those of the template and the environment
    words: tuple[str, ...]  # for the template: the options of `hvdtrain run`, the script and its arguments
    script: str  # the script among them; empty if there is none
    settings: dict[str, str]  # additional environment variables for sbatch

    def command(self, *more: str) -> list[str]:
        """Return the sbatch command as a list of arguments, with `more` options first."""
        options = [write_option(name, value) for name, value in self.given.items()]
        return ["sbatch", *more, *options, str(self.template.path.absolute()), *self.words]

    def __str__(self) -> str:
        """Return the command as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*settings, shlex.join(self.command("--parsable"))])

    @property
    def nodes(self) -> int:
        """The minimum number of nodes."""
        return first_number(self.options, "nodes") or 1

    @property
    def ranks(self) -> int:
        """Number of ranks of a node."""
        total = first_number(self.options, "ntasks")
        return math.ceil(total / self.nodes) if total else first_number(self.options, "ntasks-per-node", 1)

    @property
    def gpus(self) -> tuple[str, int]:
        """The kind and the number of the GPUs of a node."""
        return gpus(self.options.get("gres"))


def compose(options: SubmitOptions, profile: Profile, environ: Mapping[str, str]) -> Batch:
    """Choose the template and compose the options of sbatch.

    The command line overrides variables such as SBATCH_PARTITION, these the profile, and the profile the template.

    Raises:
        LaunchError: If options contradict each other, or the template does not exist.
    """
    variables = {name: environ[variable] for name, variable in _VARIABLES.items() if environ.get(variable)}
    asked = read_asked(options, {**_profile_counts(profile), **variables})
    template = find_template(_choose_template(options, profile, asked | variables))
    given = _profile_options(profile, template, {*asked, *variables}) | asked
    given |= _ranks_per_node(given, {**template.defaults, **variables, **given})
    # array_sweep.sbatch reads the file of trials first.
    first = 1 if template.name == "array_sweep" else 0
    trials, script = options.words[:first], options.words[first:]
    words = (*trials, *options.flags, *script)
    image = options.image or settings.get("HVDTRAIN_IMAGE", environ) or profile.image
    exported = {"HVDTRAIN_IMAGE": image} if image and template.name == "container" else {}
    in_effect = {**template.defaults, **variables, **given}
    return Batch(template, given, in_effect, words, script[0] if script else "", exported)


def _choose_template(options: SubmitOptions, profile: Profile, asked: Mapping[str, str | None]) -> str:
    wanted, which = "", ""
    if options.image:  # container.sbatch requeues its job too
        wanted, which = "container", "--image"
    elif options.preemptible:
        wanted, which = "preemptible", "--preemptible"
    if wanted and options.template not in (None, wanted):
        raise LaunchError(
            f"{which} and --template {options.template} contradict each other: type one of them."
        )
    has_gpus = gpus(asked.get("gres"))[1] > 0
    if options.template == "cpu" and has_gpus:
        raise LaunchError("--template cpu does not use the GPUs that are asked for: type --template gpu.")
    if options.template or wanted:
        return options.template or wanted
    if "array" in asked:
        return "array_sweep"
    if profile.template:
        return profile.template
    profile_has_gpus = "gres" not in asked and str(profile.gpus_per_node) not in ("", "0")
    return "gpu" if has_gpus or profile_has_gpus else "cpu"


def _profile_counts(profile: Profile) -> Options:
    """Return the profile's numbers of nodes, ranks and GPUs as options of sbatch."""
    counts = {"nodes": profile.nodes, "ntasks-per-node": profile.ntasks_per_node}
    found: Options = {name: str(count) for name, count in counts.items() if count}
    gpus_per_node = str(profile.gpus_per_node)
    return gpus_as_gres(found | {"gpus-per-node": gpus_per_node}) if gpus_per_node else found


def _profile_options(profile: Profile, template: Template, taken: set[str]) -> Options:
    """Return the options of the profile, except those in `taken`, which the user has set."""
    counts = _profile_counts(profile)
    options: Options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        # With the time limit of a training, the smoke test would wait longer in the queue.
        "time": "" if template.name == "smoke" else str(profile.time),
        "mem": str(profile.mem),
        "nodes": counts.get("nodes"),
        "ntasks-per-node": counts.get("ntasks-per-node"),
        "cpus-per-task": str(profile.cpus_per_task or ""),
    }
    options = {name: value for name, value in options.items() if value}
    options |= read_options(profile.sbatch)
    if template.name != "cpu" and "gres" in counts:
        options.setdefault("gres", counts["gres"])
    # Slurm accepts only one of these options.
    taken |= {"mem"} if taken & {"mem-per-cpu", "mem-per-gpu"} else set()
    taken |= {"ntasks-per-node"} if "ntasks" in taken else set()
    return {name: value for name, value in options.items() if name not in taken}


def _ranks_per_node(given: Options, options: Options) -> Options:
    """Return --ntasks-per-node, unless it is given: one rank for each GPU, or --ntasks divided by the nodes."""
    count = gpus(options.get("gres"))[1]
    if "ntasks-per-node" in given or not (count or "ntasks" in given):
        return {}
    total = first_number(options, "ntasks")
    if total:
        count = math.ceil(total / (first_number(options, "nodes") or 1))
    return {"ntasks-per-node": str(count)} if count else {}
