"""Define how a gradient is compressed before it is sent, with Horovod's interface of two methods."""

from abc import ABC, abstractmethod
from typing import Any


class Compressor(ABC):
    """Base class for `compression=`: two static methods, which your own class may define too.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/api.html).
    """

    @staticmethod
    @abstractmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Compress a tensor before it is sent.

        Args:
            tensor: A gradient.

        Returns:
            The tensor to send, of the same shape on all ranks, and the context for `decompress`.
        """

    @staticmethod
    @abstractmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Restore the gradient from the combined tensor."""


class NoneCompressor(Compressor):
    """Sends gradients unchanged."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the tensor itself."""
        return tensor
