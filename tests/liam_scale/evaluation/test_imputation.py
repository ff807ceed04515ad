"""Imputation: measures with a known answer, and a run against what was left out of its training."""

from pathlib import Path

import anndata
import numpy as np
import pytest

import liam_scale
from liam_scale.evaluate import EvaluateConfig, describe, evaluate, main
from liam_scale.evaluation.imputation import MEAN_PROFILE, _Scores
from loaders.modalities import PRESETS
from loaders.stores import open_store
from loaders.synthetic import simulate

TINY = {"num_genes": 60, "num_peaks": 150, "genes_per_cell": 20, "peaks_per_cell": 40, "num_samples": 3, "num_types": 4}


def scores(counts: np.ndarray, decoded: np.ndarray, name: str = "atac") -> dict[str, float]:
    gathered = _Scores(PRESETS[name], is_clr=name == "adt")
    for start in range(0, len(counts), 7):
        gathered.add(counts[start : start + 7], decoded[start : start + 7])
    return gathered.results()


def test_what_is_measured_is_imputed_perfectly_and_chance_is_chance():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 2.0, (60, 200))).astype(float)
    counts[3] = 0  # a cell without counts says nothing
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    found = scores(counts, shares)
    assert found == pytest.approx({"cell_r": 1, "feature_r": 1, "auroc": 1, "deviance": 0}, abs=1e-6)
    by_chance = scores(counts, rng.dirichlet(np.ones(200), 60))
    assert by_chance["cell_r"] == pytest.approx(0, abs=0.03)
    assert by_chance["feature_r"] == pytest.approx(0, abs=0.03)
    assert by_chance["auroc"] == pytest.approx(0.5, abs=0.02)
    assert by_chance["deviance"] > 1


def test_every_measure_is_that_of_its_definition():
    from scipy.stats import pearsonr
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    counts = rng.poisson(1.0, (20, 30)).astype(float)
    decoded = rng.dirichlet(np.ones(30), 20)
    one, other = np.log1p(1e3 * counts / counts.sum(axis=1, keepdims=True)), np.log1p(1e3 * decoded)
    shares = counts / counts.sum(axis=1, keepdims=True)
    terms = [s[s > 0] * np.log(s[s > 0] / d[s > 0]) for s, d in zip(shares, decoded, strict=True)]
    expected = {
        "cell_r": np.mean([pearsonr(a, b)[0] for a, b in zip(one, other, strict=True)]),
        "feature_r": np.mean([pearsonr(a, b)[0] for a, b in zip(one.T, other.T, strict=True)]),
        "auroc": np.mean([roc_auc_score(c > 0, d) for c, d in zip(counts, decoded, strict=True)]),
        "deviance": 2 * np.mean([term.sum() for term in terms]),
    }
    assert scores(counts, decoded) == pytest.approx(expected)
    assert "auroc" not in scores(counts, decoded, "rna")
    constant = scores(counts, np.broadcast_to(decoded[0], decoded.shape))
    assert np.isnan(constant["feature_r"])


@pytest.fixture(scope="module")
def mosaic(trained: Path, multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(run, store of its cells as a mosaic with their embedding, store with all that was measured)."""
    path = tmp_path_factory.mktemp("imputation") / "mosaic.zarr"
    simulate(path, num_cells=600, mosaic=[("rna", "atac"), ("rna",), ("atac",)], **TINY)
    liam_scale.load_run(trained).embed(path)
    return trained, path, multiome


def test_a_run_is_compared_with_what_was_left_out(mosaic, tmp_path, capsys):
    run, store, truth = mosaic
    config = {"batch_key": ("sample",), "label_key": ("cell_type",), "scib": "none", "baseline": False}
    found = evaluate(EvaluateConfig(str(store), run=run, truth=str(truth), **config))
    table = found.imputation.set_index("of", append=True).sort_index()
    assert set(table.index) == {("cell_r", "rna"), ("feature_r", "rna"), ("deviance", "rna")} | {
        (key, "atac") for key in ("cell_r", "feature_r", "auroc", "deviance")
    }
    lacking = np.flatnonzero(open_store(store).modality_rows("rna") < 0)
    assert table.loc[("cell_r", "rna"), "cells"] == len(lacking)
    values = liam_scale.load_run(run).decode(tmp_path / "values.zarr", modality="rna", store=(str(store),))
    decoded = np.asarray(anndata.read_zarr(values).X)[lacking]
    counts = open_store(truth).matrix("rna").read(0, 600).to_scipy().toarray()[lacking]
    expected = scores(counts.astype(float), decoded.astype(float), "rna")
    assert {key: table.loc[(key, "rna"), "X_liam"] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(table.loc[["cell_r", "deviance"], MEAN_PROFILE]).all()
    assert "held-out deviance (nats a count): atac" in describe(found)
    arguments = [str(store), "--run", str(run), "--truth", str(truth), "--batch-key", "sample", "--scib", "none"]
    assert main([*arguments, "--no-plots", "--no-baseline", "--out", str(tmp_path / "out")]) == 0
    assert "imputation.csv" in capsys.readouterr().out
    assert "held-out deviance" in (tmp_path / "out" / "report.html").read_text()


def test_what_cannot_be_imputed_is_refused_with_the_cure(mosaic, tmp_path):
    run, store, truth = mosaic
    options = {"batch_key": "sample", "scib": "none", "baseline": False}
    with pytest.raises(ValueError, match="--truth: got a store but no --run"):
        EvaluateConfig(str(store), truth=str(truth), batch_key=("sample",))
    with pytest.raises(ValueError, match=r"--truth: no cell of .* lacks a modality"):
        liam_scale.evaluate(store, run=run, truth=str(store), **options)
    simulate(tmp_path / "fewer.zarr", num_cells=600, **{**TINY, "num_genes": 50})
    with pytest.raises(ValueError, match=r"--truth: .* lacks 10 of the 60 rna features of the model, such as gene50"):
        liam_scale.evaluate(store, run=run, truth=str(tmp_path / "fewer.zarr"), **options)
