"""TileDB-SOMA experiments and remote stores as sources."""

import mudata
import numpy as np
import pandas as pd
import pytest

from loaders.ingest import ingest


@pytest.fixture
def write_experiment(write_soma):
    def write(path, adata):
        plain = adata.copy()
        plain.obs = adata.obs[["donor", "number", "note"]].astype({"donor": str})
        write_soma(path, plain)

    return write


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Observation names")
@pytest.mark.parametrize("num_cells", [150, 5000])
def test_a_soma_experiment_equals_its_source(make, tmp_path, write_experiment, num_cells):
    source = make.anndata(150, 30)[np.arange(num_cells) % 150].copy()
    source.obs_names = [f"c{n}" for n in range(num_cells)]
    source.obs["number"] = np.arange(num_cells)
    write_experiment(tmp_path / "exp", source)
    schema = ingest(tmp_path / "exp", out=tmp_path / "o.zarr", sample_key="donor", memory="32MiB", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    make.assert_store_has(read, "rna", source)
    assert schema.modalities["rna"].value_dtype == "uint16"
    expected = source.obs.loc[read.obs_names]
    for column in ("number", "note", "donor"):
        assert read.obs[column].tolist() == expected[column].tolist()
    assert read.obs["sample"].tolist() == expected["donor"].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_soma_joins_a_file_and_is_checked_like_one(make, tmp_path, write_experiment):
    first, second = make.anndata(60, 20), make.anndata(50, 20, first_cell=60)
    write_experiment(tmp_path / "exp", first)
    second.write_h5ad(tmp_path / "two.h5ad")
    ingest([tmp_path / "exp", f"rna={tmp_path / 'two.h5ad'}"], out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert read.obs["sample"].tolist() == ["exp" if n < 60 else "two" for n in read.obs["number"]]
    everything = make.anndata(110, 20)
    make.assert_store_has(read, "rna", everything)
    first.X = np.log1p(first.X.toarray())
    first.X[first.X == 0] = 0.25
    write_experiment(tmp_path / "bad", first)
    with pytest.raises(
        ValueError, match=r"RNA/X/data: got 0.25 in cell 'cell0', feature 'rna\d+', counts are integers"
    ):
        ingest(tmp_path / "bad", out=tmp_path / "p.zarr", progress=False)
    with pytest.raises(ValueError, match=r"layer: .*bad/ms/RNA/X has no layer 'nope'; it has data"):
        ingest(tmp_path / "bad", out=tmp_path / "p.zarr", layer="nope", progress=False)


def test_a_store_at_a_remote_address_is_a_source(make, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    source = make.mudata(80, absent={"atac": lambda n: n % 4 == 0})
    source.write(tmp_path / "a.h5mu")
    ingest(tmp_path / "a.h5mu", out=tmp_path / "o.zarr", sample_key="donor", progress=False)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "o.zarr"), "/ingest-test/o.zarr", recursive=True)
    try:
        address = "memory://ingest-test/o.zarr"
        ingest(address, out=tmp_path / "p.zarr", sample_key="sample", seed=1, progress=False)
    finally:
        memory.rm("/ingest-test", recursive=True)
    read = mudata.read_zarr(tmp_path / "p.zarr")
    for name in ("rna", "atac"):
        make.assert_store_has(read, name, source[name])
    assert isinstance(read.obs["donor"].dtype, pd.CategoricalDtype)
