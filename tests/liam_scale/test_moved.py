"""A run that is copied or moved, its pictures, and where it finds its store."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

import liam_scale
from liam_scale.evaluation.plots import draw_losses
from loaders import open_store
from loaders.synthetic import simulate


def test_a_copied_run_finds_its_store_again(multiome: Path, trained: Path, tmp_path: Path) -> None:
    there = tmp_path / "project"
    copy = liam_scale.load_run(trained).save_to(there / "runs" / "a")
    assert not copy.directory.checkpoints.exists()
    before = liam_scale.load_run(trained).embedding()
    record = copy.record
    object.__setattr__(record, "stores", ("gone/multiome.zarr",))
    copy.directory.write_record(record)
    with pytest.raises(ValueError, match=r"is not there, nor is multiome\.zarr in the folder of the run or above"):
        copy.embedding()
    simulate(there / "multiome.zarr", num_cells=40, num_genes=60, num_peaks=150, genes_per_cell=20, peaks_per_cell=40)
    with pytest.raises(ValueError, match="is another one"):
        copy.embedding()
    given = liam_scale.load_run(copy.path, store=multiome)
    pd.testing.assert_frame_equal(given.embedding(), before)
    shutil.rmtree(there / "multiome.zarr")
    shutil.copytree(multiome, there / "multiome.zarr")
    pd.testing.assert_frame_equal(copy.embedding(), before)
    copy.embed()
    assert open_store(there / "multiome.zarr").embedding_names() == ["X_liam"]
    assert open_store(multiome).embedding_names() == []


def test_a_run_is_not_copied_over_another_or_half(trained: Path, multiome: Path, tmp_path: Path) -> None:
    run = liam_scale.load_run(trained)
    with pytest.raises(ValueError, match="exists; name a new one"):
        run.save_to(tmp_path)
    whole = run.save_to(tmp_path / "whole", checkpoints=True)
    (whole.path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has not finished; copy it with checkpoints=True"):
        whole.save_to(tmp_path / "half")


def test_pictures_give_axes_or_a_file(trained: Path, multiome: Path, tmp_path: Path) -> None:
    run, path = liam_scale.load_run(trained), Path(shutil.copytree(multiome, tmp_path / "store.zarr"))
    curves = liam_scale.pl.loss(run, show=False, save=tmp_path / "loss.png")
    assert {axes.get_title(loc="left") for axes in curves} >= {"negative ELBO", "reconstruction, RNA"}
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"write it with run\.embed"):
        liam_scale.pl.umap(run, store=path)
    run.embed(path)
    labels = open_store(path).obs_frame()["cell_type"].iloc[::2].rename("mine")
    both = liam_scale.pl.umap(run, ["sample", labels], store=path, show=False)
    assert [axes.texts[0].get_text() for axes in both] == ["sample", "mine"]
    shown = both[1].collections[0]
    assert len(shown.get_offsets()) == 600
    assert np.unique(shown.get_facecolors(), axis=0).shape[0] == 5  # four labels, and cells without one
    assert isinstance(liam_scale.pl.umap(run, store=path, show=False), Axes)


def test_pictures_for_files_leave_the_figures_of_a_notebook_shown(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = matplotlib.get_backend()
    monkeypatch.setenv("MPLBACKEND", "pdf")
    matplotlib.use("pdf")
    try:
        draw_losses(tmp_path / "loss.png", liam_scale.load_run(trained).history, title="")
        assert matplotlib.get_backend() == "pdf"
    finally:
        matplotlib.use(before)
