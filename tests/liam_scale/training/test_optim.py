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


def test_moments_of_a_checkpoint_with_joined_library_weights_are_read() -> None:
    """Older checkpoints have the library's weights as the last column of the weight beside them."""
    model = nn.Module()
    model.weight, model.library_weight = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))
    adam = build_optimizer(model, OptimConfig())
    joined = torch.arange(20.0).reshape(5, 4)
    old = {"weight/exp_avg": joined, "weight/exp_avg_sq": joined + 100, "weight/step": torch.tensor(7.0)}
    load_optimizer_tensors(model, adam, old)
    found = optimizer_tensors(model, adam)
    for moment, value in (("exp_avg", joined), ("exp_avg_sq", joined + 100)):
        assert torch.equal(found[f"weight/{moment}"], value[:, :3])
        assert torch.equal(found[f"library_weight/{moment}"], value[:, 3])
    assert found["weight/step"] == found["library_weight/step"] == 7
    model.weight.grad, model.library_weight.grad = torch.ones(5, 3), torch.ones(5)
    adam.step()
    assert optimizer_tensors(model, adam)["library_weight/step"] == 8
