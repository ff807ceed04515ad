"""Linear output layer + negative-multinomial log-likelihood over sparse counts (ATAC)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.backends import backend_of
from liam_scale.kernels.gradients import Formed, attach, checked_buffer, make_targets
from liam_scale.kernels.options import (
    Impl,
    Likelihood,
    OutputLayer,
    Precision,
    SizedLayer,
    check_choice,
    check_output_layer,
    check_shape,
    memory_of_tiles,
    precision_in_use,
    product_precision,
)
from liam_scale.kernels.terms import Coupling
from loaders.minibatch import SparseCounts


def negative_multinomial(
    counts: SparseCounts,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    *,
    cell_weight: Tensor,
    library: Tensor | None = None,
    library_weight: Tensor | None = None,
    likelihood: Likelihood = "per-cell",
    num_global_with: int | Tensor | None = None,
    num_global: int | None = None,
    cell_scale: float | None = None,
    impl: Impl = "auto",
    precision: Precision = "float32",
    tile_bytes: int | None = None,
    grad_buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood of a minibatch, and the log-likelihood of each cell.

    Parameters
    ----------
    counts
        B cells, F features.
    hidden, weight, bias
        (B, H), (F, H), (F,): logits = hidden weight^T + bias. Differentiable.
    r
        (B,) dispersion of each cell, or () one for all ('constant'). Differentiable.
    cell_weight
        (B,) weight of each cell's log-likelihood in the loss; 0 for a cell without the modality.
    library, library_weight
        (B,), (F,): size of each cell on the count scale, and its weights; library (x) library_weight is added to the
        logits in the dtype of the weights, whatever the precision. Differentiable. None: no such input.
    likelihood
        `per-cell`: the formula of the paper. `original`: what the published code computes, whose r-terms are summed
        over all cells of the minibatch (docs/kernels.md).
    num_global_with, num_global, cell_scale
        Only for `original` on several ranks: cells with non-zero weight, and cells, of the global minibatch; and the
        weight of a cell that has the modality (a rank may hold none). None: this rank holds the whole minibatch.
    impl, precision, tile_bytes
        See `liam_scale.kernels.options` and `liam_scale.kernels.options`.
    grad_buffers
        Persistent tensors `weight` (F, H), `bias` (F,) and `library_weight` (F,) that the gradients are written into
        and adopted as `.grad`; None: ordinary autograd.

    Returns
    -------
    loss
        Scalar - sum_i cell_weight_i ll_i. For `original` on several ranks the losses of the ranks add up to the
        loss of the global minibatch.
    log_likelihood
        (B,) ll_i, detached; 0 for a cell of weight 0. For `original` its coupled sums run over the cells of this rank.

    Raises
    ------
    ValueError
        A shape, dtype or option does not fit.
    RuntimeError
        A gradient buffer still holds the gradient of an earlier step.
    """
    check_choice("impl", impl, Impl)
    check_choice("likelihood", likelihood, Likelihood)
    check_output_layer(counts, hidden, weight, bias, cell_weight)
    if r.dim() > 0:
        check_shape("r", r, (counts.num_cells,))
    coupling = None
    if likelihood == "original":
        share = 1.0 if num_global is None else counts.num_cells / num_global
        coupling = Coupling(_coupling_weight(cell_weight, num_global_with, cell_scale), share)
    layer = _layer(OutputLayer(counts, hidden, weight, bias, cell_weight), library, library_weight)
    inputs = (hidden, weight, bias, r, layer.library, layer.library_weight)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    used = precision_in_use(precision, with_gradients, impl=impl, weight=weight)
    if impl == "reference":
        return _reference(layer, r, coupling)
    named = {"weight": weight, "bias": bias, "library_weight": layer.library_weight}
    buffers = [checked_buffer(grad_buffers, name, parameter) for name, parameter in named.items()]
    tile_bytes = memory_of_tiles(weight.device) if tile_bytes is None else tile_bytes
    backend = backend_of("negative_multinomial", impl, weight.device)
    with torch.no_grad(), product_precision(used, weight.device):
        targets = make_targets(buffers, tuple(named.values())) if with_gradients else None
        terms, gradients = backend.evaluate(layer.detached(), r.detach(), coupling, used, tile_bytes, targets)
        loss, log_likelihood = terms.loss.to(weight.dtype), terms.log_likelihood.to(weight.dtype)
    if targets is None:
        return loss, log_likelihood
    weight_formed, bias_formed, library_formed = targets.formed()
    of_cells = [Formed(gradient) for gradient in (gradients.hidden, terms.r_gradient.to(r.dtype), gradients.library)]
    formed = [of_cells[0], weight_formed, bias_formed, of_cells[1], of_cells[2], library_formed]
    return attach(loss, inputs, formed), log_likelihood


def _layer(layer: OutputLayer, library: Tensor | None, library_weight: Tensor | None) -> SizedLayer:
    """The layer with its sizes, zeros where there are none: to add those costs 1 ms in 97, and saves a second way."""
    if (library is None) != (library_weight is None):
        raise ValueError("library, library_weight: got one without the other; give both or none")
    library = layer.hidden.new_zeros(len(layer.hidden)) if library is None else library
    library_weight = torch.zeros_like(layer.bias) if library_weight is None else library_weight
    check_shape("library", library, (layer.counts.num_cells,))
    check_shape("library_weight", library_weight, (layer.counts.num_features,))
    return SizedLayer(**vars(layer), library=library, library_weight=library_weight)


def _coupling_weight(
    cell_weight: Tensor, num_global_with: int | Tensor | None, cell_scale: float | None
) -> Tensor | float:
    """Sum of the weights of all cells of the global minibatch: the weight of the original's coupled terms."""
    if num_global_with is None:
        return cell_weight.sum()
    if isinstance(num_global_with, Tensor):
        num_global_with = num_global_with.double()
    if cell_scale is not None:
        return num_global_with * cell_scale
    return num_global_with * cell_weight.amax() if len(cell_weight) else cell_weight.sum()


def _reference(layer: SizedLayer, r: Tensor, coupling: Coupling | None) -> tuple[Tensor, Tensor]:
    dense = layer.counts.to_dense().to(layer.weight.dtype)
    logits = reference.linear_logits(layer.hidden, layer.weight, layer.bias)
    logits = reference.add_library(logits, layer.library, layer.library_weight)
    if coupling is None:
        log_likelihood = reference.negative_multinomial(dense, logits, r)
        loss = -(layer.cell_weight * log_likelihood).sum()
    else:
        own, zero, gamma = reference.original_terms(dense, logits, r)
        share = 1.0 if r.dim() > 0 else coupling.share
        loss = -(layer.cell_weight * own).sum() - coupling.weight * (zero.sum() - share * gamma.sum())
        log_likelihood = own + zero.sum() - gamma.sum()
    return loss, torch.where(layer.cell_weight != 0, log_likelihood.detach(), 0)
