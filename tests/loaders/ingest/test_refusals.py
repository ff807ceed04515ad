"""What ingest refuses: each with what was looked at, what was found and what to do; nothing stays behind."""

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.ingest import ingest


def refused(paths, tmp_path, match, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        ingest(paths, out=tmp_path / "o.zarr", progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def with_value(adata, row, column, value):
    dense = adata.X.toarray()
    dense[row, column] = value
    adata.X = scipy.sparse.csr_matrix(dense)
    return adata


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
@pytest.mark.parametrize("row", [3, 4999])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-2.0, r"X: got -2 in cell 'cell{row}', feature 'rna7', counts are not negative"),
        (np.nan, r"X: got nan in cell 'cell{row}', feature 'rna7', counts are finite; replace missing values"),
        (np.inf, r"X: got inf in cell 'cell{row}'"),
        (2.5, r"X: got 2.5 in cell 'cell{row}', feature 'rna7', counts are integers; "),
        (5e9, r"X: got 5000000000 in cell 'cell{row}', .* at most 4294967295"),
    ],
)
def test_values_that_are_no_counts(make, tmp_path, row, value, match):
    # Row 3 is found at the first look, row 4999 only while streaming, after files were written.
    adata = make.anndata(20, 10)
    adata = anndata.concat([adata] * 250)
    adata.obs_names = [f"cell{n}" for n in range(5000)]
    with_value(adata, row, 7, value).write_h5ad(tmp_path / "a.h5ad")
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, match.format(row=row), memory="32MiB")


def test_log_normalised_counts_name_the_layer_to_take(make, tmp_path):
    adata = make.anndata(50, 20)
    adata.layers["scaled"], adata.layers["raw_counts"] = adata.X * 2.0, adata.X.copy()
    adata.X = np.log1p(adata.X.toarray() / 1e3).astype(np.float32)
    adata.write_h5ad(tmp_path / "a.h5ad")
    match = (
        r"integers; 100% of the values read are not .* they look log-normalised: .* layer='raw_counts' \(this file has"
    )
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, match)
    del adata.layers["scaled"], adata.layers["raw_counts"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, r"log-normalised: give a file with raw counts")


def damage(path, change):
    with h5py.File(path, "a") as file:
        change(file["X"])


def set_entry(name, place, value):
    def change(group):
        group[name][place] = value

    return change


def shorten(group):
    data = group["data"][:-3]
    del group["data"]
    group["data"] = data


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_entry("indptr", 5, 10**6), r"X: row offsets fall from 1000000 to \d+ at row 5; the file is damaged"),
        (set_entry("indptr", 0, 1), r"X: row offsets run from 1 to \d+, expected 0 to"),
        (
            set_entry("indices", -1, 40),
            r"X: got feature index 40 in row 99, the matrix has 40 features; the file is damaged",
        ),
        (set_entry("indices", 0, -1), r"X: got feature index -1 in row 0"),
        (shorten, r"X: got \d+ values but \d+ indices"),
        (
            lambda group: group.attrs.update(shape=[100, 41]),
            r"X: got a matrix of 100 x 41, obs and var have 100 and 40 rows",
        ),
    ],
)
def test_a_damaged_csr_matrix(make, tmp_path, change, match):
    make.anndata(100, 40).write_h5ad(tmp_path / "a.h5ad")
    damage(tmp_path / "a.h5ad", change)
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, match)


def test_a_damaged_csc_matrix(make, tmp_path):
    adata = make.anndata(100, 40)
    adata.X = scipy.sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    damage(tmp_path / "a.h5ad", set_entry("indices", 10, 100))
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, r"got row 100 in a CSC matrix of 100 rows")


def test_a_truncated_file(make, tmp_path):
    make.anndata(100, 40).write_h5ad(tmp_path / "a.h5ad")
    whole = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").write_bytes(whole[: len(whole) // 2])
    refused(f"rna={tmp_path / 'a.h5ad'}", tmp_path, r"a.h5ad: cannot be opened \(.*truncated file.*copy or download")


def test_damaged_bytes_within_a_file(make, tmp_path):
    make.anndata(3000, 200).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        last = file["X"]["data"].id.get_num_chunks() - 1
        place = file["X"]["data"].id.get_chunk_info(last).byte_offset
    with open(tmp_path / "a.h5ad", "r+b") as file:
        file.seek(place + 100)
        file.write(b"\0" * 200)
    with pytest.raises(RuntimeError, match=r"a.h5ad: X/data: got damaged data: rows \d+:\d+ .*copy or download"):
        ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_repeated_entries_are_added_up(make, tmp_path):
    adata = make.anndata(40, 12)
    rows = adata.X.tocsr()
    doubled = scipy.sparse.csr_matrix(
        (np.repeat(rows.data, 2), np.repeat(rows.indices, 2), rows.indptr * 2), shape=rows.shape
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
            file["X"][name] = getattr(doubled, name)
    schema = ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    adata.X = rows * 2.0
    read = mudata.read_zarr(tmp_path / "o.zarr")
    make.assert_store_has(read, "rna", adata)
    assert schema.modalities["rna"].value_dtype == "uint32"
    assert f"{rows.nnz} entries stood twice" in "".join(read.uns["liam_scale"]["remarks"])


def test_empty_cells_are_kept_and_counted(make, tmp_path):
    adata = make.anndata(200, 30)
    adata.write_h5ad(tmp_path / "a.h5ad")
    schema = ingest(f"rna={tmp_path / 'a.h5ad'}", out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert schema.num_cells == 200
    assert "rna: 2 cells have no counts" in "".join(read.uns["liam_scale"]["remarks"])
    assert sorted(read.obs_names[read["rna"].X.sum(axis=1).A1 == 0]) == ["cell193", "cell96"]


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_repeated_feature_names_and_cell_ids(make, tmp_path):
    adata = make.anndata(30, 10)
    adata.var_names = [f"g{n % 9}" for n in range(10)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    refused(
        f"rna={tmp_path / 'a.h5ad'}", tmp_path, r"feature names of rna: got 'g0' more than once .*var_names_make_unique"
    )
    adata = make.anndata(30, 10)
    adata.obs_names = [f"c{n % 29}" for n in range(30)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    refused(
        f"rna={tmp_path / 'a.h5ad'}", tmp_path, r"cell ids: got 'c0' more than once \(1 repeats .*obs_names_make_unique"
    )


def test_sample_key_that_is_missing_or_has_nulls(make, tmp_path):
    for number, name in enumerate(("a", "b")):
        adata = make.anndata(30, 10, first_cell=30 * number)
        adata.obs["plate"] = [None if number and n == 4 else "p" for n in range(30)]
        adata.obs[f"only_{name}"] = 1
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [f"rna={tmp_path / name}.h5ad" for name in ("a", "b")]
    refused(
        paths,
        tmp_path,
        r"sample_key: .*b.h5ad has no obs column 'only_a'; it has donor, .*only_b",
        sample_key="only_a",
    )
    match = r"sample_key: 'plate' of .*b.h5ad is missing in 1 cells, for example 'cell34'; fill it in"
    refused(paths, tmp_path, match, sample_key="plate")


@pytest.mark.parametrize("name", ["a/b", "zarr.json", "é" * 128])
@pytest.mark.parametrize("table", ["obs", "var"])
def test_columns_that_no_folder_can_be_named_after(make, tmp_path, table, name, monkeypatch):
    """Before a count is looked at."""
    adata = make.anndata(20, 10)
    getattr(adata, table)["column"] = 1
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        group = file[table]
        order = [name if column == "column" else column for column in group.attrs["column-order"]]
        group.attrs["column-order"] = np.array(order, dtype=object)
        group.move("column", name)
    monkeypatch.setattr("loaders.ingest.run._look", lambda *_: pytest.fail("a matrix was read"))
    refused([tmp_path / "a.h5ad"], tmp_path, rf"a\.h5ad: the column '.*' of (rna\.)?{table} cannot be a folder")


def test_modalities_that_are_not_aligned(make, tmp_path):
    make.mudata(60, absent={"atac": lambda n: n % 3 == 0}).write(tmp_path / "a.h5mu")
    with h5py.File(tmp_path / "a.h5mu", "a") as file:
        obsmap = file["obsmap"]["atac"][:]
        first, second = np.flatnonzero(obsmap)[:2]
        file["obsmap"]["atac"][first], file["obsmap"]["atac"][second] = obsmap[second], obsmap[first]
    match = r"obsmap/atac sends cell 'cell1' to row 1, by its name it is row 0 .*not aligned: call update\(\)"
    refused(tmp_path / "a.h5mu", tmp_path, match)
    make.mudata(60).write(tmp_path / "a.h5mu")
    with h5py.File(tmp_path / "a.h5mu", "a") as file:
        file["mod/rna/obs/_index"][7] = "stranger"
    refused(
        tmp_path / "a.h5mu",
        tmp_path,
        r"modality rna has 1 cells that the common obs does not have, for example 'stranger'",
    )


def test_paired_files_without_common_cells(make, tmp_path):
    make.anndata(30, 10).write_h5ad(tmp_path / "a.h5ad")
    make.anndata(30, 10, modality="atac", first_cell=30).write_h5ad(tmp_path / "b.h5ad")
    text = f"rna={tmp_path / 'a.h5ad'},atac={tmp_path / 'b.h5ad'}"
    refused(text, tmp_path, r"no cell is in more than one of the files \(for example 'cell0' and 'cell30'\)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{0}/none.h5ad", r"none.h5ad: got no such file or folder; check the path"),
        ("{0}/text.h5ad", r"text.h5ad: got a file that is not HDF5"),
        ("{0}/folder", r"folder: got a folder that is no Zarr group \(holds nothing\)"),
        ("{0}/other.h5", r"other.h5: got a group that holds something at its top"),
        ("protein7={0}/a.h5ad,rna={0}/a.h5ad", r"got 'protein7=.*expected modality=path with one of rna, atac, adt"),
        ("rna={0}/a.h5ad,rna={0}/a.h5ad", r"rna is named twice; give samples in separate files"),
        ("atac={0}/typed.h5ad", r"atac was asked for, var\['feature_types'\] has Antibody Capture, Gene Expression"),
        ("{0}/old.h5", r"old.h5: a 10x matrix of Cell Ranger 2 or older"),
        ("adt={0}/m.h5mu", r"adt was asked for, the file has rna, atac; name one of them"),
        ("{0}/strange.h5ad", r"var\['feature_types'\] has strange, expected 'Gene Expression'"),
    ],
)
def test_sources_that_are_none(make, tmp_path, text, match):
    make.anndata(10, 5).write_h5ad(tmp_path / "a.h5ad")
    typed = make.anndata(10, 4)
    typed.var["feature_types"] = ["Gene Expression"] * 2 + ["Antibody Capture"] * 2
    typed.write_h5ad(tmp_path / "typed.h5ad")
    typed.var["feature_types"] = "strange"
    typed.write_h5ad(tmp_path / "strange.h5ad")
    make.mudata(10).write(tmp_path / "m.h5mu")
    (tmp_path / "text.h5ad").write_text("no file of ours")
    (tmp_path / "folder").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = 1
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["GRCh38/barcodes"] = [b"A"]
    refused(text.format(tmp_path), tmp_path, match)


def test_options_that_cannot_be(make, tmp_path):
    make.anndata(10, 5).write_h5ad(tmp_path / "a.h5ad")
    path = f"rna={tmp_path / 'a.h5ad'}"
    refused(path, tmp_path, r"join: got 'left'; choose inner or outer", join="left")
    refused(path, tmp_path, r"memory: got 'much'", memory="much")
    refused([], tmp_path, r"sources: got none")
    empty = anndata.AnnData(scipy.sparse.csr_matrix((0, 5), dtype=np.float32), var=pd.DataFrame(index=list("abcde")))
    empty.write_h5ad(tmp_path / "empty.h5ad")
    refused(f"rna={tmp_path / 'empty.h5ad'}", tmp_path, r"sources: got no cells in")


def test_an_out_that_exists_is_kept_unless_told_otherwise(make, tmp_path):
    make.anndata(10, 5).write_h5ad(tmp_path / "a.h5ad")
    path = f"rna={tmp_path / 'a.h5ad'}"
    ingest(path, out=tmp_path / "o.zarr", progress=False)
    refused(path, tmp_path, r"out: .*o.zarr exists; name another path, or give overwrite=True")
    make.anndata(25, 5).write_h5ad(tmp_path / "a.h5ad")
    ingest(path, out=tmp_path / "o.zarr", overwrite=True, progress=False)
    assert mudata.read_zarr(tmp_path / "o.zarr").n_obs == 25
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("ten years")
    with pytest.raises(ValueError, match=r"data is not a Zarr store and is left alone"):
        ingest(path, out=tmp_path / "data", overwrite=True, progress=False)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "ten years"
