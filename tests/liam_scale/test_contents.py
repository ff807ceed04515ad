"""A store that has changed since its run began is refused with what differs; categories are matched by name."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from anndata.io import write_elem

from liam_scale.contents import contents_of, differences
from liam_scale.run import RunDirectory
from liam_scale.train import main
from loaders.ecosystem import quiet_anndata
from loaders.stores import open_store

SHORT = ("--model.n-hidden", "16", "--n-latent", "4", "--minibatch", "64", "--memory", "64MiB")


def held() -> anndata.AnnData:
    draw = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix(draw.poisson(0.4, (100, 12)).astype(np.float32))
    samples = pd.Categorical([*["x"] * 40, *["y"] * 30, *["z"] * 30])
    names = [f"c{i}" for i in range(100)]
    data = anndata.AnnData(counts, obs=pd.DataFrame({"sample": samples}, index=names))
    data.var_names = [f"g{i}" for i in range(12)]
    return data


def relabel(data: anndata.AnnData, *names: str) -> anndata.AnnData:
    data.obs["sample"] = pd.Categorical(list(names))
    return data


def rename(data: anndata.AnnData, **names: str) -> anndata.AnnData:
    data.obs["sample"] = data.obs["sample"].cat.rename_categories(names)
    return data


def name_features(data: anndata.AnnData, place: int, name: str) -> anndata.AnnData:
    names = list(data.var_names)
    names[place] = name
    data.var_names = names
    return data


def count_sevenfold(data: anndata.AnnData) -> anndata.AnnData:
    data.X = data.X * 7
    return data


def merge(data: anndata.AnnData) -> anndata.AnnData:
    return relabel(data, *["x"] * 70, *["z"] * 30)


def swap(data: anndata.AnnData) -> anndata.AnnData:
    return relabel(data, *["y"] * 6, *["x"] * 40, *["y"] * 24, *["z"] * 30)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda data: data[:90].copy(), ["cells: it has 90, the run 100"]),
        (lambda data: anndata.concat([data, data[:2]], index_unique="-"), ["cells: it has 102, the run 100"]),
        (lambda data: data[::-1].copy(), ["cells: the same ones stand in another order"]),
        (lambda data: data[:, ::-1].copy(), ["features of rna: the same ones stand in another order"]),
        (lambda data: name_features(data, 3, "CD4"), ["features of rna: 'CD4' stands where 'g3' stood"]),
        (lambda data: data[:, :11].copy(), ["features of rna: it has 11, the run 12"]),
        (count_sevenfold, ["counts of rna differ"]),
        (merge, ["sample: 'y' (30 cells) went into 'x', which had 40 cells and has 70"]),
        (swap, ["sample: cells belong to others than they did; the number of cells of each is the same"]),
        (lambda data: rename(data, x="w"), ["sample: 'x' (40 cells) went into 'w', which had 0 cells and has 40"]),
        (
            lambda data: relabel(data, *["x"] * 28, *["y"] * 42, *["z"] * 30),
            ["sample: 12 cells or more were relabelled ('x' has 28 cells and had 40, 'y' has 42 cells and had 30)"],
        ),
    ],
)
def test_the_part_that_differs_is_named(edit: Callable[[anndata.AnnData], anndata.AnnData], said: list[str]) -> None:
    before, now = open_store(held()), open_store(edit(held()))
    names = {"rna": before.feature_names("rna").tolist()}
    remembered = contents_of(before, ["sample"])
    assert differences(remembered, before, names) == []
    assert differences(remembered, now, names)[: len(said)] == said


def test_categories_in_another_order_and_those_without_cells_are_no_difference() -> None:
    before, other = open_store(held()), held()
    other.obs["sample"] = other.obs["sample"].cat.set_categories(["w", "z", "y", "x"])
    assert differences(contents_of(before, ["sample"]), open_store(other), {}) == []


def rewrite_samples(store: Path, change: Callable[[pd.Categorical], pd.Categorical]) -> None:
    """As a user does with anndata, who knows of no checksum."""
    obs = zarr.open_group(store, mode="r+")["obs"]
    with quiet_anndata():
        write_elem(obs, "sample", change(open_store(store).obs_frame()["sample"].array))


def train(store: Path, out: Path, steps: int) -> int:
    options = ["--batch-key", "sample", "--max-steps", str(steps), *SHORT]
    return main([str(store), "--out", str(out), *options])


def test_a_run_goes_on_to_the_same_bits_when_the_categories_stand_in_another_order(
    multiome: Path, tmp_path: Path
) -> None:
    store, straight, resumed = tmp_path / "s.zarr", tmp_path / "straight", tmp_path / "resumed"
    shutil.copytree(multiome, store)
    assert train(store, straight, 12) == 0
    assert train(store, resumed, 6) == 0
    before = open_store(store).obs_column("sample")
    rewrite_samples(store, lambda labels: labels.reorder_categories(labels.categories[::-1]))
    after = open_store(store).obs_column("sample")
    assert after.categories == before.categories[::-1]
    assert train(store, resumed, 12) == 0
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_relabelled_cells_are_refused_on_resume_and_a_run_without_remembered_contents_goes_on(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "s.zarr", tmp_path / "run"
    shutil.copytree(multiome, store)
    assert train(store, out, 2) == 0

    def move(labels: pd.Categorical) -> pd.Categorical:
        codes = labels.codes.copy()
        codes[np.flatnonzero(codes == 0)[:12]] = 1
        return pd.Categorical.from_codes(codes, labels.categories)

    rewrite_samples(store, move)
    capsys.readouterr()
    assert train(store, out, 4) == 2
    said = capsys.readouterr().err
    assert "is not what" in said
    assert "sample: 12 cells or more were relabelled" in said
    record = RunDirectory(out).record()
    assert record.contents is not None
    RunDirectory(out).write_record(replace(record, contents=None))
    shutil.rmtree(store)
    shutil.copytree(multiome, store)
    assert train(store, out, 4) == 0
