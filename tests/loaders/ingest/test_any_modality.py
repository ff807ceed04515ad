"""Modalities of any name, from sources to stores that grow: what one is is said once, and the store keeps it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import mudata
import numpy as np
import pytest
import zarr

from loaders import Loader, LoaderConfig
from loaders.formats.compressed import CompressedRows
from loaders.ingest import append, ingest, merge
from loaders.modalities import Kind
from loaders.schema import SCHEMA_KEY
from loaders.stores import ChainedStore, open_known, open_store, read_store

SAID = ["h3k27ac=NM", "dogma.adt=NB:clr"]
KINDS = {"rna": Kind("NB", "log1p"), "dogma.adt": Kind("NB", "clr"), "h3k27ac": Kind("NM", "none")}
QUIET = {"progress": False}


def write_cells(make, path, first_cell=0, cells=30, **renamed):
    """An h5mu of RNA, a histone mark that a third of the cells lack, and proteins."""
    names = {"rna": "rna", "atac": "h3k27ac", "adt": "dogma.adt", **renamed}
    sizes = {"rna": 30, "atac": 50, "adt": 8}
    data = make.mudata(cells, first_cell=first_cell, absent={"atac": lambda n: n % 3 == 0}, num_features=sizes)
    made = mudata.MuData({names[key]: part for key, part in data.mod.items()})
    made.obs = data.obs.loc[made.obs_names]
    made.write_h5mu(path)
    return path


@pytest.fixture
def write(make, tmp_path):
    return lambda name, first_cell=0, **options: write_cells(make, tmp_path / name, first_cell, **options)


@pytest.fixture(scope="module")
def made(make, tmp_path_factory):
    """a.h5mu, b.h5mu with other cells, and a.zarr, the store of a.h5mu; tests only read them."""
    folder = tmp_path_factory.mktemp("made")
    for name, first_cell in (("a", 0), ("b", 30)):
        write_cells(make, folder / f"{name}.h5mu", first_cell)
    ingest(folder / "a.h5mu", out=folder / "a.zarr", modality=SAID, **QUIET)
    return folder


@pytest.fixture
def own(made, tmp_path):
    """A copy of a.zarr."""
    return Path(shutil.copytree(made / "a.zarr", tmp_path / "a.zarr"))


def entry_of(path: Path) -> dict:
    return dict(zarr.open_group(path, mode="r").attrs[SCHEMA_KEY])


def test_an_ingest_takes_what_is_said_and_the_store_keeps_it(make, made):
    store = open_store(made / "a.zarr")
    assert list(store.schema.kinds.items()) == list(KINDS.items())
    assert entry_of(made / "a.zarr")["format"] == 3
    data, held = mudata.read_h5mu(made / "a.h5mu"), read_store(made / "a.zarr")
    for name in KINDS:
        make.assert_store_has(held, name, data[name])
    assert (store.modality_rows("h3k27ac") < 0).sum() == 10
    assert store.embedding_names() == []
    assert "h3k27ac: 20 cells × 50 features" in repr(store)
    assert ", NM" in repr(store)


def test_a_store_of_known_names_is_written_as_before(write, tmp_path):
    source = write("a.h5mu", atac="atac", adt="prot")
    ingest(source, out=tmp_path / "a.zarr", **QUIET)
    ingest(source, out=tmp_path / "b.zarr", modality={"atac": "NM", "adt": "NB"}, **QUIET)
    entry = entry_of(tmp_path / "a.zarr")
    assert entry["format"] == 1
    assert not {"likelihood", "transform"} & {key for held in entry["modalities"].values() for key in held}
    assert entry_of(tmp_path / "b.zarr") == entry


def test_minibatches_are_those_of_the_preset_that_says_the_same(write, tmp_path):
    ingest(write("a.h5mu", atac="atac", adt="adt"), out=tmp_path / "a.zarr", **QUIET)
    ingest(write("b.h5mu", rna="a.genes"), out=tmp_path / "b.zarr", modality=["a.genes=NB", *SAID], **QUIET)
    names = {"rna": "a.genes", "atac": "h3k27ac", "adt": "dogma.adt"}
    loaders = [Loader(open_store(tmp_path / name), LoaderConfig(minibatch=16)) for name in ("a.zarr", "b.zarr")]
    for one, other in zip(*loaders, strict=True):
        for known, own in names.items():
            for part in ("indptr", "indices", "values"):
                assert (getattr(one.counts[known], part) == getattr(other.counts[own], part)).all()
            assert (one.present[known] == other.present[own]).all()


def test_files_and_features_name_a_modality_too(make, tmp_path):
    rna, marks = make.anndata(20, 12), make.anndata(20, 9, modality="atac", prefix="chr1:10-2")
    rna.write_h5ad(tmp_path / "rna.h5ad")
    marks.write_h5ad(tmp_path / "marks.h5ad")
    pair = f"rna={tmp_path / 'rna.h5ad'},H3K27ac={tmp_path / 'marks.h5ad'}"
    assert list(ingest(pair, out=tmp_path / "a.zarr", modality="h3k27ac=NM", **QUIET).modalities) == ["rna", "h3k27ac"]
    parts = [("Gene Expression", rna.var_names, rna.var_names, rna.X)]
    parts += [("Multiplexing Capture", marks.var_names, marks.var_names, marks.X)]
    make.tenx(tmp_path / "tenx.h5", parts, rna.obs_names)
    said = {"multiplexing_capture": "NB:clr"}
    schema = ingest(tmp_path / "tenx.h5", out=tmp_path / "b.zarr", modality=said, **QUIET)
    assert schema.modalities["multiplexing_capture"].num_features == 9
    marks.var["feature_types"] = "h3k27ac"
    marks.write_h5ad(tmp_path / "typed.h5ad")
    assert list(open_store(tmp_path / "typed.h5ad", modality={"h3k27ac": "NM"}).schema.kinds) == ["h3k27ac"]


def test_a_store_is_a_source_that_needs_no_explanation(made, tmp_path):
    sources = [made / "a.zarr", f"b={made / 'b.h5mu'}"]
    ingest(sources, out=tmp_path / "both.zarr", modality=SAID, **QUIET)
    assert open_store(tmp_path / "both.zarr").schema.kinds == KINDS
    schema = ingest(made / "a.zarr", out=tmp_path / "part.zarr", where="number < 20", **QUIET)
    assert schema.kinds == KINDS


def test_appended_and_merged_stores_keep_their_modalities(made, own, tmp_path):
    schema = append(own, made / "b.h5mu", **QUIET)
    assert (schema.num_cells, schema.parts, schema.kinds) == (60, (30, 30), KINDS)
    assert schema.modalities["h3k27ac"].num_cells == 40
    assert isinstance(open_store(own).matrix("dogma.adt"), CompressedRows)
    schema = merge([own, made / "a.zarr"], out=tmp_path / "d.zarr", **QUIET)
    assert (schema.num_cells, schema.kinds) == (90, KINDS)
    other = shutil.copytree(made / "a.zarr", tmp_path / "other.zarr")
    assert append(other, made / "b.h5mu", reshuffle=True, **QUIET).kinds == KINDS


def test_an_append_may_bring_a_modality_that_the_store_lacks(own, write):
    further = write("b.h5mu", first_cell=30, adt="hto")
    with pytest.raises(ValueError, match="modality: got lipids, which none of the sources has"):
        append(own, further, modality="lipids=NB", **QUIET)
    with pytest.raises(ValueError, match=r"h3k27ac is NB:log1p in what was asked for and NM:none in .*a.zarr"):
        append(own, further, modality="h3k27ac=NB", **QUIET)
    schema = append(own, further, modality="hto=NB:clr", **QUIET)
    assert list(schema.modalities) == ["rna", "dogma.adt", "h3k27ac", "hto"]
    assert schema.modalities["hto"].num_cells == 30


def test_what_nobody_explains_is_left_out_with_how_to_take_it(made, tmp_path, caplog, capsys):
    ingest(made / "a.h5mu", out=tmp_path / "a.zarr", modality="h3k27ac=NM")
    said = capsys.readouterr().err.replace("\n", " ")
    assert "modality 'dogma.adt' is left out; known are rna, atac, adt, h3k27ac; to take it, say by the option" in said
    assert "dogma.adt=NM (negative multinomial, as peaks) or dogma.adt=NB (negative binomial, as RNA)" in said
    with caplog.at_level(logging.INFO):
        assert list(open_store(made / "a.h5mu").schema.modalities) == ["rna"]
    assert "h3k27ac=NM" in caplog.text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("h3k27ac=Poisson", "modality: got 'h3k27ac=Poisson'; write NAME=NM"),
        ("h3k27me3=NM", r"modality: got h3k27me3, which none of the sources has \(there is rna\); correct the name"),
        ("a/b=NM", "modality: got the name 'a/b'"),
        ("atac=NB", "atac is always NM:none"),
    ],
)
def test_an_ingest_refuses_what_cannot_be_before_anything_is_written(made, tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        ingest(made / "a.h5mu", out=tmp_path / "o.zarr", modality=said, **QUIET)
    assert not list(tmp_path.iterdir())


def test_stores_that_say_something_else_do_not_become_one(made, own, tmp_path):
    ingest(made / "b.h5mu", out=tmp_path / "b.zarr", modality=["h3k27ac=NB", SAID[1]], **QUIET)
    match = r"modality: h3k27ac is NM:none in .*a.zarr and NB:log1p in .*b.zarr; give one of them"
    for together in (
        lambda: merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], out=tmp_path / "o.zarr", **QUIET),
        lambda: ingest([tmp_path / "a.zarr", tmp_path / "b.zarr"], out=tmp_path / "o.zarr", **QUIET),
        lambda: open_store([tmp_path / "a.zarr", tmp_path / "b.zarr"]),
    ):
        with pytest.raises(ValueError, match=match):
            together()
    with pytest.raises(ValueError, match=r"h3k27ac is NB:log1p in what was asked for and NM:none in .*a.zarr"):
        open_store(tmp_path / "a.zarr", modality={"h3k27ac": "NB"})
    with pytest.raises(ValueError, match=r"h3k27ac is NB:log1p in what was asked for and NM:none in .*a.zarr"):
        ingest(tmp_path / "a.zarr", out=tmp_path / "o.zarr", modality="h3k27ac=NB", **QUIET)
    assert not (tmp_path / "o.zarr").exists()


def test_files_stream_with_the_same_words(made):
    one, other = made / "a.h5mu", made / "b.h5mu"
    said = {"h3k27ac": "NM", "dogma.adt": "NB:clr"}
    store = open_store([one, other], modality=said)
    assert isinstance(store, ChainedStore)
    assert store.schema.kinds == open_store(mudata.read_h5mu(one), modality=SAID).schema.kinds == KINDS
    assert list(open_store(one, modality="h3k27ac=NM").schema.modalities) == ["h3k27ac"]
    chain = open_store([made / "a.zarr", other], modality=said)
    assert chain.schema.modalities["h3k27ac"].num_cells == 40
    assert np.array_equal(chain.feature_names("dogma.adt"), open_store(made / "a.zarr").feature_names("dogma.adt"))
    with pytest.raises(ValueError, match=r"modality: got lipids, which .*a.h5mu"):
        open_store(one, modality=["lipids=NB"])
    assert list(open_known(one, {"lipids": Kind("NB", "log1p")}).schema.modalities) == ["rna"]


def test_a_soma_experiment_names_a_modality_too(write_soma, make, tmp_path):
    write_soma(tmp_path / "soma", make.anndata(20, 9))
    store = open_store(tmp_path / "soma", modality=["hto=NB"], measurements={"hto": "RNA"})
    assert store.schema.kinds == {"hto": Kind("NB", "log1p")}
