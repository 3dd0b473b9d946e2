"""What can be set in MPI, Horovod and the C library to make sums and steps faster: one table for all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SUMS, STEPS = "sums", "steps"


@dataclass(frozen=True)
class Knob:
    """One way of setting something that otherwise is as its makers chose.

    Args:
        name: What people call it.
        choice: What is chosen; of several knobs of one choice one is taken at most.
        environ: The variables that set it.
        shows: What becomes faster, and so what it is judged by: sums of all sizes, or training steps.
        mpi: How the names of the MPIs begin that know it, as in `mpirun.KNOWN`; any MPI if empty.
        hosts: "one" or "several" where it means something only there.
        engine: The engine that it is for, where it is for one only.
        always: Whether it is set unasked, because it was faster wherever it was measured.
    """

    name: str
    choice: str
    environ: Mapping[str, str]
    shows: str = SUMS
    mpi: str = ""
    hosts: str = ""
    engine: str = ""
    always: bool = False

    def fits(self, mpi: str, hosts: str) -> bool:
        """Return whether it means something to an MPI on one host or several.

        Args:
            mpi: The MPI's name in `mpirun.KNOWN`.
            hosts: "one" or "several".
        """
        return mpi.startswith(self.mpi) and self.hosts in ("", hosts)


def _open_mpi() -> Iterator[Knob]:
    # What goes through memory has another name in 4 and 5.
    for mpi, memory in (("Open MPI 4", "vader"), ("Open MPI 5", "sm")):
        limit = f"OMPI_MCA_btl_{memory}_eager_limit"
        # Above its limit of 4 KiB Open MPI asks the other rank before it sends; so 64 KiB take as long as 128.
        yield Knob(
            "up to 128 KiB at once",
            "messages in memory",
            {limit: "131072"},
            mpi=mpi,
            hosts="one",
            always=True,
        )
        yield Knob("up to 32 KiB at once", "messages in memory", {limit: "32768"}, mpi=mpi, hosts="one")
        yield Knob("up to 4 KiB at once", "messages in memory", {limit: "4096"}, mpi=mpi, hosts="one")
    yield Knob(
        "copied twice, through shared memory",
        "copies in memory",
        {"OMPI_MCA_btl_vader_single_copy_mechanism": "none", "OMPI_MCA_btl_vader_max_send_size": "131072"},
        mpi="Open MPI 4",
        hosts="one",
    )
    for number, name in ((3, "recursive doubling"), (4, "a ring"), (6, "Rabenseifner's")):
        told = {"use_dynamic_rules": "1", "allreduce_algorithm": str(number)}
        environ = {f"OMPI_MCA_coll_tuned_{key}": value for key, value in told.items()}
        yield Knob(name, "MPI's own algorithm", environ, mpi="Open MPI")
    for kib in (16, 256):
        environ = {f"OMPI_MCA_btl_tcp_{which}eager_limit": str(kib << 10) for which in ("", "rndv_")}
        name = f"up to {kib} KiB at once"
        yield Knob(name, "messages between hosts", environ, mpi="Open MPI", hosts="several")
    environ = {"OMPI_MCA_btl_tcp_links": "2"}
    yield Knob("two connections", "connections between hosts", environ, mpi="Open MPI", hosts="several")


def _other_mpis() -> Iterator[Knob]:
    for name in ("recursive_doubling", "reduce_scatter_allgather"):
        environ = {"MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": name}
        yield Knob(name.replace("_", " "), "MPI's own algorithm", environ, mpi="MPICH")
    environ = {"MPIR_CVAR_NEMESIS_SHM_EAGER_MAX_SZ": "131072"}
    yield Knob("up to 128 KiB at once", "messages in memory", environ, mpi="MPICH", hosts="one")
    for number, name in ((1, "recursive doubling"), (2, "Rabenseifner's"), (8, "a ring")):
        environ = {"I_MPI_ADJUST_ALLREDUCE": str(number)}
        yield Knob(name, "MPI's own algorithm", environ, mpi="Intel MPI")
    environ = {"I_MPI_SHM_EAGER_THRESHOLD": "131072"}
    yield Knob("up to 128 KiB at once", "messages in memory", environ, mpi="Intel MPI", hosts="one")


def _horovod() -> Iterator[Knob]:
    for ms in ("0.2", "5"):
        environ = {"HOROVOD_CYCLE_TIME": ms}
        yield Knob(f"every {ms} ms", "Horovod's cycle", environ, shows=STEPS, engine="horovod")
    for mib in (0, 64):
        environ = {"HOROVOD_FUSION_THRESHOLD": str(mib << 20)}
        name = f"gradients of up to {mib} MiB as one" if mib else "each gradient by itself"
        yield Knob(name, "Horovod's fusion", environ, shows=STEPS, engine="horovod")


KNOBS = (
    *_open_mpi(),
    *_other_mpis(),
    *_horovod(),
    Knob("large", "the C library's pages", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, shows=STEPS),
)


def unasked(mpi: str, hosts: str) -> dict[str, str]:
    """Return what is set without being tried.

    Args:
        mpi: The MPI's name in `mpirun.KNOWN`.
        hosts: "one" or "several".
    """
    found: dict[str, str] = {}
    for knob in KNOBS:
        if knob.always and knob.fits(mpi, hosts):
            found |= knob.environ
    return found
