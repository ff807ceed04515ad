"""One step of training: loss, gradients, and the update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from liam_scale.training.shared_adam import SharedAdam
from liam_scale.training.soundness import Soundness, not_finite
from loaders.minibatch import Minibatch


class Objective(Protocol):
    """What a model's forward pass returns."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def terms(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Given:
    """What the trainer says of a step beside its minibatch: the arguments of the model's forward pass."""

    step: int
    seed: int
    kl_weight: float | Tensor
    cell_weight: float | Tensor
    num_global_with: Mapping[str, Tensor] | None = None


Step = Callable[[Minibatch, Given], Objective]


class Update:
    """Forward, backward and optimizer, launch by launch.

    Parameters
    ----------
    module
        The model, or DDP around it.
    give_up
        Called with names of what is not finite where that costs no waiting: on the CPU.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        soundness: Soundness,
        give_up: Callable[..., NoReturn],
    ) -> None:
        self.module, self.optimizer, self._soundness, self._give_up = module, optimizer, soundness, give_up

    def __call__(self, minibatch: Minibatch, given: Given, **more: Any) -> Objective:
        objective = self.module(minibatch, **vars(given), **more)
        self._soundness.spread(objective.loss).backward()
        if isinstance(self.optimizer, SharedAdam):
            self.optimizer.average()
        self._soundness.judge()
        if objective.loss.device.type == "cpu" and self._soundness.is_broken:
            named = self.module.named_parameters()
            gradients = {f"gradient of {n.removeprefix('module.')}": p.grad for n, p in named if p.grad is not None}
            self._give_up(*(not_finite({"loss": objective.loss, **objective.terms}) or not_finite(gradients)[:1]))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return objective
