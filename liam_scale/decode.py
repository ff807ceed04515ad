"""Decode: stored embeddings -> normalised expression, accessibility and protein of chosen features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from liam_scale.command import Command
from liam_scale.model import Liam
from liam_scale.model.decoders import NegativeMultinomialDecoder
from liam_scale.run import RunDirectory, RunRecord, check_maker, open_stores
from liam_scale.samples import sample_codes
from liam_scale.training.devices import Device, check_device, device_of
from loaders.durable import replacing
from loaders.ecosystem import add_dense_matrix, write_anndata
from loaders.formats.root import HDF5_SUFFIXES
from loaders.options import Range, check_options
from loaders.stores import Store
from loaders.stores.base import check_finite

CELLS_PER_CHUNK = 4_096
"""Cells of one chunk of the written array."""

LOGIT_BYTES = 64 * 2**20
"""Memory of the logits of the cells decoded at once; all features of a modality enter the normalisation."""


@dataclass(frozen=True)
class DecodeConfig:
    """Decode chosen features of every cell, also of modalities that a cell lacks (imputation of mosaics)."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run whose embedding stands in the store."""
    out: Path
    """AnnData Zarr to write: cells x chosen features, float32."""
    features: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FEATURE ...")] = ()
    """Names of features; `adt:CD4` names the modality where names coincide. Default: all of `modality`."""
    modality: str | None = None
    """Look for features in this modality alone."""
    target_sample: Annotated[str, tyro.conf.arg(metavar="SAMPLE")] = "own"
    """Sample that all cells are decoded as; own: that of each cell; mean: average over all samples."""
    store: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE ...")] = ()
    """Store with the embedding; default: that of the training."""
    key: str = "X_liam"
    """Name of the embedding in obsm."""
    library_size: Annotated[float, Range(above=0)] = 1.0
    """Total of each cell and modality; 1 gives shares, 1e4 counts per ten thousand."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)


@dataclass(frozen=True)
class Chosen:
    """Features of one modality to decode: columns of the model, and their names in the result."""

    modality: str
    columns: np.ndarray
    names: list[str]


def decode(config: DecodeConfig) -> Path:
    """Write decoded values of every cell of the store, chunk by chunk.

    RNA and ADT: the decoder's share of a feature in the cell's total. ATAC: the probability of a peak among all peaks,
    exp(l_f) / sum exp(l), with the library size at the mean of the target sample. All times `library_size`.

    Raises
    ------
    ValueError
        No such feature, sample or embedding; or `out` exists.
    """
    directory = RunDirectory(config.run)
    record = directory.record()
    if record.parts:
        raise ValueError(f"run: {config.run} is a late integration; decode one of {', '.join(record.parts)} in it")
    if config.out.suffix in HDF5_SUFFIXES:
        raise ValueError(
            f"--out: got {config.out}, values are written as AnnData Zarr; name {config.out.with_suffix('.zarr')}"
        )
    if config.out.exists():
        raise ValueError(f"--out: {config.out} exists; name a new folder")
    chosen = choose_features(directory.features(), config.features, config.modality)
    model = directory.load_model().to(device_of(config.device))
    store = open_stores(config.store or record.stores)
    what = f"obsm[{config.key!r}] of {store.uri}"
    embed = " ".join(
        ["python -m liam_scale.embed", str(config.run), *(["--store", *config.store] if config.store else [])]
    )
    held = store.embedding_attributes(config.key)
    if not held:
        raise ValueError(f"{what}: there is no such embedding; write it with: {embed} --key {config.key}")
    check_maker(
        held,
        record.id,
        what=what,
        cure=f"decode with that run, or write this one's first: {embed} --key {config.key} --overwrite",
    )
    targets = _target_codes(config, store, record)
    data, num_cells = _empty(store, chosen), store.schema.num_cells
    with replacing(config.out, alone=True) as path:
        write_anndata(data, path)
        values = add_dense_matrix(path, data.n_vars, cells_per_chunk=CELLS_PER_CHUNK)
        for start in range(0, num_cells, CELLS_PER_CHUNK):
            stop = min(num_cells, start + CELLS_PER_CHUNK)
            embedding = store.read_embedding(config.key, start, stop)
            if embedding.shape[1] != model.num_latent:
                raise ValueError(
                    f"{what} has {embedding.shape[1]} dimensions, the model {model.num_latent}; write its embedding "
                    f"with: {embed} --key {config.key}"
                )
            check_finite(store, embedding, start, what=what, cure=f"write it again with: {embed} --key {config.key}")
            decoded = _decode_chunk(model, torch.from_numpy(embedding), [t[start:stop] for t in targets], chosen)
            values[start:stop] = decoded.cpu().numpy() * np.float32(config.library_size)
    return config.out


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


def _target_codes(config: DecodeConfig, store: Store, record: RunRecord) -> list[np.ndarray]:
    """Sample code of every cell to decode as; several arrays are averaged over."""
    samples, num_cells = record.data.samples, store.schema.num_cells
    if config.target_sample == "own":
        return [sample_codes(store, record.batch_key, samples)]
    if config.target_sample == "mean":
        return [np.full(num_cells, code) for code in range(len(samples))]
    if config.target_sample not in samples:
        raise ValueError(
            f"--target-sample: got {config.target_sample}; choose own, mean, or one of {', '.join(samples[:20])}"
        )
    return [np.full(num_cells, samples.index(config.target_sample))]


def _empty(store: Store, chosen: list[Chosen]) -> anndata.AnnData:
    """Cells and features of the result, without values."""
    names = [name for part in chosen for name in part.names]
    modalities = [part.modality for part in chosen for _ in part.names]
    var = pd.DataFrame({"modality": pd.Categorical(modalities)}, index=pd.Index(names))
    return anndata.AnnData(obs=store.obs_frame(), var=var)


@torch.no_grad()
def _decode_chunk(model: Liam, z_BL: Tensor, targets: list[np.ndarray], chosen: list[Chosen]) -> Tensor:
    """(B, chosen features) shares, averaged over the targets."""
    parts, device = [], next(model.parameters()).device
    for part in chosen:
        columns = torch.from_numpy(part.columns).to(device)
        step = max(1, LOGIT_BYTES // (4 * model.data.num_features[part.modality]))
        pieces = []
        for start in range(0, len(z_BL), step):
            own = slice(start, start + step)
            z, codes = z_BL[own].to(device), [torch.from_numpy(t[own]).long().to(device) for t in targets]
            decoded = [_shares(model, part.modality, z, sample) for sample in codes]
            pieces.append(torch.stack([shares[:, columns] for shares in decoded]).mean(dim=0))
        parts.append(torch.cat(pieces))
    return torch.cat(parts, dim=1)


def _shares(model: Liam, modality: str, z_BL: Tensor, sample_B: Tensor) -> Tensor:
    """(B, F) share of every feature of a modality in the cell's total."""
    decoder = model.decoders[modality]
    if isinstance(decoder, NegativeMultinomialDecoder):
        log_library_B = model.library_prior(modality)[0][sample_B]

        return torch.softmax(decoder.logits(z_BL, log_library_B, sample_B), dim=1)
    return decoder.scale(z_BL, sample_B)  # type: ignore[operator]


main = Command(
    DecodeConfig,
    lambda config: print(f"wrote {decode(config)}"),
    prog="liam-scale decode",
    description="Normalised values from embeddings.",
)

if __name__ == "__main__":
    sys.exit(main())
