"""The model against an independent dense formula of the specification, in float64, for every combination of flags."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from liam_scale.model import Liam, ModelConfig, ModelData, ModelName, resolve
from liam_scale.model.noise import Noise
from loaders.minibatch import Minibatch, SparseCounts

FEATURES = {"rna": 13, "atac": 21, "adt": 5}
CELLS = 17


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Arrays this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy(modalities: tuple[str, ...], *, samples: int = 3, dtype: Any = np.float64, seed: int = 0) -> Minibatch:
    """Counts with absent modalities: cell 0 has all, each other modality misses some cells."""
    rng = np.random.default_rng(seed)
    counts = {}
    for k, name in enumerate(modalities):
        values = rng.poisson(1.5, (CELLS, FEATURES[name])).astype(dtype)
        if name == "adt":
            values = np.log1p(values)
        if len(modalities) > 1:
            values[1 + k :: 5] = 0
        counts[name] = SparseCounts.from_scipy(scipy.sparse.csr_matrix(values))
    return Minibatch(
        counts=counts,
        present={name: c.totals() > 0 for name, c in counts.items()},
        sample=torch.from_numpy(rng.integers(0, samples, CELLS)),
        place=torch.arange(CELLS),
        rows=torch.arange(CELLS),
        num_global=CELLS,
    )


def data(modalities: tuple[str, ...], *, samples: int = 3) -> ModelData:
    rng = np.random.default_rng(1)
    return ModelData(
        num_features={name: FEATURES[name] for name in modalities},
        samples=tuple(f"s{k}" for k in range(samples)),
        prior_mean={name: tuple(rng.normal(2, 0.3, samples)) for name in modalities},
        prior_variance={name: tuple(rng.uniform(0.1, 0.5, samples)) for name in modalities},
    )


def part(cells: Minibatch, rows: Tensor) -> Minibatch:
    """Some cells of a minibatch, as another rank holds them."""
    counts = {
        name: SparseCounts.from_scipy(scipy.sparse.csr_matrix(c.to_dense().numpy()[rows.numpy()]))
        for name, c in cells.counts.items()
    }
    return replace(
        cells,
        counts=counts,
        present={name: p[rows] for name, p in cells.present.items()},
        sample=cells.sample[rows],
        place=cells.place[rows],
        rows=cells.rows[rows],
    )


class Dense:
    """The specification once more, with one-hot matrices and dense counts; shares no code with the model."""

    def __init__(self, model: Liam, cells: Minibatch) -> None:
        self.config, self.training = model.config, model.training
        self.state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.x = {name: c.to_dense() for name, c in cells.counts.items()}
        self.sample = cells.sample
        self.one_hot = torch.nn.functional.one_hot(cells.sample, model.data.num_samples).double()
        self.eps = Noise(seed=5, step=9, place=cells.place)

    def block(self, name: str, norm: str, inputs: Tensor, *, encoder: bool, transposed: bool = False) -> Tensor:
        weight = self.state[f"{name}.weight"]
        out = inputs @ (weight if transposed else weight.T) + self.state[f"{name}.bias"]
        if f"{name}.sample_weight" in self.state:
            out = out + self.one_hot @ self.state[f"{name}.sample_weight"]
        side = "encoder" if encoder else "decoder"
        if getattr(self.config, f"use_batch_norm_{side}"):
            p = f"{norm}.batch_norm."
            mean, variance = self.state[p + "running_mean"], self.state[p + "running_var"]
            if self.training:
                mean, variance = out.mean(0), out.var(0, unbiased=False)
            out = (out - mean) / torch.sqrt(variance + 1e-3) * self.state[p + "weight"] + self.state[p + "bias"]
        if getattr(self.config, f"use_layer_norm_{side}"):
            out = (out - out.mean(1, keepdim=True)) / torch.sqrt(out.var(1, keepdim=True, unbiased=False) + 1e-5)
        return out.clamp(min=0)

    def gaussian(self, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        def linear(which: str) -> Tensor:
            return hidden @ self.state[f"{name}.{which}.weight"].T + self.state[f"{name}.{which}.bias"]

        return linear("mean"), torch.exp(linear("variance")) + 1e-4

    @staticmethod
    def kl(mean: Tensor, variance: Tensor, mean0: Tensor | float, variance0: Tensor | float) -> Tensor:
        one = torch.distributions.Normal(mean, variance.sqrt())
        other = torch.distributions.Normal(
            torch.as_tensor(mean0).expand_as(mean), torch.as_tensor(variance0).sqrt().expand_as(mean)
        )
        return torch.distributions.kl_divergence(one, other).sum(1)

    def loss(self, *, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, Tensor] = {}
        hidden, sizes = [], {}
        for name, x in self.x.items():
            p = f"encoders.{name}."
            entered = torch.log(1 + x) if name == "rna" else x
            hidden.append(self.block(p + "layer", p + "layer.block", entered, encoder=True, transposed=True))
            if name != "atac" or self.config.use_atac_libsize:
                h = self.block(p + "library.layer", p + "library.layer.block", x, encoder=True, transposed=True)
                mean, variance = self.gaussian(p + "library.head", h)
                eps = self.eps.normal(f"{name}.library", 1, dtype=torch.float64)
                sizes[name] = torch.exp((mean + variance.sqrt() * eps).clamp(max=15)) + 1e-4
                prior = [self.one_hot @ self.state[f"prior_{k}_{name}"][:, None] for k in ("mean", "variance")]
                terms[f"kl_divergence_l_{name}"] = self.kl(mean, variance, *prior)
        h = self.block("latent_encoder.linear", "latent_encoder.block", torch.cat(hidden, 1), encoder=True)
        mean, variance = self.gaussian("latent_encoder.head", h)
        terms["kl_divergence_z"] = self.kl(mean, variance, 0.0, 1.0)
        eps = self.eps.normal("z", mean.shape[1], dtype=torch.float64)
        self.z = torch.softmax(mean + variance.sqrt() * eps, 1)
        total = kl_weight * terms["kl_divergence_z"]
        for name, x in self.x.items():
            mask = (x.sum(1) > 0).double() if len(self.x) > 1 else torch.ones(len(x), dtype=torch.float64)
            nll = (
                self.negative_multinomial(x, sizes.get(name)) if name == "atac" else self.binomial(name, x, sizes[name])
            )
            terms[f"reconstruction_loss_{name}"] = nll * mask
            if name in sizes:
                terms[f"kl_divergence_l_{name}"] = terms[f"kl_divergence_l_{name}"] * mask
                total = total + terms[f"kl_divergence_l_{name}"]
            total = total + nll * mask
        terms["elbo"] = sum(v for k, v in terms.items())  # type: ignore[assignment]
        if "adversary.output.weight" in self.state:
            # The classifier descends (+), what lies before z ascends (-): CE(z) enters with the gradient of
            # 2 CE(stop z) - CE(z), whose value is CE as well.
            cross = self.cross_entropy(self.z)
            terms["adversarial_loss"] = cross
            total = total + self.config.alpha * (2 * self.cross_entropy(self.z.detach()) - cross)
        return total.mean(), {name: term.sum().detach() for name, term in terms.items()}

    def cross_entropy(self, z: Tensor) -> Tensor:
        h = self.block("adversary.linear", "adversary.block", z, encoder=False)
        logits = h @ self.state["adversary.output.weight"].T + self.state["adversary.output.bias"]
        return -(self.one_hot * torch.log_softmax(logits, 1)).sum(1)

    def decoder(self, name: str) -> Tensor:
        return self.block(f"decoders.{name}.linear", f"decoders.{name}.block", self.z, encoder=False)

    def binomial(self, name: str, x: Tensor, size: Tensor) -> Tensor:
        p = f"decoders.{name}."
        mu = size * torch.softmax(self.decoder(name) @ self.state[p + "weight"].T + self.state[p + "bias"], 1)
        log_theta = self.state[p + "log_theta"]
        theta = torch.exp(log_theta if log_theta.dim() == 1 else self.one_hot @ log_theta.T) + 1e-4
        log_sum = torch.log(theta + mu + 1e-8)
        ll = theta * (torch.log(theta + 1e-8) - log_sum) + x * (torch.log(mu + 1e-8) - log_sum)
        ll = ll + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return -ll.sum(1)

    def negative_multinomial(self, y: Tensor, size: Tensor | None) -> Tensor:
        h = self.decoder("atac")
        h = h if size is None else torch.cat([h, size], 1)
        odds = torch.exp(h @ self.state["decoders.atac.weight"].T + self.state["decoders.atac.bias"])
        p, p0 = odds / (1 + odds.sum(1, keepdim=True)), 1 / (1 + odds.sum(1))
        raw, n = self.state["decoders.atac.r_raw"], y.sum(1)
        r = torch.log(1 + torch.exp(raw)).clamp(1e-10, 1e5)
        r = r if len(raw) == 1 and self.config.dispersion_atac == "constant" else self.one_hot @ r
        if self.config.likelihood == "per-cell":
            return -((y * torch.log(p)).sum(1) + r * torch.log(p0) + torch.lgamma(r + n) - torch.lgamma(r))
        coupled = (r * torch.log(p0 + 1e-10)).sum() - torch.lgamma(r).sum()
        return -((y * torch.log(p + 1e-10)).sum(1) + torch.lgamma(r + n) + coupled)


def combinations(number: int) -> list[dict[str, Any]]:
    """Random combinations of every flag, so that pairs no preset has are met too."""
    rng = np.random.default_rng(20)
    sets = [("rna",), ("atac",), ("adt",), ("rna", "atac"), ("rna", "adt"), ("atac", "adt"), ("rna", "atac", "adt")]
    choices: dict[str, list[Any]] = {
        "modalities": sets,
        "adversarial": [True, False],
        "conditional_encoder": [True, False],
        "conditional_decoder": [True, False],
        "dispersion_rna": ["gene", "gene-batch"],
        "dispersion_atac": ["constant", "batch"],
        "dispersion_adt": ["ADT", "ADT-batch"],
        "use_atac_libsize": [True, False],
        "use_batch_norm_encoder": [True, False],
        "use_batch_norm_decoder": [True, False],
        "use_layer_norm_encoder": [True, False],
        "use_layer_norm_decoder": [True, False],
        "likelihood": ["per-cell", "original"],
        "samples": [1, 3],
        "training": [True, False],
    }
    return [{name: v[rng.integers(len(v))] for name, v in choices.items()} for _ in range(number)]


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("index", range(16))
def test_loss_terms_and_gradients_are_the_dense_formulas(index: int, impl: Any) -> None:
    flags = combinations(16)[index]
    samples, training = flags.pop("samples"), flags.pop("training")
    modalities = flags["modalities"]
    model_name = "bavae" if len(modalities) > 1 else f"{modalities[0]}-only"
    alpha = 3.0 if flags["adversarial"] else None
    config = ModelConfig(model=model_name, alpha=alpha, n_latent=4, n_hidden=6, dropout_rate=0.0, impl=impl, **flags)
    model = Liam(config, data(modalities, samples=samples), seed=index).double().train(training)
    cells = toy(modalities, samples=samples, seed=index)
    if flags["use_batch_norm_encoder"] or flags["use_batch_norm_decoder"]:
        _unsettle_batch_norm(model)
    dense = Dense(model, cells)
    expected, terms = dense.loss(kl_weight=0.3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    ours = model(cells, step=9, seed=5, kl_weight=0.3, cell_weight=1 / CELLS)
    ours.loss.backward()
    if not training:
        assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    torch.testing.assert_close(ours.loss, expected, rtol=1e-10, atol=1e-10)
    assert set(ours.terms) == set(terms)
    for name, value in terms.items():
        torch.testing.assert_close(ours.terms[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert parameter.grad is not None, f"{name} has no gradient"
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        scale = wanted.abs().max().clamp(min=1e-6)
        assert ((parameter.grad - wanted).abs().max() / scale) < 1e-8, name


def _unsettle_batch_norm(model: Liam) -> None:
    """Running statistics and weights that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                assert module.running_mean is not None
                assert module.running_var is not None
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    tensor.uniform_(0.5, 1.5, generator=generator)


ALL = tuple(FEATURES)


def named(model: ModelName, *, samples: int = 3, **options: Any) -> list[Liam]:
    samples = 1 if model == "vae" else samples
    configs = resolve(ModelConfig(model=model, n_hidden=8, **options), modalities=ALL, num_samples=samples)
    return [Liam(config, data(ALL, samples=samples)) for config in configs]


@pytest.mark.parametrize("model", get_args(ModelName))
def test_every_model_of_the_paper_learns(model: ModelName) -> None:
    cells = toy(ALL, dtype=np.float32, samples=1 if model == "vae" else 3)
    for liam in named(model):
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
def test_ranks_add_up_to_the_global_minibatch(likelihood: Any, dispersion: Any) -> None:
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


def test_dropout_depends_on_the_place_and_not_on_the_rank() -> None:
    config = ModelConfig(n_latent=4, n_hidden=6, dropout_rate=0.4)
    model = Liam(config, data(ALL)).double().train()
    cells = toy(ALL)
    rows = torch.tensor([3, 11, 5])
    whole = model.infer(cells, Noise(seed=1, step=2, place=cells.place))
    alone = model.infer(part(cells, rows), Noise(seed=1, step=2, place=cells.place[rows]))
    torch.testing.assert_close(alone.z, whole.z[rows])
    assert (whole.encoded["rna"].hidden == 0).double().mean() > 0.5


def test_evaluation_drops_nothing_and_latent_draws_nothing() -> None:
    model = Liam(ModelConfig(n_latent=4, n_hidden=6, dropout_rate=0.9), data(ALL)).double()
    cells = toy(ALL)
    trained = model.train().latent(cells)
    evaluated = model.eval().latent(cells)
    torch.testing.assert_close(trained, evaluated)
    inference = model.infer(cells, Noise(seed=0, step=0, place=cells.place))
    torch.testing.assert_close(inference.latent.mean, evaluated[0])
    torch.testing.assert_close(inference.latent.variance, evaluated[1])


def test_first_weights_depend_on_seed_and_name_alone() -> None:
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
def test_gradient_buffers_change_nothing(modalities: tuple[str, ...]) -> None:
    name = "bavae" if len(modalities) > 1 else "rna-only"
    model = Liam(ModelConfig(model=name, n_hidden=8), data(modalities))
    cells = toy(modalities, dtype=np.float32)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(cells, step=0, seed=0, kl_weight=1.0, cell_weight=1 / CELLS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.use_gradient_buffers(True)
    for _ in range(2):
        after = gradients()
        assert set(after) == set(before)
        for n, gradient in before.items():
            torch.testing.assert_close(after[n], gradient, msg=lambda m, n=n: n + m)
    buffer = model.encoders["rna"].grad_buffers["weight0"]
    assert model.encoders["rna"].layer.weight.grad.data_ptr() == buffer.data_ptr()
    model.use_gradient_buffers(False)
    assert model.encoders["rna"].grad_buffers is None


def test_a_single_modality_counts_every_cell_that_has_it() -> None:
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


def test_the_sum_of_cell_terms_is_the_elbo_of_the_objective() -> None:
    model = Liam(ModelConfig(n_hidden=8), data(ALL)).double()
    cells = toy(ALL)
    terms = model.cell_terms(cells, model.infer(cells, Noise(seed=0, step=0, place=cells.place)))
    objective = model(cells, step=0, seed=0, kl_weight=0.1, cell_weight=1 / CELLS)
    torch.testing.assert_close(terms.elbo.sum(), objective.terms["elbo"])


def test_no_cells_give_no_loss() -> None:
    """A rank may hold no cell of a step and still takes part in it."""
    model = Liam(ModelConfig(n_hidden=8), data(ALL)).double()
    none = part(toy(ALL), torch.zeros(0, dtype=torch.int64))
    objective = model(none, step=0, seed=0, kl_weight=0.1, cell_weight=0.1)
    objective.loss.backward()
    assert objective.loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="got concat, which is 3 models"):
        Liam(ModelConfig(model="concat"), data(ALL))
    with pytest.raises(ValueError, match="got 3 for model vae"):
        Liam(ModelConfig(model="vae"), data(ALL))
    with pytest.raises(ValueError, match="got rna for model bavae, but the store holds atac"):
        Liam(ModelConfig(modalities=("rna",)), data(("atac",)))
