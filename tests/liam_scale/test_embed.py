"""Embeddings: in cell order, by any number of ranks, interrupted, read back by the field's own tools."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import mudata
import numpy as np
import pytest
import torch

import liam_scale
from liam_scale import embed as module
from liam_scale.embed import EmbedConfig, compute, embed, main
from liam_scale.evaluate import EvaluateConfig, evaluate
from liam_scale.model import logistic_normal_mean
from liam_scale.run import RunDirectory
from loaders import Loader, LoaderConfig, open_store, resident

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def store(multiome: Path, tmp_path: Path) -> Path:
    """A copy of the store, to write into."""
    return Path(shutil.copytree(multiome, tmp_path / "store.zarr"))


def expected(run: Path, store: Path) -> np.ndarray:
    """The embedding of every cell, one by one minibatch of all cells, without the command."""
    model = liam_scale.load_run(run).model()
    opened = open_store(store)
    with Loader(opened, LoaderConfig(minibatch=600), subset="all", shuffle=False, transpose=False) as loader:
        minibatch = next(iter(loader))
        mean, variance = model.latent(minibatch)
    values = np.empty(mean.shape, dtype=np.float32)
    values[minibatch.rows.numpy()] = logistic_normal_mean(mean, variance).numpy()
    return values


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_cell_gets_its_own_embedding_on_any_number_of_ranks(
    trained: Path, store: Path, launch: Command, ranks: int
) -> None:
    done = launch("liam_scale.embed", trained, "--store", store, ranks=ranks)
    assert done.returncode == 0, done.stderr
    atlas = mudata.read_zarr(store)
    np.testing.assert_allclose(atlas.obsm["X_liam"], expected(trained, store), atol=2e-6)
    np.testing.assert_allclose(atlas.obsm["X_liam"].sum(axis=1), 1.0, atol=1e-5)


def test_one_pass_keeps_no_rows(trained: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was trained with rows that stay."""
    own = RunDirectory.loader_config
    monkeypatch.setattr(RunDirectory, "loader_config", lambda run: replace(own(run), resident="on"))
    monkeypatch.delattr(resident, "Rows")
    run = liam_scale.load_run(trained)
    assert run.embedding(str(store)).shape[0] == len(run.elbo(str(store))) == 600


def test_an_interrupted_embedding_goes_on_and_leaves_no_pieces(
    trained: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    monkeypatch.setattr(module, "CELLS_PER_STEP", 50)
    monkeypatch.setattr(module, "STEPS_PER_PIECE", 2)
    embedded = []
    one = module._embed_minibatch

    def stops_after_five(*arguments: object) -> object:
        embedded.append(1)
        if len(embedded) == 6:
            raise KeyboardInterrupt
        return one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_embed_minibatch", stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(run=run, store=(str(store),)))
    assert "X_liam" not in mudata.read_zarr(store).obsm
    embed(EmbedConfig(run=run, store=(str(store),)))
    # 12 steps in pieces of two: the 5 done before hold two whole pieces, so 8 steps remain.
    assert len(embedded) == 6 + 8
    np.testing.assert_allclose(mudata.read_zarr(store).obsm["X_liam"], expected(trained, store), atol=2e-6)
    assert not list(run.glob("embedding-*"))


def test_the_loader_starts_once(trained: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads, windows and buffers are made anew at every start, which costs as much as reading."""
    monkeypatch.setattr(module, "CELLS_PER_STEP", 50)
    monkeypatch.setattr(module, "STEPS_PER_PIECE", 2)
    starts, once = [], Loader.__iter__
    monkeypatch.setattr(Loader, "__iter__", lambda self: starts.append(1) or once(self))
    embed(EmbedConfig(run=trained, store=(str(store),)))
    assert starts == [1]


def test_a_damaged_piece_is_named_and_the_same_command_goes_on(
    trained: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    monkeypatch.setattr(module, "CELLS_PER_STEP", 100)
    monkeypatch.setattr(module, "STEPS_PER_PIECE", 2)
    write = module._write
    monkeypatch.setattr(module, "_write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(run=run, store=(str(store),)))
    monkeypatch.setattr(module, "_write", write)
    (piece,) = run.glob("embedding-*/0/*-00000002.npz")
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"00000002.npz was damaged .* run the same command again"):
        embed(EmbedConfig(run=run, store=(str(store),)))
    embed(EmbedConfig(run=run, store=(str(store),)))
    np.testing.assert_allclose(mudata.read_zarr(store).obsm["X_liam"], expected(trained, store), atol=2e-6)


def test_weights_that_are_not_finite_are_not_embedded(
    trained: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), "--store", str(store)]) == 0
    before = mudata.read_zarr(store).obsm["X_liam"]
    run = liam_scale.load_run(shutil.copytree(trained, tmp_path / "run"))
    weights = run.model().state_dict()
    run.directory.save_weights({name: torch.full_like(value, torch.nan) for name, value in weights.items()})
    assert main([str(run.path), "--store", str(store)]) == 1
    cell = open_store(store).cell_ids(0, 1)[0]
    assert f"not finite for 600 cells ({cell}, " in capsys.readouterr().err
    np.testing.assert_array_equal(mudata.read_zarr(store).obsm["X_liam"], before)


def test_an_embedding_of_another_width_replaces_the_old_one(trained: Path, store: Path) -> None:
    opened = open_store(store)
    opened.write_embedding("X_liam", np.ones((600, 7), dtype=np.float32))
    embed(EmbedConfig(run=trained, store=(str(store),)))
    assert mudata.read_zarr(store).obsm["X_liam"].shape == (600, 4)


def test_a_separate_anndata_carries_obs_and_leaves_the_store_alone(
    trained: Path, multiome: Path, tmp_path: Path
) -> None:
    assert main([str(trained), "--store", str(multiome), "--out", str(tmp_path / "embedding.zarr")]) == 0
    result = anndata.read_zarr(tmp_path / "embedding.zarr")
    assert "X_liam" not in mudata.read_zarr(multiome).obsm
    opened = open_store(multiome)
    assert result.obs_names.tolist() == opened.cell_ids(0, 600).tolist()
    assert "sample" in result.obs
    np.testing.assert_allclose(result.obsm["X_liam"], compute(EmbedConfig(run=trained)), atol=1e-7)


def test_an_h5ad_is_a_file_of_that_format(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "embedding.h5ad"
    assert main([str(trained), "--out", str(file)]) == 0
    assert f'read it with anndata.read_h5ad("{file}")' in capsys.readouterr().out
    result = anndata.read_h5ad(file)
    np.testing.assert_allclose(result.obsm["X_liam"], compute(EmbedConfig(run=trained)), atol=1e-7)
    (attributes,) = open_store(file).embedding_attributes("X_liam")
    assert attributes["liam_scale_run"] == liam_scale.load_run(trained).record.id
    assert os.listdir(tmp_path) == ["embedding.h5ad"]


@pytest.mark.parametrize("suffix", [".h5mu", ".h5"])
def test_another_format_is_refused_before_any_work(
    suffix: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), "--out", str(tmp_path / f"embedding{suffix}")]) == 2
    assert f"name {tmp_path / 'embedding.h5ad'}\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_reader_that_is_named_reads_the_store(trained: Path, store: Path, tmp_path: Path) -> None:
    main([str(trained), "--store", str(store), "--out", str(tmp_path / "embedding.zarr")])
    assert module._reader(str(store)) == "liam_scale.read_store"
    assert module._reader(str(tmp_path / "embedding.zarr")) == "anndata.read_zarr"
    assert module._reader(str(tmp_path / "experiment.soma")) is None


@pytest.mark.slow
def test_scanpy_finds_neighbours_in_what_is_read_back(trained: Path, multiome: Path, tmp_path: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    main([str(trained), "--store", str(multiome), "--out", str(tmp_path / "embedding.zarr")])
    result = anndata.read_zarr(tmp_path / "embedding.zarr")
    scanpy.pp.neighbors(result, use_rep="X_liam", n_neighbors=5)
    assert result.obsp["connectivities"].shape == (600, 600)


def test_the_posterior_before_the_softmax_and_single_draws_are_there_too(trained: Path) -> None:
    model = liam_scale.load_run(trained).model()
    mean = compute(EmbedConfig(run=trained, kind="latent-mean"))
    variance = compute(EmbedConfig(run=trained, kind="latent-variance"))
    assert mean.shape == variance.shape == (600, model.num_latent)
    assert (variance > 0).all()
    own = logistic_normal_mean(torch.from_numpy(mean), torch.from_numpy(variance)).numpy()
    np.testing.assert_allclose(own, compute(EmbedConfig(run=trained)), atol=1e-6)
    draws = [compute(EmbedConfig(run=trained, kind="sample", seed=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3
    np.testing.assert_allclose(draws[0].sum(axis=1), 1.0, atol=1e-5)


def test_another_store_is_refused_with_the_reason(
    trained: Path, trimodal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from loaders.synthetic import simulate

    other = tmp_path / "other.zarr"
    simulate(other, num_cells=50, num_genes=59, num_peaks=150, genes_per_cell=20, peaks_per_cell=40)
    assert main([str(trained), "--store", str(other)]) == 2
    assert "not those of the run" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_an_unfinished_run_says_how_to_finish_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "model.safetensors").unlink()
    assert main([str(run)]) == 2
    assert "has not finished training" in capsys.readouterr().err


def test_the_run_says_what_it_was_trained_on(trained: Path, multiome: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["stores"] == [str(multiome)]
    assert record["data"]["num_features"] == {"rna": 60, "atac": 150}


def test_a_soma_experiment_is_trained_on_embedded_and_evaluated(
    multiome: Path, tmp_path: Path, write_soma: Callable
) -> None:
    atlas = mudata.read_zarr(multiome)
    data = atlas["rna"].copy()
    for column in ("sample", "cell_type"):
        data.obs[column] = atlas.obs[column].astype(str).to_numpy()
    data.X = data.X.astype(np.float32)
    experiment = str(tmp_path / "experiment")
    write_soma(experiment, data)
    options = {"model": "rna-only", "n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB"}
    run = liam_scale.train(experiment, out=tmp_path / "run", batch_key="sample", max_epochs=2, **options)
    run.embed()
    written = open_store(experiment).read_embedding("X_liam", 0, data.n_obs)
    np.testing.assert_allclose(written.sum(axis=1), 1.0, atol=1e-5)
    held = open_store(experiment).embedding_attributes("X_liam")
    assert [entry["liam_scale_run"] for entry in held] == [run.record.id]
    found = evaluate(EvaluateConfig(experiment, batch_key="sample", label_key="cell_type", scib="none"))
    assert np.isfinite(found.table["X_liam"]).all()
    with pytest.raises(ValueError, match=r"--embedding: .*got 'X_lima', it holds X_liam"):
        evaluate(EvaluateConfig(experiment, embedding="X_lima", batch_key="sample", label_key="cell_type"))
