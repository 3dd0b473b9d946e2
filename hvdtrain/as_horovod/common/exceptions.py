"""Names that scripts import from `horovod.common.exceptions`."""

from hvdtrain.keras.elastic import HorovodInternalError, HostsUpdatedInterrupt


def get_version_mismatch_message(name: str, version: str, installed_version: str) -> str:
    """Says that a framework is not the one Horovod was built for."""
    return (
        f"Horovod was built for {name} {installed_version}; this is {name} {version}. Build it again with: "
        "hvdtrain build-horovod"
    )


class HorovodVersionMismatchError(ImportError):
    """Told scripts of another framework than the one Horovod was built for; hvdtrain never raises it."""

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
