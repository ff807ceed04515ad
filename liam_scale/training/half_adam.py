"""Adam whose moments are kept in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from liam_scale.kernels.cpu import adam as on_cpu
from liam_scale.kernels.device import adam as on_device
from liam_scale.kernels.device.noise import mix32


class HalfAdam(torch.optim.Optimizer):
    """Adam with 4 bytes of moments a parameter in the place of 8, rounded at random.

    The second moment changes by up to a thousandth of itself a step, where bfloat16 has steps of a 256th: rounded to
    the nearest it would stand still. The random bits are a function of step and parameter, so that a resume is exact.

    Parameters
    ----------
    parameters
        float32.
    lr, eps, weight_decay, betas
        As of `torch.optim.Adam`.

    Attributes
    ----------
    found_inf
        () of the parameters' device; nonzero withholds the step.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas": betas})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.bfloat16),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(number, parameter, parameter.grad, group)

    def _update(self, number: int, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        step, is_host = state["step"], parameter.device.type == "cpu"
        withheld = torch.zeros_like(step) if self.found_inf is None else self.found_inf
        if is_host and withheld:
            return
        step += withheld == 0
        # A GPU is not asked: what depends on the step is computed there.
        t = step.item() if is_host else step.double()
        rate, root = group["lr"] / (1 - beta1**t), (1 - beta2**t) ** -0.5
        key = mix32(((int(t) if is_host else step.long()) * 0x9E3779B1 + number) & 0xFFFFFFFF)
        tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        constants = (group["weight_decay"], beta1, beta2, rate, root, group["eps"])
        if is_host:
            on_cpu.update(*tensors, key, constants)
        else:
            on_device.update(*tensors, key, constants, withheld)
