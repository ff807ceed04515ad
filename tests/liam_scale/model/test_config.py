"""The paper's models by name, and refusals before any work."""

from dataclasses import fields, replace
from typing import Any, get_args

import pytest

from liam_scale.model import ModelConfig, ModelData, ModelName, resolve

ALL = ("rna", "atac", "adt")

TABLE = {
    "bavae": (True, 1.0, False, True),
    "cvae": (False, 0.0, True, True),
    "cdvae": (True, 0.0, False, True),
    "avae": (True, 1.0, False, False),
    "cevae": (False, 0.0, True, False),
    "batchvae": (True, 0.0, False, False),
    "vae": (False, 0.0, False, False),
    "rna-only": (True, 1.0, False, True),
    "atac-only": (True, 1.0, False, True),
    "adt-only": (True, 1.0, False, True),
    "concat": (True, 1.0, False, True),
}
"""Adversary, alpha, sample in the encoders, sample in the decoders: the table of the original's training scripts."""


def flags(config: ModelConfig) -> tuple[Any, ...]:
    return config.adversarial, config.alpha, config.conditional_encoder, config.conditional_decoder


@pytest.mark.parametrize("model", get_args(ModelName))
def test_names_stand_for_the_flags_of_the_paper(model: ModelName) -> None:
    for config in resolve(ModelConfig(model=model), modalities=ALL):
        assert flags(config) == TABLE[model]
        by_sample = config.dispersion_rna, config.dispersion_atac, config.dispersion_adt
        expected = ("gene", "constant", "ADT") if model == "vae" else ("gene-batch", "batch", "ADT-batch")
        assert by_sample == expected
        assert config.n_latent == (10 if model == "concat" else 20)
        assert None not in [getattr(config, f.name) for f in fields(config)]


@pytest.mark.parametrize("model", get_args(ModelName))
def test_resolving_twice_changes_nothing(model: ModelName) -> None:
    for config in resolve(ModelConfig(model=model), modalities=ALL):
        assert resolve(config, modalities=ALL) == (config,)
        assert ModelConfig.from_json(config.to_json()) == config


def test_concat_is_one_model_a_modality() -> None:
    configs = resolve(ModelConfig(model="concat", n_latent=5), modalities=("rna", "atac"))
    assert [(c.model, c.modalities, c.n_latent) for c in configs] == [
        ("rna-only", ("rna",), 5),
        ("atac-only", ("atac",), 5),
    ]


def test_modalities_stand_in_canonical_order() -> None:
    (config,) = resolve(ModelConfig(modalities=("adt", "rna")), modalities=ALL)
    assert config.modalities == ("rna", "adt")


def test_a_conditional_adversary_is_reached_from_a_name_and_a_flag() -> None:
    (config,) = resolve(ModelConfig(model="cvae", adversarial=True), modalities=ALL)
    assert flags(config) == (True, 1.0, True, True)
    (config,) = resolve(ModelConfig(model="cvae", adversarial=True, alpha=25.0), modalities=ALL)
    assert config.alpha == 25.0
    (config,) = resolve(ModelConfig(adversarial=False), modalities=ALL)
    assert flags(config) == (False, 0.0, False, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "cvae", "alpha": 5.0}, "got 5 with model cvae, which has no adversary; drop --model.alpha"),
        ({"model": "cdvae", "alpha": 5.0}, "--model.alpha: got 5.0 with model cdvae, which has 0.0"),
        ({"model": "avae", "conditional_decoder": True}, "drop --model.conditional-decoder"),
        ({"model": "vae", "dispersion_rna": "gene-batch"}, "--model.dispersion-rna: got gene-batch with model vae"),
        ({"model": "rna-only", "modalities": ("atac",)}, "got .'atac'. with model rna-only"),
        ({"model": "concat", "modalities": ("rna",)}, "got concat with one modality .rna.; use model rna-only"),
        ({"modalities": ("rna", "rna")}, "--model.modalities: .*; name each once"),
        (
            {"modalities": ("protein",)},
            "got protein for model bavae, but the store holds rna, atac, adt",
        ),
        ({"alpha": -1.0}, "--model.alpha: got -1.0; give at least 0"),
        ({"alpha": float("nan")}, "--model.alpha: got nan"),
        ({"alpha": 2.0, "adversarial": False}, "--model.alpha: got 2 with adversarial false"),
        ({"n_latent": 1}, "--model.n-latent: got 1; give at least 2"),
        ({"n_hidden": 0}, "--model.n-hidden: got 0"),
        ({"dropout_rate": 1.0}, "--model.dropout-rate: got 1.0; give at least 0 and below 1"),
    ],
)
def test_refusals_name_option_value_and_cure(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(ModelConfig(**options), modalities=ALL)


def test_a_modality_that_the_store_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="got atac for model atac-only, but the store holds rna, adt"):
        resolve(ModelConfig(model="atac-only"), modalities=("rna", "adt"))
    with pytest.raises(ValueError, match="got none for model bavae, but the store holds none"):
        resolve(ModelConfig(), modalities=())


def test_samples_are_checked_where_they_are_known() -> None:
    with pytest.raises(
        ValueError, match="--batch-key: got one with 3 samples for model vae, which sees no sample; drop --batch-key"
    ):
        resolve(ModelConfig(model="vae"), modalities=ALL, num_samples=3)
    with pytest.raises(ValueError, match=r"got 5 for data with one sample.*--batch-key"):
        resolve(ModelConfig(alpha=5.0), modalities=ALL, num_samples=1)
    assert len(resolve(ModelConfig(), modalities=ALL, num_samples=1)) == 1


def test_data_comes_back_from_json_and_checks_its_priors() -> None:
    data = ModelData({"rna": 4, "atac": 9}, ("a", "b"), {"rna": (1.0, 2.0)}, {"rna": (0.5, 0.25)})
    assert ModelData.from_json(data.to_json()) == data
    assert data.modalities == ("rna", "atac")
    assert data.select(("atac",)).num_features == {"atac": 9}
    with pytest.raises(ValueError, match="library priors of rna: got 2 values for 3 samples"):
        replace(data, samples=("a", "b", "c"))
    with pytest.raises(ValueError, match="samples: got none"):
        ModelData({"rna": 4}, ())
