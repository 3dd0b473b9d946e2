"""Parse `hvdtrain submit`."""

import sys

import click

from hvdtrain.cli.options import AS_HOROVOD, SCALE_BATCH, WRAP


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-N", "--nodes", help="Number of nodes: 4, or 2-4.")
@click.option("-n", "--ntasks", type=click.IntRange(1), help="Total number of ranks.")
@click.option("--ntasks-per-node", type=click.IntRange(1), help="Ranks per node [one per GPU, else 1].")
@click.option("-c", "--cpus-per-task", type=click.IntRange(1), help="CPUs per rank.")
@click.option("--gpus-per-node", help="GPUs per node: 4, or with their type a100:4.")
@click.option("--gpus-per-task", help="GPUs per rank: 1, or with their type a100:1.")
@click.option("--cpus-per-gpu", type=click.IntRange(1), help="CPUs per GPU.")
@click.option("-t", "--time", help="Time limit: 8:00:00, 2-00:00:00.")
@click.option("--mem", help="Memory per node: 32G.")
@click.option("--mem-per-gpu", help="Memory per GPU: 16G.")
@click.option("-p", "--partition", help="Partition of the cluster.")
@click.option("-A", "--account", help="Account to charge.")
@click.option("-q", "--qos", help="Quality of service.")
@click.option("-J", "--job-name", help="Name of the job, of its log and of its done file.")
@click.option("-a", "--array", help="Trials of a parameter sweep: 0-8, or 0-8%4 for four at a time.")
@click.option(
    "--template", help="cpu, gpu, preemptible, container, array_sweep, smoke, or the path of your own file."
)
@click.option(
    "--preemptible", is_flag=True, help="Requeue a preempted job; it continues from its checkpoint."
)
@click.option("--image", help="Container image.")
@click.option("--cpu-bind", help="How srun binds ranks to CPUs: cores, none.")
@click.option("--gpu-bind", help="Which GPUs srun shows to a rank: closest, none.")
@click.option("--sbatch", default="", help="More options for sbatch, as one quoted string.")
@click.option(
    "--cluster",
    help="Cluster profile: NAME is ~/.config/hvdtrain/NAME.toml [HVDTRAIN_CLUSTER, else cluster].",
)
@AS_HOROVOD
@WRAP
@SCALE_BATCH
@click.option("--dry-run", is_flag=True, help="Print the checks and the sbatch command without submitting.")
@click.option(
    "--follow", is_flag=True, help="Show the log until the job has ended; Ctrl-C leaves it running."
)
@click.option("--force", is_flag=True, help="Submit even if a check fails.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]...")
def submit(**typed) -> None:
    """Check SCRIPT with ARGS and submit it to Slurm."""
    from hvdtrain.batch.submit import submit
    from hvdtrain.batch.submit_options import read_typed

    sys.exit(submit(read_typed(typed)))
