"""First layer of an encoder on sparse counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.options import Impl, check_choice
from loaders.minibatch import SparseCounts


def sparse_linear(
    counts: SparseCounts,
    weights: Sequence[Tensor],
    *,
    log1p: Sequence[bool],
    impl: Impl = "auto",
    grad_buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Products of the counts with several weights, in one walk over the counts.

    Parameters
    ----------
    counts
        B cells of one modality.
    weights
        Feature-major weights (F, O_k), each differentiable.
    log1p
        Per weight: multiply log(1 + counts) instead of the counts.
    impl
        See `liam_scale.kernels.options`.
    grad_buffers
        Persistent tensors `weight0`, `weight1`, ... that the gradients are written into and adopted as `.grad`;
        None: ordinary autograd.

    Returns
    -------
    tuple of Tensor
        One (B, O_k) product per weight.
    """
    check_choice("impl", impl, Impl)
    if len(weights) != len(log1p):
        raise ValueError(f"log1p: got {len(log1p)} entries for {len(weights)} weights; give one for each")
    for k, weight in enumerate(weights):
        if weight.dim() != 2 or len(weight) != counts.num_features:
            raise ValueError(
                f"weights[{k}]: got shape {tuple(weight.shape)} for {counts.num_features} features; "
                "give (features, outputs)"
            )
    dense = counts.to_dense()
    return tuple(
        reference.sparse_linear(dense.to(w.dtype), w, log1p=log) for w, log in zip(weights, log1p, strict=True)
    )
