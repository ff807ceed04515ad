"""Weights of the original liam: read into a model, written back.

The original (ohlerlab/liam) has two classes, `Liam` (RNA + ATAC) and `Liam_ADT` (RNA + ADT), around the modules
`LiamVAE` and `LiamVAE_ADT`. A state_dict of either becomes a model here and back, array by array. Nothing is
unpickled: save the original's with `np.savez(path, **{k: v.cpu().numpy() for k, v in module.state_dict().items()})`
where it runs, and read the file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from liam_scale.model.config import ModelConfig, ModelData
from liam_scale.model.decoders import join_library
from liam_scale.model.layers import Draw
from liam_scale.model.liam import Liam
from liam_scale.model.original_arrays import Layout, entries, shapes

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
    layout = _layout(arrays, given, cls)
    _check_arrays(arrays, layout)
    config = ModelConfig(
        model="bavae" if len(layout.modalities) > 1 else f"{layout.modalities[0]}-only",  # type: ignore[arg-type]
        modalities=layout.modalities,
        alpha=float(given["factor_adversarial_loss"]) if given["adversarial_training"] else 0.0,
        adversarial=bool(given["adversarial_training"]),
        conditional_encoder=bool(given["conditional_training"]),
        conditional_decoder=not given["no_cond_decoder"],
        n_latent=layout.num_latent,
        n_hidden=layout.num_hidden,
        dropout_rate=given["dropout_rate"],
        dispersion_rna=given["dispersion_gex"],
        dispersion_atac=given.get("dispersion_atac"),
        dispersion_adt=given.get("dispersion_ADT"),
        use_atac_libsize=layout.use_atac_libsize,
        use_batch_norm_encoder=layout.batch_norm_encoder,
        use_batch_norm_decoder=layout.batch_norm_decoder,
        use_layer_norm_encoder=given["use_layer_norm_encoder"],
        use_layer_norm_decoder=given["use_layer_norm_decoder"],
        likelihood=likelihood,
        priors=priors,
        **options,
    )
    names = samples or tuple(str(code) for code in range(layout.num_samples))
    if len(names) != layout.num_samples:
        raise ValueError(f"samples: got {len(names)} names for {layout.num_samples} batches; do: give one for each")
    features = dict(zip(("rna", layout.second), (layout.num_genes, layout.num_second), strict=True))
    model = Liam(config, ModelData({name: features[name] for name in layout.modalities}, names))
    used = entries(model)
    own = {name: array for entry in used for name, array in entry.to_own(arrays).items()}
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in own.items()})
    read = {entry.original for entry in used}
    model.unused_arrays = {name: array for name, array in arrays.items() if name not in read}
    return model


def to_original(model: Liam, *, cls: OriginalClass | None = None) -> dict[str, npt.NDArray[Any]]:
    """Write a model as a state_dict of the original.

    Parameters
    ----------
    model
        With RNA, ATAC, RNA + ATAC (`Liam`), ADT or RNA + ADT (`Liam_ADT`).
    cls
        For a model of RNA alone, which both classes have; None: the class it was read from, else `Liam`.

    Returns
    -------
    dict of array
        Everything the original's `load_state_dict(..., strict=True)` asks for. Networks that the original allocates
        but does not use come from the state the model was read from, else as fresh first weights.

    Raises
    ------
    ValueError
        If the original has no such model.
    """
    layout = _layout_of(model, cls)
    arrays = as_original(model, dict(model.state_dict()))
    full = shapes(layout)
    draw = Draw(0, "original")
    for name, shape in full.items():
        if name in arrays:
            continue
        kept = model.unused_arrays.get(name)
        arrays[name] = kept if kept is not None and kept.shape == shape else _fresh(draw, name, shape)
    buffers = [name for name in model.unused_arrays if name.startswith("library")]
    order = [*full, *(name for name in [*arrays, *buffers] if name not in full)]
    return {name: arrays[name] if name in arrays else model.unused_arrays[name] for name in dict.fromkeys(order)}


def as_original(model: Liam, values: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Values keyed as the model's state_dict (weights, gradients, ...) under their original names and shapes.

    An entry whose values are missing is left out.
    """
    joined = dict(values)
    join_library(joined)
    host = {name: value.detach().cpu().numpy() for name, value in joined.items()}
    return {entry.original: entry.to_original(host) for entry in entries(model) if entry.own in host}


@dataclass(frozen=True)
class _Defect:
    what: str
    names: list[str]

    def __str__(self) -> str:
        shown = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        return f"{self.what}: {shown}"


def _check_arrays(arrays: Mapping[str, npt.NDArray[Any]], layout: Layout) -> None:
    """Refuse a state whose arrays are not those of the layout."""
    expected = shapes(layout)
    optional = {name for name in arrays if name.startswith("library") and name not in expected}
    missing = [name for name in expected if name not in arrays]
    extra = [name for name in arrays if name not in expected and name not in optional]
    wrong = [
        f"{name} has {arrays[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    defects = [_Defect("missing", missing), _Defect("superfluous", extra), _Defect("misshaped", wrong)]
    found = "; ".join(str(defect) for defect in defects if defect.names)
    if found:
        raise ValueError(
            f"original state: {found}; do: give the whole state_dict and the arguments its object was constructed with"
        )


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
        f"original state: got {path.name}; do: give a .npz or .safetensors file (pickles are not read: "
        "save the state_dict with numpy.savez where it was trained)"
    )


def _as_numpy(value: Any) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _arguments(arguments: Mapping[str, Any], cls: OriginalClass) -> dict[str, Any]:
    """All constructor arguments of the original, defaults filled in."""
    if cls not in ("Liam", "Liam_ADT", "LiamVAE", "LiamVAE_ADT"):
        raise ValueError(f"cls: got {cls!r}; do: give Liam, Liam_ADT, LiamVAE or LiamVAE_ADT")
    defaults = {**_MODULE_DEFAULTS, **(_ADT_DEFAULTS if cls.endswith("_ADT") else _ATAC_DEFAULTS)}
    if "VAE" not in cls:
        defaults.update(n_latent=20, adversarial_training=cls == "Liam")
    unknown = [name for name in arguments if name not in defaults]
    if unknown:
        raise ValueError(f"arguments of {cls}: got {', '.join(unknown)}; do: give only {', '.join(sorted(defaults))}")
    return {**defaults, **arguments}


def _layout(arrays: Mapping[str, npt.NDArray[Any]], given: Mapping[str, Any], cls: OriginalClass) -> Layout:
    """Sizes of the original's networks, from its arguments and, for those a user's class does not take, its arrays."""
    is_adt = cls.endswith("_ADT")
    second: Literal["atac", "adt"] = "adt" if is_adt else "atac"
    second_only = given["ADT_only" if is_adt else "atac_only"]
    if given["rna_only"] and second_only:
        raise ValueError("arguments: got rna_only with atac_only or ADT_only; do: set one of them")
    modalities = ("rna",) if given["rna_only"] else (second,) if second_only else ("rna", second)

    def size(argument: str, name: str, axis: int) -> int:
        if given[argument] is not None:
            return int(given[argument])
        if name not in arrays or arrays[name].ndim <= axis:
            raise ValueError(f"original state: missing: {name}; do: give the whole state_dict")
        return int(arrays[name].shape[axis])

    if is_adt:
        num_second = size("n_ADT", "ADT_decoder.px_scale_decoder.0.bias", 0)
    else:
        num_second = size("n_peaks", "peak_decoder.decoder_output.0.bias", 0)
    return Layout(
        modalities=modalities,
        second=second,
        num_genes=size("n_genes", "gene_decoder.px_scale_decoder.0.bias", 0),
        num_second=num_second,
        num_samples=size("n_batch", "domain_classifier_z.decoder_output.0.bias", 0),
        num_hidden=given["n_hidden"],
        num_latent=given["n_latent"],
        conditional_encoder=bool(given["conditional_training"]),
        conditional_decoder=not given["no_cond_decoder"],
        gene_by_sample=given["dispersion_gex"] == "gene-batch",
        second_by_sample=given["dispersion_ADT" if is_adt else "dispersion_atac"] in ("batch", "ADT-batch"),
        use_atac_libsize=bool(given.get("use_atac_libsize", True)),
        batch_norm_encoder=bool(given["use_batch_norm_encoder"]),
        batch_norm_decoder=bool(given["use_batch_norm_decoder"]),
    )


def _layout_of(model: Liam, cls: OriginalClass | None) -> Layout:
    """Layout of the original object that would hold this model."""
    modalities = model.modalities
    if modalities == ("rna",):
        was_adt = any(name.startswith("ADT_") for name in model.unused_arrays)
        is_adt = cls.endswith("_ADT") if cls is not None else was_adt
    elif len(modalities) < 3 and modalities != ("atac", "adt"):
        is_adt = "adt" in modalities
        if cls is not None and cls.endswith("_ADT") != is_adt:
            raise ValueError(f"cls: got {cls} for a model of {' + '.join(modalities)}; do: leave cls out")
    else:
        raise ValueError(
            f"model: got {' + '.join(modalities)}, which the original has no class for; "
            "do: write models of rna, atac, adt, rna + atac or rna + adt"
        )
    config, features = model.config, model.data.num_features
    second: Literal["atac", "adt"] = "adt" if is_adt else "atac"
    by_sample = config.dispersion_adt == "ADT-batch" if is_adt else config.dispersion_atac == "batch"

    def size(name: str, output: str) -> int:
        return features[name] if name in features else len(model.unused_arrays.get(f"{output}.bias", ()))

    return Layout(
        modalities=modalities,
        second=second,
        num_genes=size("rna", "gene_decoder.px_scale_decoder.0"),
        num_second=size(second, "ADT_decoder.px_scale_decoder.0" if is_adt else "peak_decoder.decoder_output.0"),
        num_samples=model.data.num_samples,
        num_hidden=config.n_hidden,
        num_latent=model.num_latent,
        conditional_encoder=bool(config.conditional_encoder),
        conditional_decoder=bool(config.conditional_decoder),
        gene_by_sample=config.dispersion_rna == "gene-batch",
        second_by_sample=by_sample,
        use_atac_libsize=config.use_atac_libsize,
        batch_norm_encoder=config.use_batch_norm_encoder,
        batch_norm_decoder=config.use_batch_norm_decoder,
    )


def _fresh(draw: Draw, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """First value of an array that the original allocates and this model does not have."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if name in ("px_r", "py_r", "r"):
        return draw.normal(name, shape).detach().numpy()
    if ".Layer 0.1." in name:
        ones = name.endswith(("weight", "running_var"))
        return np.full(shape, float(ones), dtype=np.float32)
    return draw.uniform(name, shape, num_inputs=shape[-1]).detach().numpy()
