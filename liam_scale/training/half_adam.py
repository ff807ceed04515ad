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
            self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        steps = [self.state[parameter]["step"] for parameter in parameters]
        moved = [step for step, parameter in zip(steps, parameters, strict=True) if parameter.grad is not None]
        withheld = torch.zeros_like(steps[0]) if self.found_inf is None else self.found_inf
        is_host = withheld.device.type == "cpu"
        if not moved or (is_host and withheld):
            return
        torch._foreach_add_(moved, [(withheld == 0).float()] * len(moved))
        # A GPU is not asked: what depends on the step is computed there, of all parameters at once.
        columns: Any = ()
        if not is_host:
            columns = _numbers(group, torch.stack(steps).long(), torch.arange(len(steps), device=withheld.device))
        for number, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            own = _numbers(group, int(steps[number]), number) if is_host else [column[number] for column in columns]
            state, (key, rate, root) = self.state[parameter], own
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            constants = (group["weight_decay"], *group["betas"], rate, root, group["eps"])
            if is_host:
                on_cpu.update(*tensors, key, constants)
            else:
                on_device.update(*tensors, key, constants, withheld)


def _numbers(group: dict[str, Any], t: Any, number: Any) -> tuple[Any, Any, Any]:
    """Of a parameter at step t: key of its random bits, rate, and factor of the root of its second moment."""
    (beta1, beta2), exact = group["betas"], t.double() if isinstance(t, Tensor) else t
    key = mix32((t * 0x9E3779B1 + number) & 0xFFFFFFFF)
    return key, group["lr"] / (1 - beta1**exact), (1 - beta2**exact) ** -0.5
