"""Define and check the options for combining gradients, in one record."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.schemes import NoneCompressor, Plain, Scheme, is_compressor


@dataclass(frozen=True)
class ReduceOptions:
    """Options for combining gradients.

    Args:
        name: Prefix for the names of the operations.
        op: `Op.AVERAGE`, `Op.SUM` or `Op.ADASUM`.
        sparse_as_dense: Makes sparse gradients dense before they are sent, instead of gathering their rows.
        compression: A `Compressor`, or a class with the same two methods, which is applied to tensors before and
            after they are reduced; or a `Scheme`, which reduces NumPy arrays. Sparse gradients are not compressed.
        predivide_factor: For a mean over n ranks, gradients are divided by this factor before they are summed, and
            the sum is divided by n / factor: the numbers are smaller where 16-bit floats might overflow.
        groups: Number of groups of gradients, each of which is sent as one, or lists of the variables of each
            group; the engine decides about variables in no group.
        scale_local: Divides gradients of local variables by the number of ranks, like those of the others.
        device_dense: Device for the engine's own graph operations on dense gradients.
        device_sparse: Device for those on sparse gradients.
        subject: What is combined, for messages.
    """

    name: str
    op: Op = Op.AVERAGE
    sparse_as_dense: bool = False
    compression: Any = NoneCompressor
    predivide_factor: float = 1.0
    groups: int | Sequence[Sequence[Any]] | None = None
    scale_local: bool = True
    device_dense: str = ""
    device_sparse: str = ""
    subject: str = "gradients"

    def __post_init__(self) -> None:
        if self.op not in (Op.AVERAGE, Op.SUM, Op.ADASUM):
            raise ValueError(
                "Gradients are combined by hvd.Average, hvd.Sum or hvd.Adasum. "
                f"Received: op={self.op.name.lower()}."
            )
        if self.predivide_factor != 1.0 and self.op is not Op.AVERAGE:
            raise ValueError(
                "gradient_predivide_factor divides a mean in two steps, so it needs op=hvd.Average. Received: "
                f"op={self.op.name.lower()}."
            )
        if isinstance(self.compression, Scheme):
            if self.op is Op.ADASUM:
                raise ValueError(
                    f"hvd.Adasum combines whole gradients, so it takes no scheme. Received: {self.compression!r}."
                )
        elif not is_compressor(self.compression):
            raise TypeError(
                "compression is hvd.Compression.none, fp16 or bf16, what a function such as "
                "hvd.Compression.topk(0.01) returns, or a class with the methods compress and decompress. "
                f"Received: {self.compression!r}."
            )
        _check_groups(self.groups)

    @property
    def compressor(self) -> Any:
        """The class whose two methods are applied to tensors."""
        return NoneCompressor if isinstance(self.compression, Scheme) else self.compression

    @property
    def scheme(self) -> Scheme:
        """How dense gradients are reduced as NumPy arrays."""
        return self.compression if isinstance(self.compression, Scheme) else Plain()

    @property
    def is_exact(self) -> bool:
        """Whether the result is a sum or mean up to rounding; that of Adasum depends on angles."""
        return self.op is not Op.ADASUM and self.scheme.is_exact


def _check_groups(groups: Any) -> None:
    """Raise ValueError if `groups` is neither a number of groups nor lists of variables."""
    counted = groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 0)
    listed = isinstance(groups, list | tuple) and all(isinstance(group, list | tuple) for group in groups)
    if not counted and not listed:
        raise ValueError(
            "groups is a number of groups, 0 for none, or a list of lists of variables. Received: "
            f"groups={groups!r}."
        )


def groups_of(variables: Sequence[Any], groups: int | Sequence[Sequence[Any]] | None) -> list[list[int]]:
    """Divide gradients into the groups that the user requested.

    Args:
        variables: The variables of the gradients.
        groups: As in `ReduceOptions`.

    Returns:
        For each group the indices of its gradients; groups without a gradient are omitted.
    """
    if not groups:
        return []
    if isinstance(groups, int):
        ends = [round(len(variables) * part / groups) for part in range(groups + 1)]
        divided = [list(range(start, end)) for start, end in itertools.pairwise(ends)]
    else:
        divided = [
            [index for index, variable in enumerate(variables) if any(variable is member for member in group)]
            for group in groups
        ]
    return [members for members in divided if members]
