"""A file means the same to whoever reads it: streamed by `open_store` and ingested, it gives the same cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from identifying import identifying_counts

from loaders.ecosystem import plain_mudata, quiet_anndata
from loaders.ingest import ingest
from loaders.stores import Store, open_store

NUM_CELLS = 60
FEATURES = {"rna": 20, "atac": 35, "adt": 6}
TYPES = {"rna": "Gene Expression", "atac": "Peaks", "adt": "Antibody Capture"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"),
    pytest.mark.filterwarnings("ignore:indices array has non-integer dtype:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
]


def names_of(modality: str) -> list[str]:
    if modality == "atac":
        return [f"chr{f % 5}:{100 * f}-{100 * f + 99}" for f in range(FEATURES[modality])]
    return [f"{modality}{f}" for f in range(FEATURES[modality])]


def make_anndata(modality: str, cells: np.ndarray) -> anndata.AnnData:
    counts = identifying_counts(NUM_CELLS, FEATURES[modality], modality=modality)[cells]
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical([f"d{c % 3}" for c in cells]),
            "lane": cells % 4,
            "note": [None if c % 7 == 0 else f"n{c % 5}" for c in cells],
            "good": cells % 2 == 0,
        },
        index=[f"cell{c}" for c in cells],
    )
    return anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=names_of(modality)))


def make_multiome() -> anndata.AnnData:
    """Columns of three modalities mixed, and of one that nobody knows."""
    parts = {name: make_anndata(name, np.arange(NUM_CELLS)) for name in FEATURES}
    counts = scipy.sparse.hstack([*(part.X for part in parts.values()), np.ones((NUM_CELLS, 2), np.float32)]).tocsr()
    kinds = [*(TYPES[name] for name in FEATURES for _ in range(FEATURES[name])), "CRISPR", "CRISPR"]
    names = [*(name for part in parts.values() for name in part.var_names), "guide0", "guide1"]
    var = pd.DataFrame({"feature_types": pd.Categorical(kinds)}, index=names)
    mixed = anndata.AnnData(counts, obs=parts["rna"].obs, var=var)
    return mixed[:, np.argsort(np.arange(len(names)) * 37 % 61, kind="stable")].copy()


def make_mudata() -> mudata.MuData:
    """A mosaic: ATAC in some cells and in another order, ADT in others; obs columns of every fate."""
    cells = np.arange(NUM_CELLS)
    have = {"rna": cells, "atac": np.random.default_rng(1).permutation(cells[cells % 3 != 1]), "adt": cells[25:]}
    with plain_mudata():
        data = mudata.MuData({name: make_anndata(name, own) for name, own in have.items()})
        data.obs["site"] = [f"site{c % 2}" for c in range(data.n_obs)]
    for name in have:
        data.mod[name].obs["depth"] = np.arange(len(have[name]))
    data.mod["adt"].obs["well"] = [f"w{c % 2}" for c in have["adt"]]
    return data


def write_zarr(path: Path, data: Any, version: int = 3) -> Path:
    with plain_mudata(), quiet_anndata(version):
        data.write_zarr(path)
    return path


def write_hdf5(path: Path, data: Any) -> Path:
    with plain_mudata():
        data.write(path)
    return path


def write_anndata(folder: Path, form: str, kind: str) -> Path:
    data = make_anndata("rna", np.arange(NUM_CELLS))
    if form == "dense":
        data.X = data.X.toarray()
    elif form == "csc":
        data.X = data.X.tocsc()
    elif form == "unsorted":
        for row in range(NUM_CELLS):
            span = slice(data.X.indptr[row], data.X.indptr[row + 1])
            data.X.indices[span], data.X.data[span] = data.X.indices[span][::-1].copy(), data.X.data[span][::-1].copy()
        data.X.has_sorted_indices = False
    elif form in ("layer", "raw"):
        data.layers["counts"], data.raw = data.X.copy(), data.copy()
        data.X = data.X * 0.5
    return write_hdf5(folder / "a.h5ad", data) if kind == "h5ad" else write_zarr(folder / "a.zarr", data, int(kind[-1]))


def write_sharded(folder: Path) -> Path:
    path = write_anndata(folder, "csr", "zarr3")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
    for name in ("data", "indices"):
        values = group[name][:]
        del group[name]
        group.create_array(name, data=values, chunks=(16,), shards=(64,))
    zarr.consolidate_metadata(path)
    return path


def write_tenx(folder: Path) -> Path:
    data = make_multiome()
    with h5py.File(folder / "t.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(data.obs_names, dtype="S")
        group["data"], group["indices"], group["indptr"] = data.X.data.astype(np.int32), data.X.indices, data.X.indptr
        group["shape"] = np.array(data.shape[::-1])
        features = group.create_group("features")
        features["name"], features["id"] = (np.array(data.var_names, dtype="S") for _ in range(2))
        features["feature_type"] = np.array(data.var["feature_types"], dtype="S")
    return folder / "t.h5"


FILES = {
    **{
        f"{form} {kind}": (lambda folder, form=form, kind=kind: write_anndata(folder, form, kind))
        for form, kind in [
            *((form, kind) for form in ("csr", "dense", "unsorted") for kind in ("h5ad", "zarr2", "zarr3")),
            ("layer", "h5ad"),
            ("layer", "zarr3"),
            ("raw", "zarr3"),
        ]
    },
    "sharded": write_sharded,
    "peaks": lambda folder: write_hdf5(folder / "p.h5ad", make_anndata("atac", np.arange(NUM_CELLS))),
    "multiome h5ad": lambda folder: write_hdf5(folder / "m.h5ad", make_multiome()),
    "multiome zarr2": lambda folder: write_zarr(folder / "m.zarr", make_multiome(), 2),
    "multiome zarr3": lambda folder: write_zarr(folder / "m.zarr", make_multiome()),
    "h5mu": lambda folder: write_hdf5(folder / "a.h5mu", make_mudata()),
    "mudata zarr2": lambda folder: write_zarr(folder / "a.zarr", make_mudata(), 2),
    "mudata zarr3": lambda folder: write_zarr(folder / "a.zarr", make_mudata()),
    "10x": write_tenx,
    "anndata in memory": lambda folder: make_anndata("rna", np.arange(NUM_CELLS)),
    "multiome in memory": lambda folder: make_multiome(),
    "mudata in memory": lambda folder: make_mudata(),
}


def contents(store: Store) -> dict[str, Any]:
    """What a store holds, whatever the order of its cells."""
    ids = store.cell_ids(0, store.schema.num_cells)
    order = np.argsort(ids)
    found: dict[str, Any] = {"ids": ids[order].tolist()}
    for name, held in store.schema.modalities.items():
        rows = store.modality_rows(name)
        rows = np.arange(len(ids)) if rows is None else rows
        counts = store.matrix(name).read(0, held.num_cells).to_scipy().toarray()
        totals = store.totals(name)
        np.testing.assert_array_equal(totals, counts.sum(1))
        np.testing.assert_array_equal(store.matrix(name).lengths(), (counts != 0).sum(1))
        assert held.num_nonzeros == (counts != 0).sum()
        found[name] = {
            "features": store.feature_names(name).tolist(),
            "present": (rows[order] >= 0).tolist(),
            "counts": np.where(rows[order, None] >= 0, counts[rows[order]], -1).tolist(),
        }
    return found


def obs_of(store: Store, name: str) -> list[str | None]:
    column, order = store.obs_column(name), np.argsort(store.cell_ids(0, store.schema.num_cells))
    return [None if code < 0 else column.categories[code] for code in column.codes[order]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_every_file_streams_as_it_is_ingested(tmp_path: Path, name: str) -> None:
    streams_as_it_is_ingested(FILES[name](tmp_path), tmp_path, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_experiment_streams_as_it_is_ingested(
    tmp_path: Path, write_soma: Callable[[Path, anndata.AnnData], None]
) -> None:
    write_soma(tmp_path / "soma", make_anndata("rna", np.arange(NUM_CELLS)))
    streams_as_it_is_ingested(tmp_path / "soma", tmp_path, "soma")


def streams_as_it_is_ingested(written: Any, tmp_path: Path, name: str) -> None:
    layer = {"layer": "counts", "raw": "raw"}.get(name.split()[0])
    options = {} if layer is None else {"layer": layer}
    streamed = open_store(written, **options)
    if "memory" in name:
        is_mudata = isinstance(written, mudata.MuData)
        written = write_hdf5(tmp_path / f"a.{'h5mu' if is_mudata else 'h5ad'}", written)
    ingest(written, out=tmp_path / "o.zarr", sample_key=None if name == "10x" else "donor", progress=False, **options)
    ingested = open_store(tmp_path / "o.zarr")
    assert contents(streamed) == contents(ingested)
    columns = [column for column in streamed.schema.obs_columns if column not in ("site", "well")]
    assert columns == ([] if name == "10x" else ["donor", "lane", "note", "good"])
    assert set(ingested.schema.obs_columns) == {*streamed.schema.obs_columns, "sample"}
    for column in streamed.schema.obs_columns:
        assert obs_of(streamed, column) == obs_of(ingested, column), column
    ids = contents(streamed)["ids"]
    for modality in streamed.schema.modalities:
        held = contents(streamed)[modality]
        cells = [int(cell[4:]) for cell, present in zip(ids, held["present"], strict=True) if present]
        truth = identifying_counts(NUM_CELLS, FEATURES[modality], modality=modality)[cells].toarray()
        columns = [names_of(modality).index(name) for name in held["features"]]
        np.testing.assert_array_equal(np.array(held["counts"])[held["present"]], truth[:, columns])
    streamed.close()


def test_a_matrix_by_columns_is_for_ingest_alone(tmp_path: Path) -> None:
    path = write_anndata(tmp_path, "csc", "h5ad")
    with pytest.raises(ValueError, match=r"X: got a matrix compressed by column .*tocsr.*or ingest it"):
        open_store(path)
    ingest(path, out=tmp_path / "o.zarr", progress=False)
    assert contents(open_store(tmp_path / "o.zarr")) == contents(open_store(make_anndata("rna", np.arange(NUM_CELLS))))


def broken(folder: Path, what: str) -> tuple[Any, dict[str, Any]]:
    """A file that says something contradictory, and options to open it with."""
    data = make_anndata("rna", np.arange(NUM_CELLS))
    if what == "mixture":
        data.var_names = [*names_of("atac")[:10], *names_of("rna")[10:]]
    elif what == "types":
        data.var["feature_types"] = "strange"
    elif what == "asked":
        data.var["feature_types"] = "Gene Expression"
        data.var.iloc[0, 0] = "Peaks"
        return write_hdf5(folder / "a.h5ad", data), {"modality": "adt"}
    elif what == "layer":
        return write_hdf5(folder / "a.h5ad", data), {"layer": "spliced"}
    elif what == "order":
        path = write_hdf5(folder / "a.h5mu", make_mudata())
        with h5py.File(path, "a") as file:
            rows = file["obsmap"]["atac"][:]
            first, second = np.flatnonzero(rows)[:2]
            rows[[first, second]] = rows[[second, first]]
            file["obsmap"]["atac"][:] = rows
        return path, {}
    return write_hdf5(folder / "a.h5ad", data), {}


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("mixture", r"50% of the features are named like peaks .* add var\['feature_types'\]"),
        ("types", r"var\['feature_types'\] has strange, expected 'Gene Expression'"),
        ("asked", r"adt was asked for, var\['feature_types'\] has Gene Expression, Peaks"),
        ("layer", r"no layer 'spliced'; it has X: name one of them"),
        ("order", r"obsmap/atac sends cell 'cell\d+' to row \d+, by its name it is row"),
    ],
)
def test_what_contradicts_itself_is_refused_with_one_message(tmp_path: Path, what: str, match: str) -> None:
    path, options = broken(tmp_path, what)
    with pytest.raises(ValueError, match=match) as streamed:
        open_store(path, **options)
    modality = options.pop("modality", None)
    source = str(path) if modality is None else f"{modality}={path}"
    with pytest.raises(ValueError, match=match) as ingested:
        ingest(source, out=tmp_path / "o.zarr", progress=False, **options)
    assert str(streamed.value) == str(ingested.value)


def test_one_modality_of_a_file_is_taken_by_name(tmp_path: Path) -> None:
    """A multiome AnnData opened as RNA gives the RNA columns, not all of them as RNA."""
    for written in (write_zarr(tmp_path / "m.zarr", make_multiome()), make_mudata()):
        store = open_store(written, modality="gex")
        assert list(store.schema.modalities) == ["rna"]
        assert sorted(store.feature_names("rna")) == sorted(names_of("rna"))


def test_data_in_memory_take_embeddings_and_stream(tmp_path: Path) -> None:
    data = make_mudata()
    store = open_store(data)
    values = np.arange(NUM_CELLS * 2, dtype=np.float32).reshape(-1, 2)
    store.write_embedding("X_liam", values, {"made_by": "run"})
    np.testing.assert_array_equal(data.obsm["X_liam"], values)
    np.testing.assert_array_equal(store.read_embedding("X_liam", 3, 9), values[3:9])
    assert store.embedding_attributes("X_liam") == [{"made_by": "run"}]
    with pytest.raises(ValueError, match=r"obsm of MuData in memory: got 'X_other'"):
        store.read_embedding("X_other", 0, 1)
