"""Names that scripts import from `horovod.common.exceptions`."""

from hvdtrain.keras.elastic import HorovodInternalError, HostsUpdatedInterrupt


def get_version_mismatch_message(name: str, version: str, installed_version: str) -> str:
    """Return the message for a version of a framework for which Horovod was not built."""
    return (
        f"Horovod was built for {name} {installed_version}; this is {name} {version}. Build it again with: "
        "hvdtrain build-horovod"
    )


class HorovodVersionMismatchError(ImportError):
    """The error of Horovod for a framework version for which it was not built; hvdtrain never raises it."""

    def __init__(self, name: str, version: str, installed_version: str) -> None:
        super().__init__(get_version_mismatch_message(name, version, installed_version))
        self.name = name
        self.version = version
        self.installed_version = installed_version


__all__ = [
    "HorovodInternalError",
    "HorovodVersionMismatchError",
    "HostsUpdatedInterrupt",
    "get_version_mismatch_message",
]
