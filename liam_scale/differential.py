"""Differential analysis of groups of cells from their embedding: expression, accessibility, protein.

As the change mode of scvi-tools (Boyeau et al., bioRxiv 2019): pairs of cells, one of each group, are decoded as if
both had come from one sample, and their log fold changes say how probably a feature changes. What the counts of the
groups cannot tell is added: a share that is estimated from few counts is no more certain than those counts.

Shapes: P pairs of cells, F features, G groups, S samples.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from liam_scale.command import Command
from liam_scale.continuous import values_at
from liam_scale.finding import stores_of
from liam_scale.model import Liam
from liam_scale.model.decoders import NegativeBinomialDecoder
from liam_scale.posterior import Latents, drawn, embedded, group_codes, shares, single
from liam_scale.run import RunDirectory
from liam_scale.training.devices import Device, check_device, device_of
from loaders.durable import replacing
from loaders.options import Range, check_options
from loaders.progress import Progress
from loaders.sizing import parse_memory
from loaders.stores import Store
from loaders.stores.base import cell_totals

CELLS_PER_CHUNK = 8_192
"""Cells whose latent variables are read at a time."""

SHARE_BYTES = 16 * 2**20
"""Memory of the shares of the pairs decoded at once, of which there are some six arrays."""

REST = "rest"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DifferentialConfig:
    """Compare groups of cells: features whose share in the cell's total changes, as the samples of the model have it
    on average."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    store: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[STORE ...]")] = ()
    """Store with the embedding and the groups; default: that of the training."""
    groupby: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = field(kw_only=True)
    """Obs column with the groups, such as cell types or clusters."""
    group: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP ...")] = ()
    """Groups to compare with the reference; default: each in turn."""
    reference: Annotated[str, tyro.conf.arg(metavar="GROUP")] = REST
    """Group to compare with; rest: all other cells that have a group."""
    modality: str = "rna"
    """Modality whose features are compared."""
    at: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE ...")] = ()
    """Values of continuous covariates at which groups are compared, such as age=40; default: the training's means."""
    delta: Annotated[float, Range(least=0)] = 0.25
    """Log2 fold change that a change must exceed to count as one."""
    fdr: Annotated[float, Range(above=0, below=1)] = 0.05
    """Expected share of false ones among the features called."""
    pairs: Annotated[int, Range(least=100)] = 2_000
    """Pairs of cells that are decoded for each comparison."""
    cells: Annotated[int, Range(least=10)] = 2_000
    """Most cells that stand for a group; memory grows with them and not with the store."""
    posterior: bool = False
    """Draw the cells of each pair from their posterior, for which the encoders read all counts. Default: take the
    embedding in the store."""
    out: Path | None = None
    """Table to write, .csv or .csv.gz, a row for each group and feature. Default: print the first of each group."""
    key: str = "X_liam"
    """Name of the embedding in obsm, without --posterior."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "512MiB"
    """Memory of the loader, with --posterior."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the chosen cells, of the pairs and of the draws."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        parse_memory(self.memory)
        if self.out is not None and not self.out.name.endswith((".csv", ".csv.gz")):
            raise ValueError(f"--out: got {self.out}; name a .csv or .csv.gz")
        if self.reference in self.group:
            raise ValueError(f"--group: got {self.reference}, which is the --reference too; name another")


@dataclass(frozen=True)
class _Group:
    """Cells of one group.

    Attributes
    ----------
    size
        Cells in the store.
    total, dispersal
        Counts of the modality in all its cells, n = sum n_i; and sum n_i^2 / n^2, the inverse of the number of cells
        where all are alike.
    places
        Chosen cells, as places among the latent variables read.
    """

    name: str
    size: int
    total: float
    dispersal: float
    places: np.ndarray


def differential(
    config: DifferentialConfig, store: Store | None = None, labels: pd.Series | None = None
) -> pd.DataFrame:
    """Compare groups of cells feature by feature.

    Memory does not grow with the number of cells but for 12 bytes each, of its group and its total.

    Parameters
    ----------
    store
        An open one, in the place of `config.store`.
    labels
        Groups by cell id, in the place of an obs column of the store.

    Returns
    -------
    DataFrame indexed by feature, for each group the most probable changes first: `group1`, `group2`; `scale1`,
    `scale2`, mean shares in the cells' totals; `lfc_mean`, `lfc_std`, log2 fold change of group1 over group2;
    `proba_de`, the probability that it exceeds delta in the direction in which it more probably does; `bayes_factor`,
    log(p / (1 - p)); `expected_fdr`, the expected share of false ones among the features down to this; and
    `is_de_fdr_<fdr>`.

    Raises
    ------
    ValueError
        No such column, group, modality or embedding.
    """
    directory = RunDirectory(config.run)
    record = single(directory, "compare with")
    if config.modality not in record.model.modalities:
        raise ValueError(f"--modality: got {config.modality}; the model holds {', '.join(record.model.modalities)}")
    values_at(config.at, record.data.continuous)  # refused before anything is read
    store = store or stores_of(directory, config.store)
    codes, names = group_codes(store, config.groupby) if labels is None else _codes_of(store, labels)
    compared, others = _comparisons(config, codes, names)
    model = directory.load_model().to(device_of(config.device))
    source = (
        drawn(directory, model, store, cells=1_024, memory=config.memory, seed=config.seed)
        if config.posterior
        else embedded(directory, model, store, key=config.key, cells=CELLS_PER_CHUNK, stores=config.store)
    )
    rows = _chosen_rows(config, codes, len(names))
    latents, places = _collected(source, rows)
    transform = directory.loader_config().transforms(record.data.kinds).get(config.modality)
    groups = _described(store, config.modality, transform, codes, names, places)
    features = directory.features()[config.modality]
    tables = []
    with Progress("compare", len(compared), unit="groups") as progress:
        for number in compared:
            references = [groups[other] for other in others if other != number]
            found = _compare(model, config, latents, groups[number], references, number)
            tables.append(_table(config, groups[number].name, features, found))
            progress.advance(1)
    table = pd.concat(tables)
    if config.out is not None:
        with replacing(config.out) as path:
            table.to_csv(path, float_format="%.6g")
    return table


def _codes_of(store: Store, labels: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes of the store's cells from labels by cell id; a cell without one has none."""
    if not labels.index.is_unique:
        raise ValueError("groupby: got labels with cell ids that stand there more than once; make them unique")
    groups = labels.astype("category")
    places = labels.index.get_indexer(pd.Index(store.cell_ids(0, store.schema.num_cells)))
    if (places < 0).all():
        raise ValueError(
            f"groupby: got labels of cells such as {str(labels.index[0])!r}, of which {store.uri} has none; index them "
            f"by its cell ids, such as {str(store.cell_ids(0, 1)[0])!r}"
        )
    codes = np.where(places >= 0, groups.cat.codes.to_numpy()[places], -1)
    return codes, tuple(map(str, groups.cat.categories))


def _comparisons(config: DifferentialConfig, codes: np.ndarray, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the groups to compare, and of those in the reference."""
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    known = {name: number for number, name in enumerate(names) if sizes[number]}
    for option, asked in (("--group", config.group), ("--reference", (config.reference,))):
        for name in asked:
            if name not in known and not (option == "--reference" and name == REST):
                raise ValueError(f"{option}: got {name}; {config.groupby} has {', '.join(list(known)[:20])}")
    others = list(known.values()) if config.reference == REST else [known[config.reference]]
    if len(known) < 2:
        raise ValueError(f"--groupby: got {config.groupby}, which has one group; name a column with two or more")
    compared = [known[name] for name in config.group or known if name != config.reference]
    return compared, others


def _chosen_rows(config: DifferentialConfig, codes: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """Ascending rows of the cells that stand for each group."""
    chosen = []
    for number in range(num_groups):
        rows = np.flatnonzero(codes == number)
        rng = np.random.default_rng([config.seed, 1, number])
        chosen.append(np.sort(rng.choice(rows, min(len(rows), config.cells), replace=False)))
    return chosen


def _collected(source: Iterator[Latents], rows: list[np.ndarray]) -> tuple[Latents, list[np.ndarray]]:
    """Latent variables of the chosen cells, and where those of each group stand among them."""
    wanted = np.unique(np.concatenate(rows))
    means, variances, seed = [], [], 0
    for latents in source:
        own = latents.rows.cpu().numpy()
        inside = torch.from_numpy(np.flatnonzero(np.isin(own, wanted))).to(latents.mean.device)
        means.append(latents.mean[inside])
        seed = latents.seed
        if latents.variance is not None:
            variances.append(latents.variance[inside])
    variance = torch.cat(variances) if variances else None
    kept = Latents(torch.from_numpy(wanted), torch.cat(means), variance, seed)
    return kept, [np.searchsorted(wanted, own) for own in rows]


def _described(
    store: Store,
    modality: str,
    transform: str | None,
    codes: np.ndarray,
    names: Sequence[str],
    places: list[np.ndarray],
) -> list[_Group]:
    own, rows = cell_totals(store, modality, transform), store.modality_rows(modality)
    present = codes >= 0 if rows is None else (codes >= 0) & (rows >= 0)
    totals = own[present] if rows is None else own[rows[present]]
    sums, squares = (np.bincount(codes[present], totals**power, minlength=len(names)) for power in (1, 2))
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    if not sums.any():
        raise ValueError(f"--modality: got {modality}, of which no cell with a group has counts in {store.uri}")
    return [
        _Group(name, int(size), total, square / total**2 if total else 1.0, own)
        for name, size, total, square, own in zip(names, sizes, sums, squares, places, strict=True)
    ]


@dataclass(frozen=True)
class _Found:
    """(F,) results of a comparison."""

    reference: str
    scale1: Tensor
    scale2: Tensor
    lfc_mean: Tensor
    lfc_std: Tensor
    probability: Tensor


def _compare(
    model: Liam, config: DifferentialConfig, latents: Latents, group: _Group, references: list[_Group], number: int
) -> _Found:
    """Decode pairs of cells twice: for the mean shares, which say how many counts there are, and for the changes."""
    rng = np.random.default_rng([config.seed, 2, number])
    one = rng.choice(group.places, config.pairs)
    sizes = np.array([other.size for other in references], dtype=np.float64)
    which = rng.choice(len(references), config.pairs, p=sizes / sizes.sum())
    two = np.array([rng.choice(references[other].places) for other in which])
    device = latents.mean.device
    # Every pair is decoded for one sample, in turn: an average over all of them for the price of one.
    samples = torch.arange(config.pairs, device=device) % len(model.data.samples)
    z1, z2 = (_drawn_pairs(latents, places, 2 * number + side) for side, places in enumerate((one, two)))
    step = max(1, SHARE_BYTES // (4 * model.data.num_features[config.modality]))
    chunks = [slice(start, start + step) for start in range(0, config.pairs, step)]

    known = model.data.continuous
    at = {**dict.fromkeys(known, 0.0), **values_at(config.at, known)}

    def decoded(z: Tensor, own: slice) -> Tensor:
        numbers = {name: z.new_full((len(z[own]),), value) for name, value in at.items()}
        return shares(model, config.modality, z[own], samples[own], numbers)

    scale1, scale2 = (
        torch.stack([decoded(z, own).sum(dim=0, dtype=torch.float64) for own in chunks]).sum(dim=0) / config.pairs
        for z in (z1, z2)
    )
    total = sum(other.total for other in references)
    dispersal = sum(other.dispersal * other.total**2 for other in references) / max(total, 1.0) ** 2
    spread = _uncertainty(model, config.modality, scale1 * group.total, group.dispersal) + _uncertainty(
        model, config.modality, scale2 * total, dispersal
    )
    tau = spread.sqrt().to(torch.float32)
    half = 0.5 / max(1.0, min(group.total, total))
    sums = torch.zeros(4, len(tau), dtype=torch.float64, device=device)
    for own in chunks:
        lfc = torch.log2((decoded(z1, own) + half) / (decoded(z2, own) + half))
        up, down = (torch.special.ndtr((sign * lfc - config.delta) / tau) for sign in (1.0, -1.0))
        sums += torch.stack([part.sum(dim=0, dtype=torch.float64) for part in (lfc, lfc.square(), up, down)])
    mean, square, up, down = sums / config.pairs
    deviation = ((square - mean.square()).clamp(min=0.0) + spread).sqrt()
    name = config.reference if config.reference == REST else references[0].name
    return _Found(name, scale1, scale2, mean, deviation, torch.maximum(up, down))


def _drawn_pairs(latents: Latents, places: np.ndarray, number: int) -> Tensor:
    """(P, L) latent variables of the cells at these places, each a draw of its own."""
    own = torch.from_numpy(places).to(latents.mean.device)
    variance = None if latents.variance is None else latents.variance[own]
    return Latents(torch.arange(len(own), device=own.device), latents.mean[own], variance, latents.seed).draw(number)


def _uncertainty(model: Liam, modality: str, counts_F: Tensor, dispersal: float) -> Tensor:
    """(F,) variance of the log2 of a group's share of which `counts_F` are expected.

    That of the logarithm of a gamma variable, the posterior of a Poisson rate under Jeffreys' prior; and, where the
    model's counts are negative binomial with inverse dispersion theta, sum (n_i / n)^2 / theta of the cells.
    """
    variance = torch.special.polygamma(1, counts_F + 0.5)
    decoder = model.decoder(modality)
    if isinstance(decoder, NegativeBinomialDecoder):
        theta = torch.exp(decoder.log_theta.detach().double())
        variance = variance + dispersal / (theta.mean(dim=1) if theta.dim() == 2 else theta)
    return variance / math.log(2.0) ** 2


def _table(config: DifferentialConfig, name: str, features: list[str], found: _Found) -> pd.DataFrame:
    columns = {
        key: getattr(found, key).cpu().numpy().astype(np.float64) for key in ("scale1", "scale2", "lfc_mean", "lfc_std")
    }
    p = found.probability.cpu().numpy()
    tiny = 1e-8
    table = pd.DataFrame(
        {
            "group1": name,
            "group2": found.reference,
            **columns,
            "proba_de": p,
            "bayes_factor": np.log(p + tiny) - np.log(1.0 - p + tiny),
        },
        index=pd.Index(features, name="feature"),
    )
    order = np.lexsort((-np.abs(columns["lfc_mean"]), -p))
    table = table.iloc[order]
    table["expected_fdr"] = np.cumsum(1.0 - p[order]) / np.arange(1, len(p) + 1)
    table[f"is_de_fdr_{config.fdr:g}"] = table["expected_fdr"] <= config.fdr
    return table


def _compare_and_tell(config: DifferentialConfig) -> None:
    table = differential(config)
    called = f"is_de_fdr_{config.fdr:g}"
    for name, own in table.groupby("group1", sort=False):
        up = own[own[called] & (own["lfc_mean"] > 0)]
        shown = ", ".join(f"{feature} ({change:+.1f})" for feature, change in up["lfc_mean"].head(8).items())
        number = int(own[called].sum())
        print(f"{name} against {config.reference}: {number:,} of {len(own):,} change; up: {shown or 'none'}")
    if config.out is not None:
        print(f"wrote {config.out}")


main = Command(
    DifferentialConfig,
    _compare_and_tell,
    prog="liam-scale differential",
    description="Groups of cells -> features that change between them.",
)

if __name__ == "__main__":
    sys.exit(main())
