"""Differential analysis: against formulas where the latent variables are known, and against simulated truth."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import polygamma
from scipy.stats import norm

import liam_scale
from liam_scale.differential import DifferentialConfig, differential, main
from liam_scale.posterior import shares
from liam_scale.run import attributes_of
from loaders import open_store
from loaders.synthetic import archetype_shares, simulate


@pytest.fixture(scope="module")
def placed(trained: Path, multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """(run, store whose cells of a type share one place of the simplex, the places)."""
    path = Path(shutil.copytree(multiome, tmp_path_factory.mktemp("placed") / "store.zarr"))
    store = open_store(path)
    corners = (0.1 + 3 * np.eye(4, dtype=np.float32)) / 3.4
    codes = store.obs_column("cell_type").codes
    store.write_embedding("X_liam", corners[codes], attributes_of(liam_scale.load_run(trained).record.id))
    return trained, path, corners


def test_changes_and_their_probability_are_those_of_the_decoder(placed: tuple[Path, Path, np.ndarray]) -> None:
    run, path, corners = placed
    store, loaded = open_store(path), liam_scale.load_run(run)
    table = loaded.differential(path, groupby="cell_type", group="type01", reference="type03", delta=0.1, pairs=300)
    assert (table["group1"].unique(), table["group2"].unique()) == (["type01"], ["type03"])
    model = loaded.model()
    one, two = (
        torch.stack(
            [shares(model, "rna", torch.from_numpy(corners[[k]]), torch.tensor([s]))[0] for s in range(3)]
        ).numpy()
        for k in (1, 3)
    )
    codes, own = store.obs_column("cell_type").codes, store.totals("rna")
    totals = [own[codes == k] for k in (1, 3)]
    theta = np.exp(model.decoders["rna"].log_theta.detach().numpy())
    theta = theta.mean(axis=1) if theta.ndim == 2 else theta
    variance = sum(
        polygamma(1, n.sum() * share.mean(axis=0) + 0.5) + (n**2).sum() / n.sum() ** 2 / theta
        for n, share in zip(totals, (one, two), strict=True)
    )
    half = 0.5 / min(n.sum() for n in totals)
    lfc, tau = np.log2((one + half) / (two + half)), np.sqrt(variance) / math.log(2)
    probability = np.maximum(*(norm.cdf((sign * lfc - 0.1) / tau).mean(axis=0) for sign in (1, -1)))
    found = table.loc[store.feature_names("rna")]
    np.testing.assert_allclose(found["scale1"], one.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["lfc_mean"], lfc.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found["lfc_std"], np.sqrt(lfc.var(axis=0) + tau**2), rtol=1e-3)
    np.testing.assert_allclose(found["proba_de"], probability, atol=1e-4)
    assert table["proba_de"].is_monotonic_decreasing
    np.testing.assert_allclose(table["expected_fdr"], np.cumsum(1 - table["proba_de"]) / np.arange(1, 61), atol=1e-9)


def test_the_rest_is_all_other_cells_and_every_group_has_its_turn(placed: tuple[Path, Path, np.ndarray]) -> None:
    run, path, _ = placed
    loaded, codes = liam_scale.load_run(run), open_store(path).obs_column("cell_type").codes
    table = loaded.differential(path, groupby="cell_type", modality="atac", pairs=4_000)
    assert table["group1"].value_counts().to_dict() == {f"type{k:02d}": 150 for k in range(4)}
    groups = loaded.normalized(modality="atac", groupby="cell_type", target_sample="mean", num_samples=0, store=path)
    sizes = np.bincount(codes)
    rest = (groups.iloc[1:] * sizes[1:, None]).sum() / sizes[1:].sum()
    own = table[table["group1"] == "type00"].loc[rest.index]
    np.testing.assert_allclose(own["scale1"], groups.iloc[0], rtol=1e-3)
    np.testing.assert_allclose(own["scale2"], rest, rtol=0.03)


def test_labels_of_ones_own_are_found_by_cell_id(placed: tuple[Path, Path, np.ndarray]) -> None:
    run, path, _ = placed
    loaded, obs = liam_scale.load_run(run), open_store(path).obs_frame()
    labels = obs["cell_type"].astype(str).sample(frac=1, random_state=0)
    options = {"store": path, "group": "type02", "pairs": 200}
    pd.testing.assert_frame_equal(
        loaded.differential(groupby=labels, **options), loaded.differential(groupby="cell_type", **options)
    )
    with pytest.raises(ValueError, match="has none; index them by its cell ids"):
        loaded.differential(groupby=labels.rename(lambda name: name + "-1"), **options)


def test_the_command_writes_a_table_and_says_what_is_wrong(
    placed: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path, _ = placed
    arguments = [str(run), str(path), "--groupby", "cell_type", "--pairs", "100"]
    assert main([*arguments, "--out", str(tmp_path / "table.csv")]) == 0
    said = capsys.readouterr().out
    assert "type00 against rest: " in said
    written = pd.read_csv(tmp_path / "table.csv", index_col="feature")
    wanted = differential(DifferentialConfig(run, (str(path),), groupby="cell_type", pairs=100))
    pd.testing.assert_frame_equal(written, wanted, rtol=1e-4)
    for more, message in {
        ("--group", "B"): "--group: got B; cell_type has type00",
        ("--group", "type00", "--reference", "type00"): "is the --reference too",
        ("--groupby", "own_weight"): "--groupby: ",
        ("--modality", "adt"): "--modality: got adt; the model holds rna, atac",
        ("--key", "X_none"): "there is no such embedding",
        ("--out", "table.h5"): "name a .csv",
    }.items():
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_few_false_ones_are_called_and_true_ones_are_found(tmp_path: Path) -> None:
    """On cells of which the rates are known; `benchmarks/differential.py` does so over twenty simulations."""
    simulation = {"num_genes": 400, "num_peaks": 0, "genes_per_cell": 120, "num_samples": 3, "num_types": 5}
    store = tmp_path / "store.zarr"
    simulate(store, num_cells=2_000, **simulation)
    training = {"n_hidden": 64, "n_latent": 10, "lr": 5e-3, "max_epochs": 60, "kl_warmup_epochs": 30}
    run = liam_scale.train(store, out=tmp_path / "run", batch_key="sample", early_stopping=False, **training)
    run.embed()
    obs, rates = open_store(store).obs_frame(), archetype_shares("rna", **simulation)
    own = pd.get_dummies(obs["cell_type"]).to_numpy() * obs["own_weight"].to_numpy()[:, None]
    other = pd.get_dummies(obs["mixed_with"]).to_numpy() * (1 - obs["own_weight"].to_numpy())[:, None]
    expected = pd.DataFrame((own + other) @ rates, columns=open_store(store).feature_names("rna"))
    sums, sizes = expected.groupby(obs["cell_type"].to_numpy()).sum(), obs["cell_type"].value_counts()
    for posterior in (False, True):
        num_called, num_false, is_twofold_called = 0, 0, []
        for name, found in run.differential(groupby="cell_type", posterior=posterior).groupby("group1"):
            rest = (sums.sum() - sums.loc[name]) / (2_000 - sizes[name])
            truth = np.log2(sums.loc[name] / sizes[name] / rest).loc[found.index]
            called = found["is_de_fdr_0.05"]
            num_called += called.sum()
            num_false += (called & ~((truth.abs() > 0.25) & (np.sign(truth) == np.sign(found["lfc_mean"])))).sum()
            is_twofold_called += called[truth.abs() > 1].tolist()
        assert num_called > 100
        assert num_false <= 0.05 * num_called
        assert np.mean(is_twofold_called) > 0.3
