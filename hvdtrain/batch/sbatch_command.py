"""From what was asked of `hvdtrain submit` to the one sbatch command that will be typed."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.batch.cluster_profile import Profile
from hvdtrain.batch.per_node import per_node
from hvdtrain.batch.quantities import gpus
from hvdtrain.batch.submit_options import SubmitOptions, as_resources, read_asked
from hvdtrain.batch.templates import Template, find_template, read_options, write_options
from hvdtrain.launch.hosts import LaunchError

# The variables by which a user sets an option of sbatch; they go before a template and a profile.
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
    """A job as it would be submitted.

    Args:
        template: The batch script.
        given: sbatch's options on the command line.
        options: Every option in effect, those of the template and the environment included.
        words: What stands after the template.
        script: The script among them; empty where there is none.
        settings: What the environment of sbatch gets besides.
    """

    template: Template
    given: dict[str, str | None]
    options: dict[str, str | None]
    words: tuple[str, ...]
    script: str
    settings: dict[str, str]

    def command(self, *more: str) -> list[str]:
        """Writes the sbatch command; every word of it is one of sbatch's, however it looks."""
        return ["sbatch", *more, *write_options(self.given), str(self.template.path.absolute()), *self.words]

    def __str__(self) -> str:
        """Writes it as a line that a shell takes."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*settings, shlex.join(self.command("--parsable"))])

    def number(self, option: str, default: int) -> int:
        """Reads an option that counts; of a range, the least."""
        match = re.match(r"\d+", self.options.get(option) or "")
        return int(match[0]) if match else default

    @property
    def nodes(self) -> int:
        """How many nodes the job needs."""
        return self.number("nodes", 1)

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        total = self.number("ntasks", 0)
        return -(-total // self.nodes) if total else self.number("ntasks-per-node", 1)

    @property
    def gpus(self) -> tuple[str, int]:
        """The kind and the number of GPUs a node."""
        return gpus(self.options.get("gres") or "")


def compose(options: SubmitOptions, profile: Profile, environ: Mapping[str, str]) -> Batch:
    """Chooses the template and puts together what the user, the profile and the template say.

    What was typed goes first, then variables such as SBATCH_PARTITION, then the profile, then the template.

    Args:
        options: What was asked for.
        profile: What the cluster needs.
        environ: The environment of the submission.

    Returns:
        The job.

    Raises:
        LaunchError: For a contradiction, or a template that is not there.
    """
    said = {name: environ[variable] for name, variable in _VARIABLES.items() if environ.get(variable)}
    asked = per_node(read_asked(options), {**_counts(profile), **said})
    template = find_template(_choose(options, profile, asked | said))
    given = _of_profile(profile, template, {*asked, *said}) | asked
    given |= _ranks(given, {**template.defaults, **said, **given})
    # A sweep has its file of trials before everything else.
    first = 1 if template.name == "array_sweep" else 0
    trials, script = options.words[:first], options.words[first:]
    words = (*trials, *options.flags, *script)
    image = options.image or environ.get("HVDTRAIN_IMAGE") or profile.image
    settings = {"HVDTRAIN_IMAGE": image} if image and template.name == "container" else {}
    return Batch(
        template, given, {**template.defaults, **said, **given}, words, "".join(script[:1]), settings
    )


def _choose(options: SubmitOptions, profile: Profile, asked: Mapping[str, str | None]) -> str:
    # What runs in a container is requeued too.
    wanted = "container" if options.image else "preemptible" if options.preemptible else ""
    if wanted and options.template not in (None, wanted):
        which = "--image" if options.image else "--preemptible"
        raise LaunchError(
            f"{which} and --template {options.template} contradict each other: type one of them."
        )
    has_gpus = gpus(asked.get("gres") or "")[1] > 0
    if options.template == "cpu" and has_gpus:
        raise LaunchError("--template cpu leaves the GPUs that are asked for idle: type --template gpu.")
    if options.template or wanted:
        return options.template or wanted
    if "array" in asked:
        return "array_sweep"
    if profile.template:
        return profile.template
    return "gpu" if has_gpus or ("gres" not in asked and _of_gpus(profile) not in ("", "0")) else "cpu"


def _counts(profile: Profile) -> dict[str, str | None]:
    """Returns what the profile says of nodes, ranks and GPUs."""
    found = {"nodes": str(profile.nodes or ""), "ntasks-per-node": str(profile.ntasks_per_node or "")}
    resources = as_resources({"gpus-per-node": _of_gpus(profile)}) if _of_gpus(profile) else {}
    return {name: value for name, value in found.items() if value} | resources


def _of_gpus(profile: Profile) -> str:
    return str(profile.gpus_per_node)


def _of_profile(profile: Profile, template: Template, taken: set[str]) -> dict[str, str | None]:
    """Takes from the profile what nobody has said."""
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        # The smoke test would wait in the queue for the hours of a training.
        "time": "" if template.name == "smoke" else str(profile.time),
        "mem": str(profile.mem),
        "nodes": str(profile.nodes or ""),
        "ntasks-per-node": str(profile.ntasks_per_node or ""),
        "cpus-per-task": str(profile.cpus_per_task or ""),
    }
    filled: dict[str, str | None] = {name: value for name, value in options.items() if value}
    filled |= read_options(profile.sbatch)
    if _of_gpus(profile) and template.name != "cpu" and "gres" not in filled:
        filled |= as_resources({"gpus-per-node": _of_gpus(profile)})
    # Slurm takes one of these only.
    taken |= {"mem"} if taken & {"mem-per-cpu", "mem-per-gpu"} else set()
    taken |= {"ntasks-per-node"} if "ntasks" in taken else set()
    return {name: value for name, value in filled.items() if name not in taken}


def _ranks(given: Mapping[str, str | None], options: Mapping[str, str | None]) -> dict[str, str | None]:
    """Gives each GPU its rank where no number of ranks a node was said, and shares out a total."""
    count = gpus(options.get("gres") or "")[1]
    if "ntasks-per-node" in given or not (count or "ntasks" in given):
        return {}
    total, nodes = (re.match(r"\d+", options.get(name) or "") for name in ("ntasks", "nodes"))
    if total:
        count = -(-int(total[0]) // max(1, int(nodes[0]) if nodes else 1))
    return {"ntasks-per-node": str(count)} if count else {}
