import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from identifying import identifying_counts

from loaders.csr import SparseRows
from loaders.ingest.shuffle import Shuffle, destinations


def shuffled(tmp_path, counts, order, *, memory, chunk, dtype=np.uint16):
    """counts[i] goes to order[i]; back as one dense matrix."""
    shuffle = Shuffle(
        tmp_path / "spill",
        num_rows=counts.shape[0],
        num_features=counts.shape[1],
        num_nonzeros=counts.nnz,
        memory=memory,
    )
    # Chunks come in an order of their own, as from several files.
    starts = np.random.default_rng(0).permutation(np.arange(0, counts.shape[0], chunk))
    for start in starts:
        rows = counts[start : start + chunk]
        narrow = np.uint8 if rows.data.max(initial=0) < 256 else dtype
        taken = SparseRows(rows.indptr.astype(np.int64), rows.indices, rows.data.astype(narrow), counts.shape[1])
        shuffle.add(order[start : start + chunk], taken)
    pieces = [piece.to_scipy().toarray() for piece in shuffle.in_order(dtype)]
    num_buckets = len(pieces)
    shuffle.close()
    assert not (tmp_path / "spill").exists()
    return np.concatenate(pieces), num_buckets


@pytest.mark.parametrize(("memory", "buckets"), [(2**30, 1), (20_000, 10)])
def test_rows_come_back_at_their_destinations(tmp_path, memory, buckets):
    counts = identifying_counts(1500, 80)
    order = destinations(1500, seed=3)
    result, num_buckets = shuffled(tmp_path, counts, order, memory=memory, chunk=37)
    assert num_buckets >= buckets
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


def test_a_cut_temporary_file_is_named(tmp_path):
    counts = identifying_counts(300, 50)
    shuffle = Shuffle(tmp_path / "spill", num_rows=300, num_features=50, num_nonzeros=counts.nnz, memory=4096)
    rows = SparseRows(counts.indptr.astype(np.int64), counts.indices, counts.data, 50)
    shuffle.add(np.arange(300), rows)
    pieces = shuffle.in_order(np.uint32)
    next(pieces)
    with open(tmp_path / "spill", "r+b") as file:
        file.truncate(500)
    with pytest.raises(
        RuntimeError, match=r"spill: got \d+ of \d+ bytes at offset \d+; the temporary file was cut short"
    ):
        list(pieces)
    shuffle.close()
