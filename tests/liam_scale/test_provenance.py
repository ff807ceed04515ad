"""An embedding knows the run that made it, and other runs neither read nor replace it unasked."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

import liam_scale
from liam_scale.decode import main as decode_main
from liam_scale.embed import EmbedConfig, embed_store
from liam_scale.embed import main as embed_main
from liam_scale.evaluate import main as evaluate_main
from liam_scale.map import main as map_main
from liam_scale.run import RUN_ATTRIBUTE, RunDirectory
from loaders import open_store
from loaders.formats.sealed import SEAL


@pytest.fixture(scope="module")
def other(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not `trained`; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "other"
    options = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "seed": 1}
    liam_scale.train(multiome, out=out, batch_key="sample", max_steps=3, **options)
    return out


@pytest.fixture(scope="module")
def embedded(trained: Path, multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the embedding of `trained`; tests do not change it."""
    store = Path(shutil.copytree(multiome, tmp_path_factory.mktemp("embedded") / "store.zarr"))
    liam_scale.load_run(trained).embed(store)
    return store


def id_of(run: Path) -> str:
    name = RunDirectory(run).record().id
    assert name is not None
    return name


def without_id(run: Path, copy: Path) -> Path:
    """A run as an older version left it."""
    shutil.copytree(run, copy)
    record = json.loads((copy / "run.json").read_text())
    del record["id"], record["sha256"]
    (copy / "run.json").write_text(json.dumps(record))
    return copy


def test_a_run_keeps_its_id_and_another_has_another(trained: Path, other: Path, tmp_path: Path) -> None:
    assert id_of(trained).startswith("multiome-")
    assert id_of(other).startswith("other-")
    assert id_of(Path(shutil.copytree(trained, tmp_path / "moved"))) == id_of(trained)
    directory = RunDirectory(trained)
    record, options = directory.record(), (trained / "config.toml").read_text()
    assert directory.identified(record, options).id == record.id
    assert directory.identified(record, options + "\n").id != record.id
    assert RunDirectory(trained.with_name("elsewhere")).identified(record, options).id != record.id


def test_the_embedding_says_which_run_made_it_in_store_and_file(trained: Path, embedded: Path, tmp_path: Path) -> None:
    expected = [id_of(trained)]
    assert [entry[RUN_ATTRIBUTE] for entry in open_store(embedded).embedding_attributes("X_liam")] == expected
    liam_scale.load_run(trained).embed(embedded, out=tmp_path / "apart.zarr", key="X_apart")
    assert [
        entry[RUN_ATTRIBUTE] for entry in open_store(tmp_path / "apart.zarr").embedding_attributes("X_apart")
    ] == expected
    assert open_store(embedded).embedding_attributes("X_apart") == []


def test_another_run_replaces_an_embedding_only_when_asked_to(
    trained: Path, other: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(embedded, tmp_path / "store.zarr"))
    before = open_store(store).read_embedding("X_liam", 0, 600)
    assert embed_main([str(other), "--store", str(store)]) == 2
    said = capsys.readouterr().err
    assert f"that run {id_of(trained)} made, not run {id_of(other)}" in said
    assert "--overwrite" in said
    np.testing.assert_array_equal(open_store(store).read_embedding("X_liam", 0, 600), before)
    assert embed_main([str(trained), "--store", str(store)]) == 0
    assert embed_main([str(other), "--store", str(store), "--key", "X_other"]) == 0
    assert embed_main([str(other), "--store", str(store), "--overwrite"]) == 0
    assert open_store(store).embedding_attributes("X_liam")[0][RUN_ATTRIBUTE] == id_of(other)


def test_one_store_of_a_chain_with_another_runs_embedding_is_enough_to_refuse(
    trained: Path, other: Path, multiome: Path, embedded: Path
) -> None:
    chain = open_store([multiome, embedded])
    assert [entry[RUN_ATTRIBUTE] for entry in chain.embedding_attributes("X_liam")] == [id_of(trained)]
    with pytest.raises(ValueError, match=f"that run {id_of(trained)} made"):
        embed_store(EmbedConfig(run=other), chain)


def test_decode_and_evaluate_refuse_the_embedding_of_another_run(
    trained: Path, other: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "values.zarr"
    arguments = ["--out", str(out), "--modality", "rna", "--store", str(embedded)]
    assert decode_main([str(other), *arguments]) == 2
    said = capsys.readouterr().err
    assert f"that run {id_of(trained)} made, not run {id_of(other)}" in said
    assert f"python -m liam_scale.embed {other} --store {embedded} --key X_liam --overwrite" in said
    assert not list(tmp_path.iterdir())
    scores = [str(embedded), "--batch-key", "sample", "--out", str(tmp_path / "scores"), "--no-plots"]
    assert evaluate_main([*scores, "--run", str(other)]) == 2
    assert f"--run: obsm['X_liam'] of {embedded}: got an embedding that run {id_of(trained)}" in capsys.readouterr().err
    liam_scale.load_run(trained).embed(embedded, out=tmp_path / "apart.zarr")
    assert evaluate_main([*scores, "--run", str(other), "--embedding-file", str(tmp_path / "apart.zarr")]) == 2
    assert f"apart.zarr: got an embedding that run {id_of(trained)} made" in capsys.readouterr().err


def test_mapping_over_the_embedding_of_another_run_is_refused_before_any_training(
    trained: Path, other: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(embedded, tmp_path / "store.zarr"))
    arguments = [str(other), str(store), "--out", str(tmp_path / "mapped")]
    assert map_main(arguments) == 2
    assert f"that run {id_of(trained)} made" in capsys.readouterr().err
    assert not (tmp_path / "mapped").exists()
    assert map_main([*arguments, "--overwrite"]) == 0
    assert open_store(store).embedding_attributes("X_liam")[0][RUN_ATTRIBUTE] == id_of(tmp_path / "mapped")


def test_what_an_older_version_made_is_taken_with_a_remark(
    trained: Path, embedded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = Path(shutil.copytree(embedded, tmp_path / "store.zarr"))
    old = without_id(trained, tmp_path / "old")
    liam_scale.load_run(old).decode(tmp_path / "values.zarr", modality="rna", store=(str(store),))
    assert "it or the run has no id" in caplog.text
    caplog.clear()
    array = zarr.open_group(store, mode="r+", use_consolidated=False)["obsm"]["X_liam"]
    for name in (RUN_ATTRIBUTE, SEAL):
        del array.attrs[name]
    liam_scale.load_run(trained).embed(store)
    assert "it or the run has no id" in caplog.text
    caplog.clear()
    liam_scale.load_run(trained).embed(store)
    assert "has no id" not in caplog.text
