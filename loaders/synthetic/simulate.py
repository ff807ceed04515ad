"""Simulated RNA + ATAC (+ ADT) atlases with known cell types and sample effects, streamed to a store at any size.

Every cell is a function of (seed, its number): the same whatever the number of cells or threads.
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

from loaders.csr import SparseRows, index_dtype
from loaders.ecosystem import plain_mudata
from loaders.ingest.writer import ModalityLayout, StoreWriter
from loaders.machine import default_threads
from loaders.schema import MODALITIES, Schema
from loaders.synthetic.draw import Archetypes, draw_cells, gap_table, hash64, make_archetypes

_BLOCK = 2048
"""Cells drawn by one task; their parameters come from one generator keyed (seed, block)."""

_VALUE_DTYPES: dict[str, np.dtype[Any]] = {
    "rna": np.dtype(np.uint8),
    "atac": np.dtype(np.uint8),
    "adt": np.dtype(np.uint16),
}
_NAMES = {"rna": "gene", "atac": "peak", "adt": "protein"}

_PROTEINS_POINTS = 3_000
"""Mean total count of antibodies per cell."""


@dataclass(frozen=True)
class _Cells:
    """Parameters of a range of cells: (B,) each; depth per modality."""

    numbers: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    types: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    depths: dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Simulation:
    """What is to be simulated; `simulate` documents the fields."""

    num_features: dict[str, int]
    nonzeros_per_cell: dict[str, float]
    num_samples: int
    num_types: int
    mosaic: tuple[tuple[str, ...], ...]
    sample_effect: float
    seed: int

    def __post_init__(self) -> None:
        for name, features in self.num_features.items():
            wanted = self.nonzeros_per_cell.get(name, 0.0)
            if wanted > 0.6 * features:
                raise ValueError(
                    f"non-zeros per cell of {name}: got {wanted:g} of {features} features; "
                    "a simulated cell fills at most 60% of them: ask for fewer, or for more features"
                )
        for names in self.mosaic:
            for name in names:
                if name not in self.num_features:
                    raise ValueError(
                        f"mosaic: got {name!r}, simulated are {', '.join(self.num_features)}; name one of them"
                    )
        if self.num_samples < 1 or self.num_types < 2:
            raise ValueError(
                f"num_samples, num_types: got {self.num_samples}, {self.num_types}; give at least 1 sample and 2 types"
            )

    def has(self, modality: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether cells of these samples have the modality."""
        of_sample = np.array([modality in self.mosaic[s % len(self.mosaic)] for s in range(self.num_samples)])
        return of_sample[samples]

    def tables(self) -> dict[str, Archetypes]:
        tables = {}
        depths = np.exp(_DEPTH_SIGMA * _NORMAL_QUANTILES)
        for name, features in self.num_features.items():
            rng = np.random.default_rng([self.seed, 1, MODALITIES.index(name)])
            popularity, between_types = {"rna": (1.6, 1.2), "atac": (0.9, 0.9), "adt": (1.0, 1.0)}[name]
            tables[name] = make_archetypes(
                self.num_types,
                self.num_samples,
                features,
                nonzeros_per_cell=self.nonzeros_per_cell.get(name, 0.5 * features),
                popularity_sigma=popularity,
                type_sigma=between_types,
                sample_sigma=self.sample_effect,
                depths=depths,
                rng=rng,
            )
        return tables

    def cells(self, block: int, start: int, stop: int) -> _Cells:
        """Parameters of the cells [start, stop) of a block, independent of stop: the whole block is drawn."""
        composition = np.random.default_rng([self.seed, 2]).dirichlet(np.full(self.num_types, 3.0), self.num_samples)
        rng = np.random.default_rng([self.seed, 3, block])
        samples = rng.integers(0, self.num_samples, _BLOCK)
        types = (rng.random(_BLOCK)[:, None] > np.cumsum(composition, axis=1)[samples]).sum(axis=1)
        types = np.minimum(types, self.num_types - 1)
        others = (types + rng.integers(1, self.num_types, _BLOCK)) % self.num_types
        weights = 1.0 - 0.3 * rng.beta(1.0, 3.0, _BLOCK)
        shared = rng.normal(0.0, 1.0, _BLOCK)
        depths = {}
        for name in MODALITIES:
            own = rng.normal(0.0, 1.0, _BLOCK)
            depths[name] = np.exp(_DEPTH_SIGMA * (0.8 * shared + 0.6 * own))[: stop - start]
        cut = slice(0, stop - start)
        numbers = np.arange(start, stop)
        return _Cells(numbers, samples[cut], types[cut], others[cut], weights[cut], depths)


_DEPTH_SIGMA = 0.35
_NORMAL_QUANTILES = np.array([-1.2816, -0.5244, 0.0, 0.5244, 1.2816])
"""Quantiles 0.1, 0.3, 0.5, 0.7, 0.9 of the normal distribution: five equally likely depths."""


def simulate(
    out: str | Path,
    *,
    num_cells: int,
    num_genes: int = 13_431,
    num_peaks: int = 116_490,
    num_proteins: int = 0,
    num_samples: int = 4,
    num_types: int = 12,
    genes_per_cell: float = 800,
    peaks_per_cell: float = 3_600,
    mosaic: Sequence[Sequence[str]] | None = None,
    sample_effect: float = 0.35,
    seed: int = 0,
    overwrite: bool = False,
    threads: int | None = None,
) -> Schema:
    """Simulate cells into a store; memory does not grow with their number (but for 100 bytes a cell of ids and obs).

    Parameters
    ----------
    out
        Path of the store.
    num_genes, num_peaks, num_proteins
        Features of rna, atac and adt; 0 leaves the modality out.
    genes_per_cell, peaks_per_cell
        Mean number of non-zeros of a cell.
    mosaic
        Modalities of each sample, for example `(("rna", "atac"), ("rna",), ("atac",))`, repeated over the samples;
        default: every sample has all.
    sample_effect
        Standard deviation of the samples' log effects on features; 0.0 for none.
    seed
        Decides everything; cell c is the same in a store of any size.
    threads
        Threads that draw; default the CPUs of this process, at most 4.

    Notes
    -----
    Types are archetypes: log-normal feature rates, of which a type changes a fifth. A cell mixes its type with another
    one (weight 0.7 to 1), has a log-normal depth of its own and Poisson counts; samples multiply rates and differ in
    composition. obs: `sample`, `donor` (the same), `cell_type`, `mixed_with`, `own_weight`. Cells come in random order.
    Counts of rna and atac saturate at 255.
    """
    simulation = _make(
        num_genes,
        num_peaks,
        num_proteins,
        num_samples,
        num_types,
        genes_per_cell,
        peaks_per_cell,
        mosaic,
        sample_effect,
        seed,
    )
    layouts = {
        name: ModalityLayout(
            _var(name, features), _VALUE_DTYPES[name], simulation.nonzeros_per_cell.get(name, features / 2)
        )
        for name, features in simulation.num_features.items()
    }
    truth: list[_Cells] = []
    with StoreWriter(out, modalities=layouts, overwrite=overwrite, threads=threads) as writer:
        for cells, counts in _draw(simulation, num_cells, threads):
            for name, rows in counts.items():
                writer.append(name, rows)
            truth.append(cells)
        samples = np.concatenate([cells.samples for cells in truth])
        masks = {name: simulation.has(name, samples) for name in layouts}
        return writer.finish(
            cell_ids=_cell_ids(num_cells),
            obs=_obs(simulation, truth),
            present={name: mask for name, mask in masks.items() if not mask.all()},
            is_shuffled=True,
            provenance={"simulated": True, "seed": seed, "num_types": num_types, "num_samples": num_samples},
        )


def simulate_mudata(
    *,
    num_cells: int,
    num_genes: int = 2_000,
    num_peaks: int = 8_000,
    num_proteins: int = 0,
    num_samples: int = 3,
    num_types: int = 6,
    genes_per_cell: float = 250,
    peaks_per_cell: float = 600,
    mosaic: Sequence[Sequence[str]] | None = None,
    sample_effect: float = 0.35,
    seed: int = 0,
) -> mudata.MuData:
    """The same simulation as a MuData in memory, for a source file: `simulate_mudata(...).write("multiome.h5mu")`."""
    simulation = _make(
        num_genes,
        num_peaks,
        num_proteins,
        num_samples,
        num_types,
        genes_per_cell,
        peaks_per_cell,
        mosaic,
        sample_effect,
        seed,
    )
    blocks = list(_draw(simulation, num_cells, None))
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


def _make(
    num_genes: int,
    num_peaks: int,
    num_proteins: int,
    num_samples: int,
    num_types: int,
    genes_per_cell: float,
    peaks_per_cell: float,
    mosaic: Sequence[Sequence[str]] | None,
    sample_effect: float,
    seed: int,
) -> Simulation:
    features = {"rna": num_genes, "atac": num_peaks, "adt": num_proteins}
    features = {name: count for name, count in features.items() if count}
    names = tuple(tuple(sample) for sample in mosaic) if mosaic is not None else (tuple(features),)
    nonzeros = {"rna": genes_per_cell, "atac": peaks_per_cell}
    return Simulation(features, nonzeros, num_samples, num_types, names, sample_effect, seed)


def _draw(
    simulation: Simulation, num_cells: int, threads: int | None
) -> Iterator[tuple[_Cells, dict[str, SparseRows]]]:
    """Blocks of cells in their order, drawn on threads."""
    tables = simulation.tables()
    gaps = gap_table()
    workers = threads or default_threads()
    waiting: deque[Future[tuple[_Cells, dict[str, SparseRows]]]] = deque()

    def block(number: int) -> tuple[_Cells, dict[str, SparseRows]]:
        start, stop = number * _BLOCK, min(num_cells, (number + 1) * _BLOCK)
        cells = simulation.cells(number, start, stop)
        return cells, {name: _counts(simulation, cells, name, table, gaps) for name, table in tables.items()}

    with ThreadPoolExecutor(workers, thread_name_prefix="simulate") as pool:
        for number in range(-(-num_cells // _BLOCK)):
            waiting.append(pool.submit(block, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _counts(
    simulation: Simulation, cells: _Cells, name: str, table: Archetypes, gaps: npt.NDArray[np.float64]
) -> SparseRows:
    has = simulation.has(name, cells.samples)
    num_features = simulation.num_features[name]
    points = cells.depths[name][has] * (_PROTEINS_POINTS if name == "adt" else table.points_per_depth)
    salt = np.uint64(hash64(np.uint64(simulation.seed * 8 + MODALITIES.index(name))))
    keys = salt + cells.numbers[has].astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    indptr = np.zeros(len(points) + 1, np.int64)
    # Room for every point to be a non-zero of its own, with six standard deviations of slack.
    most = int(points.max(initial=1.0) * 1.2 + 200)
    room = int(np.minimum(points + 6 * np.sqrt(points) + 50, num_features).sum()) + most
    indices = np.empty(room, index_dtype(num_features))
    values = np.empty(room, _VALUE_DTYPES[name])
    full = draw_cells(
        keys, cells.types[has], cells.others[has], cells.weights[has], cells.samples[has], points,
        table.cumulative, table.guide, table.keep, gaps, indptr, indices, values, np.empty((2, most), np.int32),
    )  # fmt: skip
    assert full == -1, full
    return SparseRows(indptr, indices[: indptr[-1]].copy(), values[: indptr[-1]].copy(), num_features)


def _obs(simulation: Simulation, truth: Sequence[_Cells]) -> Iterator[tuple[str, Any]]:
    samples = np.concatenate([cells.samples for cells in truth])
    donors = pd.Categorical.from_codes(samples, pd.Index([f"donor{s}" for s in range(simulation.num_samples)]))
    names = pd.Index([f"type{number:02d}" for number in range(simulation.num_types)])
    yield "sample", donors
    yield "donor", donors
    yield "cell_type", pd.Categorical.from_codes(np.concatenate([cells.types for cells in truth]), names)
    yield "mixed_with", pd.Categorical.from_codes(np.concatenate([cells.others for cells in truth]), names)
    yield "own_weight", np.concatenate([cells.weights for cells in truth]).astype(np.float32)


def _var(name: str, num_features: int) -> pd.DataFrame:
    return pd.DataFrame(index=[f"{_NAMES[name]}{number}" for number in range(num_features)])


def _cell_ids(num_cells: int) -> npt.NDArray[Any]:
    return np.strings.add("cell", np.arange(num_cells).astype(np.dtypes.StringDType()))
