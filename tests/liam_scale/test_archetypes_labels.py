"""What the corners of the simplex stand for, and labels from neighbours in it."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import liam_scale
from liam_scale.archetypes import main as archetypes_main
from liam_scale.map import main as map_main
from liam_scale.posterior import shares
from liam_scale.run import attributes_of
from loaders import open_store
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def corners(trained: Path, multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """(run, store with cells near the corner of their type, their weights)."""
    path = Path(shutil.copytree(multiome, tmp_path_factory.mktemp("corners") / "store.zarr"))
    store, rng = open_store(path), np.random.default_rng(0)
    alpha = 0.3 + 20 * np.eye(4)[store.obs_column("cell_type").codes]
    z = np.stack([rng.dirichlet(row) for row in alpha]).astype(np.float32)
    store.write_embedding("X_liam", z, attributes_of(liam_scale.load_run(trained).record.id))
    return trained, path, z


def test_an_archetype_has_its_cells_its_profile_and_their_entropy(corners: tuple[Path, Path, np.ndarray]) -> None:
    path, z = corners[1:]
    run = liam_scale.load_run(corners[0])
    found = run.archetypes(path, groupby="cell_type", nearest=5, top=3)
    assert len(repr(found).splitlines()) == 2
    ids = open_store(path).cell_ids(0, 600)
    for corner in range(4):
        own = found.nearest[found.nearest["archetype"] == corner + 1]
        order = np.argsort(-z[:, corner], kind="stable")[:5]
        assert own["cell"].tolist() == ids[order].tolist()
        np.testing.assert_array_equal(own["weight"], z[order, corner])
        assert set(own["group"]) == {f"type{corner:02d}"}
    np.testing.assert_array_equal(found.table["cells"], np.bincount(z.argmax(axis=1)))
    assert found.table["group"].tolist() == [f"type{k:02d}" for k in range(4)]
    np.testing.assert_allclose(found.entropy, -(z * np.log(z)).sum(axis=1) / np.log(4), atol=1e-4)
    codes = open_store(path).obs_column("cell_type").codes
    np.testing.assert_allclose(found.weights, [z[codes == k].mean(axis=0) for k in range(4)], rtol=1e-4)
    sample_of = [torch.full((4,), sample) for sample in range(3)]
    profile = torch.stack([shares(run.model(), "rna", torch.eye(4), sample) for sample in sample_of]).mean(dim=0)
    others = (profile.sum(dim=0) - profile) / 3
    lfc = torch.log2((profile + 0.01 / 60) / (others + 0.01 / 60)).numpy()
    names = np.array(run.directory.features()["rna"])
    first = found.features[(found.features["modality"] == "rna") & (found.features["archetype"] == 2)]
    assert first["feature"].tolist() == names[np.argsort(-lfc[1], kind="stable")[:3]].tolist()
    np.testing.assert_allclose(first["lfc"], np.sort(lfc[1])[::-1][:3], rtol=1e-4)


def test_the_command_writes_tables_of_all_cells_and_a_picture(
    corners: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path, z = corners
    arguments = [str(run), str(path), "--groupby", "cell_type", "--out", str(tmp_path / "out")]
    assert archetypes_main(arguments) == 0
    assert "entropy of cells" in capsys.readouterr().out
    cells = pd.read_csv(tmp_path / "out" / "cells.csv.gz", index_col="cell")
    assert cells.index.tolist() == open_store(path).cell_ids(0, 600).tolist()
    assert cells["archetype"].tolist() == (z.argmax(axis=1) + 1).tolist()
    assert (tmp_path / "out" / "archetypes.png").stat().st_size > 10_000
    assert archetypes_main(arguments) == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_labels_come_from_neighbours_and_doubt_is_unknown(
    corners: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    run, path, z = corners
    new = open_store(shutil.copytree(path, tmp_path / "new.zarr"))
    between = z.copy()
    between[:30] = [0.5, 0.5, 0, 0]
    new.write_embedding("X_liam", between, new.embedding_attributes("X_liam")[0])
    loaded = liam_scale.load_run(run, store=path)
    found = loaded.labels(tmp_path / "new.zarr", label_key="cell_type", neighbors=10, unknown=0.3)
    types = new.obs_frame()["cell_type"].astype(str)
    sure = found.iloc[30:]
    assert (sure["nearest_label"] == types.iloc[30:]).mean() > 0.95
    assert (sure["label"] == sure["nearest_label"]).mean() > 0.9
    assert (sure["label"] == "unknown").tolist() == (sure["uncertainty"] > 0.3).tolist()
    assert found["distance"].iloc[:30].min() > 3 > found["distance"].iloc[30:].median()
    # By hand, for one cell.
    distance = np.linalg.norm(z - between[50], axis=1)
    near = np.argsort(distance)[:10]
    weights = np.exp(-2 * distance[near] ** 2 / np.mean(distance[near] ** 2))
    share = pd.Series(weights).groupby(types.to_numpy()[near]).sum().max() / weights.sum()
    assert found["uncertainty"].iloc[50] == pytest.approx(1 - share, abs=1e-4)


def test_mapping_labels_cells_of_new_samples(
    corners: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path, _ = corners
    store = shutil.copytree(path, tmp_path / "new.zarr")
    shutil.copytree(run, tmp_path / "run")
    arguments = [str(tmp_path / "run"), str(store), "--max-epochs", "1", "--overwrite"]
    assert map_main([*arguments, "--label-key", "cell_type"]) == 2
    assert "there is no such embedding" in capsys.readouterr().err  # the training's store was never embedded
    assert not (tmp_path / "run" / "mapped-new").exists()


def test_labels_come_from_an_object_in_memory_too(trained: Path, multiome: Path, tmp_path: Path) -> None:
    """The reference and the query are objects; or the training's store stands elsewhere, and is given anew."""
    data = liam_scale.read_store(multiome)
    options = {"n_hidden": 8, "n_latent": 4, "minibatch": 64, "max_epochs": 1, "batch_key": "sample"}
    run, query = liam_scale.train(data, out=tmp_path / "run", **options), data[:100].copy()
    asked = {"label_key": "cell_type", "neighbors": 10}
    mapped = {**asked, "max_epochs": 1, "out": tmp_path / "mapped"}
    with pytest.raises(ValueError, match=r"trained on MuData in memory; .* reference=data for its labels"):
        run.map(query, **mapped)
    with pytest.raises(ValueError, match=r"there is no such embedding; write it with: run.embed\(data, key='X_liam'\)"):
        run.map(query, reference=data, **mapped)
    run.embed(data)
    run.map(query, reference=data, **mapped)
    found = run.labels(query, reference=data, **asked)
    assert found.index.tolist() == query.obs_names.tolist()
    written = pd.read_csv(tmp_path / "mapped" / "labels.csv", index_col="cell")
    assert written["label"].tolist() == found["label"].tolist()
    moved = Path(shutil.copytree(multiome, tmp_path / "elsewhere.zarr"))
    anew = liam_scale.load_run(trained, store=moved)
    anew.embed()
    new = shutil.copytree(multiome, tmp_path / "new.zarr")
    anew.map(new, out=tmp_path / "anew", max_epochs=1, **asked)
    assert (tmp_path / "anew" / "labels.csv").exists()


def test_the_command_labels_from_the_store_that_is_named(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store of the training was moved away under another name."""
    store, moved, new = (shutil.copytree(multiome, tmp_path / f"{name}.zarr") for name in ("store", "moved", "new"))
    options = {"n_hidden": 8, "n_latent": 4, "minibatch": 64, "max_epochs": 1, "batch_key": "sample"}
    run = liam_scale.train(store, out=tmp_path / "run", **options)
    shutil.rmtree(store)
    liam_scale.load_run(run.path, store=moved).embed()
    arguments = [str(run.path), str(new), "--max-epochs", "1", "--label-key", "cell_type", "--neighbors", "10"]
    assert map_main(arguments) == 2
    assert "give the store anew, as --store STORE (map: --reference STORE)" in capsys.readouterr().err
    assert map_main([*arguments, "--reference", str(moved)]) == 0
    assert (run.path / "mapped-new" / "labels.csv").exists()


def test_a_reference_without_the_name_of_its_labels_is_refused(
    trained: Path, multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing would be read from it; and it is refused before anything is written."""
    out, run = tmp_path / "mapped", liam_scale.load_run(trained)
    refused = "--reference: got {}, and no --label-key; name the column of it with the labels, or leave it out"
    assert map_main([str(trained), str(multiome), "--out", str(out), "--reference", str(multiome)]) == 2
    assert refused.format(multiome) in capsys.readouterr().err
    data = liam_scale.read_store(multiome)
    for given, named in ((multiome, multiome), (str(multiome), multiome), (data, "MuData in memory")):
        with pytest.raises(ValueError, match=refused.format(named)):
            run.map(multiome, out=out, reference=given)
    assert not out.exists()


@pytest.mark.slow
def test_labels_of_samples_that_were_held_out(tmp_path: Path) -> None:
    """Types of two samples are found in a third; those of a type that was left out of the training, less surely."""
    path = tmp_path / "all.zarr"
    simulate(path, num_cells=3_000, num_genes=400, num_peaks=0, genes_per_cell=120, num_samples=3, num_types=5)
    known, new = tmp_path / "known.zarr", tmp_path / "new.zarr"
    liam_scale.ingest(path, out=known, where="sample != 'donor2' and cell_type != 'type04'")
    liam_scale.ingest(path, out=new, where="sample == 'donor2'")
    options = {"n_hidden": 64, "n_latent": 10, "lr": 5e-3, "max_epochs": 80, "kl_warmup_epochs": 40}
    run = liam_scale.train(known, out=tmp_path / "run", batch_key="sample", early_stopping=False, **options)
    run.embed()
    run.map(new, max_epochs=5, label_key="cell_type")
    labels = pd.read_csv(run.path / "mapped-new" / "labels.csv", index_col="cell")
    types = open_store(new).obs_frame()["cell_type"].astype(str).loc[labels.index]
    is_new = types == "type04"
    accuracy = (labels["nearest_label"] == types)[~is_new].mean()
    print(f"accuracy {accuracy:.3f}, uncertainty {labels['uncertainty'].groupby(is_new).mean().to_dict()}")
    assert accuracy > 0.8
    assert labels["uncertainty"][is_new].mean() > 2 * labels["uncertainty"][~is_new].mean()
