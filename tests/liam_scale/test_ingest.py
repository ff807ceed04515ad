"""The ingest command, the batch key it suggests, and the batch keys that cannot serve."""

import logging
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from liam_scale.cli import command
from liam_scale.ingest import main
from liam_scale.train import main as train
from loaders.ingest import ingest
from loaders.stores import open_store


def write_source(path: Path, **columns: object) -> Path:
    """60 cells with 20 genes."""
    counts = np.random.default_rng(0).poisson(1.0, (60, 20)).astype(np.float32)
    obs = pd.DataFrame(columns, index=[f"cell{n}" for n in range(60)])
    adata = anndata.AnnData(scipy.sparse.csr_matrix(counts), obs=obs)
    adata.var["feature_types"] = "Gene Expression"
    adata.write_h5ad(path)
    return path


ONE_EACH = [f"value {n}" for n in range(60)]
TWO = ["x", "y"] * 30


def test_commands_that_make_no_minibatch_do_without_torch(tmp_path: Path) -> None:
    """It is 180 MB of a process, and two seconds."""
    source = write_source(tmp_path / "a.h5ad", sample=TWO)
    code = f"""
import sys
from liam_scale.cli import main
assert main(["ingest", {str(source)!r}, "--out", "a.zarr"]) == 0
assert main(["check", "a.zarr"]) == 0
assert main(["subset", "a.zarr", "--where", "sample == 'x'", "--out", "b.zarr"]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({}, None),
        ({"sample": TWO, "donor": TWO}, "sample"),
        ({"cell_type": TWO, "Donor_ID": TWO}, "Donor_ID"),
        ({"cell_type": TWO, "number": range(60)}, None),
        ({"composite": TWO, "my batch": pd.Categorical(TWO)}, "my batch"),
        ({"batch": ONE_EACH, "replicate": [1, 2] * 30}, "replicate"),
        ({"batch": [None, *TWO[1:]], "share": np.linspace(0, 1, 60)}, None),
    ],
)
def test_ingest_prints_a_training_that_removes_something(
    columns: dict[str, object], key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my atlas.zarr"
    assert main([str(write_source(tmp_path / "a.h5ad", **columns)), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("next: "))
    word, name, *arguments = shlex.split(line.removeprefix("next: "))
    config = command(name).parse(arguments)
    assert (word, config.store, config.batch_key) == ("liam-scale", (str(out),), (key,) if key else ())
    assert ("sample has one value" in said) == (key is None)


def test_a_batch_key_with_one_value_warns_with_the_columns_that_could_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_source(tmp_path / "a.h5ad", cell_type=["b", "t", "nk"] * 20, donor=TWO, barcode=ONE_EACH)
    ingest(source, out=tmp_path / "a.zarr", progress=False)
    arguments = [str(tmp_path / "a.zarr"), "--dry-run", "--out", str(tmp_path / "run"), "--batch-key"]
    with caplog.at_level(logging.WARNING):
        assert train([*arguments, "donor"]) == 0
        assert "nothing is removed" not in caplog.text
        assert train([*arguments, "sample"]) == 0
    listed = "columns that could serve: donor, cell_type"
    assert f"--batch-key: sample has one value in all cells, so nothing is removed; {listed}\n" in caplog.text


def test_a_batch_key_of_which_each_cell_has_its_own_value_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(write_source(tmp_path / "a.h5ad", barcode=ONE_EACH), out=tmp_path / "a.zarr", progress=False)
    assert train([str(tmp_path / "a.zarr"), "--out", str(tmp_path / "run"), "--batch-key", "barcode"]) == 2
    said = capsys.readouterr().err
    assert "error: --batch-key: barcode has 60 values in 60 cells of" in said
    assert said.endswith("so that removing it would remove all there is; no other column could serve\n")
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_and_a_run_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_source(tmp_path / "a.h5ad"))
    assert main([source, "--out", str(tmp_path / "o.zarr"), "--sample-key", "nope"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --sample-key:")
    assert main([f"d1={source}", "--out", str(tmp_path / "o.zarr")]) == 0
    shown = capsys.readouterr().err
    assert "rna: shuffle and write: 60 of 60 cells" in shown
    assert "note: sample = the name of the file: d1" in shown


@pytest.mark.parametrize("name", ["atlas.h5mu", "atlas.h5ad"])
def test_a_store_is_never_called_like_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_source(tmp_path / "a.h5ad")), "--out", str(tmp_path / name)]) == 2
    assert f"a store is a Zarr folder; name {tmp_path / 'atlas.zarr'}\n" in capsys.readouterr().err


def test_a_subset_is_a_store_of_the_cells_and_features_named(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, out = tmp_path / "hvg.txt", tmp_path / "s.zarr"
    names.write_text("gene3\n\ngene1 \n")
    assert (
        command("subset")([str(multiome), "--where", "donor == 'donor1'", "--features", str(names), "--out", str(out)])
        == 0
    )
    assert f"wrote {out}: " in capsys.readouterr().out
    store = open_store(out)
    assert store.feature_names("rna").tolist() == ["gene1", "gene3"]
    assert store.schema.modalities["atac"].num_features == 150
    assert store.obs_column("donor").categories == ("donor1",)
    assert command("subset")([str(multiome), "--out", str(out)]) == 2
    assert "--where, --features: got neither" in capsys.readouterr().err
    names.write_text(" \n")
    assert command("ingest")([str(multiome), "--features", str(names), "--out", str(tmp_path / "t.zarr")]) == 2
    assert f"--features: {names} is empty" in capsys.readouterr().err
