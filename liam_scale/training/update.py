"""One step of training: loss, gradients, what keeps numbers that are not finite out, and the update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from liam_scale.training.distributed import World
from liam_scale.training.ranks import AgreedError
from liam_scale.training.shared_adam import SharedAdam
from loaders.minibatch import Minibatch


@dataclass(frozen=True)
class Setback:
    """What was not finite, and after which step; the same on all ranks.

    Attributes
    ----------
    step
        Updates of the run that were made before.
    names
        Of losses, gradients or weights.
    rows
        Of the cells for which a term of the loss is not finite, by term.
    """

    step: int
    names: tuple[str, ...]
    rows: dict[str, list[int]] = field(default_factory=dict)


class NotFinite(AgreedError):
    """A loss, a gradient or a weight is not finite; nothing of it was kept."""

    def __init__(self, setback: Setback, *, what: str | None = None, tried: str = "") -> None:
        what = what or ", ".join(setback.rows or setback.names)
        super().__init__(
            f"training: {what} is not finite after step {setback.step:,}; nothing of it was kept{tried}: give a lower "
            "--optim.lr (or --model.precision float32) with the same command, and it goes on from the last checkpoint "
            "or from the start; if that ends here again, train into another --out"
        )
        self.setback = setback


class Soundness:
    """Watches losses and gradients of a training and withholds its updates from the first that is not finite on.

    A loss that is not finite makes all gradients of its rank NaN, and the average over ranks makes them NaN everywhere;
    ranks that share the update out agree on what each has seen. The fused optimizer reads the verdict on the device and
    leaves weights and moments alone, so that a GPU is waited for only where the trainer asks.

    The verdict is the norm of all gradients: where that overflows, so do Adam's squares. Reading 102 MB of them takes
    5 to 20 ms on the machines tried.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        self._broken = torch.zeros((), device=world.device)
        self._updates = torch.zeros((), device=world.device, dtype=torch.int64)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._shared = optimizer if isinstance(optimizer, SharedAdam) else None
        # torch's own switch of an optimizer that skips updates of half precision.
        optimizer.found_inf = self._broken  # type: ignore[attr-defined]

    def spread(self, loss: Tensor) -> Tensor:
        """The same loss, bit for bit with its gradients; NaN in every gradient where it is not finite."""
        return loss * (1.0 + 0.0 * loss.detach())

    def judge(self) -> None:
        """After the backward pass, before the update."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        # Of a finite number alone the difference to itself is 0: two launches, where isfinite takes four.
        self._broken.masked_fill_((norm - norm) != 0, 1.0)
        if self._shared is not None:
            self._shared.agree(self._broken)
        self._updates += self._broken == 0

    @property
    def is_broken(self) -> bool:
        """Whether a loss or a gradient was not finite; the same on all ranks. Waits for the device."""
        return bool(self._broken)

    @property
    def updates(self) -> int:
        """Updates that were applied. Waits for the device."""
        return int(self._updates)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is not finite. Waits for the device, once where there is none."""
    if not tensors:
        return []
    # Asking each number takes twenty times as long as their sum, which finite numbers seldom overflow.
    flags = torch.stack([value.sum().isfinite() for value in tensors.values()]).tolist()
    suspects = [value for value, flag in zip(tensors.items(), flags, strict=True) if not flag]
    return [name for name, value in suspects if not value.isfinite().all()]


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
