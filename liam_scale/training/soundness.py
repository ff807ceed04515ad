"""What keeps numbers that are not finite out of the weights: seen before the update, by all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liam_scale.training.distributed import World


class Soundness:
    """Watches the losses of a training and withholds its updates from the first that is not finite on.

    Ranks need no message of their own for it: a loss that is not finite makes all gradients of its rank NaN, and the
    average over ranks, which every rank gets, makes them NaN everywhere. The fused optimizer reads the verdict on the
    device and leaves weights and moments alone, so that a GPU is waited for only where the trainer asks.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self._broken = torch.zeros((), device=world.device)
        self._updates = torch.zeros((), device=world.device, dtype=torch.int64)
        self._witness = min((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
        # torch's own switch of an optimizer that skips updates of half precision.
        optimizer.found_inf = self._broken  # type: ignore[attr-defined]

    def spread(self, loss: Tensor) -> Tensor:
        """The same loss, bit for bit with its gradients; NaN in every gradient where it is not finite."""
        return loss * (1.0 + 0.0 * loss.detach())

    def judge(self) -> None:
        """After the backward pass, before the update."""
        assert self._witness.grad is not None
        self._broken.copy_(torch.maximum(self._broken, 1.0 - self._witness.grad.isfinite().all().float()))
        self._updates += 1 - self._broken.long()

    @property
    def is_broken(self) -> bool:
        """Whether a loss was not finite; the same on all ranks. Waits for the device."""
        return bool(self._broken)

    @property
    def updates(self) -> int:
        """Updates that were applied. Waits for the device."""
        return int(self._updates)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is not finite. Waits for the device, once."""
    if not tensors:
        return []
    flags = torch.stack([value.isfinite().all() for value in tensors.values()])
    return [name for name, flag in zip(tensors, flags.tolist(), strict=True) if not flag]
