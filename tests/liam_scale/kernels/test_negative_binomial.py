import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.options import has_bf16
from loaders.minibatch import SparseCounts

SHARED = Path(os.environ.get("LIAM_SHARED", Path(__file__).resolve().parents[4] / "shared"))
GOLDEN = SHARED / "reference" / "golden" / "nb_likelihood.npz"
NAMES = ("loss", "log_likelihood", "hidden", "weight", "bias", "library", "log_theta")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_counts(cells, features, *, density=0.1, seed=0, top=5, fractions=False, transpose=True):
    rng = np.random.default_rng(seed)
    matrix = scipy.sparse.random(cells, features, density=density, random_state=rng, format="csr")
    matrix.data = matrix.data * top if fractions else np.ceil(matrix.data * top)
    matrix = matrix.tolil()
    matrix[cells // 2] = 0  # a cell without counts
    return SparseCounts.from_scipy(matrix.tocsr().astype(np.float32), transpose=transpose)


def make_inputs(cells, features, hidden, *, samples=3, spread=0.3, log_theta=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if log_theta is None:
        log_theta = normal(features, samples) if samples else normal(features)
    library = torch.exp(normal(cells) + 5)
    sample = torch.randint(max(1, samples), (cells,), generator=generator)
    weights = torch.rand(cells, generator=generator) + 0.1
    weights[: cells // 5] = 0  # cells without the modality
    return (
        [normal(cells, hidden), normal(features, hidden) * spread, normal(features), library, log_theta],
        sample,
        weights,
    )


def run(counts, inputs, sample, cell_weight, *, dtype, factor=1.0, **options):
    parameters = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    weights = cell_weight.to(dtype)
    loss, log_likelihood = negative_binomial(counts, *parameters, sample, cell_weight=weights, **options)
    (loss * factor).backward()
    return [loss.detach(), log_likelihood, *[p.grad for p in parameters]]


def assert_within_envelope(counts, inputs, sample, cell_weight, *, slack=1e-6, impl="auto", **options):
    """Fused float32 errs no more than the plain formula in float32 plus slack; fused float64 agrees to 1e-10."""
    args = (counts, inputs, sample, cell_weight)
    plain_options = {k: v for k, v in options.items() if k != "tile_bytes"}
    truth = run(*args, dtype=torch.float64, impl="reference", **plain_options)
    plain = run(*args, dtype=torch.float32, impl="reference", **plain_options)
    fused = run(*args, dtype=torch.float32, impl=impl, **options)
    exact = run(*args, dtype=torch.float64, impl=impl, **options)
    for name, t, p, f, e in zip(NAMES, truth, plain, fused, exact, strict=True):
        if not t.numel():
            continue
        scale = t.abs().max().item()
        error = (p - t).abs().max().item()
        assert torch.isfinite(f).all(), name
        allowed = slack * (scale + 1) + (error if np.isfinite(error) else 0.0)
        assert (f - t).abs().max().item() <= allowed, name
        torch.testing.assert_close(e, t, rtol=0, atol=1e-10 * (scale + 1), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize(
    ("cells", "features", "hidden"), [(13, 301, 9), (128, 2500, 33), (5, 1, 3), (1, 77, 129), (3, 2049, 1)]
)
def test_shapes(fast_impl, samples, cells, features, hidden):
    assert_within_envelope(
        make_counts(cells, features), *make_inputs(cells, features, hidden, samples=samples), impl=fast_impl
    )


@pytest.mark.parametrize("tile_bytes", [0, 120_000, 400_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_memory_and_number_of_threads(tile_bytes, threads):
    torch.set_num_threads(threads)
    assert_within_envelope(make_counts(17, 2500), *make_inputs(17, 2500, 9), tile_bytes=tile_bytes)


def test_groups_of_cells_in_plain_torch():
    assert_within_envelope(make_counts(17, 300), *make_inputs(17, 300, 9), tile_bytes=10 * 300 * 4 * 6, impl="plain")


def test_values_that_are_not_integers(impl):
    """Proteins come as centred log ratios."""
    assert_within_envelope(make_counts(20, 30, density=0.9, fractions=True), *make_inputs(20, 30, 8), impl=impl)


@pytest.mark.parametrize("peak", [100.0, 178.0, 788.0])
def test_extreme_logits(impl, peak):
    inputs, sample, weights = make_inputs(8, 300, 5)
    inputs[2][::7], inputs[2][3::7] = peak, -peak
    assert_within_envelope(make_counts(8, 300), inputs, sample, weights, impl=impl)


@pytest.mark.parametrize("top", [1, 2**20])
def test_extreme_dispersions_and_counts(impl, top):
    log_theta = torch.linspace(-12, 11.5, 200)[:, None].expand(200, 3).contiguous()
    assert_within_envelope(make_counts(16, 200, top=top), *make_inputs(16, 200, 5, log_theta=log_theta), impl=impl)


def test_a_large_theta_in_float32_is_better_than_the_plain_formula():
    """theta (log theta - log(theta + mu)) loses every digit where mu is far below theta."""
    log_theta = torch.full((400,), 11.0)
    counts = make_counts(16, 400)
    inputs, sample, weights = make_inputs(16, 400, 5, log_theta=log_theta)
    truth, plain, fused = (
        run(counts, inputs, sample, weights, dtype=dtype, impl=impl)[1]
        for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("auto", torch.float32))
    )
    assert (fused - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (plain - truth).abs().max() > 10 * (fused - truth).abs().max()


def test_no_cell_has_the_modality(impl):
    inputs, sample, _ = make_inputs(4, 60, 5)
    results = run(make_counts(4, 60, density=0.0), inputs, sample, torch.zeros(4), dtype=torch.float32, impl=impl)
    assert all((result == 0).all() for result in results)


def test_no_cells(impl):
    counts = SparseCounts.from_scipy(scipy.sparse.csr_matrix((0, 60), dtype=np.float32))
    inputs, sample, _ = make_inputs(1, 60, 5)
    inputs[0], inputs[3] = inputs[0][:0], inputs[3][:0]
    results = run(counts, inputs, sample[:0], torch.zeros(0), dtype=torch.float32, impl=impl)
    assert all((result == 0).all() for result in results)


def test_counts_without_their_transpose(impl):
    assert_within_envelope(make_counts(13, 301, transpose=False), *make_inputs(13, 301, 9), impl=impl)


def test_gradients_follow_the_upstream_factor(impl):
    counts, arguments = make_counts(6, 50), make_inputs(6, 50, 4)
    once = run(counts, *arguments, dtype=torch.float64, impl=impl)
    twice = run(counts, *arguments, dtype=torch.float64, factor=-2.0, impl=impl)
    for a, b in zip(once[2:], twice[2:], strict=True):
        torch.testing.assert_close(-2 * a, b)


@pytest.mark.parametrize("samples", [0, 2])
def test_gradcheck(impl, samples):
    counts = make_counts(4, 9, density=0.4)
    inputs, sample, cell_weight = make_inputs(4, 9, 3, samples=samples)
    parameters = [x.double().requires_grad_() for x in inputs]

    def loss(*parameters):
        return negative_binomial(counts, *parameters, sample, cell_weight=cell_weight.double(), impl=impl)[0]

    assert torch.autograd.gradcheck(loss, parameters)


def test_a_broken_weight_makes_the_loss_nan(impl):
    counts = make_counts(6, 50)
    inputs, sample, cell_weight = make_inputs(6, 50, 4)
    for value in (torch.nan, torch.inf):
        inputs[1][17, 2] = value
        loss, _ = negative_binomial(counts, *inputs, sample, cell_weight=cell_weight, impl=impl)
        assert not torch.isfinite(loss)


def test_bf16_errs_little(fast_impl):
    if fast_impl == "auto" and not has_bf16():
        pytest.skip("this processor has no bfloat16 products")
    counts, arguments = make_counts(64, 3000), make_inputs(64, 3000, 33)
    single = run(counts, *arguments, dtype=torch.float32, impl=fast_impl)
    half = run(counts, *arguments, dtype=torch.float32, precision="bf16", impl=fast_impl)
    for name, a, b in zip(NAMES, single, half, strict=True):
        assert (a - b).norm() <= {"loss": 1e-4, "log_likelihood": 1e-3}.get(name, 2**-7) * a.norm(), name
        assert not torch.equal(a, b), name


def test_buffers_become_the_gradients():
    counts = make_counts(6, 50)
    inputs, sample, cell_weight = make_inputs(6, 50, 4)
    wanted = run(counts, inputs, sample, cell_weight, dtype=torch.float32, factor=3.0)
    parameters = [x.clone().requires_grad_() for x in inputs]
    owners = {"weight": 1, "bias": 2, "log_theta": 4}
    buffers = {name: torch.full_like(inputs[k], torch.nan) for name, k in owners.items()}
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        loss, _ = negative_binomial(counts, *parameters, sample, cell_weight=cell_weight, grad_buffers=buffers)
        (3 * loss).backward()
        for name, k in owners.items():
            assert parameters[k].grad.data_ptr() == buffers[name].data_ptr()
        for parameter, gradient in zip(parameters, wanted[2:], strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_without_gradients_nothing_is_formed():
    counts = make_counts(6, 50)
    inputs, sample, cell_weight = make_inputs(6, 50, 4)
    wanted = run(counts, inputs, sample, cell_weight, dtype=torch.float32)
    loss, log_likelihood = negative_binomial(counts, *inputs, sample, cell_weight=cell_weight)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted[0])
    torch.testing.assert_close(log_likelihood, wanted[1])


def test_wrong_arguments_are_refused():
    counts = make_counts(6, 50)
    (hidden, weight, bias, library, log_theta), sample, cell_weight = make_inputs(6, 50, 4)
    with pytest.raises(ValueError, match="library"):
        negative_binomial(counts, hidden, weight, bias, library[:1], log_theta, sample, cell_weight=cell_weight)
    with pytest.raises(ValueError, match=r"log_theta.*50 features"):
        negative_binomial(counts, hidden, weight, bias, library, log_theta.T, sample, cell_weight=cell_weight)
    with pytest.raises(ValueError, match="sample"):
        negative_binomial(counts, hidden, weight, bias, library, log_theta, sample[:2], cell_weight=cell_weight)


@pytest.mark.parametrize("impl", ["reference", "auto", "plain"])
def test_golden_values_of_the_original(impl):
    """One feature has softmax 1, so that library is the mean; one sample a cell gives each its own theta."""
    if not GOLDEN.exists():
        pytest.skip(f"golden values not found at {GOLDEN}")
    golden = np.load(GOLDEN)
    rows = (golden["theta"] > 2e-4) & (golden["mu"] > 0)
    x, mu, theta = (torch.from_numpy(golden[k][rows].astype(np.float64)) for k in ("x", "mu", "theta"))
    cells = len(x)
    counts = SparseCounts.from_scipy(scipy.sparse.csr_matrix(x[:, None].numpy().astype(np.float32)))
    zeros = torch.zeros(cells, 1), torch.zeros(1, 1), torch.zeros(1)
    inputs = [*zeros, mu, torch.log(theta - 1e-4)[None]]
    found = run(counts, inputs, torch.arange(cells), torch.ones(cells), dtype=torch.float64, impl=impl)
    wanted, exact = golden["orig_f64"][rows], golden["exact_eps"][rows]
    # for theta = 1e8 float64 itself leaves 2e-7 to the difference of two lgamma
    for truth, small in ((wanted, theta.numpy() < 1e6), (exact, theta.numpy() < 1e6)):
        error = np.abs(found[1].numpy() - truth) / np.maximum(1, np.abs(truth))
        assert error[small].max() < 1e-9
        assert error.max() < 1e-6
    np.testing.assert_allclose(-found[5], golden["grad_mu_f64"][rows], rtol=1e-7, atol=1e-9)
    # below the epsilon the original adds eps to theta in its logarithm and not in its derivative's other terms
    slope = golden["grad_theta_f64"][rows] * (theta.numpy() - 1e-4)
    np.testing.assert_allclose(-found[6][0], slope, rtol=1e-6, atol=1e-6 * np.maximum(1, np.abs(slope)).max())


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    counts = make_counts(20, 300)
    inputs, sample, cell_weight = make_inputs(20, 300, 16)
    mine = run(counts, inputs, sample, cell_weight, dtype=torch.float64)
    moved = counts.map_tensors(lambda tensor: tensor.cuda())
    theirs = run(moved, [x.cuda() for x in inputs], sample.cuda(), cell_weight.cuda(), dtype=torch.float64)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.cpu())
