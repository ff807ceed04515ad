"""Features: `liam-scale features atlas.zarr --hvg 4000 --batch-key sample --out hvg.txt` chooses what to train on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tyro

from liam_scale.command import Command
from liam_scale.finding import open_stores
from loaders.durable import write_text
from loaders.intervals import intervals_of, read_bed
from loaders.options import Range, check_options
from loaders.stores import Store, choose
from loaders.variation import Flavor, share_of_cells, variable_features


@dataclass(frozen=True)
class FeaturesConfig:
    """Choose features by streaming the counts; the file of names is what --features of other commands takes."""

    store: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE ...")]
    """Store, or several chained."""
    out: Path
    """Text file to write, a name on each line; modalities that nothing is asked of are not in it, and stay whole."""
    hvg: Annotated[int | None, Range(least=1), tyro.conf.arg(metavar="NUMBER")] = None
    """Genes to keep, the most variable ones, as scanpy's highly_variable_genes finds them."""
    flavor: Flavor = "seurat_v3"
    """How ranks in the samples are put together: by median rank, or (seurat_v3_paper) by number of samples first."""
    batch_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column with the sample of each cell, within which genes are compared."""
    min_cells_fraction: Annotated[float | None, Range(least=0, most=1), tyro.conf.arg(metavar="SHARE")] = None
    """Peaks to keep: those with a count in at least this share of the cells that have ATAC, such as 0.01."""
    blacklist: Annotated[Path | None, tyro.conf.arg(metavar="BED")] = None
    """Peaks that overlap an interval of this file go."""
    where: Annotated[str | None, tyro.conf.arg(metavar="EXPRESSION")] = None
    """Cells to look at, an expression over obs columns as pandas takes it."""
    overwrite: bool = False
    """Replace `out` if it exists."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        if self.hvg is None and self.min_cells_fraction is None and self.blacklist is None:
            raise ValueError("--hvg, --min-cells-fraction, --blacklist: got none; say which features to keep")
        if self.hvg is None and self.batch_key is not None:
            raise ValueError("--batch-key: got a column but no --hvg, which alone compares within samples")


def features(
    store: str | Path | Sequence[str | Path] | Store,
    *,
    hvg: int | None = None,
    flavor: Flavor = "seurat_v3",
    batch_key: str | None = None,
    min_cells_fraction: float | None = None,
    blacklist: str | Path | None = None,
    where: str | None = None,
    progress: bool = True,
) -> dict[str, list[str]]:
    """Choose features of a store by streaming its counts.

    Parameters
    ----------
    store
        Path of a store, several, or an open one.
    hvg
        Genes to keep: as many as are most variable, equal to `scanpy.pp.highly_variable_genes` of the flavor.
    batch_key
        Obs column within whose values genes are compared.
    min_cells_fraction
        Peaks to keep: those with a count in at least this share of the cells that have ATAC.
    blacklist
        BED file; peaks that overlap one of its intervals go.
    where
        Cells to look at, an expression over obs columns.

    Returns
    -------
    Names of the features chosen, by modality; a modality that nothing was asked of is not in it.

    Raises
    ------
    ValueError
        The store has no such modality, column or cells; an option does not fit it, or leaves no feature.
    """
    opened = choose(_opened(store), where=where)
    asked = {"rna": hvg is not None, "atac": min_cells_fraction is not None or blacklist is not None}
    for name in (name for name, is_asked in asked.items() if is_asked):
        if name not in opened.schema.modalities:
            option = "hvg" if name == "rna" else "blacklist" if min_cells_fraction is None else "min_cells_fraction"
            raise ValueError(f"{option}: {opened.uri} has no {name}, it has {', '.join(opened.schema.modalities)}")
    chosen = {}
    if hvg is not None:
        table = variable_features(opened, hvg, flavor=flavor, batch_key=batch_key, is_shown=progress)
        chosen["rna"] = table.index[table["highly_variable"]].tolist()
    if asked["atac"]:
        chosen["atac"] = _peaks(opened, min_cells_fraction, blacklist, progress)
    return chosen


def _opened(store: str | Path | Sequence[str | Path] | Store) -> Store:
    if isinstance(store, str | Path):
        return open_stores([str(store)])
    return open_stores([str(one) for one in store]) if isinstance(store, Sequence) else store


def _peaks(store: Store, least: float | None, blacklist: str | Path | None, progress: bool) -> list[str]:
    names = store.feature_names("atac")
    kept: npt.NDArray[np.bool_] = np.ones(len(names), bool)
    if blacklist is not None:
        bed, peaks = read_bed(Path(blacklist), option="blacklist"), intervals_of(names.tolist(), f"atac of {store.uri}")
        if not set(bed.chromosome) & set(peaks.chromosome):
            raise ValueError(
                f"blacklist: {blacklist} has no chromosome of the peaks (it has {', '.join(bed.chromosome[:1])}, peaks"
                f" are named {str(names[0])!r}); give that of the same genome, with the same names of chromosomes"
            )
        kept &= ~peaks.overlaps(bed)
    if least is not None:
        kept &= share_of_cells(store, "atac", is_shown=progress) >= least
    if not kept.any():
        raise ValueError(f"min_cells_fraction, blacklist: no peak of {store.uri} is left; loosen them")
    return [str(name) for name in names[kept]]


def _features(config: FeaturesConfig) -> None:
    if config.out.exists() and not config.overwrite:
        raise ValueError(f"--out: {config.out} exists; name a new file, or give --overwrite")
    options = {name: value for name, value in vars(config).items() if name not in ("store", "out", "overwrite")}
    store = open_stores(config.store)
    chosen = features(store, **options)
    write_text(config.out, "".join(f"{name}\n" for names in chosen.values() for name in names))
    held = store.schema.modalities
    told = ", ".join(f"{len(names):,} of {held[name].num_features:,} of {name}" for name, names in chosen.items())
    whole = [name for name in held if name not in chosen]
    print(f"wrote {config.out}: {told}" + (f" (all of {', '.join(whole)} stay)" if whole else ""))


main = Command(FeaturesConfig, _features, prog="liam-scale features", description="Counts -> features to train on.")

if __name__ == "__main__":
    sys.exit(main())
