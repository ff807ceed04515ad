"""A padded minibatch gives the loss and the gradients of the one that it holds."""

import pytest
import scipy.sparse
import torch

from liam_scale.kernels.device.noise import signed, step_key
from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.training.recorded import Capacity
from liam_scale.training.update import Given
from loaders.minibatch import Minibatch, SparseCounts

FEATURES = {"rna": 60, "atac": 150, "adt": 7}


def make_minibatch(num_cells: int, modalities: tuple[str, ...], *, density: float = 0.2) -> Minibatch:
    counts = {}
    for seed, name in enumerate(modalities):
        matrix = scipy.sparse.random(num_cells, FEATURES[name], density, random_state=seed, format="csr")
        matrix.data = (matrix.data * 5 + 1).round().astype("float32")
        counts[name] = SparseCounts.from_scipy(matrix, transpose=False)
    places = torch.arange(num_cells) + 5
    present = {name: torch.arange(num_cells) % 3 > 0 for name in modalities}
    return Minibatch(counts, present, places % 3, places, places, 2 * num_cells)


def make_model(modalities: tuple[str, ...], impl: str) -> Liam:
    data = ModelData(
        num_features={name: FEATURES[name] for name in modalities},
        samples=("a", "b", "c"),
        prior_mean=dict.fromkeys(modalities, (3.0,) * 3),
        prior_variance=dict.fromkeys(modalities, (0.3,) * 3),
    )
    return Liam(ModelConfig(modalities=modalities, n_hidden=16, n_latent=4, impl=impl), data).train()


def results(model: Liam, minibatch: Minibatch, given: Given, **more: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    objective = model(minibatch, **vars(given), **more)
    objective.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": objective.loss.detach(), **objective.terms, **gradients}


@pytest.mark.parametrize("impl", ["auto", "plain", "triton"])
@pytest.mark.parametrize("modalities", [("rna", "atac"), ("atac",), ("rna", "atac", "adt")])
def test_padding_changes_no_more_than_the_order_of_sums(
    impl: str, modalities: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Memory that a larger minibatch stood in before, one that holds no count, and one without cells."""
    if impl == "triton":
        pytest.importorskip("triton")
        if modalities != ("rna", "atac"):
            pytest.skip("the interpreter is slow")
    model = make_model(modalities, impl)
    sizes = ((21, 0.2), (15, 0.15), (20, 0.0), (0, 0.2)) if impl != "triton" else ((21, 0.2), (9, 0.1))
    capacity = Capacity(make_minibatch(*sizes[0][:1], modalities, density=sizes[0][1]))
    for step, (num_cells, density) in enumerate(sizes):
        minibatch = make_minibatch(num_cells, modalities, density=density)
        assert capacity.holds(minibatch)
        given = Given(step=step, seed=7, kl_weight=0.3, cell_weight=1 / 64)
        expected = results(model, minibatch, given)
        padded, given_padded, key = capacity.filled(minibatch, given)
        assert int(key) == signed(step_key(seed=7, step=step), 64)
        found = results(model, padded, given_padded, noise_key=key)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            atol = 1e-6 * float(value.abs().max()) + 1e-9
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=atol, msg=name)


def test_what_does_not_fit_is_told_and_gets_memory_in_which_all_fits() -> None:
    modalities = ("rna", "atac")
    small, dense, large = (make_minibatch(n, modalities, density=d) for n, d in ((20, 0.1), (20, 0.9), (40, 0.1)))
    capacity = Capacity(small)
    assert [capacity.holds(m) for m in (small, dense, large)] == [True, False, False]
    grown = Capacity(large, Capacity(dense, capacity))
    assert all(grown.holds(m) for m in (small, dense, large))
    assert not grown.holds(small.map_tensors(lambda t: t.double() if t.is_floating_point() else t))
