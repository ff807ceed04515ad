"""A loss that is not finite reaches every rank and no weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from liam_scale.training.distributed import World
from liam_scale.training.update import Soundness, not_finite


def trained_on(*factors: float) -> tuple[list[torch.Tensor], Soundness]:
    """Weights after each step on losses of which some are not finite."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    soundness = Soundness(optimizer, World())
    seen = []
    for factor in factors:
        soundness.spread(model(torch.ones(2, 3)).sum() * factor).backward()
        soundness.judge()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(torch.cat([p.detach().clone().view(-1) for p in model.parameters()]))
    return seen, soundness


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_update_is_made_from_a_loss_that_is_not_finite_on(bad: float) -> None:
    seen, soundness = trained_on(1.0, 2.0, bad, 1.0)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert soundness.is_broken
    assert soundness.updates == 2


def test_finite_losses_train_bit_for_bit_as_without_the_watch() -> None:
    seen, soundness = trained_on(1.0, 3.0, 0.5)
    assert not soundness.is_broken
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for factor, expected in zip((1.0, 3.0, 0.5), seen, strict=True):
        (model(torch.ones(2, 3)).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(torch.cat([p.detach().view(-1) for p in model.parameters()]), expected)


ONE_BROKEN_RANK = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from liam_scale.training.distributed import join_world
from liam_scale.training.update import Soundness

with join_world("cpu") as world:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    wrapped, soundness = DistributedDataParallel(model), Soundness(optimizer, world)
    for step in range(4):
        factor = float("inf") if (world.rank, step) == (1, 2) else 1.0
        # A constant that is not finite has finite gradients: only the watch spreads it.
        loss = wrapped(torch.ones(2, 3)).sum() + (factor if factor != 1.0 else 0.0)
        soundness.spread(loss).backward()
        soundness.judge()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = {"broken": soundness.is_broken, "updates": soundness.updates, "weights": model[0].weight.detach()}
    torch.save(found, f"{sys.argv[1]}/{world.rank}.pt")
"""


def test_one_rank_with_a_broken_loss_stops_all_of_them(on_ranks: Callable[[str, int], list[Any]]) -> None:
    first, second = on_ranks(ONE_BROKEN_RANK, 2)
    assert first["broken"]
    assert second["broken"]
    assert first["updates"] == second["updates"] == 2
    assert torch.equal(first["weights"], second["weights"])
    assert torch.isfinite(first["weights"]).all()


def test_tensors_that_are_not_finite_are_named() -> None:
    tensors = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, float("nan")]),
        "c": torch.tensor([2]),
        "d": torch.inf * torch.ones(1),
    }
    assert not_finite(tensors) == ["b", "d"]
    assert not_finite({}) == []
