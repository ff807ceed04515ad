"""Averages over ranks through shared memory: real processes, started by torchrun."""

from collections.abc import Callable
from typing import Any

import torch

SCRIPT = """
import os
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from liam_scale.training import shared_reduction
from liam_scale.training.distributed import join_world

shared_reduction.SHARED_BYTES = 4096  # pieces of 256 floats: tensors of several pieces
with join_world("cpu") as world:
    shared = shared_reduction.share_memory(world)
    torch.manual_seed(world.rank)
    means = [shared.average_(torch.randn(n, dtype=t)) for n, t in ((1, torch.float32), (1001, torch.float32),
                                                                  (0, torch.float32), (300, torch.float64))]
    torch.manual_seed(7)
    plain, hooked = (DistributedDataParallel(torch.nn.Linear(40, 30), gradient_as_bucket_view=True) for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    shared_reduction.reduce_through_shared_memory(hooked, world)
    gradients = []
    for step in range(3):
        inputs = torch.randn(5, 40, generator=torch.Generator().manual_seed(100 * step + world.rank))
        for module in (plain, hooked):
            module.zero_grad()
            module(inputs).pow(2).sum().backward()
        gradients.append([p.grad.clone() for module in (plain, hooked) for p in module.parameters()])
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if one rank were on another machine
    elsewhere = shared_reduction.share_memory(world)
    torch.save([means, gradients, elsewhere], f"{sys.argv[1]}/{world.rank}.pt")
"""


def test_averages_are_those_of_all_reduce_and_the_same_on_every_rank(
    on_ranks: Callable[[str, int], list[Any]],
) -> None:
    ranks = on_ranks(SCRIPT, 3)
    given = []
    for rank in range(3):
        torch.manual_seed(rank)
        given.append([torch.randn(n, dtype=t) for n, t in ((1, torch.float32), (1001, torch.float32))])
    for k, own in enumerate(zip(*given, strict=True)):
        torch.testing.assert_close(ranks[0][0][k], torch.stack(own).mean(dim=0))
    for means, gradients, elsewhere in ranks:
        assert [len(mean) for mean in means] == [1, 1001, 0, 300]
        assert all(torch.equal(a, b) for a, b in zip(means, ranks[0][0], strict=True))
        for step in gradients:
            torch.testing.assert_close(step[2:], step[:2])
        assert elsewhere is None
    for step, first in zip(ranks[1][1], ranks[0][1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step[2:], first[2:], strict=True))
