"""The KL schedule, the number of epochs, and Adam's state in and out of a checkpoint."""

import pytest
import torch
from torch import nn

from liam_scale.training.optim import (
    OptimConfig,
    build_optimizer,
    default_max_epochs,
    kl_schedule,
    load_optimizer_tensors,
    optimizer_tensors,
)


@pytest.mark.parametrize(("cells", "epochs"), [(62_501, 128), (1_600, 400), (20_000, 400), (10**7, 1), (40, 400)])
def test_the_number_of_epochs_is_the_originals(cells: int, epochs: int) -> None:
    assert default_max_epochs(cells) == epochs


def test_below_100000_cells_the_kl_weight_grows_by_epochs_as_in_the_original() -> None:
    schedule = kl_schedule(OptimConfig(), num_cells=62_501)
    assert [schedule(e, 10**9) for e in (0, 1, 200, 400, 500)] == [1e-3, 1 / 400, 0.5, 1.0, 1.0]


def test_above_100000_cells_it_grows_by_steps_with_the_published_slope() -> None:
    schedule = kl_schedule(OptimConfig(), num_cells=2_000_000)
    assert schedule(0, 464) == pytest.approx(1 / 400)
    assert schedule(0, 464 * 400) == 1.0


def test_a_warm_up_of_zero_is_none() -> None:
    assert kl_schedule(OptimConfig(kl_warmup_epochs=0), num_cells=100)(0, 0) == 1.0


def test_adam_goes_on_bit_for_bit_from_its_saved_moments() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 5, 3)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> None:
        model.weight.grad = gradient.clone()
        optimizer.step()

    straight = nn.Linear(3, 5, bias=False)
    resumed = nn.Linear(3, 5, bias=False)
    adam = build_optimizer(straight, OptimConfig())
    for gradient in gradients[:3]:
        step(straight, adam, gradient)
    resumed.load_state_dict(straight.state_dict())
    saved = {name: value.clone() for name, value in optimizer_tensors(straight, adam).items()}
    other = build_optimizer(resumed, OptimConfig())
    load_optimizer_tensors(resumed, other, saved)
    for gradient in gradients[3:]:
        step(straight, adam, gradient)
        step(resumed, other, gradient)
    assert torch.equal(straight.weight, resumed.weight)
