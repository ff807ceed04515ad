"""Several sources: features, samples, cell ids, obs."""

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest

from loaders.formats.source import Source
from loaders.ingest import ingest
from loaders.ingest.cells import source_names


def two_files(make, tmp_path, *, shared=True):
    """Files of 70 and 50 cells with 30 and 40 genes, of which 20 have common names, in another order."""
    first, second = make.anndata(70, 30), make.anndata(50, 40, first_cell=70)
    second.var_names = [f"rna{f + 10}" if shared else f"other{f}" for f in range(40)]
    second = second[:, ::-1].copy()
    first.write_h5ad(tmp_path / "one.h5ad")
    second.write_h5ad(tmp_path / "two.h5ad")
    return first, second, [f"rna={tmp_path / 'one.h5ad'}", f"rna={tmp_path / 'two.h5ad'}"]


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_features_join_by_name(make, tmp_path, join):
    first, second, paths = two_files(make, tmp_path)
    schema = ingest(paths, out=tmp_path / "o.zarr", join=join, progress=False)
    expected = anndata.concat([first, second], join=join, fill_value=0)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    if join == "inner":
        assert read["rna"].var_names.tolist() == [f"rna{f}" for f in range(10, 30)]
    else:
        assert read["rna"].var_names.tolist() == [f"rna{f}" for f in [*range(30), *range(49, 29, -1)]]
    assert schema.num_cells == 120
    make.assert_store_has(read, "rna", expected[:, read["rna"].var_names])
    assert read.obs["sample"].tolist() == ["one" if n < 70 else "two" for n in read.obs["number"]]


def test_nothing_in_common_is_refused_with_examples(make, tmp_path):
    *_, paths = two_files(make, tmp_path, shared=False)
    with pytest.raises(
        ValueError, match=r"rna: no feature of .*two.h5ad \(for example 'other39'\) .*'rna0'.*join='outer'"
    ):
        ingest(paths, out=tmp_path / "o.zarr", progress=False)
    assert not (tmp_path / "o.zarr").exists()
    schema = ingest(paths, out=tmp_path / "o.zarr", join="outer", progress=False)
    assert schema.modalities["rna"].num_features == 70


def test_sources_with_different_modalities_make_a_mosaic(make, tmp_path):
    paired, rna = make.mudata(60), make.anndata(40, 60, first_cell=60)
    paired.write(tmp_path / "paired.h5mu")
    rna.write_h5ad(tmp_path / "single.h5ad")
    ingest([tmp_path / "paired.h5mu", f"rna={tmp_path / 'single.h5ad'}"], out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    make.assert_store_has(read, "rna", anndata.concat([paired["rna"], rna]))
    make.assert_store_has(read, "atac", paired["atac"])
    assert read.obs["sample"].tolist() == ["paired" if n < 60 else "single" for n in read.obs["number"]]
    assert read["atac"].n_obs == 60


def test_cell_ids_are_prefixed_only_where_they_collide(make, tmp_path):
    first, second = make.anndata(30, 10), make.anndata(30, 10, first_cell=15)
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_h5ad(tmp_path / "b.h5ad")
    paths = [f"rna={tmp_path / 'a.h5ad'}", f"rna={tmp_path / 'b.h5ad'}"]
    ingest(paths, out=tmp_path / "o.zarr", progress=False)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    assert set(read.obs_names) == {f"a_cell{n}" for n in range(30)} | {f"b_cell{n}" for n in range(15, 45)}
    counts = read["rna"].to_df()
    for name, source in (("a", first), ("b", second)):
        for cell in source.obs_names:
            np.testing.assert_array_equal(counts.loc[f"{name}_{cell}"], source[cell].X.toarray()[0])
    assert "15 cell ids stand in more than one source" in "".join(read.uns["liam_scale"]["remarks"])


def test_obs_columns_of_different_kinds_are_joined(make, tmp_path):
    first, second = make.anndata(10, 5), make.anndata(10, 5, first_cell=10)
    first.obs["only"] = np.arange(10)
    first.obs["mixed"] = np.arange(10)
    second.obs["mixed"] = [f"m{n}" for n in range(10)]
    second.obs["type"] = pd.Categorical(["new"] * 10)
    second.obs["flag"] = True
    for name, adata in (("a", first), ("b", second)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    ingest([f"rna={tmp_path / 'a.h5ad'}", f"rna={tmp_path / 'b.h5ad'}"], out=tmp_path / "o.zarr", progress=False)
    obs = mudata.read_zarr(tmp_path / "o.zarr").obs.sort_values("number")
    assert obs["only"].tolist()[:10] == list(range(10))
    assert obs["only"].isna().tolist() == [False] * 10 + [True] * 10
    assert obs["mixed"].tolist() == [str(n) for n in range(10)] + [f"m{n}" for n in range(10)]
    assert obs["type"].tolist()[10:] == ["new"] * 10
    assert obs["type"].tolist()[1:4] == ["t1", "t2", "t3"]
    assert obs["flag"].isna().sum() == 10
    assert obs["is_odd"].dtype == bool
    assert obs["number"].dtype == np.int64


def test_a_sample_column_of_the_sources_is_used_or_kept_aside(make, tmp_path):
    source = make.anndata(30, 10)
    source.obs["sample"] = [f"s{n % 2}" for n in range(30)]
    source.write_h5ad(tmp_path / "a.h5ad")
    path = f"rna={tmp_path / 'a.h5ad'}"
    schema = ingest(path, out=tmp_path / "o.zarr", progress=False)
    assert schema.obs_columns.count("sample") == 1
    obs = mudata.read_zarr(tmp_path / "o.zarr").obs
    assert obs["sample"].tolist() == [f"s{n % 2}" for n in obs["number"]]
    ingest(path, out=tmp_path / "p.zarr", sample_key="donor", progress=False)
    obs = mudata.read_zarr(tmp_path / "p.zarr").obs
    assert obs["sample"].tolist() == [f"d{n % 3}" for n in obs["number"]]
    assert obs["source_sample"].tolist() == [f"s{n % 2}" for n in obs["number"]]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a.h5ad", "x/b.h5mu"], ["a", "b"]),
        (["p1/outs/filtered.h5", "p2/outs/filtered.h5"], ["p1", "p2"]),
        (["p1/a.h5ad", "p2/a.h5ad", "p1/b.h5ad"], ["p1_a", "p2_a", "p1_b"]),
        (["only/atlas.zarr"], ["atlas"]),
        (["p1/outs/filtered_feature_bc_matrix.h5"], ["p1"]),
        ([f"{p}/outs/filtered_feature_bc_matrix.h5" for p in ("p1", "p2")], ["p1", "p2"]),
        (["run/outs/per_sample_outs/p1/count/sample_filtered_feature_bc_matrix.h5"], ["p1"]),
        (["GSM1_p1_raw_feature_bc_matrix.h5", "GSM2_p2_filtered_feature_bc_matrix.h5"], ["GSM1_p1", "GSM2_p2"]),
    ],
)
def test_sources_get_short_distinct_names(tmp_path, paths, names):
    sources = [Source(path, (tmp_path / path,), np.array([]), {}, None) for path in paths]
    assert source_names(sources) == names


def test_the_same_file_twice_is_refused(make, tmp_path):
    make.anndata(10, 5).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"is given twice; give every file once"):
        ingest([f"rna={tmp_path / 'a.h5ad'}"] * 2, out=tmp_path / "o.zarr", progress=False)


def test_a_name_before_a_source_is_the_sample_of_its_cells(make, tmp_path):
    for number, name in enumerate("abc"):
        adata = make.anndata(20, 10, first_cell=20 * number)
        if name == "b":
            adata.obs["sample"] = [f"own{n % 2}" for n in range(20)]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    make.anndata(20, 15, modality="atac", first_cell=40).write_h5ad(tmp_path / "peaks.h5ad")
    a, b, c, peaks = (f"{tmp_path}/{name}.h5ad" for name in ("a", "b", "c", "peaks"))
    texts = [f"donor 1={a}", b, f"d2=rna={c},atac={peaks}"]
    schema = ingest(texts, out=tmp_path / "o.zarr", progress=False)
    assert list(schema.modalities) == ["rna", "atac"]
    obs = mudata.read_zarr(tmp_path / "o.zarr").obs.sort_values("number")
    assert obs["sample"].tolist() == ["donor 1"] * 20 + ["own0", "own1"] * 10 + ["d2"] * 20
    texts[1] = f"donor 1={b}"
    ingest(texts, out=tmp_path / "p.zarr", progress=False)
    obs = mudata.read_zarr(tmp_path / "p.zarr").obs.sort_values("number")
    assert obs["sample"].tolist() == ["donor 1"] * 40 + ["d2"] * 20
    assert list(obs["sample"].cat.categories) == ["donor 1", "d2"]
    assert obs["source_sample"].tolist()[20:40] == ["own0", "own1"] * 10


def test_where_some_sources_have_a_sample_column_each_named_cure_works(make, tmp_path):
    for number, name in enumerate("ab"):
        adata = make.anndata(20, 10, first_cell=20 * number)
        if name == "b":
            adata.obs["sample"] = "own"
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    a, b = (str(tmp_path / f"{name}.h5ad") for name in "ab")
    with pytest.raises(ValueError, match=r"a\.h5ad has no obs column 'sample'; .*") as refused:
        ingest([a, b], out=tmp_path / "o.zarr", progress=False)
    assert f"by writing NAME={a}, or take the files' names with sample_from_file=True" in str(refused.value)
    assert ingest([f"NAME={a}", b], out=tmp_path / "o.zarr", progress=False).num_cells == 40
    ingest([a, b], out=tmp_path / "p.zarr", sample_from_file=True, progress=False)
    assert set(mudata.read_zarr(tmp_path / "p.zarr").obs["sample"]) == {"a", "b"}
    ingest([a, b], out=tmp_path / "q.zarr", sample_key="donor", progress=False)
    with pytest.raises(ValueError, match=r"sample_from_file: got sample_key='donor' too"):
        ingest([a, b], out=tmp_path / "r.zarr", sample_key="donor", sample_from_file=True, progress=False)


def test_features_that_a_source_lacks_are_named(make, tmp_path, capsys):
    whole = make.anndata(20, 12, modality="adt")
    whole.write_h5ad(tmp_path / "a.h5ad")
    panel = make.anndata(20, 12, modality="adt", first_cell=20)[:, :9].copy()
    panel.write_h5ad(tmp_path / "b.h5ad")
    texts = [f"adt={tmp_path / name}.h5ad" for name in "ab"]
    ingest(texts, out=tmp_path / "o.zarr", join="outer")
    note = f"note: adt: {tmp_path}/b.h5ad lacks 3 of 12 features (adt9, adt10, adt11), which count as zero in its cells"
    assert note in capsys.readouterr().err
    ingest(texts, out=tmp_path / "p.zarr")
    assert "lacks" not in capsys.readouterr().err
