"""Using a trained run: decoding, mapping new samples, scoring cells."""

import shutil
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import liam_scale
from liam_scale import decode as decode_module
from liam_scale import map as module
from liam_scale.decode import choose_features
from liam_scale.decode import main as decode_main
from liam_scale.map import extend, united_samples
from liam_scale.map import main as map_main
from liam_scale.model import ModelData
from liam_scale.model.layers import Gaussian
from liam_scale.model.noise import Noise
from liam_scale.posterior import shares
from liam_scale.training.trainer import Trainer
from loaders import Loader, LoaderConfig, open_store
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def embedded(trained: Path, multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, store with its embedding)."""
    store = Path(shutil.copytree(multiome, tmp_path_factory.mktemp("embedded") / "store.zarr"))
    liam_scale.load_run(trained).embed(store)
    return trained, store


def test_shares_of_all_genes_sum_to_the_library_size(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    run, store = embedded
    out = tmp_path / "values.zarr"
    arguments = [str(run), "--out", str(out), "--modality", "rna", "--store", str(store), "--library-size", "10000"]
    assert decode_main(arguments) == 0
    values = anndata.read_zarr(out)
    assert values.shape == (600, 60)
    np.testing.assert_allclose(values.X.sum(axis=1), 1e4, rtol=1e-4)
    assert values.obs_names.tolist() == open_store(store).cell_ids(0, 600).tolist()
    assert set(values.var["modality"]) == {"rna"}


def test_chosen_features_are_columns_of_the_whole_and_follow_the_target_sample(
    embedded: tuple[Path, Path], tmp_path: Path
) -> None:
    run = liam_scale.load_run(embedded[0])
    names = run.directory.features()
    wanted = (names["atac"][17], names["rna"][3])
    store = (str(embedded[1]),)

    def decoded(name: str, **options: object) -> np.ndarray:
        return np.asarray(anndata.read_zarr(run.decode(tmp_path / name, store=store, **options)).X)

    chosen = decoded("chosen", features=wanted, target_sample="mean")
    whole = {m: decoded(m, modality=m, target_sample="mean") for m in ("rna", "atac")}
    np.testing.assert_allclose(chosen, np.stack([whole["rna"][:, 3], whole["atac"][:, 17]], axis=1), rtol=1e-5)
    samples = run.record.data.samples
    by_sample = [decoded(f"s{i}", features=wanted, target_sample=s) for i, s in enumerate(samples)]
    np.testing.assert_allclose(np.mean(by_sample, axis=0), chosen, rtol=1e-4)
    own = decoded("own", features=wanted)
    codes = open_store(embedded[1]).obs_column("sample").codes
    np.testing.assert_allclose(own, np.stack(by_sample)[codes, np.arange(600)], rtol=1e-5)


def test_uncertainty_is_that_of_the_posteriors_draws_whatever_the_chunks(
    embedded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = liam_scale.load_run(embedded[0]), embedded[1]
    m, v = (torch.from_numpy(run.embedding(store, kind=f"latent-{kind}").to_numpy()) for kind in ("mean", "variance"))
    model, rows = run.model(), torch.arange(600)
    codes = torch.from_numpy(open_store(store).obs_column("sample").codes).long()
    noise = [Noise(seed=5, step=draw, place=rows) for draw in range(4)]
    draws = [shares(model, "rna", torch.softmax(Gaussian(m, v).sample(n, "z"), dim=1), codes)[:, 3:5] for n in noise]
    wanted = torch.stack(draws).double()
    features, options = run.directory.features()["rna"][3:5], {"num_samples": 4, "seed": 5, "store": store}
    found = run.normalized(features, **options)
    np.testing.assert_allclose(found["mean"], wanted.mean(dim=0), rtol=1e-4)
    np.testing.assert_allclose(found["sd"], wanted.std(dim=0), rtol=1e-2)
    monkeypatch.setattr(decode_module, "VALUE_BYTES", 8 * 100)
    again = run.normalized(features, out=tmp_path / "values.zarr", **options)
    values = anndata.read_zarr(again)
    np.testing.assert_allclose(values.X, found["mean"], rtol=1e-5)
    np.testing.assert_allclose(values.layers["sd"], found["sd"], rtol=1e-3)
    pd.testing.assert_frame_equal(run.normalized(features, return_mean=True, **options), found["mean"], rtol=1e-5)


def test_a_group_is_decoded_as_the_mean_of_its_cells(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    run, store = liam_scale.load_run(embedded[0]), embedded[1]
    types = open_store(store).obs_frame()["cell_type"]
    cells = run.normalized(modality="rna", num_samples=3, store=store)
    groups = run.normalized(modality="rna", num_samples=3, store=store, groupby="cell_type")
    wanted = cells.groupby(types.to_numpy(), observed=True)
    np.testing.assert_allclose(groups["mean"], wanted.mean()["mean"], rtol=1e-5)
    variance = (cells["sd"] ** 2).groupby(types.to_numpy(), observed=True).sum()
    np.testing.assert_allclose(groups["sd"], np.sqrt(variance).div(wanted.size(), axis=0), rtol=1e-4)
    arguments = [str(run.path), "--store", str(store), "--out", str(tmp_path / "g"), "--modality", "rna"]
    assert decode_main([*arguments, "--groupby", "cell_type", "--num-samples", "3"]) == 0
    written = anndata.read_zarr(tmp_path / "g")
    assert written.obs["cells"].tolist() == types.value_counts(sort=False).tolist()
    pd.testing.assert_frame_equal(written.to_df("sd"), groups["sd"], check_names=False)


def test_names_in_two_modalities_need_a_prefix() -> None:
    features = {"rna": ["CD4", "GAPDH"], "adt": ["CD8", "CD4"]}
    chosen = choose_features(features, ["adt:CD4", "GAPDH"], None)
    assert [(c.modality, c.columns.tolist(), c.names) for c in chosen] == [
        ("rna", [1], ["GAPDH"]),
        ("adt", [1], ["adt:CD4"]),
    ]
    with pytest.raises(ValueError, match="is in rna and adt; write rna:CD4"):
        choose_features(features, ["CD4"], None)
    with pytest.raises(ValueError, match="CD19 is nowhere"):
        choose_features(features, ["CD19"], None)
    with pytest.raises(ValueError, match="name features"):
        choose_features(features, [], None)


def test_decoding_without_an_embedding_says_how_to_make_one(
    trained: Path, multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trained), "--out", str(tmp_path / "v"), "--modality", "rna", "--store", str(multiome)]
    assert decode_main(arguments) == 2
    told = capsys.readouterr().err
    command = f"python -m liam_scale.embed {trained} --store {multiome} --key X_liam"
    assert f"write it with: {command} (run.embed in Python)" in told
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_with_missing_rows_is_not_decoded(
    embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(shutil.copytree(embedded[1], tmp_path / "store.zarr"))
    values = store.read_embedding("X_liam", 0, 600)
    values[[7, 400]] = np.nan
    store.write_embedding("X_liam", values, store.embedding_attributes("X_liam")[0])
    arguments = [str(embedded[0]), "--out", str(tmp_path / "v"), "--modality", "rna", "--store", str(store.uri)]
    assert decode_main(arguments) == 1
    cells = ", ".join(str(store.cell_ids(row, row + 1)[0]) for row in (7, 400))
    assert f"not finite for 2 cells ({cells}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_the_elbo_of_cells_adds_up_to_the_objective(trained: Path, multiome: Path) -> None:
    run = liam_scale.load_run(trained)
    scores = run.elbo(draws=2, seed=3)
    assert scores.index.tolist() == open_store(multiome).cell_ids(0, 600).tolist()
    parts = scores.drop(columns="elbo").fillna(0.0).sum(axis=1)
    np.testing.assert_allclose(scores["elbo"], parts, rtol=1e-4)
    again = run.elbo(draws=2, seed=3)
    np.testing.assert_array_equal(scores["elbo"], again["elbo"])
    model = run.model()
    with Loader(
        open_store(multiome), LoaderConfig(minibatch=600), subset="all", shuffle=False, sample="sample"
    ) as loader:
        minibatch = next(iter(loader))
    with torch.no_grad():
        objective = model(
            minibatch, step=0, seed=9, kl_weight=1.0, cell_weight=1.0,
        )  # fmt: skip
    assert scores["elbo"].sum() == pytest.approx(float(objective.terms["elbo"]), rel=0.02)


def test_terms_of_an_absent_modality_are_missing(trimodal: Path, tmp_path: Path) -> None:
    run = liam_scale.train(
        trimodal, out=tmp_path / "run", batch_key="sample", max_steps=3, n_hidden=8, n_latent=3, minibatch=64
    )
    scores = run.elbo()
    store = open_store(trimodal)
    for name in ("rna", "atac", "adt"):
        rows = store.modality_rows(name)
        lacks = np.zeros(400, dtype=bool) if rows is None else rows < 0
        empty = np.ones(400, dtype=bool)
        totals = store.totals(name)
        empty[~lacks] = totals[rows[~lacks] if rows is not None else slice(None)] == 0
        np.testing.assert_array_equal(scores[f"reconstruction_loss_{name}"].isna(), lacks | empty)
    assert scores["elbo"].notna().all()


def test_a_modality_that_a_sample_lacks_is_decoded_as_in_the_mean_of_the_others(trimodal: Path, tmp_path: Path) -> None:
    options = {"batch_key": "sample", "n_hidden": 8, "n_latent": 3, "minibatch": 64}
    run = liam_scale.train(trimodal, out=tmp_path / "run", max_steps=3, **options)
    weights = load_file(run.directory.weights)
    lacking = {"rna": [2], "atac": [1], "adt": [2]}
    for name, samples in lacking.items():
        known = [code for code in range(3) if code not in samples]
        table = weights[f"decoders.{name}.linear.sample_weight"]
        torch.testing.assert_close(table[samples[0]], table[known].mean(dim=0))
        assert not torch.allclose(table[known[0]], table[known[1]])
    theta = weights["decoders.rna.log_theta"]
    torch.testing.assert_close(theta[:, 2], theta[:, :2].mean(dim=1))
    # What training goes on from is untouched: another end of it gives the same as a straight way there.
    liam_scale.train(trimodal, out=tmp_path / "run", max_steps=5, **options)
    straight = liam_scale.train(trimodal, out=tmp_path / "straight", max_steps=5, **options)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == straight.directory.weights.read_bytes()


@pytest.fixture(scope="module")
def newcomers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of five samples, of which the model knows three."""
    path = tmp_path_factory.mktemp("new") / "new.zarr"
    simulate(
        path, num_cells=300, num_genes=60, num_peaks=150, genes_per_cell=20, peaks_per_cell=40, num_samples=5,
        num_types=4, seed=1,
    )  # fmt: skip
    return path


def test_new_samples_are_mapped_without_moving_what_was_trained(trained: Path, newcomers: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(newcomers, tmp_path / "new.zarr"))
    out = tmp_path / "mapped"
    assert map_main([str(trained), str(store), "--out", str(out), "--max-epochs", "2"]) == 0
    old, new = liam_scale.load_run(trained), liam_scale.load_run(out)
    samples = new.record.data.samples
    assert samples[:3] == old.record.data.samples
    assert len(samples) == 5
    before, after = old.model().state_dict(), new.model().state_dict()
    moved = 0
    for name, value in before.items():
        own = after[name]
        for axis, size in enumerate(value.shape):
            if own.shape[axis] != size:
                fresh = own.narrow(axis, size, own.shape[axis] - size)
                moved += int((fresh != value.mean(dim=axis, keepdim=True)).any())
                own = own.narrow(axis, 0, size)
        np.testing.assert_array_equal(own.numpy(), value.numpy(), err_msg=name)
    assert moved > 0
    # The encoder of z sees no sample, so the new cells stand where the old model puts them.
    np.testing.assert_allclose(mudata.read_zarr(store).obsm["X_liam"], old.embedding(store), atol=1e-6)


def test_an_object_in_memory_is_mapped_as_its_store_is(trained: Path, newcomers: Path, tmp_path: Path) -> None:
    store, run = Path(shutil.copytree(newcomers, tmp_path / "new.zarr")), liam_scale.load_run(trained)
    data = liam_scale.read_store(store)
    with pytest.raises(ValueError, match="--out: data in memory have no name; name the folder"):
        run.map(data)
    on_disk, held = (run.map(cells, out=tmp_path / name, max_epochs=1) for cells, name in ((store, "a"), (data, "b")))
    assert held.record.stores == ("MuData in memory",)
    assert held.directory.weights.read_bytes() == on_disk.directory.weights.read_bytes()
    np.testing.assert_array_equal(data.obsm["X_liam"], open_store(store).read_embedding("X_liam", 0, 300))
    assert run.map(data, out=tmp_path / "b", max_epochs=1).record == held.record
    assert held.normalized(modality="rna", num_samples=0, store=data, return_mean=True).shape == (300, 60)
    # An AnnData of scanpy: normalised values in X, counts in a layer, another order of columns.
    rna = data["rna"][:, ::-1].copy()
    rna.layers["counts"], rna.X = rna.X.copy(), np.log1p(rna.X)
    extended = run.map(rna, layer="counts", out=tmp_path / "c", max_epochs=1)
    assert extended.record.layer == "counts"
    only = mudata.MuData({"rna": data["rna"].copy()})
    only.obs = data.obs.copy()
    run.map(only, out=tmp_path / "d", max_epochs=1)
    np.testing.assert_array_equal(rna.obsm["X_liam"], only.obsm["X_liam"])


def test_what_was_mapped_is_read_as_it_was_mapped(trained: Path, newcomers: Path, tmp_path: Path) -> None:
    """Cells that lack features of the model, in another order, are decoded and embedded again by the extended run."""
    data = liam_scale.read_store(newcomers)
    query = mudata.MuData({"rna": data["rna"][:, 50:3:-1].copy(), "atac": data["atac"][:, 10:].copy()})
    query.obs = data.obs.copy()
    mapped = liam_scale.load_run(trained).map(query, out=tmp_path / "mapped", max_epochs=1)
    np.testing.assert_allclose(mapped.embedding(query), query.obsm["X_liam"], atol=1e-6)
    values = mapped.normalized(modality="rna", num_samples=2, store=query, return_mean=True)
    assert values.columns.tolist() == mapped.directory.features()["rna"]
    assert mapped.elbo(query)["elbo"].notna().all()
    with pytest.raises(ValueError, match="not those of the run"):
        liam_scale.load_run(trained).embedding(query)


def test_an_interrupted_mapping_goes_on_to_the_same_weights(
    trained: Path, newcomers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mapped(place: str, *more: str) -> int:
        folder = tmp_path / place
        if not folder.exists():
            shutil.copytree(newcomers, folder / "new.zarr")
        arguments = [str(trained), str(folder / "new.zarr"), "--out", str(folder / "run"), "--max-epochs", "3", *more]
        return map_main(arguments)

    assert mapped("straight") == 0
    evaluate, seen = Trainer._evaluate, []

    def stops_after_the_second(self: Trainer) -> None:
        evaluate(self)
        seen.append(self.at.epoch)
        if len(seen) == 2:
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_evaluate", stops_after_the_second)
    assert mapped("killed") == 130
    monkeypatch.setattr(module, "embed_store", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert mapped("killed") == 130
    monkeypatch.undo()
    assert mapped("killed") == 0
    assert seen == [0, 1, 2]
    runs = [tmp_path / place / "run" / "model.safetensors" for place in ("straight", "killed")]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    shown = [mudata.read_zarr(tmp_path / place / "new.zarr").obsm["X_liam"] for place in ("straight", "killed")]
    np.testing.assert_array_equal(*shown)
    assert mapped("killed", "--seed", "4", "--overwrite") == 2
    assert "holds a run of other options or data" in capsys.readouterr().err


def test_mapping_matches_features_by_name(trained: Path, multiome: Path, tmp_path: Path) -> None:
    """A store with the columns in another order, some missing and some unknown, embeds as its matched columns do."""
    atlas = mudata.read_zarr(multiome)
    rna, atac = atlas["rna"][:, ::-1].copy(), atlas["atac"][:, 10:].copy()
    other = mudata.MuData({"rna": rna, "atac": atac})
    other.obs["sample"] = atlas.obs["sample"].astype(str)
    other.write_h5mu(tmp_path / "other.h5mu")
    liam_scale.ingest([tmp_path / "other.h5mu"], out=tmp_path / "other.zarr", sample_key="sample")
    run = liam_scale.load_run(trained)
    run.map(tmp_path / "other.zarr", out=tmp_path / "mapped", max_epochs=1)
    mapped = mudata.read_zarr(tmp_path / "other.zarr")
    zeroed = atlas.copy()
    peaks = zeroed["atac"].X.tolil()
    peaks[:, :10] = 0
    zeroed["atac"].X = peaks.tocsr()
    zeroed.write_h5mu(tmp_path / "zeroed.h5mu")
    liam_scale.ingest([tmp_path / "zeroed.h5mu"], out=tmp_path / "zeroed.zarr", sample_key="sample")
    ids = mudata.read_zarr(tmp_path / "zeroed.zarr").obs_names
    wanted = dict(zip(ids, run.embedding(tmp_path / "zeroed.zarr").to_numpy(), strict=True))
    np.testing.assert_allclose(mapped.obsm["X_liam"], np.stack([wanted[i] for i in mapped.obs_names]), atol=1e-5)


def test_a_model_of_one_sample_can_be_extended(multiome: Path, tmp_path: Path) -> None:
    run = liam_scale.train(multiome, out=tmp_path / "run", max_steps=2, n_hidden=8, n_latent=3, minibatch=64)
    model = run.model()
    new = ModelData(model.data.num_features, ("b",), {"rna": (1.0,), "atac": (2.0,)}, {"rna": (1.0,), "atac": (1.0,)})
    data = united_samples(model.data, new)
    extended, masks = extend(model, data)
    assert extended.data.samples == ("all", "b")
    assert masks


def test_a_store_without_common_features_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "strange.zarr"
    simulate(store, num_cells=30, num_genes=20, num_peaks=0, num_proteins=8, genes_per_cell=5)
    strange = mudata.read_zarr(store)
    strange["rna"].var_names = [f"alien{i}" for i in range(20)]
    strange.write_h5mu(tmp_path / "strange.h5mu")
    liam_scale.ingest([tmp_path / "strange.h5mu"], out=tmp_path / "alien.zarr")
    assert map_main([str(trained), str(tmp_path / "alien.zarr")]) == 2
    assert "no feature name in common" in capsys.readouterr().err
