from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch

from liam_scale.kernels.device.sparse import entries, product, transposed_product
from loaders.minibatch import SparseCounts


def make_counts(density, *, transpose):
    matrix = scipy.sparse.random(9, 70, density=density, random_state=np.random.default_rng(0), format="csr")
    matrix.data = np.ceil(matrix.data * 5)
    return SparseCounts.from_scipy(matrix.astype(np.float32), transpose=transpose)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.2])
def test_products_are_those_of_the_dense_matrix(transpose, density):
    counts = entries(make_counts(density, transpose=transpose), torch.float64, log1p=True)
    dense = torch.log1p(make_counts(density, transpose=True).to_dense().double())
    table, upstream = torch.randn(70, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(product(counts, table), dense @ table)
    torch.testing.assert_close(transposed_product(counts, upstream), dense.T @ upstream)


def test_counts_as_stored_are_widened_before_anything_else():
    """Devices index no uint16."""
    counts = make_counts(0.2, transpose=False)
    counts = replace(counts, values=counts.values.to(torch.uint16))
    upstream = torch.randn(9, 5)
    found = transposed_product(entries(counts, torch.float32), upstream)
    torch.testing.assert_close(found, make_counts(0.2, transpose=True).to_dense().T @ upstream)
