"""TileDB-SOMA experiments give every count, whatever the joinids, tiles, layers and filters."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.stores import open_store

pa = pytest.importorskip("pyarrow")
tiledbsoma = pytest.importorskip("tiledbsoma", reason="tiledbsoma is an extra: pip install liam-scale[soma]")

NUM_CELLS = 50


def joinid_of(cells: np.ndarray) -> np.ndarray:
    """Ids with gaps, as an experiment has after cells were removed: the second half lies a tile and more further on."""
    return np.where(cells < 25, 3 * cells + 5, 3 * cells + 7_000)


def write_experiment(
    path: Path,
    toy: ModuleType,
    cells: Mapping[str, np.ndarray],
    *,
    joinids: np.ndarray | None = None,
    layers: tuple[str, ...] = ("data",),
    names: Mapping[str, str] | None = None,
) -> None:
    """An experiment of all toy cells, one measurement per modality, counts only for the cells that have it."""
    ids = joinid_of(np.arange(NUM_CELLS)) if joinids is None else joinids
    frame = toy.obs_frame(np.arange(NUM_CELLS)).rename_axis("obs_id").reset_index()
    frame["soma_joinid"] = ids
    with tiledbsoma.Experiment.create(str(path)) as experiment:
        arrow = pa.Table.from_pandas(frame, preserve_index=False)
        limit = int(ids.max()) + 1
        experiment.add_new_dataframe("obs", schema=arrow.schema, domain=[(0, limit - 1)]).close()
        # Opened again: tiledbsoma 2.3 loses the categories of what is written by the handle that made the frame.
        with tiledbsoma.open(f"{path}/obs", "w") as obs:
            obs.write(arrow)
        measurements = experiment.add_new_collection("ms")
        for modality, have in cells.items():
            name = (names or {}).get(modality, modality.upper())
            measurement = measurements.add_new_collection(name, kind=tiledbsoma.Measurement)
            width = toy.FEATURES[modality]
            var = pa.table({"soma_joinid": np.arange(width), "var_id": toy.names_of(modality)})
            with measurement.add_new_dataframe("var", schema=var.schema, domain=[(0, width - 1)]) as written:
                written.write(var)
            matrices = measurement.add_new_collection("X")
            counts = scipy.sparse.coo_matrix(toy.counts_of(modality, have))
            for layer in layers:
                entries = {
                    "soma_dim_0": ids[have][counts.row],
                    "soma_dim_1": counts.col.astype(np.int64),
                    "soma_data": counts.data * (0.5 if layer == "scaled" else 1),
                }
                with matrices.add_new_sparse_ndarray(layer, type=pa.float32(), shape=(limit, width)) as array:
                    array.write(pa.table({**entries, "soma_data": entries["soma_data"].astype(np.float32)}))


@pytest.fixture
def experiment(tmp_path: Path, toy: ModuleType) -> Path:
    write_experiment(tmp_path / "exp", toy, {name: toy.cells_of(name) for name in toy.FEATURES})
    return tmp_path / "exp"


def test_measurements_stream_as_a_mosaic(experiment: Path, toy: ModuleType) -> None:
    store = open_store(experiment)
    assert tuple(store.schema.modalities) == ("rna", "atac", "adt")
    for modality in toy.FEATURES:
        toy.check_counts(store, modality)
    toy.check_obs(store)
    assert store.modality_rows("rna") is None
    assert store.row_alignment == 2048
    assert store.schema.obs_columns == ("sample", "lane", "good", "type", "score")
    expected = toy.obs_frame(np.arange(NUM_CELLS))
    pd.testing.assert_frame_equal(store.obs_frame(), expected, check_names=False, check_categorical=False)


def test_experiment_written_by_tiledbsoma_itself(tmp_path: Path, toy: ModuleType, write_soma: Callable) -> None:
    data = toy.make_anndata("rna", np.arange(NUM_CELLS))
    data.obs["good"] = pd.array([None if c % 9 == 0 else bool(c % 2) for c in range(NUM_CELLS)], dtype="boolean")
    write_soma(tmp_path / "exp", data)
    store = open_store(tmp_path / "exp")
    toy.check_counts(store, "rna")
    good = store.obs_column("good")
    assert good.categories == ("False", "True")
    assert list(good.codes) == [-1 if c % 9 == 0 else c % 2 for c in range(NUM_CELLS)]


def test_cells_beyond_one_read_and_unaligned_ranges(tmp_path: Path, toy: ModuleType, write_soma: Callable) -> None:
    """5,000 cells over three rows of tiles, read at odd places and from several threads."""
    cells = np.arange(5000)
    counts = scipy.sparse.random(5000, 40, density=0.1, format="csr", random_state=0, dtype=np.float32)
    counts.data = np.arange(1, counts.nnz + 1, dtype=np.float32)
    obs = pd.DataFrame(index=[f"cell{c}" for c in cells])
    data = toy.anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{f}" for f in range(40)]))
    write_soma(tmp_path / "exp", data)
    store = open_store(tmp_path / "exp")
    errors: list[BaseException] = []

    def read_everything(step: int) -> None:
        try:
            for start in range(0, 5000, step):
                rows = store.matrix("rna").read(start, min(5000, start + step))
                assert (rows.to_scipy() != counts[start : start + step]).nnz == 0
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read_everything, args=(step,)) for step in (700, 2048, 2049, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    np.testing.assert_array_equal(store.totals("rna"), np.asarray(counts.sum(1, dtype=np.float64)).ravel())
    np.testing.assert_array_equal(store.matrix("rna").lengths(), np.diff(counts.indptr))
    assert store.matrix("rna").read(5000, 5000).num_rows == 0


def test_filter_chooses_cells_and_keeps_their_order(experiment: Path, toy: ModuleType) -> None:
    store = open_store(experiment, obs_filter="sample in ['donor1', 'donor3'] and lane < 2")
    cells = np.array([c for c in range(NUM_CELLS) if c % 4 in (1, 3) and c % 3 < 2])
    assert list(store.cell_ids(0, len(cells))) == [f"cell{c}" for c in cells]
    assert store.schema.num_cells == len(cells)
    for modality in toy.FEATURES:
        toy.check_counts(store, modality, np.intersect1d(cells, toy.cells_of(modality)))
    toy.check_obs(store)
    assert store.schema.fingerprint != open_store(experiment).schema.fingerprint


def test_bad_filters_are_refused(experiment: Path) -> None:
    with pytest.raises(ValueError, match=r"obs filter: got \"smaple == 'a'\".*smaple.*columns of .* are: .*sample"):
        open_store(experiment, obs_filter="smaple == 'a'")
    with pytest.raises(ValueError, match=r"obs filter: got 'sample = \('"):
        open_store(experiment, obs_filter="sample = (")
    with pytest.raises(ValueError, match=r"which no cell of .* meets"):
        open_store(experiment, obs_filter="sample == 'donor9'")


def test_layers(tmp_path: Path, toy: ModuleType) -> None:
    write_experiment(tmp_path / "exp", toy, {"rna": np.arange(NUM_CELLS)}, layers=("counts", "scaled"))
    toy.check_counts(open_store(tmp_path / "exp"), "rna")
    scaled = open_store(tmp_path / "exp", layer="scaled")
    np.testing.assert_array_equal(scaled.totals("rna"), toy.counts_of("rna", np.arange(NUM_CELLS)).sum(1) / 2)
    with pytest.raises(ValueError, match=r"ms/RNA/X has no layer 'raw'; it has .*: name one of them"):
        open_store(tmp_path / "exp", layer="raw")
    write_experiment(tmp_path / "two", toy, {"rna": np.arange(NUM_CELLS)}, layers=("scaled", "other"))
    with pytest.raises(ValueError, match=r"ms/RNA/X: got layers (scaled, other|other, scaled); name the one"):
        open_store(tmp_path / "two")


def test_measurements_are_named_by_option_or_alias(tmp_path: Path, toy: ModuleType) -> None:
    names = {"rna": "my_assay", "adt": "protein"}
    write_experiment(tmp_path / "exp", toy, {name: toy.cells_of(name) for name in names}, names=names)
    assert tuple(open_store(tmp_path / "exp").schema.modalities) == ("adt",)
    both = open_store(tmp_path / "exp", measurements={"rna": "my_assay", "adt": "protein"})
    for modality in names:
        toy.check_counts(both, modality)
    with pytest.raises(ValueError, match=r"measurements\['rna'\]: got 'RNA'; .* has "):
        open_store(tmp_path / "exp", measurements={"rna": "RNA"})
    write_experiment(tmp_path / "odd", toy, {"rna": np.arange(NUM_CELLS)}, names={"rna": "odd"})
    with pytest.raises(ValueError, match=r"measurements odd, of which no name tells.*measurements=\{'rna': 'odd'\}"):
        open_store(tmp_path / "odd")


def test_embedding_is_written_at_the_joinids_and_read_back(experiment: Path, toy: ModuleType) -> None:
    store = open_store(experiment)
    values = np.arange(NUM_CELLS * 3, dtype=np.float32).reshape(-1, 3)
    store.write_embedding("X_liam", values[:, :2])
    store.write_embedding("X_liam", values, {"made_by": "a test"})
    assert store.embedding_attributes("X_liam")[0]["made_by"] == "a test"
    assert len(list((experiment / "ms/RNA/obsm").glob("X_liam*"))) == 1, "the old one is removed"
    np.testing.assert_array_equal(open_store(experiment).read_embedding("X_liam", 0, NUM_CELLS), values)
    np.testing.assert_array_equal(store.read_embedding("X_liam", 7, 31), values[7:31])
    with tiledbsoma.open(str(experiment)) as opened:
        table = opened.ms["RNA"].obsm["X_liam"].read().tables().concat().to_pandas()
    assert len(table) == NUM_CELLS * 3
    np.testing.assert_array_equal(np.unique(table["soma_dim_0"]), joinid_of(np.arange(NUM_CELLS)))
    assert store.embedding_attributes("X_other") == []
    with pytest.raises(ValueError, match=r"obsm: got 'X_other', it holds X_liam"):
        store.read_embedding("X_other", 0, 3)
    with pytest.raises(ValueError, match=r"got values of shape \(51, 3\) .* of 50 cells"):
        store.write_embedding("X_liam", np.zeros((51, 3), np.float32))


def test_embedding_of_filtered_cells_leaves_the_others_missing(experiment: Path) -> None:
    store = open_store(experiment, obs_filter="lane == 1")
    num_cells = store.schema.num_cells
    store.write_embedding("X_liam", np.ones((num_cells, 2), np.float32))
    everywhere = open_store(experiment).read_embedding("X_liam", 0, NUM_CELLS)
    np.testing.assert_array_equal(np.isnan(everywhere).all(1), np.arange(NUM_CELLS) % 3 != 1)


def test_what_is_no_experiment(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"object of type SOMADataFrame; give the whole experiment"):
        open_store(experiment / "obs")
    with pytest.raises(ValueError, match=r"got no TileDB-SOMA experiment"):
        open_store(tmp_path / "nothing", format="soma")
    with pytest.raises(ValueError, match=r"got modality='rna' for a TileDB-SOMA experiment; leave that out"):
        open_store(experiment, modality="rna")


def test_without_tiledbsoma_the_extra_is_named(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(ValueError, match=r'tiledbsoma cannot be imported .*run `pip install "liam-scale\[soma\]"`'):
        open_store(experiment)


def test_damage_is_named(tmp_path: Path, toy: ModuleType) -> None:
    write_experiment(tmp_path / "exp", toy, {"rna": np.arange(NUM_CELLS)})
    (values,) = (tmp_path / "exp/ms/RNA/X").rglob("a0.tdb")
    values.write_bytes(b"\xff" * values.stat().st_size)
    with pytest.raises(RuntimeError, match=r"(?s)ms/RNA/X/data: cells of joinid \d+ to \d+ cannot be read: .*copy"):
        open_store(tmp_path / "exp").matrix("rna").read(0, NUM_CELLS)
    for footer in (tmp_path / "exp/ms/RNA/X").rglob("__fragment_metadata.tdb"):
        footer.write_bytes(b"\xff" * footer.stat().st_size)
    with pytest.raises(RuntimeError, match=r"(?s)exp: its measurements cannot be opened: .*copy"):
        open_store(tmp_path / "exp")


def test_an_embedding_that_cannot_be_written_leaves_the_old_one(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(experiment)
    values = np.ones((NUM_CELLS, 2), np.float32)
    store.write_embedding("X_liam", values)

    def fails(*arguments: object) -> None:
        raise tiledbsoma.SOMAError("[TileDB::IO] Error: Cannot write to file; No space left on device")

    monkeypatch.setattr(tiledbsoma.SparseNDArray, "write", fails)
    with pytest.raises(RuntimeError, match=r"writing .*/obsm/X_liam: disk full"):
        store.write_embedding("X_liam", 2 * values)
    np.testing.assert_array_equal(store.read_embedding("X_liam", 0, NUM_CELLS), values)
    assert len(list((experiment / "ms/RNA/obsm").glob("X_liam*"))) == 1
