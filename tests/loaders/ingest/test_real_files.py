"""Files as they are found: tables of old anndata, raw 10x matrices, names that look alike."""

import unicodedata

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from loaders.ingest import ingest
from loaders.stores import open_store, read_store


def write_compound(path, adata):
    """The file of anndata before 0.7: tables as arrays of records, names first, categories in uns."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", np.array(adata.shape)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(adata.X, name)
        uns = file.create_group("uns")
        for table, frame in (("obs", adata.obs), ("var", adata.var)):
            columns = {"index": frame.index.to_numpy().astype("S")}
            for name, column in frame.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    uns[f"{name}_categories"] = column.cat.categories.to_numpy().astype("S")
                    column = column.cat.codes
                columns[name] = np.asarray(column)
            kinds = [(name, values.dtype) for name, values in columns.items()]
            records = np.empty(len(frame), kinds)
            for name, values in columns.items():
                records[name] = values
            file[table] = records


def old(make):
    adata = make.anndata(30, 12)
    adata.obs = adata.obs[["number", "share", "donor", "type"]]
    return adata


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning", "ignore::FutureWarning")
def test_compound_tables_of_anndata_before_0_7_are_read_as_anndata_reads_them(make, tmp_path):
    write_compound(tmp_path / "a.h5ad", old(make))
    ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    read, expected = read_store(tmp_path / "o.zarr"), anndata.read_h5ad(tmp_path / "a.h5ad")
    assert read["rna"].var_names.tolist() == expected.var_names.tolist() == [f"rna{n}" for n in range(12)]
    obs = read.obs.loc[expected.obs_names]
    assert obs["donor"].astype(str).tolist() == expected.obs["donor"].astype(str).tolist()
    assert obs["type"].isna().tolist() == expected.obs["type"].isna().tolist()
    assert obs["number"].tolist() == expected.obs["number"].tolist()
    make.assert_store_has(read, "rna", expected)
    assert open_store(tmp_path / "a.h5ad").cell_ids(0, 2).tolist() == ["cell0", "cell1"]


def test_categoricals_of_anndata_0_7_are_read(make, tmp_path):
    """Codes whose attribute refers to `__categories`."""
    old(make).write_h5ad(path := tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        for table, name in (("obs", "donor"), ("obs", "type")):
            group = file[table]
            codes, categories = group[f"{name}/codes"][:], group[f"{name}/categories"][:]
            del group[name]
            group[f"__categories/{name}"], group[name] = categories, codes
            group[name].attrs["categories"] = group[f"__categories/{name}"].ref
    column = open_store(path).obs_column("donor")
    assert column.categories == ("d0", "d1", "d2")
    assert column.codes[:4].tolist() == [0, 1, 2, 0]
    assert open_store(path).obs_column("type").codes[0] == -1


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a", " a"], r"'a' .*differ only in blanks or in how unicode writes them"),
        (["é", unicodedata.normalize("NFD", "é")], "differ only in blanks"),
        (["a b", "a\u00a0b"], "differ only in blanks"),
    ],
)
def test_samples_that_look_alike_are_refused_before_a_matrix_is_read(make, tmp_path, names, match, monkeypatch):
    adata = make.anndata(20, 10)
    adata.obs["sample"] = pd.Categorical(names * 10)
    adata.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr("loaders.ingest.run._look", lambda *_: pytest.fail("a matrix was read"))
    with pytest.raises(ValueError, match=match):
        ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    adata.write_h5ad(tmp_path / "b.h5ad")
    sources = [f"{name}=rna={tmp_path / file}" for name, file in zip(names, ("a.h5ad", "b.h5ad"), strict=True)]
    with pytest.raises(ValueError, match=match):
        ingest(sources, out=tmp_path / "o.zarr", progress=False)


def test_a_sample_with_blanks_around_it_is_remarked_upon(make, tmp_path):
    adata = make.anndata(20, 10)
    adata.obs["sample"] = pd.Categorical([" a", "b"] * 10)
    adata.write_h5ad(tmp_path / "a.h5ad")
    ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    read = read_store(tmp_path / "o.zarr")
    assert "sample ' a' has blanks" in "".join(read.uns["liam_scale"]["remarks"])


def test_a_raw_matrix_of_mostly_empty_barcodes_is_remarked_upon_with_what_to_give_instead(make, tmp_path):
    """200 barcodes, of which 20 are cells."""
    counts = make.anndata(200, 12).X.tolil()
    counts[20:] = 0
    names = [f"g{n}" for n in range(12)]
    barcodes = [f"b{n}" for n in range(200)]
    for name, kept in (("raw", 200), ("filtered", 30)):
        parts = [("Gene Expression", names, names, counts[:kept].tocsr())]
        make.tenx(tmp_path / f"{name}.h5", parts, barcodes[:kept])
        ingest(tmp_path / f"{name}.h5", out=tmp_path / f"{name}.zarr", progress=False)
    raw, filtered = (
        "".join(read_store(tmp_path / f"{name}.zarr").uns["liam_scale"]["remarks"]) for name in ("raw", "filtered")
    )
    assert "raw.h5: 180 of 200 cells have counts of no feature" in raw
    assert "filtered_feature_bc_matrix.h5" in raw
    assert "bc_matrix" not in filtered


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_numbers_in_the_other_order_of_bytes_are_read(make, tmp_path, layout):
    adata = make.anndata(30, 12)
    adata.X = adata.X.toarray() if layout == "dense" else adata.X.asformat(layout)
    adata.write_h5ad(path := tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        for name in ["X"] if layout == "dense" else ["X/data", "X/indices", "X/indptr"]:
            values, attributes = file[name][:], dict(file[name].attrs)
            del file[name]
            file[name] = values.astype(values.dtype.newbyteorder(">"))
            file[name].attrs.update(attributes)
    ingest(f"rna={path}", out=tmp_path / "o.zarr", progress=False)
    make.assert_store_has(read_store(tmp_path / "o.zarr"), "rna", make.anndata(30, 12))
    if layout != "csc":
        assert open_store(path).totals("rna").tolist() == make.anndata(30, 12).X.sum(axis=1).A1.tolist()
