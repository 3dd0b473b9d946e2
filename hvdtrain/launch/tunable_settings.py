"""List settings of MPI, Horovod and the C library that may make allreduces and training steps faster."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SUMS, STEPS = "sums", "steps"


@dataclass(frozen=True)
class Knob:
    """One value of a setting that differs from its default.

    Args:
        name: Name of the value.
        choice: Name of the setting; at most one value of a setting is used.
        environ: The variables that set it.
        shows: The benchmark that judges it: "sums" (allreduces of all sizes) or "steps" (training steps).
        mpi: Prefix of the names, as in `mpirun.KNOWN`, of the MPIs that have this setting; empty for all MPIs.
        hosts: "one" or "several" if it has an effect only then; empty for both.
        engine: The only engine that it applies to; empty for all engines.
        always: Whether it is set by default, because it was faster in all measurements.
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
        """Return whether it has an effect for an MPI on one host or several.

        Args:
            mpi: The MPI's name in `mpirun.KNOWN`.
            hosts: "one" or "several".
        """
        return mpi.startswith(self.mpi) and self.hosts in ("", hosts)


def _open_mpi() -> Iterator[Knob]:
    # The shared-memory transport has different names in Open MPI 4 and 5.
    for mpi, memory in (("Open MPI 4", "vader"), ("Open MPI 5", "sm")):
        limit = f"OMPI_MCA_btl_{memory}_eager_limit"
        # Above its default limit of 4 KiB Open MPI does a handshake first, so 64 KiB take as long as 128 KiB.
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
        settings = {"use_dynamic_rules": "1", "allreduce_algorithm": str(number)}
        environ = {f"OMPI_MCA_coll_tuned_{key}": value for key, value in settings.items()}
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
    """Return the variables that are set by default, without a measurement on this machine.

    Args:
        mpi: The MPI's name in `mpirun.KNOWN`.
        hosts: "one" or "several".
    """
    found: dict[str, str] = {}
    for knob in KNOBS:
        if knob.always and knob.fits(mpi, hosts):
            found |= knob.environ
    return found
