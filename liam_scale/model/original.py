"""Weights of the original liam: read into a model, and named as there.

The original (ohlerlab/liam) has two classes, `Liam` (RNA + ATAC) and `Liam_ADT` (RNA + ADT), around the modules
`LiamVAE` and `LiamVAE_ADT`. A state_dict of either becomes a model here. Nothing is unpickled: save the original's with
`np.savez(path, **{k: v.cpu().numpy() for k, v in module.state_dict().items()})` where it runs, and read the file here.

Its Linear weights are (outputs, inputs) with the one-hot columns of the batch last; here the first layer on counts is
feature-major (features, outputs) and the one-hot columns are rows of a table of their own.

Shapes: F features, H hidden units, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from liam_scale.model.config import ModelConfig, ModelData
from liam_scale.model.decoders import join_library
from liam_scale.model.liam import Liam

Arrays = Mapping[str, npt.NDArray[Any]]
Kind = Literal["same", "row", "weight", "count-weight"]
OriginalClass = Literal["Liam", "Liam_ADT", "LiamVAE", "LiamVAE_ADT"]

_MODULE_DEFAULTS: dict[str, Any] = {
    "n_genes": None,
    "n_batch": None,
    "n_hidden": 128,
    "n_latent": 10,
    "dropout_rate": 0.1,
    "adversarial_training": False,
    "conditional_training": False,
    "dispersion_gex": "gene-batch",
    "rna_only": False,
    "use_batch_norm_encoder": False,
    "use_batch_norm_decoder": False,
    "use_layer_norm_encoder": True,
    "use_layer_norm_decoder": True,
    "factor_adversarial_loss": 1.0,
    "no_cond_decoder": False,
}

_ATAC_DEFAULTS: dict[str, Any] = {
    "n_peaks": None,
    "use_atac_libsize": True,
    "dispersion_atac": "batch",
    "atac_only": False,
}

_ADT_DEFAULTS: dict[str, Any] = {"n_ADT": None, "dispersion_ADT": "ADT-batch", "ADT_only": False}

_NETWORKS = {
    "gene_encoder", "peak_encoder", "ADT_encoder", "z_encoder", "z_encoder_one_mod", "l_encoder", "d_encoder",
    "gene_decoder", "peak_decoder", "ADT_decoder", "domain_classifier_z", "px_r", "py_r", "r",
    "library_log_means", "library_log_vars", "library_d_log_means", "library_d_log_vars",
}  # fmt: skip
"""What the original allocates, whether its mode uses it or not: the first parts of its arrays' names."""

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_OUTPUTS = {
    "rna": "gene_decoder.px_scale_decoder.0",
    "atac": "peak_decoder.decoder_output.0",
    "adt": "ADT_decoder.px_scale_decoder.0",
}


def from_original(
    state: Mapping[str, Any] | str | Path,
    arguments: Mapping[str, Any],
    *,
    cls: OriginalClass = "Liam",
    samples: tuple[str, ...] | None = None,
    likelihood: Literal["per-cell", "original"] = "original",
    priors: Literal["present", "original"] = "original",
    **options: Any,
) -> Liam:
    """Build a model from an original state_dict.

    Parameters
    ----------
    state
        Arrays (NumPy or torch) by their original names, or a `.npz` or `.safetensors` file of them.
    arguments
        Arguments that the original object was constructed with, by name, without `adata`; what is left out takes the
        default of `cls`.
    cls
        Class the arguments are for: `Liam` and `Liam_ADT` are the user's classes, `LiamVAE` and `LiamVAE_ADT` their
        modules, whose defaults differ (n_latent 10 and no adversary).
    samples
        Names of the batches in the order of their codes; None: "0", "1", ...
    likelihood, priors
        The original's behaviour, or this package's default; see docs/model.md. Priors are read from the state either
        way; the option tells how they would be computed again.
    **options
        Further fields of ModelConfig: `impl`, `precision`.

    Returns
    -------
    Liam
        In float32, in training mode, its modalities those of the original.

    Raises
    ------
    ValueError
        If an argument is unknown, or an array is missing, superfluous or misshaped, by name.
    """
    arrays = _read(state)
    given = _arguments(arguments, cls)
    modalities = _modalities(given, cls)
    config = ModelConfig(
        model="bavae" if len(modalities) > 1 else f"{modalities[0]}-only",  # type: ignore[arg-type]
        modalities=modalities,
        alpha=float(given["factor_adversarial_loss"]) if given["adversarial_training"] else 0.0,
        adversarial=bool(given["adversarial_training"]),
        conditional_encoder=bool(given["conditional_training"]),
        conditional_decoder=not given["no_cond_decoder"],
        n_latent=given["n_latent"],
        n_hidden=given["n_hidden"],
        dropout_rate=given["dropout_rate"],
        dispersion_rna=given["dispersion_gex"],
        dispersion_atac=given.get("dispersion_atac"),
        dispersion_adt=given.get("dispersion_ADT"),
        use_atac_libsize=bool(given.get("use_atac_libsize", True)),
        use_batch_norm_encoder=bool(given["use_batch_norm_encoder"]),
        use_batch_norm_decoder=bool(given["use_batch_norm_decoder"]),
        use_layer_norm_encoder=given["use_layer_norm_encoder"],
        use_layer_norm_decoder=given["use_layer_norm_decoder"],
        likelihood=likelihood,
        priors=priors,
        **options,
    )
    model = Liam(config, _data(arrays, given, modalities, samples))
    _check_arrays(arrays, as_original(model, model.state_dict()))
    own = {name: array for entry in _entries(model) for name, array in entry.to_own(arrays).items()}
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in own.items()})
    return model


def as_original(model: Liam, values: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Values keyed as parameters and buffers are (weights, gradients, ...) under their original names and shapes.

    An entry whose values are missing is left out; networks that the original allocates and its mode does not use are
    not here, so that its `load_state_dict` takes the weights with `strict=False`.
    """
    joined = dict(values)
    join_library(joined)
    host = {name: value.detach().cpu().numpy() for name, value in joined.items()}
    return {entry.original: entry.to_original(host) for entry in _entries(model) if entry.own in host}


def _modalities(given: Mapping[str, Any], cls: OriginalClass) -> tuple[str, ...]:
    second, flag = ("adt", "ADT_only") if cls.endswith("_ADT") else ("atac", "atac_only")
    if given["rna_only"] and given[flag]:
        raise ValueError("arguments: got rna_only with atac_only or ADT_only; set one of them")
    return ("rna",) if given["rna_only"] else (second,) if given[flag] else ("rna", second)


def _data(
    arrays: Arrays, given: Mapping[str, Any], modalities: tuple[str, ...], samples: tuple[str, ...] | None
) -> ModelData:
    """Sizes of the original's networks: from its arguments, or its arrays for those a user's class does not take."""

    def size(argument: str, name: str, axis: int) -> int:
        if given.get(argument) is not None:
            return int(given[argument])
        if name not in arrays or arrays[name].ndim <= axis:
            raise ValueError(f"original state: missing: {name}; give the whole state_dict")
        return int(arrays[name].shape[axis])

    arguments = {"rna": "n_genes", "atac": "n_peaks", "adt": "n_ADT"}
    features = {name: size(arguments[name], f"{_OUTPUTS[name]}.bias", 0) for name in modalities}
    num_samples = size("n_batch", "library_log_means" if "rna" in modalities else "library_d_log_means", 1)
    names = samples or tuple(str(code) for code in range(num_samples))
    if len(names) != num_samples:
        raise ValueError(f"samples: got {len(names)} names for {num_samples} batches; give one for each")
    return ModelData(features, names)


def _check_arrays(arrays: Arrays, expected: Arrays) -> None:
    """Refuse a state that lacks what the model needs, or has more in a network that the model uses."""
    used = {name.split(".")[0] for name in expected}
    defects = {
        "missing": [name for name in expected if name not in arrays],
        "superfluous": [name for name in arrays if name not in expected and name.split(".")[0] not in _NETWORKS - used],
        "misshaped": [
            f"{name} has {arrays[name].shape}, not {array.shape}"
            for name, array in expected.items()
            if name in arrays and arrays[name].shape != array.shape
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in defects.items() if names]
    if found:
        raise ValueError(
            f"original state: {'; '.join(found)}; give the whole state_dict and the arguments its object was "
            "constructed with"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read(state: Mapping[str, Any] | str | Path) -> dict[str, npt.NDArray[Any]]:
    if isinstance(state, Mapping):
        return {name: _as_numpy(value) for name, value in state.items()}
    path = Path(state)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    raise ValueError(
        f"original state: got {path.name}; give a .npz or .safetensors file (pickles are not read: "
        "save the state_dict with numpy.savez where it was trained)"
    )


def _as_numpy(value: Any) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _arguments(arguments: Mapping[str, Any], cls: OriginalClass) -> dict[str, Any]:
    """All constructor arguments of the original, defaults filled in."""
    if cls not in ("Liam", "Liam_ADT", "LiamVAE", "LiamVAE_ADT"):
        raise ValueError(f"cls: got {cls!r}; give Liam, Liam_ADT, LiamVAE or LiamVAE_ADT")
    defaults = {**_MODULE_DEFAULTS, **(_ADT_DEFAULTS if cls.endswith("_ADT") else _ATAC_DEFAULTS)}
    if "VAE" not in cls:
        defaults.update(n_latent=20, adversarial_training=cls == "Liam")
    unknown = [name for name in arguments if name not in defaults]
    if unknown:
        raise ValueError(f"arguments of {cls}: got {', '.join(unknown)}; give only {', '.join(sorted(defaults))}")
    return {**defaults, **arguments}


@dataclass(frozen=True)
class _Entry:
    """One array of the original and the parameter here that holds it.

    `weight` and `count-weight` also hold the parameter's table of samples, as the original's last columns.
    """

    original: str
    own: str
    kind: Kind = "same"
    num_columns: int = 0

    @property
    def table(self) -> str:
        """Name of the parameter that holds the one-hot columns."""
        return self.own.removesuffix("weight") + "sample_weight"

    def to_own(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        array = arrays[self.original]
        if self.kind == "same":
            return {self.own: array}
        if self.kind == "row":
            return {self.own: array.reshape(-1)}
        inputs = array.shape[1] - self.num_columns
        own = {self.own: array[:, :inputs].T if self.kind == "count-weight" else array[:, :inputs]}
        if self.num_columns:
            own[self.table] = array[:, inputs:].T
        return own

    def to_original(self, own: Arrays) -> npt.NDArray[Any]:
        array = own[self.own]
        if self.kind == "same":
            return array
        if self.kind == "row":
            return array[None, :]
        parts = [array.T if self.kind == "count-weight" else array]
        if self.num_columns:
            parts.append(own[self.table].T)
        return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _check_has_original(model: Liam) -> None:
    if model.modalities not in (("rna",), ("atac",), ("adt",), ("rna", "atac"), ("rna", "adt")):
        raise ValueError(
            f"model: got {' + '.join(model.modalities)}, which the original has no class for; "
            "give a model of rna, atac, adt, rna + atac or rna + adt"
        )
    if model.adversaries:
        raise ValueError(
            f"model: got adversaries of {', '.join(model.data.covariates)}, where the original has one; give a model "
            "of one batch key"
        )


def _entries(model: Liam) -> list[_Entry]:
    """Every parameter and buffer of a model with its original counterpart."""
    _check_has_original(model)
    state = model.state_dict()

    def columns(own: str) -> int:
        table = state.get(f"{own}.sample_weight")
        return 0 if table is None else len(table)

    def layer(original: str, own: str, kind: Kind = "weight") -> Iterator[_Entry]:
        yield _Entry(f"{original}.weight", f"{own}.weight", kind, columns(own))
        yield _Entry(f"{original}.bias", f"{own}.bias")

    def block(original: str, own: str, norm: str, kind: Kind = "weight") -> Iterator[_Entry]:
        yield from layer(f"{original}.fc_layers.Layer 0.0", own, kind)
        if f"{norm}.batch_norm.weight" in state:
            for part in _BATCH_NORM:
                yield _Entry(f"{original}.fc_layers.Layer 0.1.{part}", f"{norm}.batch_norm.{part}")

    def head(original: str, own: str) -> Iterator[_Entry]:
        yield from layer(f"{original}.mean_encoder", f"{own}.mean")
        yield from layer(f"{original}.var_encoder", f"{own}.variance")

    def count_block(original: str, own: str) -> Iterator[_Entry]:
        yield from block(original, own, f"{own}.block", "count-weight")

    def modality(name: str) -> Iterator[_Entry]:
        network = {"rna": "gene", "atac": "peak", "adt": "ADT"}[name]
        yield from count_block(f"{network}_encoder", f"encoders.{name}.layer")
        if model.encoders[name].library is not None:
            library = "l_encoder" if name == "rna" else "d_encoder"
            yield from count_block(f"{library}.encoder", f"encoders.{name}.library.layer")
            yield from head(library, f"encoders.{name}.library.head")
        decoder = f"decoders.{name}"
        hidden = "decoder" if name == "atac" else "px_decoder"
        output = "decoder_output.0" if name == "atac" else "px_scale_decoder.0"
        yield from block(f"{network}_decoder.{hidden}", f"{decoder}.linear", f"{decoder}.block")
        yield from layer(f"{network}_decoder.{output}", decoder)
        if name == "atac":
            by_sample = model.config.dispersion_atac == "batch"
            yield _Entry("r", f"{decoder}.r_raw", "row" if by_sample else "same")
        else:
            yield _Entry("px_r" if name == "rna" else "py_r", f"{decoder}.log_theta")
        buffer = "library_log" if name == "rna" else "library_d_log"
        yield _Entry(f"{buffer}_means", f"prior_mean_{name}", "row")
        yield _Entry(f"{buffer}_vars", f"prior_variance_{name}", "row")

    found = [entry for name in model.modalities for entry in modality(name)]
    latent = "z_encoder" if len(model.modalities) > 1 else "z_encoder_one_mod"
    found += block(f"{latent}.encoder", "latent_encoder.linear", "latent_encoder.block")
    found += head(latent, "latent_encoder.head")
    if model.adversary is not None:
        found += block("domain_classifier_z.decoder", "adversary.linear", "adversary.block")
        found += layer("domain_classifier_z.decoder_output.0", "adversary.output")
    return found
