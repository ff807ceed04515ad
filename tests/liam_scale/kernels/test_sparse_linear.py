import numpy as np
import pytest
import scipy.sparse
import torch

from liam_scale.kernels.sparse_linear import sparse_linear
from loaders.minibatch import SparseCounts


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_counts(cells, features, *, density=0.1, seed=0, top=5, transpose=True):
    rng = np.random.default_rng(seed)
    matrix = scipy.sparse.random(cells, features, density=density, random_state=rng, format="csr")
    matrix.data = np.ceil(matrix.data * top)
    return SparseCounts.from_scipy(matrix.astype(np.float32), transpose=transpose)


def run(counts, weights, upstream, *, impl, dtype, log1p=(False, True), buffers=None):
    parameters = [w.to(dtype, copy=True).requires_grad_() for w in weights]
    products = sparse_linear(counts, parameters, log1p=log1p, impl=impl, grad_buffers=buffers)
    torch.autograd.backward(products, [u.to(dtype) for u in upstream])
    return [p.detach() for p in products], [p.grad for p in parameters]


def inputs(counts, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(counts.num_features, o, generator=generator) for o in outputs]
    return weights, [torch.randn(counts.num_cells, o, generator=generator) for o in outputs]


@pytest.mark.parametrize(
    ("cells", "features", "density"),
    [(7, 301, 0.1), (128, 2000, 0.05), (1, 1, 1.0), (5, 40, 0.0), (0, 40, 0.0), (3, 1_000_000, 1e-5)],
)
@pytest.mark.parametrize("transpose", [True, False])
def test_is_as_close_to_float64_as_the_plain_formula(fast_impl, cells, features, density, transpose):
    counts = make_counts(cells, features, density=density, transpose=transpose)
    weights, upstream = inputs(counts, (64, 7) if features < 10**6 else (2, 1))
    truth = run(counts, weights, upstream, impl="reference", dtype=torch.float64)
    plain = run(counts, weights, upstream, impl="reference", dtype=torch.float32)
    fused = run(counts, weights, upstream, impl=fast_impl, dtype=torch.float32)
    exact = run(counts, weights, upstream, impl=fast_impl, dtype=torch.float64)
    for kind in (0, 1):
        for t, p, f, e in zip(truth[kind], plain[kind], fused[kind], exact[kind], strict=True):
            scale = 1 + t.abs().max().item() if t.numel() else 1.0
            assert ((f - t).abs() <= (p - t).abs().amax() + 1e-6 * scale).all() if t.numel() else True
            torch.testing.assert_close(e, t, rtol=1e-12, atol=1e-12 * scale)


def test_sums_do_not_depend_on_the_number_of_threads():
    counts = make_counts(60, 3000)
    weights, upstream = inputs(counts, (129, 200))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        products, gradients = run(counts, weights, upstream, impl="auto", dtype=torch.float32)
        results.append([*products, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_counts_to_a_million_are_summed_as_well_as_by_the_plain_formula():
    counts = make_counts(9, 500, top=2**20)
    weights, upstream = inputs(counts, (33,))
    truth, plain, fused = (
        run(counts, weights, upstream, impl=impl, dtype=dtype, log1p=[False])
        for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("auto", torch.float32))
    )
    for kind in (0, 1):
        error = (fused[kind][0] - truth[kind][0]).abs().max()
        assert error <= (plain[kind][0] - truth[kind][0]).abs().max() + 1e-6 * truth[kind][0].abs().max()


def test_gradcheck():
    counts = make_counts(4, 11, density=0.4)
    weights = [torch.randn(11, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: sparse_linear(counts, [a, b], log1p=[True, False]), weights)


def test_buffers_become_the_gradients():
    counts = make_counts(6, 50)
    weights, upstream = inputs(counts, (8, 4))
    _, wanted = run(counts, weights, upstream, impl="auto", dtype=torch.float32)
    parameters = [w.clone().requires_grad_() for w in weights]
    buffers = {f"weight{k}": torch.full_like(w, torch.nan) for k, w in enumerate(weights)}
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(sparse_linear(counts, parameters, log1p=[False, True], grad_buffers=buffers), upstream)
        for k, parameter in enumerate(parameters):
            assert parameter.grad.data_ptr() == buffers[f"weight{k}"].data_ptr()
            assert torch.equal(parameter.grad, wanted[k])


def test_a_weight_used_twice_in_a_step_gets_both_gradients():
    counts, other = make_counts(6, 50), make_counts(6, 50, seed=1)
    weight = torch.randn(50, 8, requires_grad=True)
    buffers = {"weight0": torch.empty_like(weight)}
    total = sum(sparse_linear(c, [weight], log1p=[False], grad_buffers=buffers)[0].sum() for c in (counts, other))
    total.backward()
    wanted = (counts.to_dense() + other.to_dense()).sum(dim=0)[:, None].expand(50, 8)
    torch.testing.assert_close(weight.grad, wanted)


def test_a_buffer_still_in_use_is_refused():
    counts = make_counts(6, 50)
    weight = torch.randn(50, 8, requires_grad=True)
    buffers = {"weight0": torch.empty_like(weight)}
    sparse_linear(counts, [weight], log1p=[False], grad_buffers=buffers)[0].sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        sparse_linear(counts, [weight], log1p=[False], grad_buffers=buffers)


@pytest.mark.parametrize("buffer", [torch.empty(50, 7), torch.empty(50, 8).double(), torch.empty(8, 50).T])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    weight = torch.randn(50, 8, requires_grad=True)
    with pytest.raises(ValueError, match="grad_buffers"):
        sparse_linear(make_counts(6, 50), [weight], log1p=[False], grad_buffers={"weight0": buffer})


def test_wrong_shapes_are_refused():
    counts = make_counts(6, 50)
    with pytest.raises(ValueError, match=r"weights\[0\].*50 features"):
        sparse_linear(counts, [torch.randn(8, 50)], log1p=[False])
    with pytest.raises(ValueError, match="log1p"):
        sparse_linear(counts, [torch.randn(50, 8)], log1p=[])
    with pytest.raises(ValueError, match="impl"):
        sparse_linear(counts, [torch.randn(50, 8)], log1p=[False], impl="fast")


def test_no_gradient_is_formed_for_a_frozen_weight():
    counts = make_counts(6, 50)
    frozen, trained = torch.randn(50, 8), torch.randn(50, 8, requires_grad=True)
    products = sparse_linear(counts, [frozen, trained], log1p=[False, False])
    (products[0].sum() + products[1].sum()).backward()
    assert frozen.grad is None
    assert trained.grad is not None


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    counts = make_counts(20, 300)
    weights, upstream = inputs(counts, (16, 5))
    products, gradients = run(counts, weights, upstream, impl="auto", dtype=torch.float64)
    moved = counts.map_tensors(lambda tensor: tensor.cuda())
    others = run(moved, [w.cuda() for w in weights], [u.cuda() for u in upstream], impl="auto", dtype=torch.float64)
    for mine, theirs in zip([*products, *gradients], [*others[0], *others[1]], strict=True):
        torch.testing.assert_close(mine, theirs.cpu())
