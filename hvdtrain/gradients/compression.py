"""Define how a gradient is compressed while it travels, in Horovod's form of two methods."""

from abc import ABC, abstractmethod
from typing import Any


class Compressor(ABC):
    """What `compression=` takes: a class of two static methods, or one of your own with the same two.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/api.html).
    """

    @staticmethod
    @abstractmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Make a tensor ready to travel.

        Args:
            tensor: A gradient.

        Returns:
            The tensor to send, of the same shape on all ranks, and what `decompress` needs to know.
        """

    @staticmethod
    @abstractmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the gradient that the combined tensor stands for."""


class NoneCompressor(Compressor):
    """Sends gradients as they are."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the tensor itself."""
        return tensor
