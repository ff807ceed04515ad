"""Small source files of every format, whose counts name their cell and feature."""

import warnings
from types import SimpleNamespace

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from identifying import identifying_counts

from loaders.ingest import ingest


def pytest_collection_modifyitems(items):
    for item in items:
        if "loaders/ingest" in str(item.path):
            # What mudata and SciPy remark on every reading; nothing of ours.
            item.add_marker(pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:indices array has non-integer dtype:UserWarning"))


def make_anndata(num_cells, num_features, *, modality="rna", first_cell=0, prefix=None, maximum=60_000):
    """Counts of cells `first_cell`... as an AnnData; obs has a column of each kind."""
    counts = identifying_counts(num_cells, num_features, modality=modality, first_cell=first_cell, maximum=maximum)
    numbers = np.arange(first_cell, first_cell + num_cells)
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical([f"d{n % 3}" for n in numbers]),
            "number": numbers,
            "share": numbers / 7.0,
            "is_odd": numbers % 2 == 1,
            "note": [f"cell number {n}" for n in numbers],
            "type": pd.Categorical([None if n % 5 == 0 else f"t{n % 4}" for n in numbers]),
        },
        index=[f"cell{n}" for n in numbers],
    )
    var = pd.DataFrame(
        {"rank": np.arange(num_features)}, index=[f"{prefix or modality}{f}" for f in range(num_features)]
    )
    return anndata.AnnData(counts.astype(np.float32), obs=obs, var=var)


def make_mudata(num_cells=200, *, first_cell=0, absent=None, num_features=None):
    """A MuData of make_anndata's counts; `absent` names per modality a function number -> lacks it."""
    num_features = num_features or {"rna": 60, "atac": 150}
    mods = {}
    for name, features in num_features.items():
        adata = make_anndata(num_cells, features, modality=name, first_cell=first_cell)
        adata.obs = adata.obs[[]]
        if absent and name in absent:
            adata = adata[[not absent[name](n) for n in range(first_cell, first_cell + num_cells)]].copy()
        mods[name] = adata
    obs = make_anndata(num_cells, 1, first_cell=first_cell).obs
    together = mudata.MuData(mods)
    together.obs = obs.loc[together.obs_names]
    return together


def write_tenx(path, parts, barcodes):
    """The file Cell Ranger writes. parts: (feature type, names, ids, counts cells x features)."""
    matrix = scipy.sparse.hstack([counts for *_, counts in parts]).tocsr()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(barcodes, dtype="S")
        group["data"], group["indices"], group["indptr"] = matrix.data.astype(np.int32), matrix.indices, matrix.indptr
        group["shape"] = np.array(matrix.shape[::-1])
        features = group.create_group("features")
        for key, place in (("name", 1), ("id", 2)):
            features[key] = np.array([text for part in parts for text in part[place]], dtype="S")
        features["feature_type"] = np.array([part[0] for part in parts for _ in part[1]], dtype="S")
        features["genome"] = np.array(["GRCh38" for part in parts for _ in part[1]], dtype="S")
        features["_all_tag_keys"] = np.array([b"genome"])


def assert_store_has(read, modality, adata):
    """Every value of `adata` stands in the store at its cell and feature, and nothing else does."""
    inside = read[modality]
    assert inside.var_names.tolist() == adata.var_names.tolist()
    assert set(inside.obs_names) == set(adata.obs_names)
    expected = adata[inside.obs_names.tolist()].X
    expected = expected.toarray() if scipy.sparse.issparse(expected) else np.asarray(expected)
    np.testing.assert_array_equal(inside.X.toarray(), expected)
    np.testing.assert_array_equal(inside.obs["total_counts"], expected.sum(axis=1))


@pytest.fixture(scope="session")
def make():
    """The makers and the comparison above."""
    return SimpleNamespace(anndata=make_anndata, mudata=make_mudata, tenx=write_tenx, assert_store_has=assert_store_has)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A mosaic of two files, of which the first has no ATAC, and the second lacks it in some cells; 12,000 cells."""
    folder = tmp_path_factory.mktemp("sources")
    whole = make_mudata(300, num_features={"rna": 900, "atac": 2000}, absent={"atac": lambda n: n % 7 == 0})
    for name, cells, modalities in (("a", 7000, ["rna"]), ("b", 5000, ["rna", "atac"])):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Observation names are not unique")
            mods = {key: whole[key][np.arange(cells) % whole[key].n_obs].copy() for key in modalities}
            mods = {key: data[: cells if key == "rna" else cells // 2].copy() for key, data in mods.items()}
            for data in mods.values():
                data.obs_names = [f"{name}{n}" for n in range(data.n_obs)]
        both = mudata.MuData(mods)
        both.obs["donor"] = [f"d{n % 3}" for n in range(cells)]
        both.write(folder / f"{name}.h5mu")
    return [str(folder / "a.h5mu"), str(folder / "b.h5mu")]


def _bytes_of(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def bytes_of():
    """Every file of a store."""
    return _bytes_of


@pytest.fixture(scope="session")
def expected(sources, tmp_path_factory):
    """The store of `sources` that threads make without being disturbed, with more memory than any other."""
    out = tmp_path_factory.mktemp("expected") / "o.zarr"
    ingest(sources, out=out, memory="1GiB", sample_key="donor", progress=False)
    return _bytes_of(out)
