"""Weights in the original's form: shapes and meaning by an original-shaped formula, files, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.model.original import as_original, from_original

ARGUMENTS: dict[str, Any] = {"n_hidden": 6, "n_latent": 4}


def model(*, modalities: tuple[str, ...] = ("rna", "atac"), samples: int = 3, **options: Any) -> Liam:
    sizes = {"rna": 7, "atac": 11, "adt": 5}
    data = ModelData({name: sizes[name] for name in modalities}, tuple("abcdefg"[:samples]))
    name = "bavae" if len(modalities) > 1 else f"{modalities[0]}-only"
    return Liam(ModelConfig(model=name, n_hidden=6, n_latent=4, **options), data)  # type: ignore[arg-type]


def written(liam: Liam) -> dict[str, np.ndarray]:
    return as_original(liam, liam.state_dict())


CASES = [
    ("Liam", {}, {}),
    ("Liam", {"conditional_encoder": True}, {"conditional_training": True}),
    ("Liam", {"conditional_decoder": False}, {"no_cond_decoder": True}),
    ("Liam", {"adversarial": False}, {"adversarial_training": False}),
    ("Liam", {"alpha": 25.0}, {"factor_adversarial_loss": 25.0}),
    ("Liam", {"use_atac_libsize": False}, {"use_atac_libsize": False}),
    ("Liam", {"dispersion_rna": "gene", "dispersion_atac": "constant"}, None),
    ("Liam", {"use_batch_norm_encoder": True, "use_batch_norm_decoder": True}, None),
    ("Liam", {"use_layer_norm_encoder": False, "use_layer_norm_decoder": False}, None),
    ("Liam", {"modalities": ("rna",)}, {"rna_only": True}),
    ("Liam", {"modalities": ("atac",)}, {"atac_only": True}),
    ("Liam", {"samples": 1}, {}),
    ("Liam_ADT", {"modalities": ("rna", "adt")}, {"adversarial_training": True}),
    ("Liam_ADT", {"modalities": ("adt",)}, {"ADT_only": True, "adversarial_training": True}),
    ("Liam_ADT", {"modalities": ("rna",)}, {"rna_only": True, "adversarial_training": True}),
    (
        "Liam_ADT",
        {"modalities": ("rna", "adt"), "dispersion_adt": "ADT"},
        {"dispersion_ADT": "ADT", "adversarial_training": True},
    ),
]


@pytest.mark.parametrize(("cls", "options", "arguments"), CASES)
def test_a_model_written_and_read_is_the_same(cls: Any, options: dict[str, Any], arguments: Any) -> None:
    names = {"dispersion_rna": "dispersion_gex"}
    arguments = {names.get(k, k): v for k, v in options.items()} if arguments is None else arguments
    before = model(**options)
    state = written(before)
    after = from_original(state, {**ARGUMENTS, **arguments}, cls=cls, samples=before.data.samples)
    assert after.config == before.config.__class__(
        **{**before.config.to_json(), "modalities": before.modalities, "likelihood": "original", "priors": "original"}
    )
    assert after.data.num_features == before.data.num_features
    own = before.state_dict()
    assert set(after.state_dict()) == set(own)
    assert all(torch.equal(value, own[name]) for name, value in after.state_dict().items())
    again = written(after)
    assert all(np.array_equal(array, state[name]) for name, array in again.items())


def test_arrays_have_the_shapes_of_a_published_log() -> None:
    """Shapes printed by the original's training script, with 13 samples, 20 latent dimensions and fewer features."""
    data = ModelData({"rna": 431, "atac": 490}, tuple(f"s{k}" for k in range(13)))
    state = written(Liam(ModelConfig(), data))
    expected = {
        "gene_encoder.fc_layers.Layer 0.0.weight": (128, 431),
        "peak_encoder.fc_layers.Layer 0.0.weight": (128, 490),
        "z_encoder.encoder.fc_layers.Layer 0.0.weight": (128, 256),
        "z_encoder.mean_encoder.weight": (20, 128),
        "l_encoder.encoder.fc_layers.Layer 0.0.weight": (128, 444),
        "d_encoder.encoder.fc_layers.Layer 0.0.weight": (128, 503),
        "gene_decoder.px_decoder.fc_layers.Layer 0.0.weight": (128, 33),
        "gene_decoder.px_scale_decoder.0.weight": (431, 128),
        "peak_decoder.decoder_output.0.weight": (490, 129),
        "domain_classifier_z.decoder.fc_layers.Layer 0.0.weight": (32, 20),
        "domain_classifier_z.decoder_output.0.weight": (13, 32),
        "px_r": (431, 13),
        "r": (1, 13),
        "library_log_means": (1, 13),
        "library_d_log_vars": (1, 13),
    }
    assert {name: state[name].shape for name in expected} == expected


def test_one_hot_columns_stand_last() -> None:
    liam = model()
    state = written(liam)
    table = liam.decoders["rna"].linear.sample_weight.detach().numpy()
    np.testing.assert_array_equal(state["gene_decoder.px_decoder.fc_layers.Layer 0.0.weight"][:, 4:], table.T)
    library = liam.encoders["rna"].library.layer
    np.testing.assert_array_equal(
        state["l_encoder.encoder.fc_layers.Layer 0.0.weight"],
        np.concatenate([library.weight.detach().numpy().T, library.sample_weight.detach().numpy().T], axis=1),
    )


def test_networks_that_the_model_does_not_use_are_passed_over() -> None:
    state = written(model())
    read = from_original({**state, "z_encoder_one_mod.mean_encoder.weight": np.ones((4, 6))}, ARGUMENTS)
    assert set(written(read)) == set(state)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_are_read_without_pickle(tmp_path: Path, suffix: str) -> None:
    state = written(model())
    path = tmp_path / f"liam{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        safetensors.numpy.save_file(state, path)
    read = from_original(path, ARGUMENTS)
    assert all(np.array_equal(array, state[name]) for name, array in written(read).items())


def test_torch_tensors_are_read_too() -> None:
    state = {name: torch.from_numpy(array) for name, array in written(model()).items()}
    assert from_original(state, ARGUMENTS).modalities == ("rna", "atac")


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got model\.pt; give a \.npz or \.safetensors file"):
        from_original(tmp_path / "model.pt", ARGUMENTS)


def test_defaults_are_those_of_the_class() -> None:
    state = written(model())
    assert from_original(state, ARGUMENTS, cls="Liam").config.adversarial is True
    assert from_original(state, ARGUMENTS, cls="LiamVAE").config.adversarial is False
    with pytest.raises(ValueError, match=r"z_encoder.mean_encoder.weight has \(4, 6\), not \(20, 6\)"):
        from_original(state, {"n_hidden": 6}, cls="Liam")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("px_r"), "missing: px_r"),
        (lambda s: s.update(extra=np.zeros(1)), "superfluous: extra"),
        (lambda s: s.update({"z_encoder.more": np.zeros(1)}), r"superfluous: z_encoder\.more"),
        (lambda s: s.update(r=np.zeros((1, 2))), r"misshaped: r has \(1, 2\), not \(1, 3\)"),
        (lambda s: s.pop("gene_decoder.px_scale_decoder.0.bias"), "missing: gene_decoder.px_scale_decoder.0.bias"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    state = written(model())
    change(state)
    with pytest.raises(ValueError, match=message):
        from_original(state, ARGUMENTS)


def test_arguments_that_do_not_fit_are_refused() -> None:
    state = written(model())
    with pytest.raises(ValueError, match="arguments of Liam: got n_ADT"):
        from_original(state, {**ARGUMENTS, "n_ADT": 5})
    with pytest.raises(ValueError, match="got rna_only with atac_only"):
        from_original(state, {**ARGUMENTS, "rna_only": True, "atac_only": True})
    with pytest.raises(ValueError, match="got 2 names for 3 batches"):
        from_original(state, ARGUMENTS, samples=("a", "b"))
    with pytest.raises(ValueError, match="cls: got 'Mira'"):
        from_original(state, ARGUMENTS, cls="Mira")  # type: ignore[arg-type]


def test_models_the_original_has_no_class_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got rna \+ atac \+ adt, which the original has no class for"):
        written(model(modalities=("rna", "atac", "adt")))
