"""Names and shapes of the original's arrays, and how each maps to a parameter here.

Its Linear weights are (outputs, inputs) with the one-hot columns of the batch last; here the first layer on counts is
feature-major (features, outputs) and the one-hot columns are rows of a table of their own.

Shapes: F features, H hidden units, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from liam_scale.model.decoders import ADVERSARY_HIDDEN
from liam_scale.model.liam import Liam

Arrays = Mapping[str, npt.NDArray[Any]]
Kind = Literal["same", "row", "weight", "count-weight"]

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layout:
    """Sizes and flags that decide the shapes of the original's arrays."""

    modalities: tuple[str, ...]
    """Modalities in use; the original allocates both anyhow."""
    second: Literal["atac", "adt"]
    num_genes: int
    num_second: int
    num_samples: int
    num_hidden: int
    num_latent: int
    conditional_encoder: bool
    conditional_decoder: bool
    gene_by_sample: bool
    second_by_sample: bool
    use_atac_libsize: bool
    batch_norm_encoder: bool
    batch_norm_decoder: bool

    @property
    def second_name(self) -> str:
        return "peak" if self.second == "atac" else "ADT"

    @property
    def second_hidden(self) -> str:
        """Name of the hidden layers of the second decoder."""
        return "peak_decoder.decoder" if self.second == "atac" else "ADT_decoder.px_decoder"

    @property
    def second_output(self) -> str:
        return "peak_decoder.decoder_output.0" if self.second == "atac" else "ADT_decoder.px_scale_decoder.0"


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Every array of the original's state_dict by name, except library priors of modalities not in use."""
    hidden, latent, samples = layout.num_hidden, layout.num_latent, layout.num_samples
    columns = samples if samples > 1 else 0
    seen = columns if layout.conditional_encoder else 0
    decoded = columns if layout.conditional_decoder else 0
    second = layout.second_name
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        found[f"{name}.bias"] = (outputs,)

    def block(name: str, inputs: int, outputs: int, *, batch_norm: bool) -> None:
        linear(f"{name}.fc_layers.Layer 0.0", outputs, inputs)
        if batch_norm:
            for part in _BATCH_NORM:
                found[f"{name}.fc_layers.Layer 0.1.{part}"] = () if part == "num_batches_tracked" else (outputs,)

    def encoder(name: str, inputs: int, outputs: int) -> None:
        block(f"{name}.encoder", inputs, hidden, batch_norm=layout.batch_norm_encoder)
        linear(f"{name}.mean_encoder", outputs, hidden)
        linear(f"{name}.var_encoder", outputs, hidden)

    found["px_r"] = (layout.num_genes, samples) if layout.gene_by_sample else (layout.num_genes,)
    if layout.second == "atac":
        found["r"] = (1, samples) if layout.second_by_sample else (1,)
    else:
        found["py_r"] = (layout.num_second, samples) if layout.second_by_sample else (layout.num_second,)
    for name, modality in (("library_log", "rna"), ("library_d_log", layout.second)):
        if modality in layout.modalities:
            found[f"{name}_means"] = found[f"{name}_vars"] = (1, samples)
    block("gene_encoder", layout.num_genes + seen, hidden, batch_norm=layout.batch_norm_encoder)
    block(f"{second}_encoder", layout.num_second + seen, hidden, batch_norm=layout.batch_norm_encoder)
    encoder("z_encoder", 2 * hidden + seen, latent)
    encoder("z_encoder_one_mod", hidden + seen, latent)
    encoder("l_encoder", layout.num_genes + columns, 1)
    encoder("d_encoder", layout.num_second + columns, 1)
    block("gene_decoder.px_decoder", latent + decoded, hidden, batch_norm=layout.batch_norm_decoder)
    linear("gene_decoder.px_scale_decoder.0", layout.num_genes, hidden)
    block(layout.second_hidden, latent + decoded, hidden, batch_norm=layout.batch_norm_decoder)
    extra = int(layout.second == "atac" and layout.use_atac_libsize)
    linear(layout.second_output, layout.num_second, hidden + extra)
    block("domain_classifier_z.decoder", latent, ADVERSARY_HIDDEN, batch_norm=layout.batch_norm_decoder)
    linear("domain_classifier_z.decoder_output.0", samples, ADVERSARY_HIDDEN)
    return found


@dataclass(frozen=True)
class Entry:
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


def entries(model: Liam) -> list[Entry]:
    """Every parameter and buffer of a model with its original counterpart."""
    state = model.state_dict()

    def columns(own: str) -> int:
        table = state.get(f"{own}.sample_weight")
        return 0 if table is None else len(table)

    def layer(original: str, own: str, kind: Kind = "weight") -> Iterator[Entry]:
        yield Entry(f"{original}.weight", f"{own}.weight", kind, columns(own))
        yield Entry(f"{original}.bias", f"{own}.bias")

    def block(original: str, own: str, norm: str, kind: Kind = "weight") -> Iterator[Entry]:
        yield from layer(f"{original}.fc_layers.Layer 0.0", own, kind)
        if f"{norm}.batch_norm.weight" in state:
            for part in _BATCH_NORM:
                yield Entry(f"{original}.fc_layers.Layer 0.1.{part}", f"{norm}.batch_norm.{part}")

    def head(original: str, own: str) -> Iterator[Entry]:
        yield from layer(f"{original}.mean_encoder", f"{own}.mean")
        yield from layer(f"{original}.var_encoder", f"{own}.variance")

    def count_block(original: str, own: str) -> Iterator[Entry]:
        yield from block(original, own, f"{own}.block", "count-weight")

    def modality(name: str) -> Iterator[Entry]:
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
            yield Entry("r", f"{decoder}.r_raw", "row" if by_sample else "same")
        else:
            yield Entry("px_r" if name == "rna" else "py_r", f"{decoder}.log_theta")
        buffer = "library_log" if name == "rna" else "library_d_log"
        yield Entry(f"{buffer}_means", f"prior_mean_{name}", "row")
        yield Entry(f"{buffer}_vars", f"prior_variance_{name}", "row")

    found = [entry for name in model.modalities for entry in modality(name)]
    latent = "z_encoder" if len(model.modalities) > 1 else "z_encoder_one_mod"
    found += block(f"{latent}.encoder", "latent_encoder.linear", "latent_encoder.block")
    found += head(latent, "latent_encoder.head")
    if model.adversary is not None:
        found += block("domain_classifier_z.decoder", "adversary.linear", "adversary.block")
        found += layer("domain_classifier_z.decoder_output.0", "adversary.output")
    return found
