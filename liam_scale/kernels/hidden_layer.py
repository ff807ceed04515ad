"""What follows the product of a hidden layer: bias, a row for the cell's sample, LayerNorm, ReLU, dropout.

Shapes: B cells, H hidden units, S samples.
"""

from __future__ import annotations

from torch import Tensor

from liam_scale.kernels.backends import backend_of
from liam_scale.kernels.device.noise import Dropout
from liam_scale.kernels.options import Impl, check_choice, check_shape


def hidden_layer(
    linear: Tensor,
    *,
    bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    sample: Tensor | None = None,
    layer_norm: bool = True,
    dropout: Dropout | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """(B, H) dropout(relu(norm(linear + bias + sample_weight[sample]))), of which each part may be absent.

    Parameters
    ----------
    linear
        (B, H) product. Differentiable, as bias and sample weights.
    bias, sample_weight, sample
        (H,), (S, H), and (B,) int64 row of each cell.
    layer_norm
        Without weights, eps 1e-5.
    dropout
        Which units are zeroed: the same ones, bit for bit, in every implementation.
    impl
        See `liam_scale.kernels.options`.

    Raises
    ------
    ValueError
        A shape does not fit.
    """
    check_choice("impl", impl, Impl)
    if bias is not None:
        check_shape("bias", bias, linear.shape[1:])
    if sample_weight is not None:
        if sample is None:
            raise ValueError("sample: got None beside sample_weight; give the row of each cell")
        check_shape("sample_weight", sample_weight, (len(sample_weight), linear.shape[1]))
        check_shape("sample", sample, linear.shape[:1])
    backend = backend_of("hidden_layer", "plain" if impl == "reference" else impl, linear.device)
    return backend.evaluate(linear, bias, sample_weight, sample, layer_norm=layer_norm, dropout=dropout)
