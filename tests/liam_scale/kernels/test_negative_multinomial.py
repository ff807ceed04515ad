import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liam_scale.kernels import reference
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.kernels.options import has_bf16
from loaders.minibatch import SparseCounts

SHARED = Path(os.environ.get("LIAM_SHARED", Path(__file__).resolve().parents[4] / "shared"))
GOLDEN = SHARED / "reference" / "golden" / "nm_likelihood.npz"
NAMES = ("loss", "log_likelihood", "hidden", "weight", "bias", "r", "library", "library_weight")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_counts(cells, features, *, density=0.1, seed=0, top=5, transpose=True):
    rng = np.random.default_rng(seed)
    matrix = scipy.sparse.random(cells, features, density=density, random_state=rng, format="csr")
    matrix.data = np.ceil(matrix.data * top)
    matrix = matrix.tolil()
    matrix[cells // 2] = 0  # a cell without counts
    return SparseCounts.from_scipy(matrix.tocsr().astype(np.float32), transpose=transpose)


def make_inputs(cells, features, hidden, *, spread=0.3, r=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    r = torch.rand(cells, generator=generator) * 5 + 0.1 if r is None else r
    weights = torch.rand(cells, generator=generator) + 0.1
    weights[: cells // 5] = 0  # cells without the modality
    library, library_weight = torch.exp(normal(cells) + 3), normal(features) * spread / 20
    return [
        normal(cells, hidden),
        normal(features, hidden) * spread,
        normal(features),
        r,
        library,
        library_weight,
    ], weights


def evaluate(counts, hidden, weight, bias, r, library=None, library_weight=None, **options):
    sizes = {"library": library, "library_weight": library_weight}
    return negative_multinomial(counts, hidden, weight, bias, r, **sizes, **options)


def run(counts, inputs, cell_weight, *, dtype, factor=1.0, **options):
    parameters = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    loss, log_likelihood = evaluate(counts, *parameters, cell_weight=cell_weight.to(dtype), **options)
    (loss * factor).backward()
    return [loss.detach(), log_likelihood, *[p.grad for p in parameters]]


def assert_within_envelope(counts, inputs, cell_weight, *, slack=1e-6, impl="auto", **options):
    """Fused float32 errs no more than the plain formula in float32 plus slack; fused float64 agrees to 1e-11."""
    truth = run(counts, inputs, cell_weight, dtype=torch.float64, impl="reference", **_plain(options))
    plain = run(counts, inputs, cell_weight, dtype=torch.float32, impl="reference", **_plain(options))
    fused = run(counts, inputs, cell_weight, dtype=torch.float32, impl=impl, **options)
    exact = run(counts, inputs, cell_weight, dtype=torch.float64, impl=impl, **options)
    for name, t, p, f, e in zip(NAMES[: len(truth)], truth, plain, fused, exact, strict=True):
        if not t.numel():
            continue
        scale = t.abs().max().item()
        error = (p - t).abs().max().item()
        assert torch.isfinite(f).all(), name
        allowed = slack * scale + 1e-7 + (error if np.isfinite(error) else 0.0)
        assert (f - t).abs().max().item() <= allowed, name
        torch.testing.assert_close(e, t, rtol=0, atol=1e-11 * (scale + 1), msg=lambda m, n=name: f"{n}: {m}")


def _plain(options):
    return {k: v for k, v in options.items() if k not in ("tile_bytes", "precision")}


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
@pytest.mark.parametrize(
    ("cells", "features", "hidden"),
    [(13, 301, 9), (128, 4099, 33), (5, 1, 3), (1, 77, 129), (3, 2049, 1), (2, 4096, 16)],
)
def test_shapes(fast_impl, likelihood, cells, features, hidden):
    counts = make_counts(cells, features)
    assert_within_envelope(counts, *make_inputs(cells, features, hidden), likelihood=likelihood, impl=fast_impl)


@pytest.mark.parametrize("tile_bytes", [0, 40_000, 300_000])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_any_memory_and_number_of_threads(tile_bytes, threads, likelihood):
    torch.set_num_threads(threads)
    counts = make_counts(16, 7001, density=0.02)
    assert_within_envelope(counts, *make_inputs(16, 7001, 9), tile_bytes=tile_bytes, likelihood=likelihood)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
@pytest.mark.parametrize("peak", [100.0, 178.0, 788.0])
def test_extreme_logits(impl, peak, likelihood):
    """The published code turns NaN once a logit exceeds 177."""
    counts = make_counts(8, 300)
    inputs, cell_weight = make_inputs(8, 300, 5)
    inputs[2][::7], inputs[2][3::7] = peak, -peak
    assert_within_envelope(counts, inputs, cell_weight, likelihood=likelihood, impl=impl)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
@pytest.mark.parametrize("top", [1, 2**20])
def test_extreme_dispersions_and_counts(impl, top, likelihood):
    r = torch.logspace(-10, 5, 16)
    counts = make_counts(16, 200, top=top)
    assert_within_envelope(counts, *make_inputs(16, 200, 5, r=r), likelihood=likelihood, impl=impl)


def test_one_dispersion_for_all_cells(impl):
    counts = make_counts(12, 90)
    for likelihood in ("per-cell", "original"):
        assert_within_envelope(counts, *make_inputs(12, 90, 5, r=torch.tensor(2.5)), likelihood=likelihood, impl=impl)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_no_cell_has_the_modality(impl, likelihood):
    counts = make_counts(4, 60, density=0.0)
    inputs, _ = make_inputs(4, 60, 5)
    results = run(counts, inputs, torch.zeros(4), dtype=torch.float32, likelihood=likelihood, impl=impl)
    assert all((result == 0).all() for result in results)


def test_no_cells(impl):
    counts = SparseCounts.from_scipy(scipy.sparse.csr_matrix((0, 60), dtype=np.float32))
    inputs, _ = make_inputs(1, 60, 5)
    inputs = [x[:0] if len(x) == 1 else x for x in inputs]
    found = run(counts, inputs, torch.zeros(0), dtype=torch.float32, impl=impl)
    loss, log_likelihood, hidden, weight, bias, r, library, library_weight = found
    assert loss == 0
    assert [len(x) for x in (log_likelihood, hidden, r, library)] == [0, 0, 0, 0]
    assert all((x == 0).all() for x in (weight, bias, library_weight))


def test_counts_without_their_transpose(impl):
    counts = make_counts(13, 301, transpose=False)
    assert_within_envelope(counts, *make_inputs(13, 301, 9), impl=impl)


def test_gradients_follow_the_upstream_factor(impl):
    counts = make_counts(6, 50)
    inputs, cell_weight = make_inputs(6, 50, 4)
    once = run(counts, inputs, cell_weight, dtype=torch.float64, impl=impl)
    twice = run(counts, inputs, cell_weight, dtype=torch.float64, factor=-2.0, impl=impl)
    for a, b in zip(once[2:], twice[2:], strict=True):
        torch.testing.assert_close(-2 * a, b)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_gradcheck(impl, likelihood):
    counts = make_counts(4, 9, density=0.4)
    inputs, cell_weight = make_inputs(4, 9, 3)
    parameters = [x.double().requires_grad_() for x in inputs]

    def loss(*parameters):
        options = {"cell_weight": cell_weight.double(), "likelihood": likelihood}
        return evaluate(counts, *parameters, **options, impl=impl)[0]

    assert torch.autograd.gradcheck(loss, parameters)


def test_a_broken_weight_makes_the_loss_nan(impl):
    counts = make_counts(6, 50)
    inputs, cell_weight = make_inputs(6, 50, 4)
    for value in (torch.nan, torch.inf):
        inputs[1][17, 2] = value
        loss, _ = evaluate(counts, *inputs, cell_weight=cell_weight, impl=impl)
        assert not torch.isfinite(loss)


@pytest.mark.parametrize("constant", [False, True])
def test_the_original_on_ranks_adds_up_to_the_whole_minibatch(impl, constant):
    counts = make_counts(10, 40, density=0.3)
    r = torch.tensor(1.7) if constant else torch.rand(10) + 0.5
    inputs, _ = make_inputs(10, 40, 4, r=r)
    scale, present = 0.125, torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])  # the first rank has no cell with ATAC
    whole = run(counts, inputs, scale * present, dtype=torch.float64, likelihood="original", impl=impl)
    sums = [torch.zeros(()).double(), *[torch.zeros_like(x).double() for x in inputs]]
    for cells in (slice(0, 3), slice(3, 10)):
        part = SparseCounts.from_scipy(counts.to_scipy()[cells])
        share = [inputs[0][cells], inputs[1], inputs[2], r if constant else r[cells], inputs[4][cells], inputs[5]]
        found = run(
            part, share, scale * present[cells], dtype=torch.float64, likelihood="original",
            num_global_with=int(present.sum()), num_global=10, cell_scale=scale, impl=impl,
        )  # fmt: skip
        sums[0] += found[0]
        for total, gradient, is_cells in zip(
            sums[1:], found[2:], (True, False, False, not constant, True, False), strict=True
        ):
            total[cells if is_cells else ...] += gradient
    torch.testing.assert_close(sums[0], whole[0])
    for total, gradient in zip(sums[1:], whole[2:], strict=True):
        torch.testing.assert_close(total, gradient)


def deep_cells(cells=64, features=5000, hidden=32):
    """Cells of thousands of counts, which drive the logits to +-300."""
    inputs, cell_weight = make_inputs(cells, features, hidden)
    inputs[4] = torch.linspace(1000, 9000, cells)
    inputs[5] *= 0.6
    return make_counts(cells, features), inputs, cell_weight


class TensorCores(TorchDispatchMode):
    """Matrix products of float32 as a GPU makes them with tf32: operands rounded to 10 bits of mantissa."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            args = [self.rounded(x) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_the_size_of_a_cell_survives_products_in_tf32(likelihood):
    """As a 129th input of the product it shifts cells by thousands of nats and gradients by a tenth of their norm."""
    counts, inputs, cell_weight = deep_cells()
    truth = run(counts, inputs, cell_weight, dtype=torch.float64, likelihood=likelihood, impl="reference")
    with TensorCores():
        found = run(counts, inputs, cell_weight, dtype=torch.float32, likelihood=likelihood, impl="plain")
    assert (found[1] - truth[1]).abs().max() < 3e-4 * truth[1].abs().max()
    for name, a, b in zip(NAMES[2:], found[2:], truth[2:], strict=True):
        assert (a - b).norm() < 2e-3 * b.norm(), name


class TestBfloat16:
    @pytest.fixture(autouse=True, params=["auto", "plain"])
    def impl(self, request):
        if request.param == "auto" and not has_bf16():
            pytest.skip("this processor has no bfloat16 products")
        return request.param

    @pytest.mark.parametrize("tile_bytes", [0, 2**26])
    def test_errs_little(self, impl, tile_bytes):
        counts, inputs, cell_weight = deep_cells()
        options = {"dtype": torch.float32, "tile_bytes": tile_bytes or (1 if impl == "auto" else 2**20), "impl": impl}
        single = run(counts, inputs, cell_weight, **options)
        half = run(counts, inputs, cell_weight, precision="bf16", **options)
        for name, a, b in zip(NAMES, single, half, strict=True):
            assert (a - b).norm() <= (1e-4 if name in ("loss", "log_likelihood", "r") else 2**-8) * a.norm(), name
            assert not torch.equal(a, b), name

    def test_a_loss_without_gradients_is_that_of_float32(self, impl):
        counts, inputs, cell_weight = deep_cells()
        single, half = (
            evaluate(counts, *inputs, cell_weight=cell_weight, precision=precision, impl=impl)
            for precision in ("float32", "bf16")
        )
        assert all(torch.equal(a, b) for a, b in zip(single, half, strict=True))


def test_buffers_become_the_gradients():
    counts = make_counts(6, 50)
    inputs, cell_weight = make_inputs(6, 50, 4)
    wanted = run(counts, inputs, cell_weight, dtype=torch.float32, factor=3.0)
    parameters = [x.clone().requires_grad_() for x in inputs]
    owners = {"weight": 1, "bias": 2, "library_weight": 5}
    buffers = {name: torch.full_like(inputs[k], torch.nan) for name, k in owners.items()}
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        loss, _ = evaluate(counts, *parameters, cell_weight=cell_weight, grad_buffers=buffers)
        (3 * loss).backward()
        for name, k in owners.items():
            assert parameters[k].grad.data_ptr() == buffers[name].data_ptr()
        for parameter, gradient in zip(parameters, wanted[2:], strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    with pytest.raises(RuntimeError, match="zero_grad"):
        evaluate(counts, *parameters, cell_weight=cell_weight, grad_buffers=buffers)


def test_a_buffer_overwritten_before_backward_is_noticed():
    counts = make_counts(6, 50)
    inputs, cell_weight = make_inputs(6, 50, 4)
    parameters = [x.clone().requires_grad_() for x in inputs]
    buffers = {"weight": torch.empty_like(inputs[1])}
    first, _ = evaluate(counts, *parameters, cell_weight=cell_weight, grad_buffers=buffers)
    evaluate(counts, *parameters, cell_weight=cell_weight, grad_buffers=buffers)
    with pytest.raises(RuntimeError, match="written again"):
        first.backward()


def test_without_gradients_nothing_is_formed():
    counts = make_counts(6, 50)
    inputs, cell_weight = make_inputs(6, 50, 4)
    parameters = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        loss, log_likelihood = evaluate(counts, *parameters, cell_weight=cell_weight)
    wanted = run(counts, inputs, cell_weight, dtype=torch.float32)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted[0])
    torch.testing.assert_close(log_likelihood, wanted[1])


def test_wrong_arguments_are_refused():
    counts = make_counts(6, 50)
    (hidden, weight, bias, r, library, _), cell_weight = make_inputs(6, 50, 4)
    with pytest.raises(ValueError, match=r"hidden.*\(6, 4\)"):
        negative_multinomial(counts, hidden.T, weight, bias, r, cell_weight=cell_weight)
    with pytest.raises(ValueError, match=r"^r: "):
        negative_multinomial(counts, hidden, weight, bias, r[:1], cell_weight=cell_weight)
    with pytest.raises(ValueError, match="likelihood"):
        negative_multinomial(counts, hidden, weight, bias, r, cell_weight=cell_weight, likelihood="coupled")
    with pytest.raises(ValueError, match="library, library_weight: got one without the other"):
        negative_multinomial(counts, hidden, weight, bias, r, cell_weight=cell_weight, library=library)
    halves = [x.bfloat16() for x in (hidden, weight, bias)]
    with pytest.raises(ValueError, match="precision"):
        negative_multinomial(counts, *halves, r, cell_weight=cell_weight)


MEMORY = """
import sys, threading
import numpy as np, torch
from pathlib import Path
from liam_scale.kernels.negative_multinomial import negative_multinomial
from loaders.minibatch import SparseCounts
cells, features, hidden = 512, 300_000, 33
torch.set_num_threads(1)
rng = np.random.default_rng(0)
columns = np.sort(rng.integers(0, features, (cells, 500)), axis=1).astype(np.int32)
indptr = torch.arange(cells + 1, dtype=torch.int32) * 500
order = np.argsort(columns.ravel(), kind="stable")
owners = np.repeat(np.arange(cells, dtype=np.int32), 500)[order]
starts = np.searchsorted(columns.ravel()[order], np.arange(features + 1)).astype(np.int32)
ones = torch.ones(columns.size)
transpose = (torch.from_numpy(starts), torch.from_numpy(owners), ones)
counts = SparseCounts(indptr, torch.from_numpy(columns.ravel()), ones, features, *transpose)
inputs = [torch.rand(cells, hidden), torch.randn(features, hidden) * 0.05, torch.zeros(features), torch.ones(cells)]
inputs = [x.requires_grad_() for x in inputs]
buffers = {"weight": torch.ones(features, hidden), "bias": torch.ones(features)}
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
def run():
    options = {"likelihood": sys.argv[1], "precision": sys.argv[2], "tile_bytes": 2**25}
    return negative_multinomial(counts, *inputs, cell_weight=torch.ones(cells), grad_buffers=buffers, **options)
warm = threading.Thread(target=run)
warm.start()
warm.join()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run()
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "precision"), [("per-cell", "float32"), ("per-cell", "bf16"), ("original", "float32")]
)
def test_memory_stays_below_the_bound(likelihood, precision):
    """512 x 300,000 logits would take 586 MiB; allowed are the 32 MiB of the tiles and what a thread brings along."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", MEMORY, likelihood, precision]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert float(found) < 40


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"golden values not found at {GOLDEN}")
    return np.load(GOLDEN)


def golden_run(golden, rows, r, *, likelihood, impl, dtype=torch.float64):
    """The table's logits as a linear layer: hidden = logits, weight = identity."""
    counts = SparseCounts.from_scipy(scipy.sparse.csr_matrix(golden["targets"][rows].astype(np.float32)))
    logits = torch.from_numpy(golden["logits"][rows])
    inputs = [logits, torch.eye(64), torch.zeros(64), torch.from_numpy(np.asarray(r))]
    options = {"dtype": dtype, "likelihood": likelihood, "impl": impl}
    return run(counts, inputs, torch.ones(len(logits)), **options)


@pytest.mark.parametrize("impl", ["reference", "auto", "plain"])
def test_golden_minibatches_of_the_original(golden, impl):
    wanted = (golden["batch_orig_f64"], golden["batch_grad_logits_f64"], golden["batch_grad_r_f64"])
    for rows, value, logits_gradient, r_gradient in zip(golden["batch_rows"], *wanted, strict=True):
        _, found, hidden, _, _, r = golden_run(golden, rows, golden["r"][rows], likelihood="original", impl=impl)
        np.testing.assert_allclose(found, value, rtol=1e-9)
        scale = np.abs(logits_gradient).max()
        np.testing.assert_allclose(-hidden, logits_gradient, rtol=1e-7, atol=1e-9 * scale)
        np.testing.assert_allclose(-r, r_gradient, rtol=1e-8, atol=1e-9 * np.abs(r_gradient).max())


@pytest.mark.parametrize("impl", ["reference", "auto", "plain"])
def test_golden_minibatches_with_one_dispersion(golden, impl):
    for rows, value in zip(golden["batch_rows"], golden["const_orig_f64"], strict=True):
        found = golden_run(golden, rows, golden["const_r"], likelihood="original", impl=impl)[1]
        np.testing.assert_allclose(found, value, rtol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "auto", "plain"])
def test_golden_single_cells(golden, impl):
    """The formula without epsilons, against 60-digit arithmetic."""
    found = golden_run(golden, slice(None), golden["r"], likelihood="per-cell", impl=impl)[1]
    exact = golden["single_exact_noeps"]
    assert (np.abs(found.numpy() - exact) / np.maximum(1, np.abs(exact))).max() < 1e-9


def test_golden_single_cells_in_float32(golden):
    """The published code in float32 is off by up to 1.3e-2 for large r; this is not."""
    found = golden_run(golden, slice(None), golden["r"], likelihood="per-cell", impl="auto", dtype=torch.float32)[1]
    exact = golden["single_exact_noeps"]
    assert (np.abs(found.numpy() - exact) / np.maximum(1, np.abs(exact))).max() < 2e-6


def test_the_reference_normalizer_counts_the_reference_class():
    logits = torch.tensor([[0.0, 0.0], [-800.0, -900.0], [788.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.log_normalizer(logits), torch.tensor([np.log(3.0), 0.0, 788.0]).double())


@pytest.mark.gpu
@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_cuda_agrees_with_the_cpu(likelihood):
    counts = make_counts(20, 300)
    inputs, cell_weight = make_inputs(20, 300, 16)
    mine = run(counts, inputs, cell_weight, dtype=torch.float64, likelihood=likelihood)
    moved = counts.map_tensors(lambda tensor: tensor.cuda())
    options = {"dtype": torch.float64, "likelihood": likelihood}
    theirs = run(moved, [x.cuda() for x in inputs], cell_weight.cuda(), **options)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.cpu())
