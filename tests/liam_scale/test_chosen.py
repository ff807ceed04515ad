"""Training on some cells and features of a store: what follows works on the same ones, and says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import liam_scale
from liam_scale.check import check_store
from liam_scale.cli import main
from liam_scale.info import describe, info
from liam_scale.run import RunDirectory
from loaders.stores import open_store
from loaders.stores.chosen import with_embedding

WHERE = "sample != 'donor2' and cell_type in ['type00', 'type01']"
OPTIONS: dict[str, Any] = {"n_hidden": 8, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "max_epochs": 2}


@pytest.fixture(scope="module")
def chosen(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A store, a run on some cells and 20 genes of it, which are embedded, and the file of the genes."""
    folder = tmp_path_factory.mktemp("chosen")
    store, genes, run = folder / "a.zarr", folder / "genes.txt", folder / "run"
    shutil.copytree(multiome, store)
    names = open_store(store).feature_names("rna")
    genes.write_text("\n".join(names[::3]) + "\nnowhere\n")
    liam_scale.train(store, out=run, batch_key="sample", where=WHERE, features=genes, **OPTIONS).embed()
    return store, run, genes


def rows_of(store: Path) -> np.ndarray:
    obs = open_store(store).obs_frame()
    return np.flatnonzero((obs["sample"] != "donor2") & obs["cell_type"].isin(["type00", "type01"]))


def test_a_run_knows_its_cells_and_features_and_no_others(chosen: tuple[Path, Path, Path]) -> None:
    store, run, genes = chosen
    record = RunDirectory(run).record()
    assert record.where == WHERE
    assert RunDirectory(run).saved_options()["where"] == WHERE
    assert RunDirectory(run).saved_options()["features"] == str(genes)
    assert record.data.samples == ("donor0", "donor1")
    assert record.data.num_features == {"rna": 20, "atac": 150}
    assert record.contents is not None
    assert record.contents["cells"]["number"] == len(rows_of(store))


def test_the_embedding_is_of_the_cells_chosen_and_everything_that_reads_it_knows(
    chosen: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store, path, _ = chosen
    run, rows, opened = liam_scale.load_run(path), rows_of(store), open_store(store)
    values = opened.read_embedding("X_liam", 0, opened.schema.num_cells)
    assert np.flatnonzero(np.isfinite(values).all(axis=1)).tolist() == rows.tolist()
    frame = run.embedding()
    assert frame.index.tolist() == opened.cell_ids(0, opened.schema.num_cells)[rows].tolist()
    np.testing.assert_allclose(frame.to_numpy(), values[rows], atol=1e-6)
    assert check_store(store).is_sound
    assert f"of the cells with {WHERE}" in describe(info(opened))
    means = run.normalized(opened.feature_names("rna")[:1].tolist(), groupby="cell_type", num_samples=0)
    assert means.index.tolist() == ["type00", "type01"]
    assert with_embedding(opened, "X_liam").schema.num_cells == len(rows), "what evaluation looks at"


def test_a_store_that_is_named_is_embedded_whole_by_the_features_of_the_run(chosen: tuple[Path, Path, Path]) -> None:
    store, path, _ = chosen
    run, rows = liam_scale.load_run(path), rows_of(store)
    whole = run.embedding(store)
    assert len(whole) == open_store(store).schema.num_cells
    np.testing.assert_allclose(whole.to_numpy()[rows], run.embedding().to_numpy(), atol=1e-5)


def test_going_on_takes_the_same_cells_and_features_or_is_refused_by_name(
    chosen: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    store, _, genes = chosen
    out, names = tmp_path / "run", genes.read_text().split()
    given = {"out": out, "batch_key": "sample", **OPTIONS}
    liam_scale.train(store, where=WHERE, features=names, **{**given, "max_epochs": 1})
    run = liam_scale.train(store, where=WHERE, features=names, **given)
    straight = pd.read_csv(chosen[1] / "history.csv")["elbo_validation"]
    np.testing.assert_array_equal(pd.read_csv(run.path / "history.csv")["elbo_validation"], straight)
    with pytest.raises(ValueError, match="--where: got None, the run has sample != 'donor2'"):
        liam_scale.train(store, features=names, **given)
    with pytest.raises(ValueError, match=r"features of rna: it has 60, the run 20\n.* its own --features"):
        liam_scale.train(store, where=WHERE, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "organ == 'x'"], "--where: got \"organ == 'x'\", which names no obs column of"),
        (["--where", "sample == 'nobody'"], "--where: got \"sample == 'nobody'\", for which no cell is left"),
        (["--features", "zz.txt"], "--features: got 1 names such as 'zz', none of which is there (there are 'gene0'"),
        (["--features", "none.txt"], "--features: none.txt is no text that can be read"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused_before_anything_is_written(
    multiome: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zz.txt").write_text("zz\n")
    assert main(["train", str(multiome), "--out", "run", *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["zz.txt"]
