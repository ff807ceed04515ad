"""Weights of the modalities' likelihoods: what they multiply, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import liam_scale
from liam_scale.model import Liam, ModelConfig, resolve

ALL = ("rna", "atac", "adt")
CELLS = 17


def weighed(data: Any, *weights: str, likelihood: Any = "per-cell") -> Liam:
    return Liam(ModelConfig(n_latent=4, n_hidden=6, weights=weights, likelihood=likelihood), data(ALL)).double()


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_a_weight_multiplies_one_likelihood_and_its_gradients(likelihood: Any, toy: Any, data: Any) -> None:
    given: dict[str, Any] = {"step": 1, "seed": 2, "kl_weight": 0.5, "cell_weight": 1 / CELLS}
    found, gradients = [], []
    for weights in ((), ("atac=3", "adt=1"), ("atac=5",)):
        model = weighed(data, *weights, likelihood=likelihood)
        objective = model(toy(ALL), **given)
        objective.loss.backward()
        found.append(objective)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, three, five = found
    part = plain.terms["reconstruction_loss_atac"] / CELLS
    for objective, weight in ((three, 3), (five, 5)):
        assert objective.terms == plain.terms, "the history tells likelihoods without weights"
        torch.testing.assert_close(objective.loss, plain.loss + (weight - 1) * part)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[2][name], 2 * gradients[1][name] - gradient)
    torch.testing.assert_close(gradients[1]["decoders.atac.bias"], 3 * gradients[0]["decoders.atac.bias"])
    assert torch.equal(gradients[1]["decoders.adt.bias"], gradients[0]["decoders.adt.bias"])


def test_models_of_a_late_integration_take_their_own_weight() -> None:
    configs = resolve(ModelConfig(model="concat", weights=("adt=20", "rna=2")), modalities=ALL)
    assert [config.weights for config in configs] == [("rna=2",), (), ("adt=20",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ["adt"]}, "--model.weights: got 'adt'; give modalities with a weight above 0"),
        ({"weights": ["adt=0"]}, "--model.weights: got 'adt=0'; give modalities with a weight above 0"),
        ({"weights": {"adt": float("nan")}}, "--model.weights: got 'adt=nan'; give modalities with a weight above 0"),
        ({"weights": ["atac=2", "atac=3"]}, "--model.weights: got atac twice; name each once"),
        ({"weights": {"protein": 2}}, "--model.weights: got protein; the model has rna, atac: give weights of"),
        (
            {"weights": {"atac": 2}, "model": "rna-only"},
            "--model.weights: got atac; the model has rna: give weights of these",
        ),
    ],
)
def test_weights_that_nothing_can_have_are_refused(
    options: dict[str, Any], message: str, multiome: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        liam_scale.train(multiome, out=tmp_path / "run", **options)


def test_a_run_keeps_its_weights_and_its_history_shows_the_loss_with_them(multiome: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_epochs": 1, "n_hidden": 8, "n_latent": 4, "minibatch": 64}
    plain = liam_scale.train(multiome, out=tmp_path / "plain", **given)
    run = liam_scale.train(multiome, out=tmp_path / "run", weights={"rna": 4}, **given)
    assert liam_scale.load_run(run.path).record.model.weights == ("rna=4",)
    row, other = run.history.iloc[-1], plain.history.iloc[-1]
    assert row["validation_loss"] > row["elbo_validation"]
    assert other["validation_loss"] <= other["elbo_validation"]
