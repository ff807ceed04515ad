"""Kernels over sparse rows against SciPy and the plain formula."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse

from loaders import csr
from loaders.csr import (
    OUT_OF_RANGE,
    SORTED,
    UNSORTED,
    SparseRows,
    centred_log_ratio,
    gather_rows,
    inspect_columns,
    transpose_rows,
)


def random_rows(num_rows, num_features, density, *, indices=np.int32, values=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    matrix = scipy.sparse.random(num_rows, num_features, density, format="csr", random_state=rng)
    matrix.data = rng.integers(1, 200, matrix.nnz).astype(values)
    matrix.sort_indices()
    return SparseRows(matrix.indptr.astype(np.int64), matrix.indices.astype(indices), matrix.data, num_features)


@pytest.mark.parametrize(("indices", "values"), [(np.uint16, np.uint8), (np.uint32, np.uint16), (np.int32, np.float32)])
def test_gather_copies_the_rows_asked_for_and_no_others(indices, values):
    rows = random_rows(50, 300, 0.1, indices=indices, values=values)
    asked = np.array([7, 49, 0, 7, 23])
    lengths = np.diff(rows.indptr)[asked]
    packed = np.concatenate(([0], np.cumsum(lengths)))
    out_indices = np.full(packed[-1] + 3, -5, np.int32)
    out_values = np.full(packed[-1] + 3, -5, np.float32)
    gather_rows(rows.indices, rows.values, rows.indptr[asked], lengths, packed[:-1], out_indices, out_values)
    expected = rows.to_scipy()[asked]
    assert np.array_equal(out_indices[:-3], expected.indices)
    assert np.array_equal(out_values[:-3], expected.data)
    assert np.all(out_indices[-3:] == -5)
    assert np.all(out_values[-3:] == -5)


@pytest.mark.parametrize(
    ("num_rows", "num_features", "density"), [(60, 40, 0.2), (5, 3_000, 0.01), (3, 7, 0.0), (0, 9, 0.0)]
)
def test_transpose_is_scipys(num_rows, num_features, density):
    rows = random_rows(num_rows, num_features, density)
    count = len(rows.indices)
    feature_indptr = np.full(num_features + 1, 99, np.int32)
    cells, values = np.empty(count, np.int32), np.empty(count, np.float32)
    transpose_rows(rows.indptr.astype(np.int32), rows.indices, rows.values, feature_indptr, cells, values)
    expected = rows.to_scipy().tocsc()
    expected.sort_indices()
    assert np.array_equal(feature_indptr, expected.indptr)
    assert np.array_equal(cells, expected.indices)
    assert np.array_equal(values, expected.data)


def test_centred_log_ratio_is_the_formula_on_dense_rows():
    rows = random_rows(40, 30, 0.4, seed=2)
    dense = rows.to_scipy().toarray().astype(np.float64)
    values = rows.values.copy()
    centred_log_ratio(rows.indptr, values, rows.num_features)
    scale = np.exp(np.where(dense > 0, np.log1p(dense), 0).sum(axis=1) / 30)
    expected = np.log1p(dense / scale[:, None])
    got = scipy.sparse.csr_matrix((values, rows.indices, rows.indptr), shape=dense.shape).toarray()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_columns_are_inspected_row_by_row():
    rows = random_rows(20, 60, 0.3)
    assert inspect_columns(rows.indptr, rows.indices, 60) == (20, SORTED)
    assert inspect_columns(rows.indptr[4:9], rows.indices[rows.indptr[4] :], 60) == (4, SORTED)
    swapped = rows.indices.copy()
    begin = rows.indptr[5]
    swapped[begin : begin + 2] = swapped[begin : begin + 2][::-1]
    assert inspect_columns(rows.indptr, swapped, 60) == (5, UNSORTED)
    for wrong in (60, -1):
        swapped[rows.indptr[7]] = wrong
        assert inspect_columns(rows.indptr, swapped, 60) == (7, OUT_OF_RANGE)
    repeated = np.array([3, 3])
    assert inspect_columns(np.array([0, 2]), repeated, 60) == (0, UNSORTED)


def test_kernels_run_in_an_installation_where_nothing_can_be_written(tmp_path):
    """`__pycache__` and the home are files here, so that not even root can put machine code into them."""
    shutil.copy(csr.__file__, tmp_path / "rows.py")
    for name in ("__pycache__", "home"):
        (tmp_path / name).touch()
    script = (
        "from rows import compiled\nimport numpy as np\nimport rows\n"
        "@compiled(fastmath=True)\ndef double(x):\n    return 2 * x\n"
        "print(double(21), rows.inspect_columns(np.array([0, 2]), np.array([1, 0]), 9))"
    )
    nowhere = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME")}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("42 (0, 1)\n", "")
