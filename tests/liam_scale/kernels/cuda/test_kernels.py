"""The Triton kernels against float64, by Triton's interpreter where there is no GPU."""

import zlib

import numpy as np
import pytest
import scipy.sparse
import torch

from liam_scale.kernels import backends
from liam_scale.kernels.device.noise import Dropout, signed, step_key
from liam_scale.kernels.hidden_layer import hidden_layer
from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.kernels.sparse_linear import sparse_linear
from liam_scale.model import noise
from loaders.minibatch import SparseCounts

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = [(0, 40, 5), (1, 77, 128), (7, 1, 3), (40, 130, 16)]
"""No cell, one, and more than a tile; one feature, and no multiple of a tile; inputs that are no power of two."""

GATES = {"float32": 1e-6, "tf32": 1e-3, "bf16": 1e-2}
"""Error of a gradient, of its norm; float32 beyond the error of the plain formula."""

CELL_GATES = {"float32": 1e-6, "tf32": 1e-4, "bf16": 3e-4}
"""Error of a cell's log-likelihood, of the largest; more counts have less, here are 20 a cell."""


def make_counts(cells, features, *, density=0.2, kind=torch.float32):
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random(cells, features, density=density, random_state=rng, format="csr")
    matrix.data = np.ceil(matrix.data * 5)
    matrix = matrix.tolil()
    matrix[: cells // 3] = 0  # cells without counts
    counts = SparseCounts.from_scipy(matrix.tocsr().astype(np.float32), transpose=False)
    return SparseCounts(counts.indptr, counts.indices, counts.values.to(kind), features)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_multinomial(cells, features, hidden, *, size=100.0):
    inputs = [normal(cells, hidden), normal(features, hidden) * 0.1, normal(features), normal(cells).exp()]
    inputs += [torch.full((cells,), size), normal(features, seed=1) * 0.3 / max(size, 10.0)]
    return inputs, cell_weights(cells)


def cell_weights(cells):
    weights = torch.rand(cells, generator=torch.Generator().manual_seed(0)) + 0.1
    weights[: cells // 5] = 0  # cells without the modality
    return weights


def multinomial(counts, given, *, dtype=torch.float32, impl="triton", **options):
    inputs, weights = given
    parameters = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    sizes = {"library": parameters[4], "library_weight": parameters[5]}
    loss, found = negative_multinomial(
        counts, *parameters[:4], cell_weight=weights.to(dtype), impl=impl, **sizes, **options
    )
    loss.backward()
    return [loss.detach(), found, *[p.grad for p in parameters]]


def make_binomial(cells, features, hidden, *, samples=3):
    log_theta = normal(features, samples) if samples else normal(features, seed=2)
    inputs = [normal(cells, hidden), normal(features, hidden) * 0.1, normal(features), (normal(cells) + 5).exp()]
    sample = torch.arange(cells) % max(1, samples)
    return [*inputs, log_theta], sample, cell_weights(cells)


def binomial(counts, given, *, dtype=torch.float32, impl="triton", **options):
    inputs, sample, weights = given
    parameters = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    loss, found = negative_binomial(counts, *parameters, sample, cell_weight=weights.to(dtype), impl=impl, **options)
    loss.backward()
    return [loss.detach(), found, *[p.grad for p in parameters]]


def assert_inside_gates(run, counts, given, *, precision="float32", **options):
    truth = run(counts, given, dtype=torch.float64, impl="reference", **options)
    plain = run(counts, given, impl="reference", **options)
    found = run(counts, given, precision=precision, **options)
    for place, (t, p, f) in enumerate(zip(truth, plain, found, strict=True)):
        assert torch.isfinite(f).all()
        error = (p - t).norm() if precision == "float32" else 0.0
        assert (f - t).norm() <= GATES[precision] * (t.norm() + 1e-6) + error, place
    if len(truth[1]):
        error = (plain[1] - truth[1]).abs().max() if precision == "float32" else 0.0
        assert (found[1] - truth[1]).abs().max() <= CELL_GATES[precision] * truth[1].abs().max() + error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_multinomial_in_float32_errs_no_more_than_the_plain_formula(shape, likelihood):
    counts = make_counts(*shape[:2])
    assert_inside_gates(multinomial, counts, make_multinomial(*shape), likelihood=likelihood)


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_binomial_in_float32_errs_no_more_than_the_plain_formula(shape, samples):
    assert_inside_gates(binomial, make_counts(*shape[:2]), make_binomial(*shape, samples=samples))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("size", [1.0, 100.0, 8_000.0])
def test_the_size_of_the_cell_costs_no_digits_in_any_precision(precision, size):
    assert_inside_gates(multinomial, make_counts(7, 60), make_multinomial(7, 60, 16, size=size), precision=precision)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_binomial_in_lower_precision_stays_inside_its_gate(precision):
    assert_inside_gates(binomial, make_counts(7, 60), make_binomial(7, 60, 16), precision=precision)


def test_sums_are_the_same_from_run_to_run_and_features_are_cut_among_programs(monkeypatch):
    from liam_scale.kernels.cuda import launch

    counts, given = make_counts(9, 300), make_multinomial(9, 300, 16)
    wanted = multinomial(counts, given)
    for first, again in zip(wanted, multinomial(counts, given), strict=True):
        assert torch.equal(first, again)
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    assert launch.split(9, 300, launch.Tile(64, 32, 8, 2)) == launch.Grid(1, 2, 5, 10)
    for one, other in zip(wanted, multinomial(counts, given), strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.float32])
def test_counts_are_taken_as_they_are_stored(kind):
    from liam_scale.kernels.cuda.counts import dense_counts

    wide, counts = make_counts(9, 70), make_counts(9, 70, kind=kind)
    assert dense_counts(counts).values.dtype == kind
    for a, b in zip(*(multinomial(c, make_multinomial(9, 70, 16)) for c in (wide, counts)), strict=True):
        assert torch.equal(a, b)


def test_counts_are_scattered_once_a_minibatch_and_anew_when_its_memory_is_written_anew():
    from liam_scale.kernels.cuda.counts import dense_counts

    counts = make_counts(9, 70)
    first = dense_counts(counts)
    assert torch.equal(first.values[:9, :70], counts.to_dense())
    assert dense_counts(counts) is first
    counts.values.add_(1)
    assert torch.equal(dense_counts(counts).values[:9, :70], counts.to_dense())


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("shape", "density"), [((40, 130), 0.2), ((7, 2_000), 0.005), ((0, 30), 0.1), ((1, 1), 1.0)])
def test_encoders_are_as_close_to_float64_as_the_plain_formula(shape, density, kind):
    """Dense tiles, and below the break-even a gather by cell."""
    counts = make_counts(*shape, density=density, kind=kind)
    results = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton")):
        weights = [normal(shape[1], outputs).to(dtype).requires_grad_() for outputs in (16, 7)]
        products = sparse_linear(counts, weights, log1p=[True, False], impl=impl)
        torch.autograd.backward(products, [normal(*p.shape).to(dtype) for p in products])
        results.append([*[p.detach() for p in products], *[w.grad for w in weights]])
    for t, p, f in zip(*results, strict=True):
        assert (f - t).norm() <= 1e-6 * t.norm() + (p - t).norm()


def test_layers_that_no_tile_holds_take_the_plain_path():
    counts, given = make_counts(5, 30), make_multinomial(5, 30, 200)
    for a, b in zip(*(multinomial(counts, given, impl=impl) for impl in ("triton", "plain")), strict=True):
        assert torch.equal(a, b)


def test_the_trial_before_training_finds_a_wrong_kernel(monkeypatch):
    from liam_scale.kernels.cuda import softmax, trial

    monkeypatch.setattr(trial, "HIDDEN", 16)
    trial.run(torch.device("cpu"))
    launch = softmax.launch

    def broken(kernel, grid, arguments, *rest, **constants):
        launch(kernel, grid, (arguments[0] * 1.1, *arguments[1:]), *rest, **constants)

    monkeypatch.setattr(softmax, "launch", broken)
    with pytest.raises(RuntimeError, match=r"negative_multinomial, float32: .* apart from plain torch"):
        trial.run(torch.device("cpu"))


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_failing_kernel_is_told_once_and_plain_torch_takes_over(monkeypatch, is_broken):
    from liam_scale.kernels.cuda import trial

    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "lacks_triton", lambda device: None)
    backends.triton_serves.cache_clear()

    def run(device):
        if is_broken:
            raise OSError("no kernel image\n\nfor this card")

    monkeypatch.setattr(trial, "run", run)
    if is_broken:
        with pytest.warns(RuntimeWarning, match=r"fail on cuda:0 \(OSError: no kernel image\); running plain torch"):
            backends.backend_of("sparse", "auto", device)
    for _ in range(2):
        found = backends.backend_of("sparse", "auto", device)
        assert found.__name__ == f"liam_scale.kernels.{'device' if is_broken else 'cuda'}.sparse"
    backends.triton_serves.cache_clear()


@pytest.mark.parametrize("units", [1, 20, 300])
def test_noise_is_that_of_plain_torch_bit_for_bit(units):
    from liam_scale.kernels.cuda import noise as kernels

    place = torch.tensor([0, 1, 77, 2**31, 2**32 - 1])
    for step in range(4):
        source = {"seed": 5, "step": step, "layer": "rna.dropout"}
        key, layer = step_key(seed=5, step=step), zlib.crc32(b"rna.dropout")
        found = kernels.hash_bits(place, key, layer, units)
        assert torch.equal(found, noise.hash_bits(place=place, units=units, **source))
        held = torch.tensor(signed(key, 64))
        assert torch.equal(found, kernels.hash_bits(place, held, layer, units))


def hidden_results(shape, dtype, impl, **options):
    """Hidden layer and gradients of product, bias and sample weights."""
    cells, units = shape
    parts = [normal(cells, units), normal(units), normal(3, units, seed=4)]
    linear, bias, sample_weight = (part.to(dtype).requires_grad_() for part in parts)
    given = {"bias": bias, "sample_weight": sample_weight, "sample": torch.arange(cells) * 7 % 3}
    found = hidden_layer(linear, **given, impl=impl, **options)
    found.backward(normal(cells, units, seed=9).to(dtype))
    return [found.detach(), linear.grad, bias.grad, sample_weight.grad]


@pytest.mark.parametrize("shape", [(0, 16), (1, 128), (7, 130), (40, 128), (130, 5)])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_hidden_layer_is_as_close_to_float64_as_the_plain_one_and_drops_the_same_units(shape, layer_norm):
    dropout = Dropout(torch.arange(shape[0]) + 2**31, 2**63 + 5, 2**32 - 9, 0.3)
    options = {"layer_norm": layer_norm, "dropout": dropout}
    truth = hidden_results(shape, torch.float64, "plain", **options)
    plain = hidden_results(shape, torch.float32, "plain", **options)
    found = hidden_results(shape, torch.float32, "triton", **options)
    again = hidden_results(shape, torch.float32, "triton", **options)
    for t, p, f, g in zip(truth, plain, found, again, strict=True):
        assert torch.equal(f, g)
        assert (f - t).norm() <= 1e-6 * t.norm() + (p - t).norm()
    ones = [hidden_layer(torch.ones(shape), layer_norm=False, dropout=dropout, impl=i) for i in ("plain", "triton")]
    assert torch.equal(*ones)


def test_a_hidden_layer_without_parts_and_a_wide_one_are_the_plain_ones():
    x = normal(9, 20)
    assert torch.equal(hidden_layer(x, layer_norm=False, impl="triton"), torch.relu(x))
    wide = normal(3, 1_100)
    assert torch.equal(hidden_layer(wide, impl="triton"), hidden_layer(wide, impl="plain"))
    assert hidden_layer(torch.full((2, 4), torch.nan), impl="triton").isnan().all()
