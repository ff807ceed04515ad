"""The loader: every value where it belongs, on any number of ranks, after any interruption."""

import hashlib
import logging
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.utils.data
from identifying import identifying_counts, identifying_store

from loaders.formats.matrix import SelectedColumns
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores.open import open_store

FEATURES = {"rna": 120, "atac": 300, "adt": 12}
CELLS = 1_500


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "cells.zarr"
    identifying_store(path, num_cells=CELLS, num_features=FEATURES, absent={"atac": [1], "adt": [0, 2]})
    return open_store(path)


@pytest.fixture(scope="module")
def truth():
    matrices = {name: identifying_counts(CELLS, count, modality=name) for name, count in FEATURES.items()}
    lacks = {"rna": [], "atac": [1], "adt": [0, 2]}
    present = {name: ~np.isin(np.arange(CELLS) % 3, samples) for name, samples in lacks.items()}
    return matrices, present


def check(minibatch, truth, names=tuple(FEATURES)):
    """Every count, presence and code of a minibatch is that of its cells."""
    matrices, present = truth
    rows = minibatch.rows.numpy()
    assert set(minibatch.counts) == set(names)
    for name in names:
        expected = matrices[name][rows].multiply(present[name][rows][:, None]).tocsr()
        expected.eliminate_zeros()
        counts = minibatch.counts[name]
        assert (counts.to_scipy() != expected).nnz == 0
        assert counts.indptr.dtype == counts.indices.dtype == torch.int32
        assert counts.values.dtype == torch.float32
        assert np.array_equal(minibatch.present[name].numpy(), present[name][rows])
        if counts.feature_indptr is not None:
            by_feature = expected.tocsc()
            by_feature.sort_indices()
            assert np.array_equal(counts.feature_indptr.numpy(), by_feature.indptr)
            assert np.array_equal(counts.cells.numpy(), by_feature.indices)
            assert np.array_equal(counts.feature_values.numpy(), by_feature.data)


def test_counts_may_keep_the_type_they_are_stored_in(store):
    stored = next(iter(Loader(store, LoaderConfig(minibatch=64), subset="all", values="stored")))
    widened = next(iter(Loader(store, LoaderConfig(minibatch=64), subset="all")))
    for name, counts in stored.counts.items():
        kind = np.float32 if name == "adt" else store.schema.modalities[name].value_dtype
        assert counts.values.numpy().dtype == counts.feature_values.numpy().dtype == kind
        plain = widened.counts[name]
        for field in ("indptr", "indices", "values", "feature_indptr", "cells", "feature_values"):
            assert torch.equal(getattr(counts, field).float(), getattr(plain, field).float())
        torch.testing.assert_close(counts.totals(), plain.totals())
        assert torch.equal(counts.to_dense(), plain.to_dense())
    assert stored.counts["rna"].values.dtype != torch.float32
    with pytest.raises(ValueError, match="values: got 'uint8'; choose from float32, stored"):
        Loader(store, values="uint8")


def raw(store, **options):
    """A loader that hands out ADT counts as they are."""
    own = {field.name: options.pop(field.name) for field in fields(LoaderConfig) if field.name in options}
    return Loader(store, LoaderConfig(**{"adt_transform": "none", **own}), **options)


def rows_of(loader):
    return [minibatch.rows.numpy().copy() for minibatch in loader]


def reader_threads():
    """Threads of loaders that stay: one that itself drops the last reference to its loader ends a moment later."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    for thread in threads:
        thread.join(5)
    return [thread for thread in threads if thread.is_alive()]


def same(a, b):
    """Whether two minibatches are equal bit for bit."""
    pairs = [(a.sample, b.sample), (a.place, b.place), (a.rows, b.rows)]
    for name in a.counts:
        pairs += [(getattr(a.counts[name], f), getattr(b.counts[name], f)) for f in ("indptr", "indices", "values")]
        pairs += [(a.counts[name].cells, b.counts[name].cells), (a.present[name], b.present[name])]
    return (a.epoch, a.step, a.num_global) == (b.epoch, b.step, b.num_global) and all(
        torch.equal(x, y) for x, y in pairs
    )


@pytest.mark.parametrize("minibatch", [7, 128, 5_000])
def test_an_epoch_holds_every_cell_once_with_its_own_counts(store, truth, minibatch):
    with raw(store, minibatch=minibatch, subset="all", sample="sample", obs=("cell_type",)) as loader:
        rows = []
        for step, got in enumerate(loader):
            assert (got.epoch, got.step) == (0, step)
            check(got, truth)
            assert np.array_equal(got.sample, got.rows % 3)
            assert np.array_equal(got.obs["cell_type"], np.where(got.rows % 8 == 7, -1, got.rows % 4))
            assert np.array_equal(got.place, np.arange(got.num_global))
            rows.append(got.rows.numpy())
        assert step + 1 == loader.steps_per_epoch == -(-CELLS // minibatch)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(CELLS))
    assert loader.num_cells == CELLS


def test_train_and_validation_share_the_cells_between_them(store, truth):
    options = {"sample": "sample", "validation_share": 0.1, "minibatch": 64, "seed": 4}
    train = np.concatenate(rows_of(raw(store, **options)))
    held_out = raw(store, **options, subset="validation", shuffle=False)
    validation = np.concatenate(rows_of(held_out))
    assert np.array_equal(np.sort(np.concatenate((train, validation))), np.arange(CELLS))
    assert np.array_equal(np.bincount(validation % 3), [50, 50, 50])
    assert np.all(np.diff(validation) > 0)
    for minibatch in held_out:
        check(minibatch, truth)


def test_the_split_goes_with_the_cells_wherever_they_stand(store, tmp_path):
    identifying_store(tmp_path / "b.zarr", num_cells=400, num_features={"rna": 120})
    chosen = []
    for paths in ([store.uri, tmp_path / "b.zarr"], [tmp_path / "b.zarr", store.uri]):
        loader = raw(open_store(paths), subset="validation", validation_share=0.2, modalities=["rna"])
        chosen.append(np.sort(np.concatenate([loader.cell_ids(minibatch) for minibatch in loader])))
    assert len(chosen[0]) == 380
    assert np.array_equal(*chosen)
    assert not np.array_equal(chosen[0][:10], [f"cell{row}" for row in range(10)])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_subset_of_no_validation_cells_is_an_empty_epoch(store, shuffle):
    loader = raw(store, subset="validation", validation_share=0.0, shuffle=shuffle)
    assert (loader.num_cells, loader.steps_per_epoch, len(loader)) == (0, 0, 0)
    assert list(loader) == []


def test_cell_ids_are_those_of_the_rows(store):
    loader = raw(store, minibatch=50)
    minibatch = next(iter(loader))
    assert loader.cell_ids(minibatch).tolist() == [f"cell{row}" for row in minibatch.rows.tolist()]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_trains_the_same_minibatches(store, truth, world):
    whole = list(raw(store, minibatch=100))
    ranks = [list(raw(store, minibatch=100, rank=rank, world=world)) for rank in range(world)]
    for step, expected in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        merged = np.full(expected.num_global, -1)
        for share in shares:
            assert share.num_global == expected.num_global
            check(share, truth)
            merged[share.place] = share.rows
        assert np.array_equal(merged, expected.rows)


def test_ranks_without_cells_stay_in_step(store):
    drop = np.arange(CELLS) >= 5
    ranks = [list(raw(store, minibatch=4, world=8, rank=r, drop=drop, subset="all")) for r in range(8)]
    assert {len(minibatches) for minibatches in ranks} == {2}
    assert sorted(int(row) for minibatches in ranks for m in minibatches for row in m.rows) == [0, 1, 2, 3, 4]
    empty = next(m for minibatches in ranks for m in minibatches if m.num_cells == 0)
    assert empty.counts["rna"].indptr.tolist() == [0]
    assert empty.num_global > 0


def test_inference_order_is_the_order_of_the_rows_in_contiguous_ranges(store):
    assert np.array_equal(np.concatenate(rows_of(raw(store, subset="all", shuffle=False))), np.arange(CELLS))
    parts = [np.concatenate(rows_of(raw(store, subset="all", shuffle=False, rank=r, world=3))) for r in range(3)]
    assert [part[0] for part in parts] == [0, 500, 1000]
    assert np.array_equal(np.concatenate(parts), np.arange(CELLS))


def test_epochs_differ_follow_each_other_and_can_be_set(store):
    loader = raw(store, minibatch=128)
    first, second = rows_of(loader), rows_of(loader)
    assert loader.epoch == 2
    assert not np.array_equal(first[0], second[0])
    loader.set_epoch(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, rows_of(loader), strict=True))
    again = raw(store, minibatch=128)
    again.set_epoch(1)
    assert all(np.array_equal(a, b) for a, b in zip(second, rows_of(again), strict=True))


@pytest.mark.parametrize("stop", [0, 1, 17, 22])
def test_resuming_goes_on_bit_for_bit(store, stop):
    options = {"minibatch": 64, "sample": "sample", "adt_transform": "clr"}
    whole = [*(loader := raw(store, **options)), *loader]
    first = raw(store, **options)
    iterator = iter(first)
    for _ in range(stop + 1):
        next(iterator)
    state = first.state_dict()
    first.close()
    resumed = raw(store, **options, memory="200MiB", threads=1)
    resumed.load_state_dict(state)
    rest = [*resumed, *resumed] if len(whole) // 2 > stop + 1 else [*resumed]
    assert len(rest) == len(whole) - stop - 1
    assert all(same(a, b) for a, b in zip(rest, whole[stop + 1 :], strict=True))


def test_resuming_on_another_number_of_ranks_keeps_the_order(store):
    whole = rows_of(raw(store, minibatch=100))
    loader = raw(store, minibatch=100)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = loader.state_dict()
    assert state["step"] == 4
    shares = []
    for rank in range(3):
        resumed = raw(store, minibatch=100, rank=rank, world=3, streams=64)
        resumed.load_state_dict(state)
        assert resumed.streams == 16
        shares.append(list(resumed))
    for step, expected in enumerate(whole[4:]):
        merged = np.full(len(expected), -1)
        for share in shares:
            merged[share[step].place] = share[step].rows
        assert np.array_equal(merged, expected)


def test_seeking_goes_on_at_any_step_of_any_epoch(store):
    epochs = [*(loader := raw(store, minibatch=64)), *loader]
    loader.seek(1, 5)
    assert (loader.epoch, loader.step) == (1, 5)
    assert all(same(a, b) for a, b in zip(loader, epochs[len(epochs) // 2 + 5 :], strict=True))
    loader.seek(0, 3)
    assert same(next(iter(loader)), epochs[3])
    for position in ((-1, 0), (0, -1), (0, loader.steps_per_epoch + 1)):
        with pytest.raises(ValueError, match="position: got epoch"):
            loader.seek(*position)


def test_given_codes_become_the_samples_and_split_the_cells_as_their_column_does(store):
    codes = store.obs_column("sample").codes.astype(np.int64)
    named = list(raw(store, minibatch=64, sample="sample", subset="validation", shuffle=False))
    given = list(raw(store, minibatch=64, sample=np.array([40, 7, 300])[codes], subset="validation", shuffle=False))
    for a, b in zip(named, given, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert b.sample.tolist() == [[40, 7, 300][code] for code in a.sample.tolist()]


def test_a_state_of_other_cells_is_refused(store):
    state = raw(store, minibatch=64).state_dict()
    with pytest.raises(ValueError, match="loader state: got minibatch 64, this loader has 32"):
        raw(store, minibatch=32).load_state_dict(state)
    with pytest.raises(ValueError, match="loader state: got seed 0, this loader has 1"):
        raw(store, minibatch=64, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="16 streams for 17 ranks"):
        raw(store, minibatch=64, world=17).load_state_dict(state)


def test_clr_is_applied_to_adt_alone_unless_told_otherwise(store, truth):
    matrices, present = truth
    for got in Loader(store, LoaderConfig(minibatch=300)):
        rows = got.rows.numpy()
        dense = matrices["adt"][rows].toarray() * present["adt"][rows][:, None]
        scale = np.exp(np.log1p(dense).sum(axis=1) / FEATURES["adt"])
        np.testing.assert_allclose(got.counts["adt"].to_dense(), np.log1p(dense / scale[:, None]), rtol=1e-6)
        assert (got.counts["rna"].to_scipy() != matrices["rna"][rows]).nnz == 0


def test_modalities_and_transpose_are_optional(store, truth):
    for got in raw(store, minibatch=256, modalities=["atac"], transpose=False):
        check(got, truth, names=("atac",))
        assert got.counts["atac"].feature_indptr is None


def test_drop_and_weights(store):
    kept = np.concatenate(rows_of(raw(store, subset="all", drop={"sample": ["s1"]})))
    assert np.array_equal(np.sort(kept), np.flatnonzero(np.arange(CELLS) % 3 != 1))
    weights = np.where(np.arange(CELLS) < 100, 3.0, 0.5)
    drawn = np.concatenate(rows_of(raw(store, subset="all", weights=weights)))
    counts = np.bincount(drawn, minlength=CELLS)
    assert np.all(counts[:100] == 3)
    assert counts[100:].sum() == 700
    assert counts.max() == 3
    cells = np.arange(CELLS)
    skewed = (cells % 3 == 0) & (cells > 600) | (cells % 3 == 2) & (cells > 1_000)
    balanced = raw(store, subset="all", balance="sample", drop=skewed)
    sizes = np.bincount(np.concatenate(rows_of(balanced)) % 3)
    assert sizes.max() - sizes.min() <= 2


def test_memory_handed_out_is_not_written_again_while_it_is_held(store, truth):
    loader = raw(store, minibatch=32)
    kept = list(loader)
    for _ in loader:
        pass
    for minibatch in kept:
        check(minibatch, truth)


def test_inside_a_torch_data_loader(store):
    expected = rows_of(raw(store, minibatch=64))
    wrapped = torch.utils.data.DataLoader(raw(store, minibatch=64), batch_size=None)
    assert len(wrapped) == len(expected)
    assert all(np.array_equal(a.rows, b) for a, b in zip(wrapped, expected, strict=True))


def test_worker_processes_are_refused(store):
    wrapped = torch.utils.data.DataLoader(raw(store, minibatch=64), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="set num_workers=0"):
        next(iter(wrapped))


class BrokenMatrix(SelectedColumns):
    """A matrix one of whose reads fails."""

    def read(self, start, stop):
        if start <= 700 < stop:
            raise OSError("the disk is gone")
        return super().read(start, stop)


def test_a_failing_read_reaches_the_consumer_and_no_thread_stays(store, monkeypatch):
    matrix = store.matrix("rna")
    broken = BrokenMatrix(matrix, np.arange(matrix.num_features, dtype=np.int32), matrix.num_features)
    monkeypatch.setattr(store, "matrix", lambda modality: broken)
    loader = Loader(store, LoaderConfig(minibatch=32), modalities=["rna"])
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader)
    assert not reader_threads()


def test_leaving_an_epoch_early_stops_its_threads(store):
    for _ in raw(store, minibatch=16):
        break
    loader = raw(store, minibatch=16)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    assert not reader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        list(iterator)


def test_a_closed_loader_keeps_no_memory_for_a_next_pass(store):
    """Lightning holds its loaders after training."""
    with Loader(store, LoaderConfig(minibatch=64)) as loader:
        for minibatch in loader:
            del minibatch
        pools = [loader._pool, *(pool for s in loader._sources.values() for pool in (s.indices_pool, s.values_pool))]
        assert any(pool._free for pool in pools)
    assert not any(pool._free for pool in pools)


def test_an_unshuffled_store_says_so(store, caplog):
    with caplog.at_level(logging.INFO, logger="loaders"):
        raw(store, minibatch=32)
    assert "is not shuffled" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatch": 0}, "minibatch: got 0"),
        ({"rank": 2, "world": 2}, "rank: got 2 of 2 ranks"),
        ({"streams": 2, "world": 3}, "streams: got 2 for 3 ranks"),
        ({"modalities": ["protein"]}, "modalities: got 'protein'.*rna, atac, adt"),
        ({"sample": "donor"}, "obs column.*'donor'.*sample, cell_type, number"),
        ({"sample": "cell_type"}, "187 of 1,500 cells without a value"),
        ({"subset": "test"}, "subset: got 'test'"),
        ({"memory": "1KiB"}, "memory: got 0 MiB"),
        ({"memory": "lots"}, "memory: got 'lots'"),
        ({"adt_transform": "log"}, "adt_transform: got 'log'"),
        ({"sample": np.zeros(3, int)}, "sample: got int64 of shape .3,.; give one code"),
        ({"validation_share": 1.0}, "validation_share: got 1.0"),
        ({"weights": np.ones(3)}, "weights: got shape"),
        ({"weights": np.ones(CELLS), "shuffle": False}, "weights: got weights for a fixed order"),
        ({"drop": {"sample": ["s9"]}}, "drop: got sample = 's9'"),
        ({"drop": np.ones(CELLS, bool)}, "drop fewer cells"),
    ],
)
def test_refusals_name_the_option_and_the_cure(store, options, message):
    with pytest.raises(ValueError, match=message):
        raw(store, **options)


def test_the_order_of_cells_is_that_of_earlier_versions(store):
    """A run that an earlier version began goes on in its order; a change of this hash breaks every such run."""
    served = hashlib.sha256()
    loader = Loader(store, LoaderConfig(minibatch=100, streams=4, memory="1MiB"), sample="sample", seed=3)
    for _ in range(2):
        for minibatch in loader:
            served.update(minibatch.rows.numpy().tobytes())
    assert served.hexdigest() == "9ef58ed0a9ced1efa27b598629a30a3d99db35c975993009b6e762022d136509"
