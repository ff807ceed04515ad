"""Adam with moments in bfloat16: against torch's Adam, and the same mathematics in plain torch."""

from typing import Any

import pytest
import torch
from torch import nn

from liam_scale.kernels.cpu import adam as on_cpu
from liam_scale.kernels.device import adam as on_device
from liam_scale.training.half_adam import HalfAdam
from liam_scale.training.optim import OptimConfig, build_optimizer, load_optimizer_tensors, optimizer_tensors

SIZE = 40_000
OPTIONS = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6}


def make(size: int = SIZE) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size // 8, 8, bias=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, noise: float = 1.0) -> None:
    for step in steps:
        drawn = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = 0.1 * (1 + noise * torch.randn(parameter.shape, generator=drawn))
        optimizer.step()


def test_weights_stay_close_to_those_of_adam() -> None:
    half, whole, start = make(), make(), make().weight
    train(half, HalfAdam(half.parameters(), **OPTIONS), range(100))
    train(whole, torch.optim.Adam(whole.parameters(), **OPTIONS), range(100))
    moved = (whole.weight - start).norm()
    assert (half.weight - whole.weight).norm() < 0.01 * moved


def test_moments_are_right_on_average_though_a_step_changes_them_by_less_than_bfloat16_can() -> None:
    model = make()
    optimizer = HalfAdam(model.parameters(), **OPTIONS)
    train(model, optimizer, range(1_500), noise=0.0)
    found = optimizer.state[model.weight]
    # Rounded to the nearest, the second one would stand still at a quarter of the squared gradient.
    assert float(found["exp_avg_sq"].double().mean()) == pytest.approx(0.01 * (1 - 0.999**1_500), rel=2e-3)
    assert float(found["exp_avg"].double().mean()) == pytest.approx(0.1, rel=2e-3)


@pytest.mark.parametrize("size", [1, 17, 40_000])
def test_the_walk_of_the_cpu_is_the_formula_in_plain_torch(size: int) -> None:
    torch.manual_seed(1)
    first, second = torch.randn(size).bfloat16(), torch.rand(size).bfloat16()
    weight, gradient = torch.randn(size), torch.randn(size)
    key, constants = 0xFFFFFFF1, (0.1, 0.9, 0.999, 2e-3, 1.5, 0.01)
    walked, plain = ([t.clone() for t in (weight, first, second)] for _ in range(2))
    on_cpu.update(walked[0], gradient, *walked[1:], key, constants)
    on_device.update(plain[0], gradient, *plain[1:], torch.tensor(key), constants, torch.zeros(()))
    torch.testing.assert_close(walked[0], plain[0], rtol=1e-6, atol=1e-7)
    for found, expected in zip(walked[1:], plain[1:], strict=True):
        # Where a sum is rounded otherwise, one in some thousands is cut to the neighbour.
        assert (found != expected).float().mean() < 1e-3
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = make(), make()
    train(one, HalfAdam(one.parameters(), **OPTIONS), range(3))
    monkeypatch.setattr(on_cpu.threads, "num_workers", lambda: 3)
    train(three, HalfAdam(three.parameters(), **OPTIONS), range(3))
    assert torch.equal(one.weight, three.weight)


@pytest.mark.parametrize(("before", "after"), [("bf16", "bf16"), ("float32", "bf16"), ("bf16", "float32")])
def test_it_goes_on_from_saved_moments_also_of_the_other_type(before: Any, after: Any) -> None:
    straight, resumed = make(), make()
    optimizer = build_optimizer(straight, OptimConfig(moments=before))
    train(straight, optimizer, range(4))
    resumed.load_state_dict(straight.state_dict())
    saved = {name: value.clone() for name, value in optimizer_tensors(straight, optimizer).items()}
    other = build_optimizer(resumed, OptimConfig(moments=after))
    load_optimizer_tensors(resumed, other, saved)
    train(straight, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    if before == after:
        assert torch.equal(straight.weight, resumed.weight)
    else:
        assert (straight.weight - resumed.weight).norm() < 0.01 * (straight.weight - make().weight).norm()


def test_a_step_that_is_withheld_changes_nothing() -> None:
    model = make()
    optimizer = HalfAdam(model.parameters(), **OPTIONS)
    train(model, optimizer, range(2))
    before = [model.weight.detach().clone(), *(value.clone() for value in optimizer.state[model.weight].values())]
    optimizer.found_inf = torch.ones(())
    train(model, optimizer, range(2, 3))
    after = [model.weight.detach(), *optimizer.state[model.weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
