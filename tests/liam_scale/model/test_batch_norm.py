"""Batch normalisation: torch's on one rank, and the same over unequal ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from liam_scale.model.batch_norm import GlobalBatchNorm

SCRIPT = """
import sys
import torch
from torch import distributed
from liam_scale.model.batch_norm import GlobalBatchNorm

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
inputs = torch.randn(9, 4, dtype=torch.float64) * 3 + 5
factors = torch.randn(9, 4, dtype=torch.float64)
# three ranks: 7 cells, 2 cells, none
own = [slice(0, 7), slice(7, 9), slice(9, 9)][rank]
norm = GlobalBatchNorm(4).double()
local = inputs[own].clone().requires_grad_()
outputs = norm(local)
(outputs * factors[own] * outputs).sum().backward()
weight_gradient = norm.weight.grad.clone()
distributed.all_reduce(weight_gradient)
torch.save([outputs.detach(), local.grad, weight_gradient, norm.state_dict()], f"{sys.argv[1]}/{rank}.pt")
"""


def test_one_rank_is_torchs_batch_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GlobalBatchNorm(5).double(), torch.nn.BatchNorm1d(5, momentum=0.01, eps=1e-3).double()
    for _ in range(3):
        inputs = 4 + 2 * torch.randn(11, 5, generator=generator, dtype=torch.float64)
        pair = [inputs.clone().requires_grad_(), inputs.clone().requires_grad_()]
        outputs = [module(x) for module, x in zip((ours, theirs), pair, strict=True)]
        torch.testing.assert_close(outputs[0], outputs[1])
        for output in outputs:
            (output**3).sum().backward()
        torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-6, atol=1e-9)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(inputs), theirs.eval()(inputs))


def test_one_cell_and_none_are_finite() -> None:
    norm = GlobalBatchNorm(3)
    assert torch.isfinite(norm(torch.randn(1, 3))).all()
    assert norm(torch.zeros(0, 3)).shape == (0, 3)
    assert all(torch.isfinite(value).all() for value in norm.state_dict().values())


@pytest.mark.slow
def test_three_unequal_ranks_are_one(on_ranks: Callable[[str, int], list[Any]]) -> None:
    parts = on_ranks(SCRIPT, 3)
    torch.manual_seed(0)
    inputs = (torch.randn(9, 4, dtype=torch.float64) * 3 + 5).requires_grad_()
    factors = torch.randn(9, 4, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(4, momentum=0.01, eps=1e-3).double()
    outputs = norm(inputs)
    (outputs * factors * outputs).sum().backward()
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), outputs)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), inputs.grad)
    for p in parts:
        torch.testing.assert_close(p[2], norm.weight.grad)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(p[3][name], value)
