"""The Python interface: found by completion, refused early, shown in a few lines."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pytest

import liam_scale
from liam_scale.train import main as train_main
from loaders import Loader, LoaderConfig, open_store
from loaders.ecosystem import plain_mudata

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_completion_shows_what_there_is_and_the_version_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from liam_scale.cli import main

    assert {"Run", "__version__", "ingest", "load_run", "train"} <= set(dir(liam_scale))
    assert "annotations" not in dir(liam_scale)
    main(["--version"])
    assert capsys.readouterr().out.split()[-1] == liam_scale.__version__
    kinds = {p.kind for p in inspect.signature(liam_scale.train).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_importing_the_package_loads_no_torch_and_a_foreign_loaders_is_named(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    code = "import sys, liam_scale; print('torch' in sys.modules, 'numpy' in sys.modules)"

    def started() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    assert started().stdout == "False False\n"
    (tmp_path / "loaders.py").write_text("")
    done = started()
    assert done.returncode == 1
    assert f"`import loaders` finds {tmp_path / 'loaders.py'}; rename that one" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"model": "BAVAE"}, ["--model", "BAVAE"], "--model.model: got 'BAVAE'; choose one of bavae, cvae"),
        ({"n_latent": "3"}, None, "--model.n-latent: got '3'; give a whole number"),
        ({"n_latent": 1}, ["--n-latent", "1"], "--model.n-latent: got 1; give at least 2"),
        ({"lr": -1}, ["--lr", "-1"], "--optim.lr: got -1.0; give at least 0"),
        ({"minibatch": 0}, ["--minibatch", "0"], "minibatch: got 0; give at least 1"),
        ({"modalities": "rna"}, None, "--model.modalities: got 'rna'; give a list"),
        ({"device": "cuda"}, ["--device", "cuda"], "--device: got cuda, but torch sees no CUDA device here"),
        ({"resume": "maybe"}, ["--resume", "maybe"], "--resume: got 'maybe'; choose one of auto, never"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_option_that_cannot_be_is_refused_before_the_store_is_looked_for(
    options: dict[str, Any],
    flags: list[str] | None,
    message: str,
    dry_run: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(message)):
        liam_scale.train("nowhere.zarr", out=tmp_path / "run", dry_run=dry_run, **options)
    if flags is not None:
        try:
            code = train_main(["nowhere.zarr", "--out", str(tmp_path / "run"), *flags, *["--dry-run"] * dry_run])
        except SystemExit as stop:  # the parser's own refusal of what is not among the choices
            code = stop.code
        assert code == 2
        assert str(next(iter(options.values()))) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def small_anndata() -> anndata.AnnData:
    return anndata.AnnData(np.ones((5, 3), np.float32))


@pytest.mark.parametrize("kind", ["AnnData", "MuData", "dict"])
def test_data_in_memory_are_refused_where_files_are_meant(kind: str, tmp_path: Path) -> None:
    data: Any = {"X": 1}
    cure = "got {'X': 1} (dict); give the path"
    if kind == "AnnData":
        data, cure = small_anndata(), 'data.write("data.h5ad"), and make a store of that: ingest("data.h5ad"'
    if kind == "MuData":
        data, cure = mudata.MuData({"rna": small_anndata()}), 'data.write("data.h5mu")'
    for refused in (
        lambda: liam_scale.train([data], out=tmp_path / "run"),
        lambda: liam_scale.ingest(data, out=tmp_path / "store.zarr"),
        lambda: liam_scale.ingest(["a.h5ad", data], out=tmp_path / "store.zarr"),
    ):
        with pytest.raises(ValueError, match=re.escape(cure)):
            refused()
    assert not list(tmp_path.iterdir())


def test_a_mudata_in_memory_trains_goes_on_and_takes_its_embedding(multiome: Path, tmp_path: Path) -> None:
    with plain_mudata():
        data = mudata.read_zarr(multiome)
    options: dict[str, Any] = {"batch_key": "sample", "out": tmp_path / "run", "n_latent": 4, "n_hidden": 8}
    run = liam_scale.train(data, max_epochs=1, **options)
    assert run.record.stores == ("MuData in memory",)
    run = liam_scale.train(data, max_epochs=2, **options)
    assert run.history["epoch"].max() == 1
    with pytest.raises(ValueError, match=r"trained on MuData in memory; give the object again, run.embed\(data\)"):
        run.embed()
    with pytest.raises(ValueError, match=r"is not what .*run was trained on"):
        liam_scale.train(data[:300].copy(), max_epochs=3, **options)
    run.embed(data)
    assert data.obsm["X_liam"].shape == (600, 4)
    np.testing.assert_array_equal(data.obsm["X_liam"], run.embedding(data).loc[data.obs_names].to_numpy())
    on_disk = liam_scale.train(multiome, max_epochs=1, **{**options, "out": tmp_path / "disk"})
    assert on_disk.record.data == run.record.data


def test_files_may_come_as_any_list_of_paths(multiome: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.h5ad: got no such file"):
        liam_scale.ingest((tmp_path / name for name in ("absent.h5ad",)), out=tmp_path / "store.zarr")


def test_store_schema_run_and_minibatch_are_shown_in_a_few_lines(multiome: Path, trained: Path) -> None:
    store = open_store(multiome)
    assert repr(store).splitlines()[:2] == [
        f"SourceStore {multiome}: 600 cells, shuffled",
        "    rna: 600 cells × 60 features, "
        f"{store.schema.modalities['rna'].nonzeros_per_cell:.0f} non-zeros a cell, uint8",
    ]
    assert repr(store).splitlines()[-1] == "    obs: 'sample', 'donor', 'cell_type', 'mixed_with', 'own_weight'"
    assert repr(open_store([multiome, multiome])).startswith(f"ChainedStore {multiome} + {multiome}: 1,200 cells")
    run = liam_scale.load_run(trained)
    assert repr(run).splitlines() == [
        f"Run {trained}: bavae, finished",
        f"    stores: {multiome}",
        "    features: rna: 60, atac: 150",
        f"    3 samples of 'sample', 4 latent dimensions, id {run.record.id}",
    ]
    assert repr(liam_scale.api.Run(type(run.directory)(Path("nowhere")))) == "Run nowhere: nothing trained there yet"
    with Loader(store, LoaderConfig(minibatch=64), sample="sample") as loader:
        minibatch = next(iter(loader))
    assert repr(minibatch).splitlines() == [
        f"Minibatch of {minibatch.num_cells} of {minibatch.num_global} cells, epoch 0, step 0",
        f"    rna: {minibatch.num_cells} cells × 60 features, "
        f"{len(minibatch.counts['rna'].values):,} non-zeros, torch.float32 on cpu",
        f"    atac: {minibatch.num_cells} cells × 150 features, "
        f"{len(minibatch.counts['atac'].values):,} non-zeros, torch.float32 on cpu",
    ]


def test_what_is_no_path_of_a_run_is_named() -> None:
    with pytest.raises(ValueError, match="path: got 3; give a path in quotes"):
        liam_scale.load_run(3)  # type: ignore[arg-type]
