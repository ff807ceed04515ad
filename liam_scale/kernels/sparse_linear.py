"""First layer of an encoder on sparse counts.

Shapes: B cells, F features, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liam_scale.kernels import reference, workers
from liam_scale.kernels.device import gather_product, transposed_product, with_values
from liam_scale.kernels.gradients import adopt, checked_buffer, is_same_memory
from liam_scale.kernels.options import Impl, check_choice
from liam_scale.kernels.sparse_walk import ByFeature, add_product, by_feature, cut_features, write_gradient
from loaders.minibatch import SparseCounts

MIN_COLUMNS = 32
"""Fewest outputs that a thread takes of a product: two AVX-512 registers of float32."""


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
    if counts.values.device.type == "cpu":
        return _CpuProduct.apply(
            [_entries(counts, w.dtype, log) for w, log in zip(weights, log1p, strict=True)], buffers, *weights
        )
    return _DeviceProduct.apply(
        [with_values(counts, w.dtype, log1p=log) for w, log in zip(weights, log1p, strict=True)], buffers, *weights
    )


def _entries(counts: SparseCounts, dtype: torch.dtype, log1p: bool) -> ByFeature:
    entries = by_feature(counts, dtype)
    return replace(entries, values=np.log1p(entries.values)) if log1p else entries


class _CpuProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: list[ByFeature], buffers: list[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.inputs, ctx.buffers, ctx.weights = inputs, buffers, weights
        return tuple(_product(entries, w.detach().contiguous()) for entries, w in zip(inputs, weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, *_gradients(ctx, upstream, _weight_gradient)


class _DeviceProduct(torch.autograd.Function):
    """The same sums by `embedding_bag`, which every device has and which uses no atomics in its forward direction."""

    @staticmethod
    def forward(
        ctx: Any, inputs: list[SparseCounts], buffers: list[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.inputs, ctx.buffers, ctx.weights = inputs, buffers, weights
        return tuple(gather_product(counts, w.detach()) for counts, w in zip(inputs, weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, *_gradients(ctx, upstream, _device_gradient)


def _gradients(
    ctx: Any, upstream: Sequence[Tensor], write: Callable[[Any, Tensor, Tensor], None]
) -> list[Tensor | None]:
    """Form the gradients of all weights; those with a buffer are adopted, the others handed to autograd."""
    gradients: list[Tensor | None] = []
    for k, (entries, weight, buffer) in enumerate(zip(ctx.inputs, ctx.weights, ctx.buffers, strict=True)):
        gradients.append(None)
        if not ctx.needs_input_grad[k + 2]:
            continue
        # a second use of the weight in one step finds the buffer taken: autograd then adds the two
        is_free = buffer is not None and (weight.grad is None or not is_same_memory(weight.grad, buffer))
        target = buffer if is_free else torch.empty_like(weight, memory_format=torch.contiguous_format)
        write(entries, upstream[k].contiguous(), target)
        if is_free:
            adopt(weight, target)
        else:
            gradients[k] = target
    return gradients


def _product(entries: ByFeature, weight: Tensor) -> Tensor:
    """Threads share the outputs and not the features, so that no sum depends on how many threads there are."""
    outputs = weight.shape[1]
    result = torch.zeros(entries.num_cells, outputs, dtype=weight.dtype)
    parts = max(1, min(workers.num_workers(), outputs // MIN_COLUMNS))
    edges = [outputs * part // parts for part in range(parts + 1)]
    arrays = (entries.indptr, entries.cells, entries.values, weight.numpy(), result.numpy())
    workers.run([functools.partial(add_product, *arrays, a, b) for a, b in pairwise(edges)])
    return result


def _weight_gradient(entries: ByFeature, upstream: Tensor, gradient: Tensor) -> None:
    """Threads share the features: each row of the gradient is the work of one thread."""
    arrays = (entries.indptr, entries.cells, entries.values, upstream.numpy(), gradient.numpy())
    ranges = cut_features(entries.indptr, workers.num_workers())
    workers.run([functools.partial(write_gradient, *arrays, a, b) for a, b in ranges])


def _device_gradient(counts: SparseCounts, upstream: Tensor, gradient: Tensor) -> None:
    gradient.copy_(transposed_product(counts, upstream))
