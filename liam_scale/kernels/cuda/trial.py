"""One small step of every kernel against plain torch, before training relies on them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from liam_scale.kernels.cuda import hidden_layer, negative_binomial, negative_multinomial, noise, sparse
from liam_scale.kernels.device import hidden_layer as plain_hidden
from liam_scale.kernels.device import negative_binomial as plain_binomial
from liam_scale.kernels.device import negative_multinomial as plain_multinomial
from liam_scale.kernels.device import noise as plain_noise
from liam_scale.kernels.device import sparse as plain_sparse
from liam_scale.kernels.gradients import make_targets
from liam_scale.kernels.options import TILE_BYTES, OutputLayer, Precision, SizedLayer
from loaders.minibatch import SparseCounts

CELLS, FEATURES, HIDDEN = 5, 70, 128
TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "tf32": 0.02, "bf16": 0.2}
"""Of the largest value of each result: far above rounding, far below a wrong kernel."""


@torch.no_grad()
def run(device: torch.device) -> None:
    """
    Raises
    ------
    RuntimeError
        A kernel gives other numbers than plain torch; and whatever Triton raises.
    """
    counts = _counts(device, every=3)
    _compare("sparse", _encode(sparse, counts), _encode(plain_sparse, counts))
    few = _counts(device, every=FEATURES)
    _compare("sparse", _encode(sparse, few), _encode(plain_sparse, few))
    _compare("noise", _noise(noise, device), _noise(plain_noise, device), 0.0)
    _compare("hidden_layer", _hidden(hidden_layer, device), _hidden(plain_hidden, device))
    multinomial, binomial = _multinomial(plain_multinomial, counts), _binomial(plain_binomial, counts)
    for precision, tolerance in TOLERANCE.items():
        found = _multinomial(negative_multinomial, counts, precision)
        _compare(f"negative_multinomial, {precision}", found, multinomial, tolerance)
        _compare(
            f"negative_binomial, {precision}", _binomial(negative_binomial, counts, precision), binomial, tolerance
        )


def _counts(device: torch.device, *, every: int) -> SparseCounts:
    features = torch.arange(0, FEATURES, every, dtype=torch.int32)
    indptr = torch.arange(CELLS + 1, dtype=torch.int32) * len(features)
    indices = features.repeat(CELLS)
    return SparseCounts(indptr, indices, (indices % 5 + 1).float(), FEATURES).map_tensors(lambda t: t.to(device))


def _wave(device: torch.device, *shape: int) -> Tensor:
    """Numbers between -0.5 and 0.5."""
    total = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return torch.sin(total * 0.7).mul_(0.5).reshape(shape)


def _layer(counts: SparseCounts) -> SizedLayer:
    device = counts.values.device
    weights = (_wave(device, FEATURES, HIDDEN), _wave(device, FEATURES))
    sizes = (_wave(device, CELLS).exp().mul_(50), _wave(device, FEATURES).mul_(0.01))
    return SizedLayer(counts, _wave(device, CELLS, HIDDEN), *weights, torch.ones(CELLS, device=device), *sizes)


def _encode(room: ModuleType, counts: SparseCounts) -> list[Tensor]:
    device, found = counts.values.device, []
    for is_log in (False, True):
        entries = room.entries(counts, torch.float32, log1p=is_log)
        gradient = torch.empty(FEATURES, HIDDEN, device=device)
        room.write_gradient(entries, _wave(device, CELLS, HIDDEN), gradient)
        found += [room.product(entries, _wave(device, FEATURES, HIDDEN)), gradient]
    return found


def _noise(room: ModuleType, device: torch.device) -> list[Tensor]:
    """In two halves, as float32 holds no 32 bits."""
    bits = room.hash_bits(torch.arange(CELLS, device=device), 2**63 + 5, 2**32 - 9, HIDDEN)
    return [(bits >> 16).float(), (bits & 0xFFFF).float()]


@torch.enable_grad()
def _hidden(room: ModuleType, device: torch.device) -> list[Tensor]:
    places = torch.arange(CELLS, device=device)
    parts = [_wave(device, *shape).requires_grad_() for shape in ((CELLS, HIDDEN), (HIDDEN,), (2, HIDDEN))]
    dropout = plain_noise.Dropout(places, 2**63 + 5, 2**32 - 9, 0.1)
    hidden = room.evaluate(*parts, places % 2, layer_norm=True, dropout=dropout)
    return [hidden.detach(), *torch.autograd.grad(hidden, parts, _wave(device, CELLS, HIDDEN))]


def _multinomial(room: ModuleType, counts: SparseCounts, precision: Precision = "float32") -> list[Tensor]:
    layer = _layer(counts)
    targets = make_targets([None] * 3, (layer.weight, layer.bias, layer.library_weight))
    r = torch.ones(CELLS, device=counts.values.device)
    terms, gradients = room.evaluate(layer, r, None, precision, TILE_BYTES, targets)
    return [terms.log_likelihood, terms.r_gradient, gradients.hidden, gradients.library, *targets.tensors]


def _binomial(room: ModuleType, counts: SparseCounts, precision: Precision = "float32") -> list[Tensor]:
    layer, device = _layer(counts), counts.values.device
    found = []
    for log_theta in (_wave(device, FEATURES), _wave(device, FEATURES, 2)):
        targets = make_targets([None] * 3, (layer.weight, layer.bias, log_theta))
        own = OutputLayer(counts, layer.hidden, layer.weight, layer.bias, layer.cell_weight)
        sample = torch.arange(CELLS, device=device) % 2
        found += [*room.evaluate(own, layer.library, log_theta, sample, precision, TILE_BYTES, targets)]
        found += targets.tensors
    return found


def _compare(what: str, found: list[Tensor], wanted: list[Tensor], tolerance: float = TOLERANCE["float32"]) -> None:
    apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    worst = float(torch.stack(apart).max())
    if not worst <= tolerance:
        raise RuntimeError(f"{what}: {worst:.1e} of the largest value apart from plain torch")
