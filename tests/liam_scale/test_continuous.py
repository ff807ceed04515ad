"""Continuous covariates: numbers of obs that decoders read beside the latent space, and encoders do not."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import liam_scale
from liam_scale.cli import main
from liam_scale.continuous import described, standardised
from liam_scale.model import Liam, ModelConfig, ModelData
from loaders import Loader, LoaderConfig, open_store
from loaders.synthetic import simulate_mudata

SHAPE: dict[str, Any] = {"num_genes": 60, "num_peaks": 90, "genes_per_cell": 25, "peaks_per_cell": 30, "num_types": 3}
OPTIONS: dict[str, Any] = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "lr": 0.01}


def aged(num_cells: int = 512, first_sample: int = 0) -> mudata.MuData:
    """Cells of two donors whose age, 20 to 80, the counts of gene0 grow with, and those of gene1 fall with."""
    data = simulate_mudata(num_cells=num_cells, num_samples=2, **SHAPE)
    rng = np.random.default_rng(num_cells)
    ages = rng.uniform(20, 80, num_cells)
    counts = data["rna"].X.toarray().astype(np.float32)
    counts[:, 0], counts[:, 1] = rng.poisson(ages / 8), rng.poisson((100 - ages) / 8)
    data["rna"].X = scipy.sparse.csr_matrix(counts)
    data.obs["age"] = ages
    data.obs["donor"] = [f"donor{int(name[-1]) + first_sample}" for name in data.obs["donor"]]
    return data


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    aged().write(folder / "aged.h5mu")
    liam_scale.ingest(folder / "aged.h5mu", out=folder / "aged.zarr")
    return folder / "aged.zarr"


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> liam_scale.Run:
    out = tmp_path_factory.mktemp("runs") / "aged"
    made = liam_scale.train(store, batch_key="donor", continuous_key="age", out=out, max_epochs=25, **OPTIONS)
    made.embed()
    return made


def test_the_run_keeps_mean_and_deviation_of_the_column(store: Path, run: liam_scale.Run) -> None:
    ages = open_store(store).obs_frame()["age"]
    assert run.record.data.continuous["age"] == pytest.approx((ages.mean(), ages.std(ddof=0)))
    assert "decoders read age" in repr(run)
    found = standardised(open_store(store), run.record.data.continuous)["age"]
    assert found.dtype == np.float32
    assert (found.mean(), found.std()) == pytest.approx((0, 1), abs=1e-4)


def test_minibatches_carry_the_numbers_of_their_cells(store: Path) -> None:
    opened = open_store(store)
    numbers = {"row": np.arange(opened.schema.num_cells) / 2}
    with Loader(opened, LoaderConfig(minibatch=64, memory="64MiB"), obs=numbers, modalities=["rna"]) as loader:
        for minibatch in loader:
            assert minibatch.obs["row"].dtype == torch.float32
            torch.testing.assert_close(minibatch.obs["row"], minibatch.rows / 2, check_dtype=False)
    with pytest.raises(ValueError, match=r"obs: got row of shape \(3,\); give one number for each of 512 cells"):
        Loader(opened, obs={"row": np.zeros(3)})


def test_decoders_alone_have_a_column_for_it_and_without_it_the_model_is_as_before() -> None:
    config = ModelConfig(n_hidden=8, n_latent=4)
    data = ModelData(num_features={"rna": 20, "atac": 30}, samples=("a", "b"))
    plain = Liam(config, data).state_dict()
    read = Liam(config, dataclasses.replace(data, continuous={"age": (50.0, 10.0)})).state_dict()
    assert plain.keys() == read.keys()
    changed = {name for name in plain if plain[name].shape != read[name].shape}
    assert changed == {"decoders.rna.linear.weight", "decoders.atac.linear.weight"}
    assert read["decoders.rna.linear.weight"].shape == (8, 5)
    assert all(torch.equal(plain[name], read[name]) for name in plain if name.startswith(("encoders", "latent_enc")))
    assert "continuous" not in data.to_json()


def test_decoded_values_follow_the_age_that_is_asked_for(run: liam_scale.Run) -> None:
    young, old = (
        run.normalized(["rna:gene0", "rna:gene1"], at=f"age={age}", num_samples=0, return_mean=True).mean()
        for age in (25, 75)
    )
    assert old["rna:gene0"] > 1.5 * young["rna:gene0"]
    assert young["rna:gene1"] > 1.5 * old["rna:gene1"]
    own = run.normalized(["rna:gene0"], num_samples=0)["rna:gene0"]
    ages = run.open_store().obs_frame()["age"]
    assert np.corrcoef(own, ages.loc[own.index])[0, 1] > 0.5


def test_encoders_do_not_see_it(run: liam_scale.Run) -> None:
    data = aged()
    before = run.embedding(data)
    data.obs["age"] = data.obs["age"].to_numpy()[::-1]
    pd.testing.assert_frame_equal(run.embedding(data), before)
    del data.obs["age"]
    pd.testing.assert_frame_equal(run.embedding(data), before)


def test_losses_rest_on_the_age_of_each_cell(run: liam_scale.Run, store: Path, tmp_path: Path) -> None:
    own = run.elbo()["reconstruction_loss_rna"].mean()
    data = liam_scale.read_store(store)
    data.obs["age"] = 100 - data.obs["age"]
    data.write(tmp_path / "turned.h5mu")
    liam_scale.ingest(tmp_path / "turned.h5mu", out=tmp_path / "turned.zarr")
    assert run.elbo(tmp_path / "turned.zarr")["reconstruction_loss_rna"].mean() > own + 0.5


def test_groups_are_compared_at_the_mean_age_or_at_one_that_is_asked_for(run: liam_scale.Run) -> None:
    options: dict[str, Any] = {"groupby": "cell_type", "pairs": 200, "cells": 100}
    mean, at_mean, old = (
        run.differential(**options, at=at) for at in ((), (f"age={run.record.data.continuous['age'][0]}",), ("age=80",))
    )
    pd.testing.assert_frame_equal(mean, at_mean)
    assert old["scale1"]["gene0"].mean() > 1.1 * mean["scale1"]["gene0"].mean()
    with pytest.raises(ValueError, match="--at: got weight; the run has age"):
        run.differential(**options, at=["weight=3"])


def test_training_goes_on_with_the_same_columns_and_values_alone(
    store: Path, run: liam_scale.Run, tmp_path: Path
) -> None:
    copy = run.save_to(tmp_path / "run", checkpoints=True)
    given = {"batch_key": "donor", "out": copy.path, **OPTIONS}
    with pytest.raises(ValueError, match="--continuous-key: got None, the run has age"):
        liam_scale.train(store, max_epochs=26, **given)
    data = liam_scale.read_store(store)
    data.obs["age"] *= 2
    with pytest.raises(ValueError, match="is not what"):
        liam_scale.train(data, continuous_key="age", max_epochs=26, **given)
    more = liam_scale.train(store, continuous_key="age", max_epochs=26, **given)
    assert more.history["epoch"].iloc[-1] == 25


def test_a_query_needs_the_columns_of_the_run(run: liam_scale.Run, tmp_path: Path) -> None:
    query = aged(128, first_sample=2)
    for name, own in {"with": query, "without": query.copy()}.items():
        if name == "without":
            del own.obs["age"]
        own.write(tmp_path / f"{name}.h5mu")
        liam_scale.ingest(tmp_path / f"{name}.h5mu", out=tmp_path / f"{name}.zarr")
    with pytest.raises(ValueError, match=r"continuous covariates of the run: got age, but obs of .* has no such"):
        run.map(tmp_path / "without.zarr", max_epochs=1)
    assert not (run.path / "mapped-without").exists()
    mapped = run.map(tmp_path / "with.zarr", max_epochs=1)
    assert mapped.record.data.continuous == run.record.data.continuous
    assert mapped.record.data.num_samples == 4
    values = mapped.normalized(["rna:gene0"], at="age=30", num_samples=0, store=tmp_path / "with.zarr")
    assert values.shape == (128, 1)
    shutil.rmtree(mapped.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.drop(columns="age"), "got age, but obs of .* has no such column; it has donor"),
        (lambda obs: obs.assign(age=40.0), "age is 40 in all cells of"),
        (lambda obs: obs.assign(age=obs["age"].where(obs["age"] > 25)), "age has no finite number in .* of 512 cells"),
        (lambda obs: obs.assign(age=np.inf), "age has no finite number in 512 of 512 cells"),
        (
            lambda obs: obs.assign(age="young"),
            r"age has no finite number in 512 of 512 cells of .*, such as .* \(young\)",
        ),
    ],
)
def test_columns_that_decoders_cannot_read_are_refused_before_a_folder_is_made(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    data = aged()
    data.obs = change(data.obs[["donor", "age"]].copy())
    with pytest.raises(ValueError, match=f"--continuous-key: {message}"):
        liam_scale.train(data, continuous_key=["age"], out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_numbers_written_as_labels_are_numbers(store: Path) -> None:
    data = liam_scale.read_store(store)
    ages = data.obs["age"].round()
    data.obs["age"] = ages.astype(int).astype(str).astype("category")
    assert described(open_store(data), ["age"])["age"] == pytest.approx((ages.mean(), ages.std(ddof=0)))
    with pytest.raises(ValueError, match="--continuous-key: got age age; name each column once"):
        described(open_store(data), ["age", "age"])


def test_the_command_line_decodes_at_an_age_and_says_what_it_does_not_know(
    run: liam_scale.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["decode", str(run.path), "--features", "rna:gene0", "--out", str(tmp_path / "values.zarr")]
    assert main([*command, "--at", "weight=3"]) == 2
    assert "--at: got weight; the run has age" in capsys.readouterr().err
    assert main([*command, "--at", "age=old"]) == 2
    assert "--at: got 'age=old'; give columns with a number, such as age=40" in capsys.readouterr().err
    assert main([*command, "--at", "age=30"]) == 0
    saved = json.loads((run.path / "run.json").read_text())["data"]["continuous"]
    assert list(saved) == ["age"]
