"""A modality of another name that is what a known one is has the same networks, loss and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from liam_scale.model import Liam, ModelConfig, ModelData, parameter_key, resolve
from liam_scale.model.original import as_original
from loaders.modalities import PRESETS, Kind, declared

OWN = {"rna": "a.genes", "atac": "b-marks", "adt": "values"}
"""One with a dot, and one that PyTorch's ModuleDict has for itself."""

KINDS = {OWN[name]: kind for name, kind in PRESETS.items()}


def renamed(data: ModelData) -> ModelData:
    fields = ("num_features", "prior_mean", "prior_variance")
    own = {field: {OWN[name]: value for name, value in getattr(data, field).items()} for field in fields}
    return replace(data, **own, kinds=KINDS)


def key_here(key: str) -> str:
    for known, own in OWN.items():
        key = key.replace(f"coders.{known}.", f"coders.{parameter_key(own)}.")
        key = key.replace(f"prior_mean_{known}", f"prior_mean_{parameter_key(own)}")
        key = key.replace(f"prior_variance_{known}", f"prior_variance_{parameter_key(own)}")
    return key


@pytest.mark.parametrize("options", [{}, {"likelihood": "original"}, {"use_atac_libsize": False}, {"model": "vae"}])
def test_loss_and_gradients_are_those_of_the_presets(options: dict[str, Any], toy: Any, data: Any) -> None:
    samples = 1 if options.get("model") == "vae" else 3
    known = Liam(ModelConfig(n_hidden=8, n_latent=4, **options), data(tuple(OWN), samples=samples)).double().eval()
    other = Liam(known.config.__class__(n_hidden=8, n_latent=4, **options), renamed(known.data)).double().eval()
    other.load_state_dict({key_here(key): value for key, value in known.state_dict().items()})
    cells = toy(tuple(OWN), samples=samples)
    others = replace(
        cells,
        counts={OWN[name]: counts for name, counts in cells.counts.items()},
        present={OWN[name]: present for name, present in cells.present.items()},
    )
    rng = np.random.default_rng(0)
    noise = {"z": torch.from_numpy(rng.normal(size=(cells.num_global, 4)))}
    noise |= {f"{name}.library": torch.from_numpy(rng.normal(size=(cells.num_global, 1))) for name in OWN}
    theirs = noise | {f"{own}.library": noise[f"{name}.library"] for name, own in OWN.items()}
    shared = {"step": 0, "seed": 0, "kl_weight": 0.5, "cell_weight": 1 / cells.num_global}
    one, two = known(cells, noise=noise, **shared), other(others, noise=theirs, **shared)
    torch.testing.assert_close(two.loss, one.loss, rtol=0, atol=0)
    assert set(two.terms) == {
        next((term.replace(name, own) for name, own in OWN.items() if name in term), term) for term in one.terms
    }
    one.loss.backward()
    two.loss.backward()
    gradients = {key_here(name): parameter.grad for name, parameter in known.named_parameters()}
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)


def test_data_and_configuration_come_back_from_json(data: Any) -> None:
    own = renamed(data(tuple(OWN)))
    assert own.modalities == tuple(OWN.values())
    assert ModelData.from_json(own.to_json()) == own
    assert "kinds" not in data(tuple(OWN)).to_json()
    assert own.select(("b-marks",)).kinds == {"b-marks": Kind("NM", "none")}
    with pytest.raises(ValueError, match=r"kinds: got none for hto; say by the option modality what it is: hto=NM"):
        ModelData({"rna": 4, "hto": 3})


def test_models_of_one_modality_stand_side_by_side() -> None:
    configs = resolve(ModelConfig(model="concat"), modalities=("rna", "h3k27ac"))
    assert [(c.model, c.modalities, c.n_latent) for c in configs] == [
        ("rna-only", ("rna",), 10),
        ("bavae", ("h3k27ac",), 10),
    ]
    (config,) = resolve(ModelConfig(modalities=("hto", "rna")), modalities=("rna", "h3k27ac", "hto"))
    assert config.modalities == ("rna", "hto")
    with pytest.raises(ValueError, match=r"got concat with one modality \(hto\); use model bavae"):
        resolve(ModelConfig(model="concat"), modalities=("hto",))
    with pytest.raises(ValueError, match=r"got lipids for model bavae, but the store holds rna"):
        resolve(ModelConfig(modalities=("lipids",)), modalities=("rna",))


def test_the_original_has_no_names_for_its_weights() -> None:
    model = Liam(ModelConfig(n_hidden=4, n_latent=2), ModelData({"rna": 5, "hto": 3}, kinds=declared("hto=NB")))
    with pytest.raises(ValueError, match=r"model: got rna \+ hto, which the original has no class for"):
        as_original(model, model.state_dict())
