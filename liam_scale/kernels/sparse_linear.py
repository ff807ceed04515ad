"""First layer of an encoder on sparse counts.

Shapes: B cells, F features, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liam_scale.kernels import reference
from liam_scale.kernels.backends import backend_of
from liam_scale.kernels.gradients import adopt, checked_buffer, is_same_memory
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
    """Products of the counts with several weights. Deterministic bit for bit, whatever the number of CPU threads.

    Parameters
    ----------
    counts
        B cells of one modality. Without its transpose the transpose is made here.
    weights
        Feature-major weights (F, O_k), float32 or float64, each differentiable.
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

    Raises
    ------
    ValueError
        A shape does not fit the counts.
    RuntimeError
        A gradient buffer still holds the gradient of an earlier step.
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
    if impl == "reference":
        dense = counts.to_dense()
        pairs = zip(weights, log1p, strict=True)
        return tuple(reference.sparse_linear(dense.to(w.dtype), w, log1p=log) for w, log in pairs)
    buffers = [checked_buffer(grad_buffers, f"weight{k}", weight) for k, weight in enumerate(weights)]
    backend = backend_of("sparse", impl, counts.values.device)
    entries = [backend.entries(counts, w.dtype, log1p=log) for w, log in zip(weights, log1p, strict=True)]
    return _Product.apply(backend, entries, buffers, *weights)


class _Product(torch.autograd.Function):
    """Products by `backend.product`; gradients by `backend.write_gradient`, written where they are to stand."""

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, entries: list[Any], buffers: list[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backend, ctx.entries, ctx.buffers, ctx.weights = backend, entries, buffers, weights
        return tuple(backend.product(e, w.detach().contiguous()) for e, w in zip(entries, weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """Those with a buffer are adopted, the others handed to autograd."""
        gradients: list[Tensor | None] = [None] * len(ctx.weights)
        for k, (entries, weight, buffer) in enumerate(zip(ctx.entries, ctx.weights, ctx.buffers, strict=True)):
            if not ctx.needs_input_grad[k + 3]:
                continue
            # a second use of the weight in one step finds the buffer taken: autograd then adds the two
            is_free = buffer is not None and (weight.grad is None or not is_same_memory(weight.grad, buffer))
            target = buffer if is_free else torch.empty_like(weight, memory_format=torch.contiguous_format)
            ctx.backend.write_gradient(entries, upstream[k].contiguous(), target)
            if is_free:
                adopt(weight, target)
            else:
                gradients[k] = target
        return None, None, None, *gradients
