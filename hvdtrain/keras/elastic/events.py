"""Define the exceptions that send an elastic training back to its last commit, or restart its function."""


class HorovodInternalError(RuntimeError):
    """Raised inside a function under `elastic.run`: all ranks restore the last commit and run it again."""


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818 - the name is Horovod's
    """Raised inside a function under `elastic.run`: it is run again with the current state, without restoring.

    Args:
        skip_sync: True to skip the synchronisation before the run.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__(skip_sync)
        self.skip_sync = skip_sync
