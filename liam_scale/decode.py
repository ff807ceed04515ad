"""Decode: normalised expression, accessibility and protein of chosen features, by cell or group, with uncertainty."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from liam_scale.command import Command
from liam_scale.continuous import standardised, values_at
from liam_scale.finding import stores_of
from liam_scale.model import Liam
from liam_scale.posterior import Latents, drawn, embedded, group_codes, shares, single
from liam_scale.run import RunDirectory, RunRecord
from liam_scale.samples import sample_codes
from liam_scale.training.devices import Device, check_device, device_of
from loaders.durable import replacing
from loaders.ecosystem import add_dense_matrix, write_anndata
from loaders.formats.root import HDF5_SUFFIXES
from loaders.options import Range, check_options
from loaders.sizing import parse_memory
from loaders.stores import Store

MOST_CELLS = 4_096
"""Cells of one chunk of the written array, or fewer: so many as have `VALUE_BYTES` of values."""

VALUE_BYTES, LOGIT_BYTES = 64 * 2**20, 64 * 2**20
"""Memory of the chosen values of one chunk, and of the logits of the cells decoded at once; all features of a modality
enter the normalisation."""


@dataclass(frozen=True)
class Decoding:
    """Which values of which cells, and whence their latent variables come."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    features: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FEATURE ...")] = ()
    """Names of features; `adt:CD4` names the modality where names coincide. Default: all of `modality`."""
    modality: str | None = None
    """Look for features in this modality alone."""
    groupby: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column: a row for each group of cells, the mean of its cells, instead of one for each cell."""
    target_sample: Annotated[str, tyro.conf.arg(metavar="SAMPLE")] = "own"
    """Sample that all cells are decoded as; own: that of each cell; mean: average over all samples."""
    at: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE ...")] = ()
    """Values of continuous covariates that all cells are decoded for, such as age=40; else each cell has its own."""
    num_samples: Annotated[int, Range(least=0)] = 0
    """Posterior draws of each cell, for which the encoders read its counts; 0: decode the embedding in the store, once.
    Several give the mean and the standard deviation over draws."""
    store: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE ...")] = ()
    """Store with the cells; default: that of the training."""
    key: str = "X_liam"
    """Name of the embedding in obsm, where there are no draws."""
    library_size: Annotated[float, Range(above=0)] = 1.0
    """Total of each cell and modality; 1 gives shares, 1e4 counts per ten thousand."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "512MiB"
    """Memory of the loader, where there are draws."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the draws; a draw rests on it and the cell alone."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        parse_memory(self.memory)


@dataclass(frozen=True)
class DecodeConfig(Decoding):
    """Decode chosen features of every cell, also of modalities that a cell lacks (imputation of mosaics)."""

    out: Path = field(kw_only=True)
    """AnnData Zarr to write: cells (or groups) x chosen features, float32; the standard deviation is the layer `sd`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix in HDF5_SUFFIXES:
            raise ValueError(
                f"--out: got {self.out}, values are written as AnnData Zarr; name {self.out.with_suffix('.zarr')}"
            )
        if self.out.exists():
            raise ValueError(f"--out: {self.out} exists; name a new folder")


@dataclass(frozen=True)
class Chosen:
    """Features of one modality to decode: columns of the model, and their names in the result."""

    modality: str
    columns: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class Values:
    """Of cells that follow each other, or of groups.

    Attributes
    ----------
    rows
        (B,) rows in the store, or numbers of the groups.
    mean, sd
        (B, chosen features), over draws; `sd` is None where there are none to compare.
    """

    rows: np.ndarray
    mean: np.ndarray
    sd: np.ndarray | None


def decode(config: DecodeConfig, store: Store | None = None) -> Path:
    """Write decoded values, chunk by chunk, as AnnData Zarr: of every cell, or of every group of cells.

    RNA and ADT: the decoder's share of a feature in the cell's total. ATAC: the probability of a peak among all peaks.
    All times `library_size`. Memory does not grow with the number of cells, but for obs.

    Parameters
    ----------
    store
        An open one, in the place of `config.store`.

    Raises
    ------
    ValueError
        No such feature, sample, group or embedding; or `out` exists.
    """
    work = _Work(config, store)
    data = anndata.AnnData(obs=work.obs(), var=work.var())
    with replacing(config.out, alone=True) as path:
        write_anndata(data, path)
        names = ["X", "layers/sd"] if work.has_sd else ["X"]
        arrays = [add_dense_matrix(path, data.n_vars, cells_per_chunk=work.chunk_cells, name=name) for name in names]
        for values in work.values():
            for array, part in zip(arrays, (values.mean, values.sd), strict=False):
                array[int(values.rows[0]) : int(values.rows[-1]) + 1] = part
    return config.out


def normalized(config: Decoding, store: Store | None = None) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The same in memory: mean, and standard deviation over draws where there are several."""
    work = _Work(config, store)
    parts = list(work.values())
    columns, index = work.var().index, work.obs().index
    mean = pd.DataFrame(np.concatenate([part.mean for part in parts]), index=index, columns=columns)
    if not work.has_sd:
        return mean, None
    spread = [part.sd for part in parts if part.sd is not None]
    return mean, pd.DataFrame(np.concatenate(spread), index=index, columns=columns)


class _Work:
    """A decoding whose options fit its run and its store; nothing has been computed yet."""

    def __init__(self, config: Decoding, store: Store | None) -> None:
        self.config, directory = config, RunDirectory(config.run)
        record = single(directory, "decode")
        self.chosen = choose_features(directory.features(), config.features, config.modality)
        self.model = directory.load_model().to(device_of(config.device))
        self.store = store or stores_of(directory, config.store)
        self.targets = _target_codes(config, self.store, record)
        self.numbers = _numbers(config, self.store, record)
        self.groups = None if config.groupby is None else group_codes(self.store, config.groupby)
        self.has_sd = config.num_samples > 1
        self.num_columns = sum(len(part.columns) for part in self.chosen)
        self.chunk_cells = max(1, min(MOST_CELLS, VALUE_BYTES // (4 * self.num_columns)))
        options = {"cells": self.chunk_cells}
        self.latents: Iterator[Latents] = (
            drawn(directory, self.model, self.store, memory=config.memory, seed=config.seed, **options)
            if config.num_samples
            else embedded(directory, self.model, self.store, key=config.key, stores=config.store, **options)
        )

    def obs(self) -> pd.DataFrame:
        if self.groups is None:
            return self.store.obs_frame()
        codes, names = self.groups
        index = pd.Index(names, name=self.config.groupby)
        return pd.DataFrame({"cells": np.bincount(codes[codes >= 0], minlength=len(names))}, index=index)

    def var(self) -> pd.DataFrame:
        names = [name for part in self.chosen for name in part.names]
        modalities = [part.modality for part in self.chosen for _ in part.names]
        return pd.DataFrame({"modality": pd.Categorical(modalities)}, index=pd.Index(names))

    def values(self) -> Iterator[Values]:
        return self._by_cell() if self.groups is None else self._by_group(*self.groups)

    def _by_cell(self) -> Iterator[Values]:
        size = np.float32(self.config.library_size)
        for latents in self.latents:
            rows = latents.rows.cpu().numpy()
            targets = [torch.from_numpy(codes[rows]).long().to(latents.rows.device) for codes in self.targets]
            numbers = {k: torch.from_numpy(own[rows]).to(latents.rows.device) for k, own in self.numbers.items()}
            draws = max(1, self.config.num_samples)
            mean, variance = _moments(self.model, latents, targets, numbers, self.chosen, draws)
            sd = variance.sqrt_().cpu().numpy() * size if self.has_sd else None
            yield Values(rows, mean.cpu().numpy() * size, sd)

    def _by_group(self, codes: np.ndarray, names: Sequence[str]) -> Iterator[Values]:
        """One chunk with the means of the groups; draws of different cells are independent, so variances add up."""
        mean, variance = (np.zeros((len(names), self.num_columns)) for _ in range(2))
        for values in self._by_cell():
            own = codes[values.rows]
            for group in np.unique(own[own >= 0]):
                mean[group] += values.mean[own == group].sum(axis=0, dtype=np.float64)
                if values.sd is not None:
                    variance[group] += np.square(values.sd[own == group], dtype=np.float64).sum(axis=0)
        with np.errstate(invalid="ignore"):  # a group without cells has no mean
            counts = np.bincount(codes[codes >= 0], minlength=len(names))[:, None]
            sd = (np.sqrt(variance) / counts).astype(np.float32) if self.has_sd else None
            yield Values(np.arange(len(names)), (mean / counts).astype(np.float32), sd)


def choose_features(features: dict[str, list[str]], names: Sequence[str], modality: str | None) -> list[Chosen]:
    """Find features by name, in the order of the modalities and of the names given.

    Raises
    ------
    ValueError
        A name is in no modality, or in several.
    """
    if modality is not None and modality not in features:
        raise ValueError(f"--modality: got {modality}; the model holds {', '.join(features)}")
    searched = {modality: features[modality]} if modality else features
    if not names:
        if modality is None:
            raise ValueError("--features: got none; name features, or a --modality to decode all of it")
        return [Chosen(modality, np.arange(len(features[modality])), list(features[modality]))]
    columns = {m: {name: column for column, name in enumerate(own)} for m, own in searched.items()}
    found: dict[str, list[tuple[int, str]]] = {m: [] for m in searched}
    for name in names:
        prefix, colon, rest = name.partition(":")
        places = [prefix] if colon and prefix in columns else [m for m in columns if name in columns[m]]
        plain = rest if colon and prefix in columns else name
        if len(places) != 1 or plain not in columns[places[0]]:
            problem = f"is in {' and '.join(places)}; write {places[0]}:{name}" if len(places) > 1 else "is nowhere"
            raise ValueError(f"--features: {name} {problem} among the features of {', '.join(searched)}")
        found[places[0]].append((columns[places[0]][plain], name))
    return [Chosen(m, np.array([c for c, _ in own]), [n for _, n in own]) for m, own in found.items() if own]


def _target_codes(config: Decoding, store: Store, record: RunRecord) -> list[np.ndarray]:
    """Sample code of every cell to decode as; several arrays are averaged over."""
    samples, num_cells = record.data.samples, store.schema.num_cells
    if config.target_sample == "own":
        return [sample_codes(store, record.batch_key, samples)]
    if config.target_sample == "mean":
        return [np.broadcast_to(code, num_cells) for code in range(len(samples))]
    if config.target_sample not in samples:
        raise ValueError(
            f"--target-sample: got {config.target_sample}; choose own, mean, or one of {', '.join(samples[:20])}"
        )
    return [np.broadcast_to(samples.index(config.target_sample), num_cells)]


def _numbers(config: Decoding, store: Store, record: RunRecord) -> dict[str, np.ndarray]:
    """(n,) standardised value of every cell to decode for, by continuous covariate."""
    known = record.data.continuous
    given = values_at(config.at, known)
    own = standardised(store, {name: told for name, told in known.items() if name not in given})
    return {**own, **{name: np.full(store.schema.num_cells, value, np.float32) for name, value in given.items()}}


@torch.no_grad()
def _moments(
    model: Liam,
    latents: Latents,
    targets: list[Tensor],
    numbers: Mapping[str, Tensor],
    chosen: list[Chosen],
    num_draws: int,
) -> tuple[Tensor, Tensor]:
    """(B, chosen features) mean and variance over draws of the shares, which are averaged over the targets."""
    widest = max(model.data.num_features[part.modality] for part in chosen)
    step = max(1, LOGIT_BYTES // (4 * widest))
    means, variances = [], []
    for start in range(0, len(latents.rows), step):
        own = slice(start, start + step)
        few, samples = latents[own], [codes[own] for codes in targets]
        values = {name: column[own] for name, column in numbers.items()}
        mean, squares = (torch.zeros(()).to(few.mean) for _ in range(2))
        for number in range(num_draws):
            share = _chosen_shares(model, few.draw(number), samples, values, chosen)
            # Welford's update: a variance is not the small difference of two large sums.
            before, mean = share - mean, mean + (share - mean) / (number + 1)
            squares = squares + before * (share - mean)
        means.append(mean)
        variances.append(squares / max(1, num_draws - 1))
    return torch.cat(means), torch.cat(variances)


def _chosen_shares(
    model: Liam, z_BL: Tensor, samples: list[Tensor], numbers: Mapping[str, Tensor], chosen: list[Chosen]
) -> Tensor:
    """(B, chosen features), averaged over the samples."""
    parts = []
    for part in chosen:
        columns = torch.from_numpy(part.columns).to(z_BL.device)
        decoded = [shares(model, part.modality, z_BL, sample_B, numbers)[:, columns] for sample_B in samples]
        parts.append(torch.stack(decoded).mean(dim=0))
    return torch.cat(parts, dim=1)


main = Command(
    DecodeConfig,
    lambda config: print(f"wrote {decode(config)}"),
    prog="liam-scale decode",
    description="Normalised values of cells or groups.",
)

if __name__ == "__main__":
    sys.exit(main())
