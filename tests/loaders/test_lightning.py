"""MULTIVI and TOTALVI of scvi-tools train on minibatches of a store, and see what they would see in memory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import LoaderConfig, open_store
from loaders.synthetic import simulate

pytest.importorskip("lightning", reason="Lightning is an extra: pip install liam-scale[lightning]")
scvi = pytest.importorskip("scvi", reason="scvi-tools is an extra: pip install liam-scale[lightning]")
pytestmark = pytest.mark.filterwarnings("default")

from loaders.lightning import StoreDataModule  # noqa: E402

TINY = {"num_genes": 60, "num_peaks": 150, "genes_per_cell": 20, "peaks_per_cell": 40, "num_samples": 3, "num_types": 4}
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
LAYERS = {
    "multivi": {"rna_layer": "rna", "atac_layer": "atac"},
    "totalvi": {"rna_layer": "rna", "protein_layer": "adt"},
}


def model_of(kind: str, data: StoreDataModule) -> Any:
    scvi.settings.seed = 0
    cls = {"multivi": scvi.model.MULTIVI, "totalvi": scvi.model.TOTALVI}[kind]
    cls.setup_mudata(data.example, batch_key=data.batch_key, modalities=LAYERS[kind])
    return cls(data.example, n_latent=5)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {kind: tmp_path_factory.mktemp("stores") / f"{kind}.zarr" for kind in LAYERS}
    simulate(paths["multivi"], num_cells=600, mosaic=[("rna", "atac"), ("rna",), ("atac",)], **TINY)
    simulate(
        paths["totalvi"], num_cells=600, num_proteins=12, mosaic=[("rna", "adt"), ("rna",), ("rna", "adt")], **TINY
    )
    return paths


@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_trains_on_the_store_and_embeds_its_cells_in_their_order(kind: str, stores: dict[str, Path]) -> None:
    config = LoaderConfig(minibatch=64, memory="64MiB")
    data = StoreDataModule(stores[kind], batch_key="sample", config=config, example_cells=40)
    model = model_of(kind, data)
    data.train(model, max_epochs=8, **QUIET)
    elbo = model.history["elbo_validation"].to_numpy().ravel()
    assert elbo[-1] < elbo[0], "it learns"
    assert model.adata.n_obs < 200, "of an example, not of the store"
    latent = data.latent(model)
    assert latent.shape == (600, 5)
    assert np.isfinite(latent).all()
    # What the model says of the example's cells from memory, it says of the same cells from the store.
    rows = [int(name.removeprefix("cell")) for name in data.example.obs_names]
    np.testing.assert_allclose(latent[rows], model.get_latent_representation(), rtol=1e-4, atol=1e-5)
    assert model._data_splitter_cls is type(model)._data_splitter_cls, "the model is as it was"


@pytest.mark.parametrize("kind", LAYERS)
def test_minibatches_hold_the_counts_of_the_store_every_cell_once(kind: str, stores: dict[str, Path]) -> None:
    data = StoreDataModule(stores[kind], batch_key="sample", config=LoaderConfig(minibatch=100, memory="64MiB"))
    store, seen = open_store(stores[kind]), []
    for part in (data.train_dataloader(), data.val_dataloader()):
        assert sum(1 for _ in part) == len(part)
        for tensors in part:
            rows = tensors["ind_x"].ravel()
            seen.append(rows.numpy().copy())
            np.testing.assert_array_equal(tensors["batch"].ravel(), data.samples.codes[rows.numpy()])
            held = store.modality_rows("rna")
            has = np.ones(len(rows), bool) if held is None else held[rows.numpy()] >= 0
            totals = np.zeros(len(rows))
            places = rows.numpy() if held is None else held[rows.numpy()]
            totals[has] = store.totals("rna")[places[has]]
            np.testing.assert_array_equal(tensors["X"].sum(1), totals)
    assert sorted(np.concatenate(seen)) == list(range(600))
    data.teardown()


def test_the_example_tells_missing_proteins_from_rare_ones(stores: dict[str, Path]) -> None:
    data = StoreDataModule(stores["totalvi"], batch_key="sample", example_cells=1)
    codes = np.asarray(data.samples.codes)
    store = open_store(stores["totalvi"])
    place, whole = store.modality_rows("adt"), np.zeros((3, 12))
    rows = store.matrix("adt").read(0, store.schema.modalities["adt"].num_cells)
    dense = np.zeros((rows.num_rows, 12))
    for i in range(rows.num_rows):
        own = slice(rows.indptr[i], rows.indptr[i + 1])
        dense[i, np.asarray(rows.indices[own], int)] = rows.values[own]
    for row, i in enumerate(place):
        whole[codes[row]] += dense[i] if i >= 0 else 0
    example = data.example
    own = np.stack(
        [example["adt"].X[(example.obs["sample"] == name).to_numpy()].sum(0) for name in data.samples.categories]
    )
    np.testing.assert_array_equal(own > 0, whole > 0)
    assert (whole == 0).all(axis=1).any(), "one sample has no proteins"


def test_the_lines_of_the_docs_run(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    section = page.partition("## MULTIVI and TOTALVI out of core")[2]
    block = re.search(r"```python\n(.*?)```", section, flags=re.S)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stores["multivi"], "atlas.zarr")
    exec(block.group(1).replace("max_epochs=20", "max_epochs=1"), {})
    assert open_store("atlas.zarr").embedding_names() == ["X_multivi"]


def test_what_does_not_fit_is_refused_before_training(stores: dict[str, Path]) -> None:
    data = StoreDataModule(stores["multivi"], batch_key="sample", example_cells=20)
    model = model_of("multivi", data)
    with pytest.raises(ValueError, match=r"batch_size: got 32, which the data module decides"):
        data.train(model, batch_size=32)
    other = StoreDataModule(stores["multivi"], batch_key="sample", example_cells=20)
    with pytest.raises(ValueError, match=r"model: got MULTIVI of other data; make it of this object's example"):
        other.train(model)
    with pytest.raises(ValueError, match=r"modalities: got adt; .*multivi.zarr holds rna, atac"):
        StoreDataModule(stores["multivi"], batch_key="sample", modalities=["rna", "adt"])
    renamed = StoreDataModule(stores["multivi"], batch_key="cell_type", example_cells=20)
    renamed.__dict__["example"] = data.example
    with pytest.raises(ValueError, match=r"batch_key: got 'sample' in setup_mudata and 'cell_type' here"):
        renamed.train(model)
