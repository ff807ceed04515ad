"""The step's heavy operations: sparse first layers and fused likelihoods."""

from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.kernels.options import Impl, Likelihood, Precision
from liam_scale.kernels.sparse_linear import sparse_linear

__all__ = ["Impl", "Likelihood", "Precision", "negative_binomial", "negative_multinomial", "sparse_linear"]
