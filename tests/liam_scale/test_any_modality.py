"""A mosaic of RNA, a histone mark and proteins of a name with a dot, through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from safetensors.numpy import load_file

import liam_scale
from liam_scale.cli import command, main
from liam_scale.evaluate import main as evaluate_main
from liam_scale.evaluation.plots import loss_figure
from loaders.modalities import Kind
from loaders.stores import open_store

SAID = {"h3k27ac": "NM", "dogma.adt": "NB:clr"}
KINDS = {"rna": Kind("NB", "log1p"), "dogma.adt": Kind("NB", "clr"), "h3k27ac": Kind("NM", "none")}
SIZES = {"rna": 40, "h3k27ac": 70, "dogma.adt": 8}
HELD = {"s0": ("rna", "h3k27ac", "dogma.adt"), "s1": ("rna", "dogma.adt"), "s2": ("h3k27ac",)}
SMALL: dict[str, Any] = {"batch_key": "sample", "n_hidden": 8, "n_latent": 4, "minibatch": 64, "memory": "64MiB"}


def cells_of(samples: dict[str, tuple[str, ...]], *, seed: int = 0, each: int = 80) -> mudata.MuData:
    """Cells of two types, of which each modality shows the type in its features."""
    rng = np.random.default_rng(seed)
    rates = {name: rng.gamma(0.6, 1.5, (2, size)) for name, size in SIZES.items()}
    obs = pd.DataFrame({"sample": np.repeat(list(samples), each)})
    types = rng.integers(0, 2, len(obs))
    obs.index, obs["cell_type"] = [f"{sample}-{i}" for i, sample in enumerate(obs["sample"])], [f"t{t}" for t in types]
    mods = {}
    for name, rate in rates.items():
        has = obs["sample"].map(lambda sample, name=name: name in samples[sample]).to_numpy()
        if has.any():
            counts = scipy.sparse.csr_matrix(rng.poisson(rate[types]).astype(np.float32)[has])
            mods[name] = anndata.AnnData(counts, obs=obs[[]][has])
            mods[name].var_names = [f"{name[0]}{i}" for i in range(SIZES[name])]
    data = mudata.MuData(mods)
    data.obs = obs.loc[data.obs_names]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.h5mu, the mosaic; truth.h5mu, the same cells with everything."""
    path = tmp_path_factory.mktemp("any")
    whole = cells_of(dict.fromkeys(HELD, tuple(SIZES)))
    whole.write_h5mu(path / "truth.h5mu")
    mods = {name: part[[name in HELD[cell.partition("-")[0]] for cell in part.obs_names]].copy()
            for name, part in whole.mod.items()}  # fmt: skip
    mosaic = mudata.MuData(mods)
    mosaic.obs = whole.obs.loc[mosaic.obs_names]
    mosaic.write_h5mu(path / "a.h5mu")
    return path


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    said = ["--modality", *(f"{name}={kind}" for name, kind in SAID.items())]
    for name in ("a", "truth"):
        assert main(["ingest", str(folder / f"{name}.h5mu"), "--out", str(folder / f"{name}.zarr"), *said]) == 0
    return folder / "a.zarr"


@pytest.fixture(scope="module")
def run(store: Path) -> liam_scale.Run:
    """Trained and embedded."""
    made = liam_scale.train(store, out=store.parent / "run", max_epochs=3, **SMALL)
    made.embed()
    return made


def test_training_goes_on_where_it_stopped(run: liam_scale.Run, store: Path, tmp_path: Path) -> None:
    straight = liam_scale.train(store, out=tmp_path / "straight", max_steps=6, **SMALL)
    for steps in (3, 6):
        halved = liam_scale.train(store, out=tmp_path / "halved", max_steps=steps, **SMALL)
    one, other = (load_file(made.path / "model.safetensors") for made in (straight, halved))
    assert {name.split(".")[1] for name in one if name.startswith("encoders")} == {
        "rna", "mod:h3k27ac", "mod:dogma:adt",
    }  # fmt: skip
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert run.record.data.kinds == KINDS


def test_history_and_losses_have_a_column_and_a_panel_of_each(run: liam_scale.Run) -> None:
    history = pd.read_csv(run.path / "history.csv")
    for name in KINDS:
        for term in (f"reconstruction_loss_{name}", f"kl_divergence_l_{name}"):
            assert np.isfinite(history[[f"{term}_train", f"{term}_validation"]].to_numpy(float)).all()
    titles = [axes.get_title(loc="left") for axes in loss_figure(history, title="run").axes]
    assert [title for title in titles if title.startswith("reconstruction")] == [
        "reconstruction, RNA",
        "reconstruction, DOGMA.ADT",
        "reconstruction, H3K27AC",
    ]


def test_an_embedding_is_scored_beside_the_baseline_and_by_what_was_held_out(
    run: liam_scale.Run, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(store), "--batch-key", "sample", "--label-key", "cell_type", "--scib", "none", "--no-plots"]
    truth = ["--truth", str(store.parent / "truth.zarr"), "--run", str(run.path), "--out", str(tmp_path)]
    capsys.readouterr()
    assert evaluate_main([*arguments, *truth, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"PCA", "X_liam"} <= set(found["measures"][0])
    scored = {(row["measure"], row["of"]) for row in found["imputation"]}
    assert {("auroc", "h3k27ac"), ("cell_r", "dogma.adt"), ("deviance", "rna")} <= scored
    assert ("auroc", "rna") not in scored


def test_values_are_decoded_and_compared(run: liam_scale.Run) -> None:
    named = run.normalized(["h3k27ac:h3", "d1", "r5"], num_samples=2)
    assert named["mean"].shape == (240, 3)
    assert np.isfinite(named.to_numpy()).all()
    whole = run.normalized(modality="h3k27ac", groupby="cell_type", num_samples=2)
    np.testing.assert_allclose(whole["mean"].sum(axis=1), 1, rtol=1e-4)
    for name, size in SIZES.items():
        table = run.differential(groupby="cell_type", modality=name, pairs=200)
        assert len(table) == 2 * size
        assert np.isfinite(table["lfc_mean"]).all()
    assert f"reconstruction_loss_{'dogma.adt'}" in run.elbo().columns


@pytest.mark.parametrize("is_ingested", [True, False])
def test_new_samples_are_mapped_with_what_the_run_knows(run: liam_scale.Run, tmp_path: Path, is_ingested: bool) -> None:
    new = cells_of({"s9": ("rna", "h3k27ac")}, seed=0, each=40)
    path = tmp_path / "new.zarr"
    if is_ingested:
        new.write_h5mu(tmp_path / "new.h5mu")
        liam_scale.ingest(tmp_path / "new.h5mu", out=path, sample_key="sample", modality="h3k27ac=NM", progress=False)
    else:
        new.write_zarr(path)
    mapped = run.map(path, out=tmp_path / "mapped", max_epochs=1)
    held = open_store(path, modality={} if is_ingested else {"h3k27ac": "NM"})
    assert np.isfinite(held.read_embedding("X_liam", 0, 40)).all()
    assert mapped.record.data.samples == ("s0", "s1", "s2", "s9")
    assert mapped.record.data.kinds == KINDS


def test_info_check_and_export_know_the_store(
    run: liam_scale.Run, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command("info")([str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = found["modalities"]["dogma.adt"]
    assert (held["num_features"], held["likelihood"], held["transform"]) == (8, "NB", "clr")
    assert found["cells_with"] == {"rna + dogma.adt + h3k27ac": 80, "rna + dogma.adt": 80, "h3k27ac": 80}
    assert list(found["embeddings"]) == ["X_liam"]
    assert command("info")([str(store)]) == 0
    assert "kB a cell, NB:clr\n" in capsys.readouterr().out
    assert command("check")([str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_sound"]
    assert main(["export", str(store), "--out", str(tmp_path / "a.h5mu")]) == 0
    out = mudata.read_h5mu(tmp_path / "a.h5mu")
    assert list(out.mod) == list(KINDS)
    assert out["h3k27ac"].obsm["X_liam"].shape == (160, 4)


def test_a_file_streams_and_its_run_needs_the_words_once(folder: Path, tmp_path: Path) -> None:
    file, options = folder / "a.h5mu", {**SMALL, "max_steps": 2}
    run = liam_scale.train(file, out=tmp_path / "run", modality=SAID, **options)
    assert run.record.data.kinds == KINDS
    assert run.embedding().shape == (240, 4)
    run.embed(out=tmp_path / "embedding.h5ad")
    again = liam_scale.load_run(tmp_path / "run").embedding(mudata.read_h5mu(file))
    np.testing.assert_array_equal(again.to_numpy(), anndata.read_h5ad(tmp_path / "embedding.h5ad").obsm["X_liam"])
    with pytest.raises(ValueError, match=r"--modality: got None, the run has \['h3k27ac=NM', 'dogma.adt=NB:clr'\]"):
        liam_scale.train(file, out=tmp_path / "run", **options)
    held = liam_scale.train(mudata.read_h5mu(file), out=tmp_path / "held", modality=SAID, **options)
    assert held.record.data == run.record.data


def test_a_store_that_says_something_else_is_not_the_runs(run: liam_scale.Run, folder: Path, tmp_path: Path) -> None:
    said = {**SAID, "h3k27ac": "NB"}
    other = liam_scale.ingest(folder / "a.h5mu", out=tmp_path / "a.zarr", modality=said, progress=False)
    assert other.modalities["h3k27ac"].likelihood == "NB"
    for use in (
        lambda: run.embedding(tmp_path / "a.zarr"),
        lambda: run.map(tmp_path / "a.zarr", out=tmp_path / "mapped"),
        lambda: liam_scale.train(tmp_path / "a.zarr", out=tmp_path / "r", modality="h3k27ac=NM", **SMALL),
    ):
        with pytest.raises(ValueError, match=r"modality: h3k27ac is N[BM]"):
            use()
    assert not (tmp_path / "r").exists()


def test_each_alone_side_by_side(store: Path, tmp_path: Path) -> None:
    run = liam_scale.train(store, out=tmp_path / "run", model="concat", max_steps=1, **SMALL)
    assert run.record.parts == ("rna", "mod.dogma.adt", "mod.h3k27ac")
    assert run.embedding().shape == (240, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modality", "h3k27ac=Poisson"], "--modality: got 'h3k27ac=Poisson'; write NAME=NM"),
        (["--modality", "h3k27ac=NB"], "--modality: h3k27ac is NB:log1p in what was asked for and NM:none in "),
        (["--modality", "h3k4me1=NM"], "--modality: got h3k4me1, which"),
        (["--modality", "a/b=NM"], "--modality: got the name 'a/b'"),
        (
            ["--model.modalities", "lipids"],
            "--model.modalities: got lipids for model bavae, but the store",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", str(store), "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
