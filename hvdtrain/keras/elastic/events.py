"""What sends an elastic training back to its last commit, or to its start."""


class HorovodInternalError(RuntimeError):
    """Raised inside a function under `elastic.run`: all ranks restore the last commit and run it again."""


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818 - the name is Horovod's
    """Raised inside a function under `elastic.run`: it is run again from where the state stands, nothing restored.

    Args:
        skip_sync: True to leave out the synchronisation before.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__(skip_sync)
        self.skip_sync = skip_sync
