"""Files of others that declare what is not there, or must not be followed: refused by name before they are read."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.ecosystem import quiet_anndata
from loaders.ingest import ingest
from loaders.stores import open_store


@pytest.fixture
def adata():
    counts = scipy.sparse.random(300, 40, density=0.3, format="csr", dtype=np.float32, random_state=1)
    counts.data = np.ceil(counts.data * 9)
    obs = pd.DataFrame({"donor": pd.Categorical(["a", "b", "c"] * 100)}, index=[f"c{n}" for n in range(300)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{n}" for n in range(40)]))


def replace(path, name, values, **options):
    with h5py.File(path, "a") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **options).attrs.update(attributes)


def refused_by_both(path, tmp_path, match):
    """By a reader who streams and by one who ingests."""
    with pytest.raises(ValueError, match=match):
        open_store(path)
    with pytest.raises(ValueError, match=match):
        ingest(path, out=tmp_path / "o.zarr", progress=False)
    assert not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_truncated_arrays_of_a_matrix_are_refused_when_it_is_opened(adata, tmp_path, name, layout):
    adata.X = adata.X.asformat(layout)
    adata.write_h5ad(path := tmp_path / "a.h5ad")
    with h5py.File(path) as file:
        values = file[f"X/{name}"][:]
    replace(path, f"X/{name}", values[: len(values) // 8])
    refused_by_both(path, tmp_path, r"a\.h5ad: X.*: got .*; the file is damaged or was written wrongly: write it again")


@pytest.mark.parametrize("values", [np.zeros((4, 5), np.int32), np.int32(3), np.array(["a"], "S1"), np.zeros(5)])
def test_what_is_no_row_of_numbers_is_no_array_of_a_matrix(adata, tmp_path, values):
    adata.write_h5ad(path := tmp_path / "a.h5ad")
    replace(path, "X/indices", values)
    refused_by_both(path, tmp_path, r"a\.h5ad: X: got an array of .* for indices, expected one row of numbers")


@pytest.mark.parametrize("name", ["X/indptr", "obs/_index", "obs/donor/codes"])
def test_a_file_that_declares_chunks_it_lacks_is_refused_before_memory_is_taken(adata, tmp_path, name):
    adata.write_h5ad(path := tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        old = file[name]
        attributes, kind = dict(old.attrs), old.dtype
        del file[name]
        file.create_dataset(name, shape=(10**12,), chunks=(1000,), dtype=kind).attrs.update(attributes)
    refused_by_both(path, tmp_path, rf"a\.h5ad: got 0 of 1,000,000,000 chunks of {name}; .* write it again")


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("name", ["X/indptr", "obs/_index"])
def test_a_zarr_array_declared_larger_than_memory_is_refused(adata, tmp_path, name):
    adata.write_zarr(path := tmp_path / "a.zarr", convert_strings_to_categoricals=False)
    for document in (path / name / "zarr.json", path / name / ".zarray"):
        if document.exists():
            entry = json.loads(document.read_text())
            document.write_text(json.dumps({**entry, "shape": [10**12]}))
    for document in (path / "zarr.json", path / ".zmetadata"):
        if document.exists():
            entry = json.loads(document.read_text())
            entry.pop("consolidated_metadata", None)
            document.write_text(json.dumps(entry)) if document.name == "zarr.json" else document.unlink()
    refused_by_both(path, tmp_path, rf"a\.zarr: got 1,000,000,000,000 declared elements in {name} \(")


def test_links_and_values_in_other_files_are_not_followed(adata, tmp_path):
    adata.write_h5ad(path := tmp_path / "a.h5ad")
    adata.write_h5ad(tmp_path / "other.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/donor"]
        file["obs/donor"] = h5py.ExternalLink("other.h5ad", "/obs/donor")
    refused_by_both(path, tmp_path, r"a\.h5ad: got a link at obs/donor into another file \(other\.h5ad\)")
    adata.write_h5ad(path)
    (tmp_path / "bytes").write_bytes(bytes(8 * 301))
    with h5py.File(path, "a") as file:
        del file["X/indptr"]
        file.create_dataset("X/indptr", (301,), np.int64, external=[(str(tmp_path / "bytes"), 0, 8 * 301)])
    refused_by_both(path, tmp_path, r"a\.h5ad: got an array at X/indptr whose values lie in another file")


@pytest.mark.parametrize("codec", ["pickle", "json2"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_codecs_that_build_objects_are_refused(adata, tmp_path, codec):
    with quiet_anndata(2):
        adata.write_zarr(path := tmp_path / "a.zarr")
    document = path / "obs" / "_index" / ".zarray"
    entry = json.loads(document.read_text())
    document.write_text(json.dumps({**entry, "filters": [{"id": "vlen-utf8"}, {"id": codec}]}))
    (path / ".zmetadata").unlink(missing_ok=True)
    refused_by_both(path, tmp_path, rf"a\.zarr: got the codec {codec} at obs/_index, which builds Python objects")
