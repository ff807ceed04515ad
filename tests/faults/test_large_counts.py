"""Counts that no cell has: an ingest, and a training that streams them, say so or refuse them; never in silence."""

from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import load_file

import liam_scale
from liam_scale.train import main as train
from loaders.ecosystem import quiet_anndata
from loaders.ingest import ingest
from loaders.stores import open_store

OPTIONS = ("--batch-key", "sample", "--model", "rna-only", "--model.n-hidden", "8", "--n-latent", "3")
OPTIONS = (*OPTIONS, "--minibatch", "32", "--max-steps", "2")


def write(path: Path, value: float, dtype: str) -> Path:
    """A file of 60 cells, of which `c7` has a value at gene `g3`."""
    counts = np.random.default_rng(0).poisson(1.0, (60, 12)).astype(dtype)
    counts[7, 3] = value
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    data.obs_names, data.var_names = [f"c{n}" for n in range(60)], [f"g{n}" for n in range(12)]
    data.obs["sample"] = np.repeat(["a", "b"], 30).astype(object)
    data.strings_to_categoricals()
    with quiet_anndata():
        data.write_zarr(path) if path.suffix == ".zarr" else data.write_h5ad(path)
    return path


def assert_finite(out: Path) -> None:
    assert all(np.isfinite(values).all() for values in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize("value", [2**24, 2**31, 2**32 - 1])
def test_ingest_keeps_such_a_count_exactly_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: int
) -> None:
    ingest(f"rna={write(tmp_path / 'a.h5ad', value, 'float64')}", out=tmp_path / "a.zarr")
    assert f"note: rna: the largest count is {value:,}, which no cell has" in capsys.readouterr().err
    assert open_store(tmp_path / "a.zarr").matrix("rna").read(0, 60).values.max() == value
    assert train([str(tmp_path / "a.zarr"), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    assert_finite(tmp_path / "run")


def test_one_less_is_a_count_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest(f"rna={write(tmp_path / 'a.h5ad', 2**24 - 1, 'int64')}", out=tmp_path / "a.zarr")
    assert "largest count" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (2**24, "float32", "the largest count is 16,777,216, which no cell has"),
        (2**31, "int64", "the largest count is 2,147,483,648, which no cell has"),
        (2**31, "float64", "the largest count is 2,147,483,648, which no cell has"),
        (0.5, "float32", "counts are integers; under 1% of the values read are not and the largest is 5"),
    ],
)
def test_a_training_that_streams_them_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float, dtype: str, said: str
) -> None:
    assert train([str(write(tmp_path / name, value, dtype)), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    assert caplog.text.count(said) == 1
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (2**32, "int64", "to 4294967296; counts are integers from 0 to 4294967295"),
        (2**40, "float64", "got 1.099511628e+12, counts are at most 4294967295"),
        (1e39, "float64", "got inf among the counts, which are finite"),
        (np.nan, "float32", "got nan among the counts, which are finite"),
        (-5, "float32", "got -5, counts are not negative"),
        (-5, "int32", "got values from -5 to"),
    ],
)
def test_a_training_that_streams_what_is_no_count_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float, dtype: str, said: str
) -> None:
    assert train([str(write(tmp_path / name, value, dtype)), "--out", str(tmp_path / "run"), *OPTIONS]) == 2
    assert f"{name}: X: " in (told := capsys.readouterr().err)
    assert said in told
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_normalised_counts_are_called_so_by_whatever_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An ingest refuses them; what streams them says the same, once, and takes them as they are."""
    assert train([str(write(tmp_path / "a.h5ad", 3, "float32")), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    run = liam_scale.load_run(tmp_path / "run")
    data = anndata.read_h5ad(tmp_path / "a.h5ad")
    data.X.data = np.log1p(data.X.data)
    data.write_h5ad(tmp_path / "b.h5ad")
    told = "counts are integers; 100% of the values read are not and the largest is 1.792, so they look log-normalised"
    with pytest.raises(ValueError, match=told):
        ingest(f"rna={tmp_path / 'b.h5ad'}", out=tmp_path / "b.zarr")
    caplog.clear()
    for read in (
        lambda: run.write_to(data, store=data),
        lambda: run.embedding(tmp_path / "b.h5ad"),
        lambda: run.embed(tmp_path / "b.h5ad", out=tmp_path / "b.zarr"),
        lambda: run.map(data, out=tmp_path / "mapped", max_epochs=1, overwrite=True),
    ):
        read()
        assert caplog.text.count(told) == 1
        caplog.clear()
