"""Options of the model, the paper's models by name, and what the model must know of the data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from liam_scale.kernels.options import Impl, Precision
from loaders.modalities import PRESETS, Kind, is_name, ordered, saying
from loaders.options import Range, check_options, named_numbers

ModelName = Literal[
    "bavae", "cvae", "cdvae", "avae", "cevae", "batchvae", "vae", "rna-only", "atac-only", "adt-only", "concat"
]

_LISTS = ("modalities", "alphas", "weights")

CONCAT_LATENT = 10
"""Latent dimensions of each model of a late integration, so that both side by side have 20 as in the paper."""


def parameter_key(modality: str) -> str:
    """A modality in the names of parameters: PyTorch takes no dots there, and keeps names of its own for itself."""
    return modality if modality in PRESETS else f"mod:{modality.replace('.', ':')}"


@dataclass(frozen=True)
class ModelConfig:
    """Options of the model. Those that are None have the values that `--model` stands for."""

    model: Annotated[ModelName, tyro.conf.arg(aliases=["--model"])] = "bavae"
    """Model of the paper; bavae is liam as published."""
    modalities: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODALITY ...")] = ()
    """Modalities to integrate, such as rna, atac and adt; empty: all that the store holds."""
    alpha: Annotated[float | None, Range(least=0), tyro.conf.arg(aliases=["--alpha"])] = None
    """Weight of the adversary that removes the sample from the embedding; the paper uses 0 to 1000."""
    alphas: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=ALPHA ...", aliases=["--alphas"])] = ()
    """With several columns to remove, weights of the adversaries of some of them; `alpha` is that of the others."""
    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODALITY=WEIGHT ...", aliases=["--weights"])] = ()
    """Weights of the likelihoods of some modalities, such as adt=20; 1 of the others, as published."""
    adversarial: bool | None = None
    """Whether a classifier of the sample reads the latent space through a gradient reversal."""
    conditional_encoder: bool | None = None
    """Whether the encoders of modalities and latent space see the sample."""
    conditional_decoder: bool | None = None
    """Whether the decoders see the sample."""
    n_latent: Annotated[int | None, Range(least=2), tyro.conf.arg(aliases=["--n-latent"])] = None
    """Latent dimensions; 20, or 10 for each model of concat. At least 2: a softmax over one is constant."""
    n_hidden: Annotated[int, Range(least=1)] = 128
    """Units of each hidden layer; the adversary always has 32."""
    dropout_rate: Annotated[float, Range(least=0, below=1)] = 0.1
    """Share of hidden units dropped in the encoders while training."""
    dispersion_rna: Literal["gene", "gene-batch"] | None = None
    """One dispersion per gene, or one per gene and sample; also of NB modalities of other names than adt."""
    dispersion_atac: Literal["constant", "batch"] | None = None
    """One dispersion for all peaks, or one per sample; also of NM modalities of other names."""
    dispersion_adt: Literal["ADT", "ADT-batch"] | None = None
    """One dispersion per protein, or one per protein and sample."""
    use_atac_libsize: bool = True
    """Whether the decoders of ATAC and other NM modalities read an inferred library size."""
    use_batch_norm_encoder: bool = False
    """Batch normalisation in the hidden layers of the encoders."""
    use_batch_norm_decoder: bool = False
    """Batch normalisation in the hidden layers of decoders and adversary."""
    use_layer_norm_encoder: bool = True
    """Layer normalisation in the hidden layers of the encoders."""
    use_layer_norm_decoder: bool = True
    """Layer normalisation in the hidden layers of decoders and adversary."""
    likelihood: Literal["per-cell", "original"] = "per-cell"
    """NM likelihood, as of ATAC: cell by cell, or summed over the minibatch as the original's code does."""
    priors: Literal["present", "original"] = "present"
    """Library priors from the cells that have the modality, or from all cells with log 0 taken as 0 as the original."""
    impl: Impl = "auto"
    """Kernels made for the device where there are any, the same in plain torch, or the formulas on dense tensors."""
    precision: Annotated[Precision, tyro.conf.arg(aliases=["--precision"])] = "float32"
    """Type in which the decoders multiply over all features while training; refused where the device lacks it."""

    def __post_init__(self) -> None:
        check_options(self, "--model.")
        if self.alpha and self.adversarial is False:
            raise ValueError(
                f"--model.alpha: got {self.alpha:g} with adversarial false, where nothing has that weight; "
                "drop one of the two"
            )
        self.alpha_by_column()
        self.weight_by_modality()
        if not all(map(is_name, self.modalities)) or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(
                f"--model.modalities: got {list(self.modalities)}; name each once, out of those that the store holds"
            )

    def alpha_by_column(self) -> dict[str, float]:
        """Weights of adversaries that have one of their own, by obs column."""
        wanted = "columns with a weight from 0 on, such as site=25"
        return named_numbers("--model.alphas", self.alphas, wanted=wanted, least=0.0)

    def weight_by_modality(self) -> dict[str, float]:
        """Weights of likelihoods that have one of their own."""
        wanted = "modalities with a weight above 0, such as adt=20"
        return named_numbers("--model.weights", self.weights, wanted=wanted, least=sys.float_info.min)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), **{name: list(getattr(self, name)) for name in _LISTS}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ModelConfig:
        lists = {name: tuple(entry.get(name, ())) for name in _LISTS}
        return cls(**{**entry, **lists})


@dataclass(frozen=True)
class ModelData:
    """What the model must know of the data. Modalities are the keys of `num_features`, in canonical order."""

    num_features: Mapping[str, int]
    """Features per modality."""
    samples: tuple[str, ...] = ("all",)
    """Categories of the sample covariate in the order of their codes; one entry if no column was named."""
    prior_mean: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per modality and sample: mean of the log total; empty: 0."""
    prior_variance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per modality and sample: population variance of the log total; empty: 1."""
    covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where samples are combinations of several obs columns: the value of each sample, by column."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """What each modality is; those whose names tell may be left out."""
    continuous: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of the columns of numbers that decoders read, standardised."""

    def __post_init__(self) -> None:
        check_options(self)
        kinds = {name: PRESETS.get(name, self.kinds.get(name)) for name in self.modalities}
        if unsaid := [name for name, kind in kinds.items() if kind is None]:
            raise ValueError(f"kinds: got none for {unsaid[0]}; {saying(unsaid[0])}")
        object.__setattr__(self, "kinds", kinds)
        if not self.samples:
            raise ValueError("samples: got none; give one category for data without a sample covariate")
        for name, means in [*self.prior_mean.items(), *self.prior_variance.items()]:
            if len(means) != len(self.samples):
                raise ValueError(
                    f"library priors of {name}: got {len(means)} values for {len(self.samples)} samples; "
                    "give one per sample"
                )
        if unsound := [name for name, (_, deviation) in self.continuous.items() if not deviation > 0]:
            raise ValueError(f"continuous: got standard deviation 0 of {unsound[0]}; leave it out")
        for name, values in self.covariates.items():
            if len(values) != len(self.samples):
                raise ValueError(
                    f"covariates: got {len(values)} values of {name} for {len(self.samples)} samples; give one each"
                )

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ordered(self.num_features)

    def select(self, modalities: Sequence[str]) -> ModelData:
        """The same with some modalities alone, for a model that reads no others."""

        def chosen(entries: Mapping[str, Any]) -> dict[str, Any]:
            return {name: entries[name] for name in modalities if name in entries}

        return replace(
            self,
            num_features=chosen(self.num_features),
            prior_mean=chosen(self.prior_mean),
            prior_variance=chosen(self.prior_variance),
            kinds=chosen(self.kinds),
        )

    def to_json(self) -> dict[str, Any]:
        kinds = {name: asdict(kind) for name, kind in self.kinds.items() if name not in PRESETS}
        return {
            **({"kinds": kinds} if kinds else {}),
            **({"continuous": {name: list(own) for name, own in self.continuous.items()}} if self.continuous else {}),
            "num_features": dict(self.num_features),
            "samples": list(self.samples),
            "prior_mean": {name: list(values) for name, values in self.prior_mean.items()},
            "prior_variance": {name: list(values) for name, values in self.prior_variance.items()},
            "covariates": {name: list(values) for name, values in self.covariates.items()},
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ModelData:
        return cls(
            num_features=dict(entry["num_features"]),
            samples=tuple(entry["samples"]),
            prior_mean={name: tuple(values) for name, values in entry["prior_mean"].items()},
            prior_variance={name: tuple(values) for name, values in entry["prior_variance"].items()},
            covariates={name: tuple(values) for name, values in entry.get("covariates", {}).items()},
            kinds={name: Kind(**kind) for name, kind in entry.get("kinds", {}).items()},
            continuous={name: (mean, sd) for name, (mean, sd) in entry.get("continuous", {}).items()},
        )


_BAVAE: dict[str, Any] = {
    "adversarial": True,
    "alpha": 1.0,
    "conditional_encoder": False,
    "conditional_decoder": True,
    "n_latent": 20,
    "dispersion_rna": "gene-batch",
    "dispersion_atac": "batch",
    "dispersion_adt": "ADT-batch",
}

_WITHOUT_SAMPLE: dict[str, Any] = {
    "adversarial": False,
    "alpha": 0.0,
    "conditional_encoder": False,
    "conditional_decoder": False,
    "dispersion_rna": "gene",
    "dispersion_atac": "constant",
    "dispersion_adt": "ADT",
}

_FLAGS: dict[str, dict[str, Any]] = {
    "bavae": {},
    "cvae": {"adversarial": False, "alpha": 0.0, "conditional_encoder": True},
    "cdvae": {"alpha": 0.0},
    "avae": {"conditional_decoder": False},
    "cevae": {"adversarial": False, "alpha": 0.0, "conditional_encoder": True, "conditional_decoder": False},
    "batchvae": {"alpha": 0.0, "conditional_decoder": False},
    "vae": _WITHOUT_SAMPLE,
    "rna-only": {},
    "atac-only": {},
    "adt-only": {},
    "concat": {"n_latent": CONCAT_LATENT},
}

_FIXED: dict[str, tuple[str, ...]] = {
    "cvae": ("conditional_encoder", "conditional_decoder"),
    "cdvae": ("adversarial", "alpha", "conditional_encoder", "conditional_decoder"),
    "avae": ("adversarial", "conditional_encoder", "conditional_decoder"),
    "cevae": ("conditional_encoder", "conditional_decoder"),
    "batchvae": ("adversarial", "alpha", "conditional_encoder", "conditional_decoder"),
    "vae": tuple(_WITHOUT_SAMPLE),
}
"""Flags that make a model what its name says: another value would be another model."""


def _flag(name: str) -> str:
    return "--model." + name.replace("_", "-")


def _check_name(config: ModelConfig) -> None:
    """Refuse options that contradict the model's name."""
    flags = {**_BAVAE, **_FLAGS[config.model]}
    if config.alpha and config.model in ("cvae", "cevae") and config.adversarial is None:
        raise ValueError(
            f"--model.alpha: got {config.alpha:g} with model {config.model}, which has no adversary; "
            "drop --model.alpha, or use model bavae"
        )
    has_weight = (flags["adversarial"] or config.adversarial) and "alpha" not in _FIXED.get(config.model, ())
    if config.alphas and (not has_weight or config.adversarial is False):
        raise ValueError(
            f"--model.alphas: got {' '.join(config.alphas)} with a model whose adversaries have no weight; "
            "drop --model.alphas, or use model bavae"
        )
    for name in _FIXED.get(config.model, ()):
        value = getattr(config, name)
        if value is not None and value != flags[name]:
            raise ValueError(
                f"{_flag(name)}: got {value} with model {config.model}, which has {flags[name]}; "
                f"drop {_flag(name)}, or start from model bavae"
            )


def _chosen_modalities(config: ModelConfig, modalities: Sequence[str]) -> tuple[str, ...]:
    """Modalities of the model, in canonical order, all of which the store must hold."""
    wanted: Sequence[str] = config.modalities or modalities
    if config.model.endswith("-only"):
        only = config.model.removesuffix("-only")
        if config.modalities and tuple(config.modalities) != (only,):
            raise ValueError(
                f"--model.modalities: got {list(config.modalities)} with model {config.model}; "
                "drop --model.modalities, or choose another model"
            )
        wanted = (only,)
    missing = [name for name in wanted if name not in modalities]
    if missing or not wanted:
        raise ValueError(
            f"--model.modalities: got {', '.join(missing) or 'none'} for model {config.model}, but the store holds "
            f"{', '.join(modalities) or 'none'}; choose among these, or ingest a source with the missing one"
        )
    if unread := [name for name in config.weight_by_modality() if name not in wanted]:
        raise ValueError(
            f"--model.weights: got {', '.join(unread)}; the model has {', '.join(ordered(wanted))}: give weights of "
            "these"
        )
    return ordered(wanted)


def _check_samples(config: ModelConfig, num_samples: int) -> None:
    if config.model == "vae" and num_samples != 1:
        raise ValueError(
            f"--batch-key: got one with {num_samples} samples for model vae, which sees no sample; "
            "drop --batch-key, or use model batchvae (the sample in library encoders, priors and dispersions alone)"
        )
    if config.alpha and num_samples == 1:
        raise ValueError(
            f"--model.alpha: got {config.alpha:g} for data with one sample, where there is nothing to remove; "
            "name the sample column with --batch-key, or drop --model.alpha"
        )


def check_ranks(config: ModelConfig, num_ranks: int) -> None:
    """Refuse batch normalisation on several ranks: statistics of a rank's share would depend on their number."""
    for name in ("use_batch_norm_encoder", "use_batch_norm_decoder"):
        if getattr(config, name) and num_ranks > 1:
            raise ValueError(
                f"{_flag(name)}: got True on {num_ranks} ranks, which would each normalise their own cells; "
                "train on one rank, or keep layer normalisation, the default"
            )


def resolve(
    config: ModelConfig, *, modalities: Sequence[str], num_samples: int | None = None
) -> tuple[ModelConfig, ...]:
    """Turn a model's name into flags and refuse what does not fit, before any work.

    Parameters
    ----------
    config
        Options as the user gave them.
    modalities
        Modalities of the store.
    num_samples
        Samples of the data, 1 without a sample covariate; None: not to be checked.

    Returns
    -------
    One configuration without None fields; two or three for `concat`, one single-modality model each, to be trained
    one after the other and whose embeddings stand side by side. Resolving a resolved configuration changes nothing.

    Raises
    ------
    ValueError
        If options contradict each other, the model's name, the store's modalities or its samples.
    """
    _check_name(config)
    if num_samples is not None:
        _check_samples(config, num_samples)
    chosen = _chosen_modalities(config, modalities)
    flags = {**_BAVAE, **_FLAGS[config.model]}
    if config.adversarial is not None and config.alpha is None:
        flags["alpha"] = 1.0 if config.adversarial else 0.0
    given = {name: getattr(config, name) for name in flags if getattr(config, name) is not None}
    full = replace(config, modalities=chosen, **{**flags, **given})
    if config.model != "concat":
        return (full,)
    if len(chosen) < 2:
        raise ValueError(
            f"--model: got concat with one modality ({chosen[0]}); use model {_alone(chosen[0])}, "
            "or a store with two modalities"
        )
    own = {name: tuple(text for text in full.weights if text.startswith(f"{name}=")) for name in chosen}
    return tuple(replace(full, model=_alone(name), modalities=(name,), weights=own[name]) for name in chosen)


def _alone(modality: str) -> ModelName:
    """The model of one modality; those of other names than the known ones have none of their own."""
    return f"{modality}-only" if modality in PRESETS else "bavae"  # type: ignore[return-value]
