"""Define the options that several commands have."""

import click

NUM_PROC = click.option(
    "-np", "--num-proc", "num_proc", type=int, help="Number of ranks [all tasks of the Slurm job, else 2]."
)
HOSTS = click.option("-H", "--hosts", help="Hosts and their numbers of slots: a:4,b:4.")

# How the script is run, for commands that start one.
AS_HOROVOD = click.option(
    "--as-horovod", is_flag=True, help="Make `import horovod` in SCRIPT import hvdtrain."
)
WRAP = click.option(
    "--wrap", is_flag=True, help="Distribute a SCRIPT written for one process over the ranks."
)
SCALE_BATCH = click.option(
    "--scale-batch", is_flag=True, help="With --wrap: each rank keeps the full batch size of SCRIPT."
)
