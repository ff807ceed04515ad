"""Simulated RNA + ATAC (+ ADT) atlases with known cell types and sample effects, streamed to a store at any size.

A cell's expected counts are `depth * (w p_a + (1 - w) p_b) * effect_s`: two archetypes a and b (the cell's type and
another one), mixed by w, and the multiplicative effect of its sample s. Its counts are the points of a Poisson process:
each point chooses an archetype, a feature of it, and stays with the probability of the sample's effect.

Shapes: B cells, K archetypes, S samples, F features, N points.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse

from loaders.csr import SparseRows, index_dtype, offsets_of
from loaders.ecosystem import plain_mudata
from loaders.ingest.writer import ModalityLayout, StoreWriter
from loaders.modalities import MODALITIES
from loaders.schema import Schema
from loaders.sizing import default_threads

_BLOCK = 256
"""Cells drawn by one task, from generators keyed (seed, purpose, block): a cell does not depend on how many follow."""

_SLOT_BITS, _EFFECT_BITS, _MIX_BITS = 20, 8, 16
"""Bits of a point's 64 that choose its feature (shares in steps of 2^-20; the mean of 116,490 peaks is 9 steps),
whether the sample's effect keeps it, and its archetype."""

_SIGMAS = {"rna": (1.6, 1.2), "atac": (0.9, 0.9), "adt": (1.0, 1.0)}
"""Standard deviations of log rates: between features, and between types in a fifth of the features."""

_DEPTH_SIGMA = 0.35
_NORMAL_QUANTILES = np.array([-1.2816, -0.5244, 0.0, 0.5244, 1.2816])
"""Quantiles 0.1, 0.3, 0.5, 0.7, 0.9 of the normal distribution: five equally likely depths."""

_PROTEINS_POINTS = 3_000
"""Mean total count of antibodies per cell."""

_VALUE_DTYPES: dict[str, np.dtype[Any]] = {
    "rna": np.dtype(np.uint8),
    "atac": np.dtype(np.uint8),
    "adt": np.dtype(np.uint16),
}
_NAMES = {"rna": "gene", "atac": "peak", "adt": "protein"}


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is to be simulated.

    Types are archetypes: log-normal feature rates, of which a type changes a fifth. A cell mixes its type with another
    one (weight 0.7 to 1), has a log-normal depth of its own and Poisson counts; samples multiply rates and differ in
    composition. Cells come in random order.
    """

    num_genes: int = 13_431
    num_peaks: int = 116_490
    num_proteins: int = 0
    """Features of rna, atac and adt; 0 leaves the modality out."""
    num_samples: int = 4
    num_types: int = 12
    genes_per_cell: float = 800
    peaks_per_cell: float = 3_600
    """Mean number of non-zeros of a cell."""
    mosaic: Sequence[Sequence[str]] | None = None
    """Modalities of each sample, for example `(("rna", "atac"), ("rna",), ("atac",))`, repeated over the samples; None:
    every sample has all."""
    sample_effect: float = 0.35
    """Standard deviation of the samples' log effects on features; 0.0 for none."""
    num_conditions: int = 1
    """With several, sample s is replicate s // num_conditions under condition s % num_conditions: the effect of a
    replicate is shared by its conditions, and obs has `replicate` and `condition`."""
    condition_effect: float = 0.35
    """Standard deviation of the conditions' log effects on features, shared by their replicates."""
    num_sites: int = 1
    """With several, samples are nested in sites: sample s is of site s // (num_samples // num_sites), whose effect adds
    to its own, and obs has `site`."""
    site_effect: float = 0.35
    """Standard deviation of the sites' log effects on features."""
    seed: int = 0
    """Decides everything; cell c is the same in a store of any size."""

    def __post_init__(self) -> None:
        for name, features in self.num_features.items():
            wanted = self.nonzeros_per_cell(name)
            if wanted > 0.6 * features:
                raise ValueError(
                    f"non-zeros per cell of {name}: got {wanted:g} of {features} features; "
                    "a simulated cell fills at most 60% of them: ask for fewer, or for more features"
                )
        for name in {name for names in self.mosaic or () for name in names} - set(self.num_features):
            raise ValueError(f"mosaic: got {name!r}, simulated are {', '.join(self.num_features)}; name one of them")
        if self.num_conditions < 1 or self.num_samples % self.num_conditions:
            raise ValueError(
                f"num_conditions: got {self.num_conditions} for {self.num_samples} samples; every replicate is seen"
                " under every condition: give a number that divides num_samples"
            )
        if self.num_sites < 1 or self.num_samples % self.num_sites:
            raise ValueError(
                f"num_sites: got {self.num_sites} for {self.num_samples} samples; every site has as many: give a number"
                " that divides num_samples"
            )
        if self.num_samples < 1 or self.num_types < 2:
            raise ValueError(
                f"num_samples, num_types: got {self.num_samples}, {self.num_types}; give at least 1 sample and 2 types"
            )

    @property
    def num_features(self) -> dict[str, int]:
        features = {"rna": self.num_genes, "atac": self.num_peaks, "adt": self.num_proteins}
        return {name: count for name, count in features.items() if count}

    def nonzeros_per_cell(self, name: str) -> float:
        return {"rna": self.genes_per_cell, "atac": self.peaks_per_cell}.get(name, 0.5 * self.num_proteins)

    def has(self, name: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether cells of these samples have the modality."""
        mosaic = self.mosaic or [tuple(self.num_features)]
        return np.array([name in mosaic[s % len(mosaic)] for s in range(self.num_samples)])[samples]

    def layouts(self) -> dict[str, ModalityLayout]:
        return {
            name: ModalityLayout(_var(name, features), _VALUE_DTYPES[name], self.nonzeros_per_cell(name))
            for name, features in self.num_features.items()
        }


@dataclass(frozen=True)
class _Cells:
    """Parameters of a block's cells: (B,) each; depth per modality."""

    samples: npt.NDArray[np.int64]
    types: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    depths: dict[str, npt.NDArray[np.float64]]

    def head(self, size: int) -> _Cells:
        depths = {name: depth[:size] for name, depth in self.depths.items()}
        return _Cells(self.samples[:size], self.types[:size], self.others[:size], self.weights[:size], depths)


@dataclass(frozen=True)
class _Archetypes:
    """Tables of one modality.

    Attributes
    ----------
    feature
        (K, 2^20) int32: a feature stands as often in its archetype's row as its share says.
    keep
        (S, F) uint16 effect of each sample, 256 = one.
    points
        Points drawn per unit of depth, before the sample's effect removes some.
    """

    feature: npt.NDArray[np.int32]
    keep: npt.NDArray[np.uint16]
    points: float


def simulate(
    out: str | Path, *, num_cells: int, overwrite: bool = False, threads: int | None = None, **options: Any
) -> Schema:
    """Simulate cells into a store; memory does not grow with their number (but for 100 bytes a cell of ids and obs).

    Parameters
    ----------
    out
        Path of the store.
    threads
        Threads that draw; default the CPUs of this process, at most 4.
    **options
        Fields of `Simulation`.

    Notes
    -----
    obs: `sample`, `donor` (the same), `cell_type`, `mixed_with`, `own_weight`; with several conditions `replicate` and
    `condition`, with several sites `site`. Counts of rna and atac saturate at 255.
    20,000 cells of the default shape take 40 s of one core.
    """
    simulation = Simulation(**options)
    layouts = simulation.layouts()
    truth: list[_Cells] = []
    with StoreWriter(out, modalities=layouts, overwrite=overwrite, threads=threads) as writer:
        for cells, counts in _blocks(simulation, num_cells, threads):
            for name, rows in counts.items():
                writer.append(name, rows)
            truth.append(cells)
        samples = np.concatenate([cells.samples for cells in truth])
        masks = {name: simulation.has(name, samples) for name in layouts}
        about = {"simulated": True, "seed": simulation.seed}
        return writer.finish(
            cell_ids=_cell_ids(num_cells),
            obs=_obs(simulation, truth),
            present={name: mask for name, mask in masks.items() if not mask.all()},
            is_shuffled=True,
            provenance={**about, "num_types": simulation.num_types, "num_samples": simulation.num_samples},
        )


def simulate_mudata(*, num_cells: int, **options: Any) -> mudata.MuData:
    """The same as a MuData in memory, for a source file: `simulate_mudata(...).write("multiome.h5mu")`."""
    simulation = Simulation(**options)
    blocks = list(_blocks(simulation, num_cells, None))
    obs = pd.DataFrame(
        dict(_obs(simulation, [cells for cells, _ in blocks])), index=_cell_ids(num_cells).astype(object)
    )
    samples = np.concatenate([cells.samples for cells, _ in blocks])
    mods = {}
    for name, features in simulation.num_features.items():
        matrix = scipy.sparse.vstack([counts[name].to_scipy() for _, counts in blocks], format="csr")
        own = pd.DataFrame(index=obs.index[simulation.has(name, samples)])
        mods[name] = anndata.AnnData(matrix, obs=own, var=_var(name, features))
    with plain_mudata():
        together = mudata.MuData(mods)
        together.obs = together.obs.join(obs)
    return together


def archetype_shares(modality: str, **options: Any) -> npt.NDArray[np.float64]:
    """(K, F) expected share of every feature in each archetype's total, before the samples' effects.

    Parameters
    ----------
    **options
        Fields of `Simulation`. A cell of type a that is mixed with b has the shares
        own_weight * a + (1 - own_weight) * b.
    """
    simulation = Simulation(**options)
    table, features = _archetypes(simulation, modality), simulation.num_features[modality]
    return np.stack([np.bincount(row, minlength=features) / len(row) for row in table.feature])


def _blocks(
    simulation: Simulation, num_cells: int, threads: int | None
) -> Iterator[tuple[_Cells, dict[str, SparseRows]]]:
    """Blocks of cells in their order, drawn on threads."""
    tables = {name: _archetypes(simulation, name) for name in simulation.num_features}
    workers = threads or default_threads()
    waiting: deque[Future[tuple[_Cells, dict[str, SparseRows]]]] = deque()

    def block(number: int) -> tuple[_Cells, dict[str, SparseRows]]:
        cells, size = _draw_cells(simulation, number), min(_BLOCK, num_cells - number * _BLOCK)
        return cells.head(size), {name: _counts(simulation, number, cells, size, name, t) for name, t in tables.items()}

    with ThreadPoolExecutor(workers, thread_name_prefix="simulate") as pool:
        for number in range(-(-num_cells // _BLOCK)):
            waiting.append(pool.submit(block, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _archetypes(simulation: Simulation, name: str) -> _Archetypes:
    """Log-normal rates of features, types and samples, and the depth that meets the mean number of non-zeros."""
    rng = np.random.default_rng([simulation.seed, 1, MODALITIES.index(name)])
    features, shape = simulation.num_features[name], (simulation.num_types, simulation.num_features[name])
    between_features, between_types = _SIGMAS[name]
    popularity, is_marker = rng.normal(0.0, between_features, features), rng.random(shape) < 0.2
    rates = np.exp(popularity + is_marker * rng.normal(0.0, between_types, shape))
    rates /= rates.sum(axis=1, keepdims=True)
    effect, spread = _sample_effects(simulation, features, rng)
    # Thinning can only lower a rate, so effects are relative to the upper 2%; what lies above is cut.
    effect = np.clip(effect / np.exp(2.05 * spread), 1 / 256, 1.0)
    keep = np.round(effect * 2**_EFFECT_BITS).astype(np.uint16)
    edges = np.round(np.cumsum(rates, axis=1) * 2**_SLOT_BITS).astype(np.int64)
    edges[:, -1] = 2**_SLOT_BITS
    slots = np.diff(edges, axis=1, prepend=0)
    feature = np.stack([np.repeat(np.arange(features, dtype=np.int32), row) for row in slots])
    if name == "adt":
        return _Archetypes(feature, keep, _PROTEINS_POINTS)
    mean_rates = (rates[:, None, :] * (keep / 2**_EFFECT_BITS)).reshape(-1, features)
    if len(mean_rates) > 16:
        mean_rates = mean_rates[rng.choice(len(mean_rates), 16, replace=False)]
    return _Archetypes(feature, keep, _points_for(mean_rates, simulation.nonzeros_per_cell(name)))


def _sample_effects(
    simulation: Simulation, features: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], float]:
    """(S, F) factors of the samples' rates, and the standard deviation of their logarithm."""
    samples, conditions, sites = simulation.num_samples, simulation.num_conditions, simulation.num_sites
    own = rng.normal(0.0, simulation.sample_effect, (samples // conditions, features))
    logs, spreads = np.repeat(own, conditions, axis=0), [simulation.sample_effect]
    if conditions > 1:
        of_condition = rng.normal(0.0, simulation.condition_effect, (conditions, features))
        logs += np.tile(of_condition, (samples // conditions, 1))
        spreads.append(simulation.condition_effect)
    if sites > 1:
        logs += np.repeat(rng.normal(0.0, simulation.site_effect, (sites, features)), samples // sites, axis=0)
        spreads.append(simulation.site_effect)
    return np.exp(logs), float(np.hypot.reduce(spreads))


def _points_for(rates: npt.NDArray[np.float64], nonzeros: float) -> float:
    """Number of points with which `nonzeros` distinct features are expected, by bisection of its logarithm."""
    low, high = 0.0, 25.0
    for _ in range(40):
        middle = (low + high) / 2
        depths = np.exp(middle + _DEPTH_SIGMA * _NORMAL_QUANTILES)
        distinct = np.mean([-np.expm1(-depth * rates).sum(axis=1).mean() for depth in depths])
        low, high = (middle, high) if distinct < nonzeros else (low, middle)
    return float(np.exp(low))


def _draw_cells(simulation: Simulation, block: int) -> _Cells:
    """Parameters of a whole block."""
    seed, types = simulation.seed, simulation.num_types
    composition = np.random.default_rng([seed, 2]).dirichlet(np.full(types, 3.0), simulation.num_samples)
    rng = np.random.default_rng([seed, 3, block])
    samples = rng.integers(0, simulation.num_samples, _BLOCK)
    own = (rng.random(_BLOCK)[:, None] > np.cumsum(composition, axis=1)[samples]).sum(axis=1).clip(max=types - 1)
    others = (own + rng.integers(1, types, _BLOCK)) % types
    weights = 1.0 - 0.3 * rng.beta(1.0, 3.0, _BLOCK)
    shared, apart = rng.normal(0.0, 1.0, _BLOCK), rng.normal(0.0, 1.0, (len(MODALITIES), _BLOCK))
    depths = np.exp(_DEPTH_SIGMA * (0.8 * shared + 0.6 * apart))
    return _Cells(samples, own, others, weights, dict(zip(MODALITIES, depths, strict=True)))


def _counts(simulation: Simulation, block: int, cells: _Cells, size: int, name: str, table: _Archetypes) -> SparseRows:
    """Counts of the first cells of a block that have the modality."""
    rng = np.random.default_rng([simulation.seed, 4, MODALITIES.index(name), block])
    has, features = simulation.has(name, cells.samples), simulation.num_features[name]
    lengths = rng.poisson(cells.depths[name] * table.points * has)[:size]
    cell = np.repeat(np.arange(size), lengths)
    # One draw of 64 bits a point, cell after cell, so that a cell's points do not depend on the cells after it.
    bits = rng.integers(0, 2**64, len(cell), dtype=np.uint64)
    is_own = (bits & np.uint64(2**_MIX_BITS - 1)) < (cells.weights * 2**_MIX_BITS)[cell]
    coin = (bits >> np.uint64(_MIX_BITS)) & np.uint64(2**_EFFECT_BITS - 1)
    chosen = table.feature[np.where(is_own, cells.types[cell], cells.others[cell]), bits >> np.uint64(64 - _SLOT_BITS)]
    is_kept = coin < table.keep[cells.samples[cell], chosen]
    entries = np.sort(cell[is_kept] * features + chosen[is_kept])
    first = np.flatnonzero(np.diff(entries, prepend=-1))
    counts = np.diff(first, append=len(entries))
    rows, columns = np.divmod(entries[first], features)
    indptr = offsets_of(np.bincount(rows, minlength=size)[has[:size]])
    values = np.minimum(counts, np.iinfo(_VALUE_DTYPES[name]).max).astype(_VALUE_DTYPES[name])
    return SparseRows(indptr, columns.astype(index_dtype(features)), values, features)


def _obs(simulation: Simulation, truth: Sequence[_Cells]) -> Iterator[tuple[str, Any]]:
    samples = np.concatenate([cells.samples for cells in truth])
    donors = pd.Categorical.from_codes(samples, pd.Index([f"donor{s}" for s in range(simulation.num_samples)]))
    names = pd.Index([f"type{number:02d}" for number in range(simulation.num_types)])
    yield "sample", donors
    yield "donor", donors
    groups = {}
    if simulation.num_conditions > 1:
        groups["replicate"], groups["condition"] = np.divmod(samples, simulation.num_conditions)
    if simulation.num_sites > 1:
        groups["site"] = samples // (simulation.num_samples // simulation.num_sites)
    for name, codes in groups.items():
        yield name, pd.Categorical.from_codes(codes, pd.Index([f"{name}{number}" for number in range(codes.max() + 1)]))
    yield "cell_type", pd.Categorical.from_codes(np.concatenate([cells.types for cells in truth]), names)
    yield "mixed_with", pd.Categorical.from_codes(np.concatenate([cells.others for cells in truth]), names)
    yield "own_weight", np.concatenate([cells.weights for cells in truth]).astype(np.float32)


def _var(name: str, num_features: int) -> pd.DataFrame:
    return pd.DataFrame(index=[f"{_NAMES[name]}{number}" for number in range(num_features)])


def _cell_ids(num_cells: int) -> npt.NDArray[Any]:
    return np.strings.add("cell", np.arange(num_cells).astype(np.dtypes.StringDType()))
