"""Real files through ingest, compared with their sources value by value."""

import os
from pathlib import Path

import anndata
import mudata
import numpy as np
import pytest

from loaders.ingest import ingest

DATA = Path(os.environ.get("LIAM_SHARED", Path(__file__).resolve().parents[3] / ".." / "shared")) / "data"

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder of real data at {DATA}"),
    # mudata on proteins called like genes (CD4, CD14).
    pytest.mark.filterwarnings("ignore:Cannot join columns with the same name:UserWarning"),
    pytest.mark.filterwarnings("ignore:var_names are not unique:UserWarning"),
]


def equal(stored, source):
    order = stored.obs_names.tolist()
    assert sorted(order) == sorted(source.obs_names)
    assert stored.var_names.tolist() == source.var_names.tolist()
    assert (abs(stored.X.astype(np.float32) - source[order].X)).nnz == 0
    np.testing.assert_array_equal(stored.obs["total_counts"], np.ravel(source[order].X.sum(axis=1)))


@pytest.mark.parametrize(
    ("name", "modalities"),
    [
        ("bmmc_multiome_A", ["rna", "atac"]),
        ("bmmc_cite", ["rna", "adt"]),
        ("pbmc_wnn_mosaic", ["rna", "adt"]),
        ("bmmc_trimodal_mosaic", ["rna", "atac", "adt"]),
        ("a549_scicar_rna_atac", ["rna", "atac"]),
        ("pbmc_multiome_40c_fullwidth", ["rna", "atac"]),
    ],
)
def test_real_multimodal_files(tmp_path, name, modalities):
    schema = ingest(DATA / f"{name}.h5mu", out=tmp_path / "o.zarr", sample_key="batch", memory="64MiB", progress=False)
    source, read = mudata.read_h5mu(DATA / f"{name}.h5mu"), mudata.read_zarr(tmp_path / "o.zarr")
    assert list(schema.modalities) == modalities == list(read.mod)
    for modality in modalities:
        equal(read[modality], source[modality])
    for column in ("batch", "cell_type"):
        assert read.obs[column].astype(str).tolist() == source.obs[column].loc[read.obs_names].astype(str).tolist()
    assert read.obs["sample"].tolist() == read.obs["batch"].tolist()
    assert not any(":" in column for column in schema.obs_columns)


def test_real_atac(tmp_path):
    ingest(f"atac={DATA / 'granja_bmmc_atac.h5ad'}", out=tmp_path / "o.zarr", memory="64MiB", progress=False)
    equal(mudata.read_zarr(tmp_path / "o.zarr")["atac"], anndata.read_h5ad(DATA / "granja_bmmc_atac.h5ad"))


def test_two_real_experiments_join_on_their_genes(tmp_path):
    paths = [DATA / "bmmc_multiome_A.h5mu", DATA / "bmmc_cite.h5mu"]
    schema = ingest(paths, out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    sources = [mudata.read_h5mu(path) for path in paths]
    common = sources[0]["rna"].var_names[sources[0]["rna"].var_names.isin(sources[1]["rna"].var_names)]
    assert schema.num_cells == 1100
    equal(read["rna"], anndata.concat([source["rna"][:, common] for source in sources]))
    equal(read["atac"], sources[0]["atac"])
    equal(read["adt"], sources[1]["adt"])
    assert set(read.obs["sample"]) == {"bmmc_multiome_A", "bmmc_cite"}


def test_embeddings_are_no_counts(tmp_path):
    with pytest.raises(ValueError, match=r"X: got -?0\.\d+ in cell .*, counts are (integers|not negative)"):
        ingest(f"rna={DATA / 'liam_published_rest_a_seed11.h5ad'}", out=tmp_path / "o.zarr", progress=False)
