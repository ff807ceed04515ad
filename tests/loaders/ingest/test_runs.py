import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from identifying import identifying_counts

from loaders.csr import SparseRows
from loaders.ingest.matrices import joined_crc
from loaders.ingest.runs import RunWriter, destinations, merge_runs, row_table


def shuffled(tmp_path, counts, order, *, memory, chunk, dtype=np.uint16):
    """counts[i] goes to order[i]; back as one dense matrix, with the number of runs and of pieces."""
    writer = RunWriter(tmp_path, num_features=counts.shape[1], memory=memory)
    # Chunks come in an order of their own, as from several files.
    starts = np.random.default_rng(0).permutation(np.arange(0, counts.shape[0], chunk))
    for start in starts:
        rows = counts[start : start + chunk]
        narrow = np.uint8 if rows.data.max(initial=0) < 256 else dtype
        taken = SparseRows(rows.indptr.astype(np.int64), rows.indices, rows.data.astype(narrow), counts.shape[1])
        writer.add(order[start : start + chunk], taken)
    writer.write()
    runs = [(tmp_path, run) for run in writer.runs]
    assert all(run.is_whole(tmp_path) for run in writer.runs)
    lengths, sums = row_table(runs, counts.shape[0])
    np.testing.assert_array_equal(lengths[order], np.diff(counts.indptr))
    np.testing.assert_array_equal(sums[order], np.asarray(counts.sum(axis=1)).ravel())
    # Two readers of a half each, as two tasks are.
    half = counts.shape[0] // 2
    parts = [
        piece.to_scipy().toarray()
        for span in ((0, half), (half, counts.shape[0]))
        for piece in merge_runs(runs, *span, value_dtype=dtype, memory=memory)
    ]
    return np.concatenate(parts), len(runs)


@pytest.mark.parametrize(("memory", "runs"), [(2**30, 1), (20_000, 6)])
def test_rows_come_back_at_their_destinations(tmp_path, memory, runs):
    counts = identifying_counts(1500, 80)
    order = destinations(1500, seed=3)
    result, num_runs = shuffled(tmp_path, counts, order, memory=memory, chunk=37)
    assert num_runs >= runs
    np.testing.assert_array_equal(result[order], counts.toarray())


def test_values_grow_wider_while_rows_come(tmp_path):
    counts = identifying_counts(400, 50, maximum=200)
    counts.data[counts.indptr[250] :] += 1000
    order = destinations(400, seed=0)
    result, _ = shuffled(tmp_path, counts, order, memory=2**16, chunk=50)
    np.testing.assert_array_equal(result[order], counts.toarray())


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 200),
    num_features=st.integers(1, 60),
    memory=st.sampled_from([2048, 10_000, 2**20]),
    chunk=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_memory(tmp_path_factory, num_rows, num_features, memory, chunk, seed):
    counts = identifying_counts(num_rows, num_features)
    order = destinations(num_rows, seed)
    assert sorted(order) == list(range(num_rows))
    result, _ = shuffled(tmp_path_factory.mktemp("s"), counts, order, memory=memory, chunk=chunk)
    np.testing.assert_array_equal(result[order], counts.toarray())


def test_a_cut_or_changed_run_is_named(tmp_path):
    counts = identifying_counts(300, 50)
    writer = RunWriter(tmp_path, num_features=50, memory=2**20)
    writer.add(np.arange(300), SparseRows(counts.indptr.astype(np.int64), counts.indices, counts.data, 50))
    writer.write()
    (run,) = writer.runs
    held = (tmp_path / "0").read_bytes()
    (tmp_path / "0").write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    assert not run.is_whole(tmp_path)
    (tmp_path / "0").write_bytes(held[:-500])
    assert not run.is_whole(tmp_path)
    with pytest.raises(RuntimeError, match=r"0: got \d+ of \d+ bytes; the temporary file was cut short"):
        list(merge_runs([(tmp_path, run)], 0, 300, value_dtype=np.uint32, memory=2**20))


def test_checksums_of_parts_make_that_of_the_whole():
    text = np.random.default_rng(0).bytes(5000)
    for cut in (0, 1, 777, 5000):
        first, second = google_crc32c.value(text[:cut]), google_crc32c.value(text[cut:])
        assert joined_crc(first, second, len(text) - cut) == google_crc32c.value(text)
