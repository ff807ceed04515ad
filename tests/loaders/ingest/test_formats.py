"""Every format in, every value out."""

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from identifying import identifying_counts

from loaders.ecosystem import quiet_anndata
from loaders.ingest import ingest
from loaders.schema import SCHEMA_KEY, Schema


def remarks(store):
    return list(mudata.read_zarr(store).uns["liam_scale"]["remarks"])


def test_h5mu_mosaic_equals_its_source_in_every_cell(make, tmp_path):
    source = make.mudata(300, absent={"rna": lambda n: n % 5 == 1, "atac": lambda n: n % 3 == 0})
    source.write(tmp_path / "a.h5mu")
    schema = ingest(tmp_path / "a.h5mu", out=tmp_path / "o.zarr", progress=False)
    # The default, pull_on_update=None, moves the cells of a mosaic: those of the first modality come first.
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert read.n_obs == source.n_obs == 280
    for name in ("rna", "atac"):
        make.assert_store_has(read, name, source[name])
        has = np.isin(read.obs_names, source[name].obs_names)
        np.testing.assert_array_equal(np.ravel(read.obsm[name]), has)
        np.testing.assert_array_equal(np.ravel(read.obsmap[name]), np.where(has, np.cumsum(has), 0))
        assert read[name].obs_names.tolist() == read.obs_names[has].tolist()
        assert schema.modalities[name].num_nonzeros == source[name].X.nnz
    expected = source.obs.loc[read.obs_names]
    for column in ("donor", "number", "share", "is_odd", "note", "type"):
        got = read.obs[column].astype(object).where(read.obs[column].notna(), None)
        assert got.tolist() == expected[column].astype(object).where(expected[column].notna(), None).tolist(), column
    assert set(read.obs["sample"]) == {"a"}
    assert Schema.from_json(zarr.open_group(tmp_path / "o.zarr", mode="r").attrs[SCHEMA_KEY]) == schema
    assert schema.is_shuffled
    assert schema.modalities["rna"].value_dtype == "uint16"


def test_order_is_global_seeded_and_far_from_the_sources(make, tmp_path):
    make.anndata(500, 30).write_h5ad(tmp_path / "a.h5ad")
    orders = []
    for seed in (0, 0, 1):
        ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", seed=seed, overwrite=True, progress=False)
        orders.append(mudata.read_zarr(tmp_path / "o.zarr").obs["number"].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(500))
    assert abs(np.corrcoef(orders[0], np.arange(500))[0, 1]) < 0.2


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning", "ignore:Consolidated metadata is currently")
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "unsorted"])
@pytest.mark.parametrize("kind", ["h5ad", "zarr2", "zarr3"])
def test_anndata_in_every_form_and_container(make, tmp_path, form, kind):
    source = make.anndata(150, 40)
    written = source.copy()
    if form == "csc":
        written.X = scipy.sparse.csc_matrix(source.X)
    elif form == "dense":
        written.X = source.X.toarray()
    elif form == "unsorted":
        written.X = _reversed_rows(source.X)
    path = tmp_path / ("a.h5ad" if kind == "h5ad" else "a.zarr")
    if kind == "h5ad":
        written.write_h5ad(path)
    else:
        with quiet_anndata(int(kind[-1])):
            written.write_zarr(path)
    ingest(f"rna={path}", out=tmp_path / "o.zarr", progress=False)
    make.assert_store_has(mudata.read_zarr(tmp_path / "o.zarr"), "rna", source)


def _reversed_rows(matrix):
    rows = matrix.copy()
    for row in range(rows.shape[0]):
        cut = slice(rows.indptr[row], rows.indptr[row + 1])
        rows.indices[cut], rows.data[cut] = rows.indices[cut][::-1].copy(), rows.data[cut][::-1].copy()
    rows.has_sorted_indices = False
    return rows


def test_mudata_zarr_and_our_own_store_are_sources(make, tmp_path):
    source = make.mudata(120, absent={"atac": lambda n: n % 4 == 0})
    with quiet_anndata(2):
        source.write_zarr(tmp_path / "a.zarr")
    ingest(tmp_path / "a.zarr", out=tmp_path / "o.zarr", progress=False)
    ingest(tmp_path / "o.zarr", out=tmp_path / "again.zarr", seed=3, progress=False)
    first, again = mudata.read_zarr(tmp_path / "o.zarr"), mudata.read_zarr(tmp_path / "again.zarr")
    for name in ("rna", "atac"):
        make.assert_store_has(again, name, source[name])
    assert first.obs_names.tolist() != again.obs_names.tolist()
    assert again.obs["sample"].unique().tolist() == ["a"]


def test_tenx_is_split_by_feature_type(make, tmp_path):
    types = {"rna": "Gene Expression", "atac": "Peaks", "adt": "Antibody Capture"}
    sizes = {"rna": 30, "atac": 70, "adt": 12}
    barcodes = [f"AAAC{n:04d}-1" for n in range(90)]
    parts = []
    for name, size in sizes.items():
        names, ids = [f"{name}{f}" for f in range(size)], [f"ID{f}" for f in range(size)]
        parts.append((types[name], names, ids, identifying_counts(90, size, modality=name)))
    parts.append(("CRISPR Guide Capture", ["guide"], ["g"], scipy.sparse.csr_matrix((90, 1))))
    parts[0][1][5] = parts[0][1][3]
    make.tenx(tmp_path / "t.h5", parts, barcodes)
    ingest(tmp_path / "t.h5", out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert list(read.mod) == ["rna", "atac", "adt"]
    for name, size in sizes.items():
        cells = [barcodes.index(barcode) for barcode in read[name].obs_names]
        np.testing.assert_array_equal(
            read[name].X.toarray(), identifying_counts(90, size, modality=name)[cells].toarray()
        )
    assert read["rna"].var_names[5] == "rna3-1"
    assert read["rna"].var["gene_ids"].tolist()[:2] == ["ID0", "ID1"]
    assert read.obs["sample"].unique().tolist() == ["t"]
    said = remarks(tmp_path / "o.zarr")
    assert any(
        "CRISPR Guide Capture is left out" in remark or "CRISPR Guide Capture are left out" in remark for remark in said
    )
    assert any("1 feature names repeat another" in remark for remark in said)


def test_h5ad_is_split_by_feature_types_in_either_spelling(make, tmp_path):
    rna, atac = make.anndata(80, 20), make.anndata(80, 50, modality="atac")
    both = anndata.concat([rna, atac], axis=1, merge="same")
    both.obs = rna.obs
    both.var["feature_types"] = ["GEX"] * 20 + ["ATAC"] * 50
    # Interleaved, so that columns of both modalities are picked out of each row.
    both = both[:, np.argsort(np.arange(70) * 37 % 70)].copy()
    both.write_h5ad(tmp_path / "m.h5ad")
    ingest(tmp_path / "m.h5ad", out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    for name, expected in (("rna", rna), ("atac", atac)):
        order = read[name].var_names
        assert set(order) == set(expected.var_names)
        make.assert_store_has(read, name, expected[:, order])


def test_files_of_one_modality_each_are_paired_by_cell(make, tmp_path):
    rna, atac = make.anndata(100, 30), make.anndata(100, 60, modality="atac")
    rna, atac = rna[:80].copy(), atac[np.random.default_rng(0).permutation(np.arange(20, 100))].copy()
    atac.obs["only_atac"] = np.arange(80)
    rna.obs["n_counts"], atac.obs["n_counts"] = np.arange(80), np.arange(80) + 1000
    rna.write_h5ad(tmp_path / "r.h5ad")
    atac.write_h5ad(tmp_path / "t.h5ad")
    text = f"rna={tmp_path / 'r.h5ad'},atac={tmp_path / 't.h5ad'}"
    ingest(text, out=tmp_path / "o.zarr", sample_key="donor", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert read.n_obs == 100
    make.assert_store_has(read, "rna", rna)
    make.assert_store_has(read, "atac", atac)
    everything = make.anndata(100, 1).obs.loc[read.obs_names]
    for column in ("number", "note"):
        assert read.obs[column].tolist() == everything[column].tolist()
    assert read.obs["sample"].tolist() == everything["donor"].tolist()
    assert read.obs["only_atac"].isna().sum() == 20
    # Columns that differ between the modalities stay with each.
    apart = mudata.read_zarr(tmp_path / "o.zarr")
    assert "n_counts" not in apart.obs
    assert apart["atac"].obs["n_counts"].tolist() == atac.obs["n_counts"].loc[apart["atac"].obs_names].tolist()
    assert "20 of 100 cells have no rna" in "".join(remarks(tmp_path / "o.zarr"))


def test_layer_and_raw_hold_the_counts(make, tmp_path):
    source = make.anndata(60, 25)
    normalised = source.copy()
    normalised.layers["counts"] = source.X.copy()
    normalised.raw = source.copy()
    normalised.X = np.log1p(source.X.toarray() / 100)
    normalised.write_h5ad(tmp_path / "n.h5ad")
    for layer in ("counts", "raw"):
        out = tmp_path / f"{layer}.zarr"
        ingest(f"rna={tmp_path / 'n.h5ad'}", out=out, layer=layer, progress=False)
        make.assert_store_has(mudata.read_zarr(out), "rna", source)
    with pytest.raises(ValueError, match=r"no layer 'cnts'; it has X, counts, raw: name one of them"):
        ingest(f"rna={tmp_path / 'n.h5ad'}", out=tmp_path / "x.zarr", layer="cnts", progress=False)


def test_what_nothing_says_is_rna_and_said_so(make, tmp_path):
    make.anndata(20, 10).write_h5ad(tmp_path / "plain.h5ad")
    ingest(tmp_path / "plain.h5ad", out=tmp_path / "o.zarr", progress=False)
    assert list(mudata.read_zarr(tmp_path / "o.zarr").mod) == ["rna"]
    assert any("taken as rna (nothing says otherwise)" in remark for remark in remarks(tmp_path / "o.zarr"))


def test_features_named_like_peaks_are_atac_and_a_mixture_is_refused(make, tmp_path):
    peaks = make.anndata(20, 10)
    peaks.var_names = [f"chr1:{100 * f}-{100 * f + 50}" for f in range(10)]
    peaks.write_h5ad(tmp_path / "peaks.h5ad")
    ingest(tmp_path / "peaks.h5ad", out=tmp_path / "o.zarr", progress=False)
    assert list(mudata.read_zarr(tmp_path / "o.zarr").mod) == ["atac"]
    peaks.var_names = [*peaks.var_names[:5], "CD4", "CD8A", "MS4A1", "NKG7", "LYZ"]
    peaks.write_h5ad(tmp_path / "mixed.h5ad")
    with pytest.raises(ValueError, match=r"50% of the features are named like peaks .* add var\['feature_types'\]"):
        ingest(tmp_path / "mixed.h5ad", out=tmp_path / "x.zarr", progress=False)


def test_modality_columns_fill_the_common_obs_and_prefixed_copies_go(make, tmp_path):
    source = make.mudata(90, absent={"rna": lambda n: n < 30, "atac": lambda n: n >= 60})
    for name in ("rna", "atac"):
        numbers = [int(cell[4:]) for cell in source[name].obs_names]
        source[name].obs["batch"] = pd.Categorical([f"b{n % 4}" for n in numbers])
        source[name].obs["depth"] = np.array(numbers) * (1 if name == "rna" else 2)
    source.write(tmp_path / "a.h5mu")
    with h5py.File(tmp_path / "a.h5mu", "a") as file:
        # As older versions of mudata left it: copies of modality columns at the top.
        anndata.io.write_elem(file["obs"], "rna:batch", pd.Categorical(["old"] * 90))
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "rna:batch"]
    schema = ingest(tmp_path / "a.h5mu", out=tmp_path / "o.zarr", sample_key="batch", progress=False)
    assert "batch" in schema.obs_columns
    assert "rna:batch" not in schema.obs_columns
    assert "depth" not in schema.obs_columns
    read = mudata.read_zarr(tmp_path / "o.zarr")
    numbers = [int(cell[4:]) for cell in read.obs_names]
    assert read.obs["batch"].tolist() == [f"b{n % 4}" for n in numbers] == read.obs["sample"].tolist()
    assert read["atac"].obs["depth"].tolist() == [2 * int(cell[4:]) for cell in read["atac"].obs_names]


def test_store_opens_in_mudata_without_a_warning_of_ours(make, tmp_path, recwarn):
    make.mudata(30).write(tmp_path / "a.h5mu")
    ingest(tmp_path / "a.h5mu", out=tmp_path / "o.zarr", progress=False)
    recwarn.clear()
    mudata.read_zarr(tmp_path / "o.zarr")
    assert all("From 0.4 .update()" in str(warning.message) for warning in recwarn)
