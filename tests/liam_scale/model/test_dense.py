"""The model against an independent dense formula of the specification, in float64, for any combination of flags."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from liam_scale.model import Liam, ModelConfig
from liam_scale.model.noise import Noise
from loaders.minibatch import Minibatch

CELLS = 17


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
        logits = self.decoder("atac") @ self.state["decoders.atac.weight"].T + self.state["decoders.atac.bias"]
        logits = logits if size is None else logits + size * self.state["decoders.atac.library_weight"]
        odds = torch.exp(logits)
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
def test_loss_terms_and_gradients_are_the_dense_formulas(index: int, impl: Any, toy: Any, data: Any) -> None:
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


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_logits_of_hundreds_stay_finite_in_float32(impl: Any, likelihood: Any, toy: Any, data: Any) -> None:
    """The original is NaN in float32 from a logit of 177 on."""
    config = ModelConfig(n_latent=4, n_hidden=6, dropout_rate=0.0, likelihood=likelihood, impl=impl)
    model = Liam(config, data(("rna", "atac")), seed=1).double()
    with torch.no_grad():
        model.decoders["atac"].weight.mul_(400.0)
        model.decoders["atac"].library_weight.mul_(400.0)
    cells = toy(("rna", "atac"))
    logits = model.decoders["atac"].logits
    inference = model.infer(cells, Noise(seed=5, step=9, place=cells.place))
    largest = logits(inference.z, inference.log_library["atac"], cells.sample).abs().max()
    assert 300 < largest < 700
    expected, _ = Dense(model, cells).loss(kl_weight=0.3)
    exact = model(cells, step=9, seed=5, kl_weight=0.3, cell_weight=1 / CELLS).loss
    if likelihood == "original":
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=0)
    single = model.float()
    objective = single(toy(("rna", "atac"), dtype=np.float32), step=9, seed=5, kl_weight=0.3, cell_weight=1 / CELLS)
    torch.testing.assert_close(objective.loss.double(), exact, rtol=1e-4, atol=0)
    objective.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in single.parameters())
