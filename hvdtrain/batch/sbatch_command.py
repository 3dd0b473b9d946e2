"""Compose the sbatch command of a job from the command line, the environment, the profile and the template."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain import settings
from hvdtrain.batch.cluster_profile import Profile
from hvdtrain.batch.per_node import per_node
from hvdtrain.batch.quantities import gpus
from hvdtrain.batch.submit_options import SubmitOptions, gpus_as_gres, read_asked
from hvdtrain.batch.templates import Template, find_template, read_options, write_options
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
    """A job to submit.

    Args:
        template: The batch script.
        given: The options on the command line of sbatch.
        options: All options in effect, including those of the template and the environment.
        words: The arguments of the template: the options of `hvdtrain run`, the script and its arguments.
        script: The script among them; empty if there is none.
        settings: Additional environment variables for sbatch.
    """

    template: Template
    given: dict[str, str | None]
    options: dict[str, str | None]
    words: tuple[str, ...]
    script: str
    settings: dict[str, str]

    def command(self, *more: str) -> list[str]:
        """Return the sbatch command as a list of arguments, with `more` options first."""
        return ["sbatch", *more, *write_options(self.given), str(self.template.path.absolute()), *self.words]

    def __str__(self) -> str:
        """Return the command as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*settings, shlex.join(self.command("--parsable"))])

    def number(self, option: str, default: int) -> int:
        """Return the value of an option that is a number; of a range, the minimum."""
        match = re.match(r"\d+", self.options.get(option) or "")
        return int(match[0]) if match else default

    @property
    def nodes(self) -> int:
        """The minimum number of nodes."""
        return self.number("nodes", 1)

    @property
    def ranks(self) -> int:
        """Number of ranks of a node."""
        total = self.number("ntasks", 0)
        return -(-total // self.nodes) if total else self.number("ntasks-per-node", 1)

    @property
    def gpus(self) -> tuple[str, int]:
        """The kind and the number of the GPUs of a node."""
        return gpus(self.options.get("gres") or "")


def compose(options: SubmitOptions, profile: Profile, environ: Mapping[str, str]) -> Batch:
    """Choose the template and compose the options of sbatch.

    The command line overrides variables such as SBATCH_PARTITION, these the profile, and the profile the template.

    Args:
        options: The options of `hvdtrain submit`.
        profile: The cluster profile.
        environ: The environment variables.

    Returns:
        The job.

    Raises:
        LaunchError: If options contradict each other, or the template does not exist.
    """
    variables = {name: environ[variable] for name, variable in _VARIABLES.items() if environ.get(variable)}
    asked = per_node(read_asked(options), {**_profile_counts(profile), **variables})
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
    # container.sbatch requeues its job too.
    wanted = "container" if options.image else "preemptible" if options.preemptible else ""
    if wanted and options.template not in (None, wanted):
        which = "--image" if options.image else "--preemptible"
        raise LaunchError(
            f"{which} and --template {options.template} contradict each other: type one of them."
        )
    has_gpus = gpus(asked.get("gres") or "")[1] > 0
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


def _profile_counts(profile: Profile) -> dict[str, str | None]:
    """Return the profile's numbers of nodes, ranks and GPUs as options of sbatch."""
    found = {"nodes": str(profile.nodes or ""), "ntasks-per-node": str(profile.ntasks_per_node or "")}
    return {name: value for name, value in found.items() if value} | _profile_gres(profile)


def _profile_gres(profile: Profile) -> dict[str, str | None]:
    number = str(profile.gpus_per_node)
    return gpus_as_gres({"gpus-per-node": number}) if number else {}


def _profile_options(profile: Profile, template: Template, taken: set[str]) -> dict[str, str | None]:
    """Return the options of the profile, except those in `taken`, which the user has set."""
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        # With the time limit of a training, the smoke test would wait longer in the queue.
        "time": "" if template.name == "smoke" else str(profile.time),
        "mem": str(profile.mem),
        "nodes": str(profile.nodes or ""),
        "ntasks-per-node": str(profile.ntasks_per_node or ""),
        "cpus-per-task": str(profile.cpus_per_task or ""),
    }
    filled: dict[str, str | None] = {name: value for name, value in options.items() if value}
    filled |= read_options(profile.sbatch)
    if template.name != "cpu" and "gres" not in filled:
        filled |= _profile_gres(profile)
    # Slurm accepts only one of these options.
    taken |= {"mem"} if taken & {"mem-per-cpu", "mem-per-gpu"} else set()
    taken |= {"ntasks-per-node"} if "ntasks" in taken else set()
    return {name: value for name, value in filled.items() if name not in taken}


def _ranks_per_node(
    given: Mapping[str, str | None], options: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return --ntasks-per-node, unless it is given: one rank for each GPU, or --ntasks divided by the nodes."""
    count = gpus(options.get("gres") or "")[1]
    if "ntasks-per-node" in given or not (count or "ntasks" in given):
        return {}
    total, nodes = (re.match(r"\d+", options.get(name) or "") for name in ("ntasks", "nodes"))
    if total:
        count = -(-int(total[0]) // max(1, int(nodes[0]) if nodes else 1))
    return {"ntasks-per-node": str(count)} if count else {}
