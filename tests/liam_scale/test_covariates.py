"""Several covariates to remove: samples are their combinations, and each has an adversary of its own."""

import json
import math
from pathlib import Path
from typing import Any

import mudata
import numpy as np
import pytest
import torch

import liam_scale
from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.samples import samples_of
from loaders import Loader, LoaderConfig, open_store
from loaders.synthetic import simulate_mudata

SHAPE: dict[str, Any] = {"num_genes": 60, "num_peaks": 150, "genes_per_cell": 20, "peaks_per_cell": 40, "num_types": 4}
OPTIONS: dict[str, Any] = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB"}
SAMPLES = ("site=a, donor=donor0", "site=a, donor=donor1", "site=b, donor=donor2", "site=b, donor=donor3")
VALUES = {"site": ("a", "a", "b", "b"), "donor": ("donor0", "donor1", "donor2", "donor3")}


@pytest.fixture(scope="module")
def nested() -> mudata.MuData:
    """Four donors, two at each of two sites."""
    data = simulate_mudata(num_cells=400, num_samples=4, **SHAPE)
    data.obs["site"] = np.where(data.obs["donor"].isin(["donor0", "donor1"]), "a", "b")
    return data


@pytest.fixture(scope="module")
def run(nested: mudata.MuData, tmp_path_factory: pytest.TempPathFactory) -> liam_scale.Run:
    out = tmp_path_factory.mktemp("runs") / "both"
    return liam_scale.train(nested, batch_key=["site", "donor"], alphas=["site=5"], out=out, max_epochs=2, **OPTIONS)


def model_of(alphas: tuple[str, ...] = (), alpha: float = 1.0) -> Liam:
    config = ModelConfig(alpha=alpha, alphas=alphas, modalities=("rna",), n_hidden=8, n_latent=4)
    return Liam(config, ModelData(num_features={"rna": 60}, samples=SAMPLES, covariates=VALUES))


def test_samples_are_the_combinations_that_occur(nested: mudata.MuData, run: liam_scale.Run) -> None:
    assert run.record.batch_key == ("site", "donor")
    assert run.record.data.samples == SAMPLES
    assert run.record.data.covariates == VALUES
    assert "4 samples of 'site' x 'donor'" in repr(run)
    samples = samples_of(open_store(nested), ("site", "donor"))
    expected = [
        f"site={site}, donor={donor}" for site, donor in zip(nested.obs["site"], nested.obs["donor"], strict=True)
    ]
    assert np.array(samples.names)[samples.codes].tolist() == expected


def test_each_column_has_an_adversary_whose_loss_the_history_shows(run: liam_scale.Run) -> None:
    last = run.history.iloc[-1]
    for column, values in (("site", 2), ("donor", 4)):
        assert last[f"adversarial_loss_{column}_train"] == pytest.approx(math.log(values), rel=0.2)
    assert "adversarial_loss_train" not in run.history


def test_each_adversary_weighs_as_much_as_was_asked(nested: mudata.MuData) -> None:
    store = open_store(nested)
    samples = samples_of(store, ("site", "donor"))
    with Loader(store, LoaderConfig(minibatch=128, memory="64MiB"), sample=samples.codes, modalities=["rna"]) as loader:
        minibatch = next(iter(loader))
    given = {"step": 0, "seed": 0, "kl_weight": 1.0, "cell_weight": 1.0}
    found = [model_of(alphas)(minibatch, **given) for alphas in ((), ("site=5",), ("donor=3", "site=0"))]
    site, donor = (float(found[0].terms[f"adversarial_loss_{name}"]) for name in ("site", "donor"))
    assert float((found[1].loss - found[0].loss).detach()) == pytest.approx(4 * site, rel=1e-4)
    assert float((found[2].loss - found[0].loss).detach()) == pytest.approx(2 * donor - site, rel=1e-3)
    # Only what reads the latent space differs, and by the weight of the column.
    weight = "latent_encoder.head.mean.weight"
    gradients = []
    for alphas in ((), ("site=0", "donor=0"), ("site=2", "donor=2")):
        model = model_of(alphas)
        model(minibatch, **given).loss.backward()
        gradients.append(dict(model.named_parameters())[weight].grad)
    torch.testing.assert_close(gradients[2] - gradients[1], 2 * (gradients[0] - gradients[1]), rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_embeds_decodes_and_takes_a_new_donor(
    nested: mudata.MuData, run: liam_scale.Run, tmp_path: Path
) -> None:
    more = liam_scale.train(
        nested, batch_key=["site", "donor"], alphas=["site=5"], out=run.path, max_epochs=3, **OPTIONS
    )
    assert more.history["epoch"].tolist() == [0, 1, 2]
    copy = nested.copy()
    more.embed(copy)
    assert copy.obsm["X_liam"].shape == (400, 4)
    means = more.normalized(["rna:gene0"], store=copy, target_sample=SAMPLES[2], num_samples=0)
    assert means.shape == (400, 1)
    query = simulate_mudata(num_cells=60, num_samples=5, seed=0, **SHAPE)
    query = query[query.obs["donor"] == "donor4"].copy()
    query.obs["site"] = "b"
    query.obs["donor"] = query.obs["donor"].astype(str)
    file = tmp_path / "query.h5mu"
    query.write(file)
    liam_scale.ingest(file, out=tmp_path / "query.zarr")
    mapped = more.map(tmp_path / "query.zarr", max_epochs=1)
    assert mapped.record.data.samples == (*SAMPLES, "site=b, donor=donor4")
    assert mapped.record.data.covariates == {"site": (*VALUES["site"], "b"), "donor": (*VALUES["donor"], "donor4")}


def test_a_run_of_a_version_that_knew_one_column_goes_on(nested: mudata.MuData, tmp_path: Path) -> None:
    given = {"batch_key": "donor", "out": tmp_path / "run", **OPTIONS}
    liam_scale.train(nested, max_epochs=1, **given)
    options, record = tmp_path / "run" / "config.toml", tmp_path / "run" / "run.json"
    text = (
        options.read_text()
        .replace('batch_key = [\n    "donor",\n]', 'batch_key = "donor"')
        .replace("alphas = []\n", "")
        .replace("weights = []\n", "")
    )
    assert 'batch_key = "donor"' in text
    assert "alphas" not in text
    assert "weights" not in text
    options.write_text(text)
    older = record.read_text().replace("\n", "")
    assert older.count('"batch_key"') == 1
    entry = json.loads(older)
    entry["batch_key"] = "donor"
    del entry["model"]["alphas"], entry["model"]["weights"], entry["data"]["covariates"], entry["sha256"]
    record.write_text(json.dumps(entry))
    run = liam_scale.train(nested, max_epochs=2, **given)
    assert run.history["epoch"].tolist() == [0, 1]
    assert run.record.batch_key == ("donor",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_key": ["site", "donor"], "alphas": ["tissue=3"]}, "--model.alphas: got tissue; --batch-key names"),
        ({"batch_key": "donor", "alphas": ["donor=3"]}, "give --alpha, or several columns"),
        ({"batch_key": ["site", "donor"], "alphas": ["site=-1"]}, "with a weight from 0 on"),
        ({"batch_key": ["site", "donor"], "alphas": ["site"]}, "with a weight from 0 on"),
        ({"batch_key": ["site", "site"]}, "name each column once"),
        ({"batch_key": ["site", "donor"], "alphas": ["site=3"], "model": "cdvae"}, "adversaries have no weight"),
        ({"batch_key": ["site", "nowhere"]}, "nowhere"),
    ],
)
def test_what_cannot_be_removed_so_is_refused(
    nested: mudata.MuData, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        liam_scale.train(nested, out=tmp_path / "run", **given, **OPTIONS)
    assert not (tmp_path / "run").exists()
