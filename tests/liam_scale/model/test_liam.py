"""What the model does: learning, ranks, noise, masks, gradient buffers."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from liam_scale.model import Liam, ModelConfig, ModelData, ModelName, resolve
from liam_scale.model.noise import Noise
from loaders.minibatch import SparseCounts

ALL = ("rna", "atac", "adt")
CELLS = 17


def named(model: ModelName, data: Any, *, samples: int = 3, **options: Any) -> list[Liam]:
    samples = 1 if model == "vae" else samples
    configs = resolve(ModelConfig(model=model, n_hidden=8, **options), modalities=ALL, num_samples=samples)
    return [Liam(config, data(ALL, samples=samples)) for config in configs]


@pytest.mark.parametrize("model", get_args(ModelName))
def test_every_model_of_the_paper_learns(model: ModelName, toy: Any, data: Any) -> None:
    cells = toy(ALL, dtype=np.float32, samples=1 if model == "vae" else 3)
    for liam in named(model, data):
        optimizer = torch.optim.Adam(liam.parameters(), lr=0.02)
        losses = []
        for step in range(60):
            objective = liam(cells, step=step, seed=0, kl_weight=0.1, cell_weight=1 / CELLS)
            optimizer.zero_grad()
            objective.loss.backward()
            assert all(p.grad is not None for p in liam.parameters()), "DDP waits for every gradient"
            optimizer.step()
            losses.append(objective.loss.item())
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
        mean, variance = liam.latent(cells)
        assert mean.shape == variance.shape == (CELLS, liam.num_latent)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
@pytest.mark.parametrize("dispersion", ["constant", "batch"])
def test_ranks_add_up_to_the_global_minibatch(likelihood: Any, dispersion: Any, toy: Any, data: Any, part: Any) -> None:
    """Loss and gradients are the same on one rank and on three unequal ones, one of them without any ATAC."""
    config = ModelConfig(n_latent=4, n_hidden=6, likelihood=likelihood, dispersion_atac=dispersion)
    model = Liam(config, data(ALL)).double()
    cells = toy(ALL)
    whole = model(cells, step=1, seed=2, kl_weight=0.5, cell_weight=1 / CELLS)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lacking = torch.nonzero(~cells.present["atac"])[:, 0]
    having = torch.nonzero(cells.present["atac"])[:, 0]
    parts = [part(cells, rows) for rows in (lacking, having[:2], having[2:])]
    with_modality = [model.num_cells_with(p) for p in parts]
    total = {name: sum(count[name] for count in with_modality) for name in ALL}
    losses = []
    for p in parts:
        local = model(p, step=1, seed=2, kl_weight=0.5, cell_weight=1 / CELLS, num_global_with=total)
        local.loss.backward()
        losses.append(local.loss.detach())
    torch.testing.assert_close(torch.stack(losses).sum(), whole.loss.detach(), rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)


def test_dropout_depends_on_the_place_and_not_on_the_rank(toy: Any, data: Any, part: Any) -> None:
    config = ModelConfig(n_latent=4, n_hidden=6, dropout_rate=0.4)
    model = Liam(config, data(ALL)).double().train()
    cells = toy(ALL)
    rows = torch.tensor([3, 11, 5])
    whole = model.infer(cells, Noise(seed=1, step=2, place=cells.place))
    alone = model.infer(part(cells, rows), Noise(seed=1, step=2, place=cells.place[rows]))
    torch.testing.assert_close(alone.z, whole.z[rows])
    assert (whole.encoded["rna"].hidden == 0).double().mean() > 0.5


def test_evaluation_drops_nothing_and_latent_draws_nothing(toy: Any, data: Any) -> None:
    model = Liam(ModelConfig(n_latent=4, n_hidden=6, dropout_rate=0.9), data(ALL)).double()
    cells = toy(ALL)
    trained = model.train().latent(cells)
    evaluated = model.eval().latent(cells)
    torch.testing.assert_close(trained, evaluated)
    inference = model.infer(cells, Noise(seed=0, step=0, place=cells.place))
    torch.testing.assert_close(inference.latent.mean, evaluated[0])
    torch.testing.assert_close(inference.latent.variance, evaluated[1])


def test_first_weights_depend_on_seed_and_name_alone(data: Any) -> None:
    one, same, other = (Liam(ModelConfig(), data(ALL), seed=seed) for seed in (3, 3, 4))
    fewer = Liam(ModelConfig(modalities=("rna", "adt")), data(ALL), seed=3)
    states = [model.state_dict() for model in (one, same, other, fewer)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoders.rna.layer.weight"], states[2]["encoders.rna.layer.weight"])
    assert torch.equal(states[0]["encoders.rna.layer.weight"], states[3]["encoders.rna.layer.weight"])


def test_first_weights_are_those_of_a_torch_linear() -> None:
    wide = ModelData({"rna": 4000}, ("a", "b"))
    weight = Liam(ModelConfig(model="rna-only"), wide).encoders["rna"].library.layer.weight
    bound = 1 / np.sqrt(4002)
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert weight.std().item() == pytest.approx(bound / np.sqrt(3), rel=1e-2)


@pytest.mark.parametrize("modalities", [("rna",), ALL])
def test_gradients_are_written_where_the_last_ones_stood(modalities: tuple[str, ...], toy: Any, data: Any) -> None:
    name = "bavae" if len(modalities) > 1 else "rna-only"
    model = Liam(ModelConfig(model=name, n_hidden=8), data(modalities))
    cells = toy(modalities, dtype=np.float32)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(cells, step=0, seed=0, kl_weight=1.0, cell_weight=1 / CELLS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    large = [model.encoders["rna"].layer.weight, model.decoders["rna"].weight, model.decoders["rna"].log_theta]
    for _ in range(2):
        model.keep_gradients()
        places = [p.grad.data_ptr() for p in large]
        after = gradients()
        assert set(after) == set(before)
        for n, gradient in before.items():
            torch.testing.assert_close(after[n], gradient, msg=lambda m, n=n: n + m)
        assert [p.grad.data_ptr() for p in large] == places


def test_a_single_modality_counts_every_cell_that_has_it(toy: Any, data: Any) -> None:
    """A cell of the store without counts still has the modality; a cell that lacks it never counts."""
    model = Liam(ModelConfig(model="rna-only", n_hidden=8), data(("rna",))).double()
    cells = toy(("rna",))
    is_present = torch.ones(CELLS, dtype=torch.bool)
    is_present[4] = False
    dense = cells.counts["rna"].to_dense()
    dense[:6] = 0
    counts = {"rna": SparseCounts.from_scipy(scipy.sparse.csr_matrix(dense.numpy()))}
    cells = replace(cells, counts=counts, present={"rna": is_present})
    inference = model.infer(cells, Noise(seed=0, step=0, place=cells.place))
    terms = model.cell_terms(cells, inference)
    assert torch.equal(terms.masks["rna"], is_present)
    assert (terms.reconstruction["rna"] != 0).equal(is_present)


def test_the_sum_of_cell_terms_is_the_elbo_of_the_objective(toy: Any, data: Any) -> None:
    model = Liam(ModelConfig(n_hidden=8), data(ALL)).double()
    cells = toy(ALL)
    terms = model.cell_terms(cells, model.infer(cells, Noise(seed=0, step=0, place=cells.place)))
    objective = model(cells, step=0, seed=0, kl_weight=0.1, cell_weight=1 / CELLS)
    torch.testing.assert_close(terms.elbo.sum(), objective.terms["elbo"])


def test_no_cells_give_no_loss(toy: Any, data: Any, part: Any) -> None:
    """A rank may hold no cell of a step and still takes part in it."""
    model = Liam(ModelConfig(n_hidden=8), data(ALL)).double()
    none = part(toy(ALL), torch.zeros(0, dtype=torch.int64))
    objective = model(none, step=0, seed=0, kl_weight=0.1, cell_weight=0.1)
    objective.loss.backward()
    assert objective.loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_refusals(data: Any) -> None:
    with pytest.raises(ValueError, match="got concat, which is 3 models"):
        Liam(ModelConfig(model="concat"), data(ALL))
    with pytest.raises(ValueError, match="got 3 for model vae"):
        Liam(ModelConfig(model="vae"), data(ALL))
    with pytest.raises(ValueError, match="got rna for model bavae, but the store holds atac"):
        Liam(ModelConfig(modalities=("rna",)), data(("atac",)))
