"""Adam shared out among the ranks of one machine: each averages and updates its part of weights that all share.

Between processes of one machine gloo goes through TCP. Here no gradient is sent and no weight is copied: a rank reads
the others' gradients of its part where they stand, and only its part of Adam's moments; weights and moments are in
memory once instead of once a rank.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liam_scale.training.distributed import World

_log = logging.getLogger(__name__)

_ALIGNED = 16
"""Parameters begin at multiples of so many numbers: a line of the processor's cache."""


class SharedAdam(torch.optim.Adam):
    """Fused Adam whose step every rank does for its part of each parameter.

    To be called after the backward pass, by all ranks: `average`, then `agree` on what may keep the update from being
    made, then `step`.

    Parameters
    ----------
    parameters
        float32 on the CPU, the same on all ranks; their values move into the shared memory.
    memory
        (3 + ranks, numbers of `size_of`) float32 that all ranks share: weights, first and second moments, and the
        gradients of each rank.
    **options
        Of `torch.optim.Adam`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], memory: Tensor, world: World, **options: Any) -> None:
        self._world, self._meeting = world, torch.zeros(1)
        self._shares: list[tuple[nn.Parameter, Tensor, slice]] = []
        states: dict[Tensor, dict[str, Tensor]] = {}
        parts, start = [], 0
        for whole in parameters:
            rows = memory[:, start : start + whole.numel()]
            # The main rank has a part of every parameter, so that its counts of steps, which it saves, are right.
            low, high = (-(-whole.numel() * rank // world.size) for rank in (world.rank, world.rank + 1))
            rows[0].copy_(whole.detach().view(-1))
            whole.data = rows[0].view(whole.shape)
            part = nn.Parameter(rows[0, low:high])
            part.grad = rows[3 + world.rank, low:high]
            step = torch.zeros(())
            states[part] = {"step": step, "exp_avg": rows[1, low:high], "exp_avg_sq": rows[2, low:high]}
            # What a checkpoint takes and gives back.
            shape = whole.shape
            states[whole] = {"step": step, "exp_avg": rows[1].view(shape), "exp_avg_sq": rows[2].view(shape)}
            self._shares.append((whole, rows[3:], slice(low, high)))
            parts.append(part)
            start += _aligned(whole.numel())
        super().__init__(parts, **options, fused=True)
        self.state.update(states)
        self.register_step_post_hook(lambda *_: self._meet())

    def average(self) -> None:
        """Make the gradients of this rank's part the mean over ranks."""
        own = self._world.rank
        for whole, gradients, _ in self._shares:
            stands = gradients[own].view(whole.shape)
            if whole.grad is None:
                stands.zero_()
            elif whole.grad.data_ptr() != stands.data_ptr():
                stands.copy_(whole.grad)
            # The next backward pass writes the large ones here (`Liam.keep_gradients`).
            whole.grad = stands
        self._meet()
        for _, gradients, part in self._shares:
            mean = gradients[own, part]
            for rank in range(self._world.size):
                if rank != own:
                    mean.add_(gradients[rank, part])
            mean.div_(self._world.size)

    def agree(self, verdict: Tensor) -> None:
        """The largest over ranks, of which each has seen the gradients of its part alone."""
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the whole parameters; the parts keep their memory."""
        for whole, _, _ in self._shares:
            whole.grad = None

    def _meet(self) -> None:
        dist.all_reduce(self._meeting)


def share_memory(parameters: Sequence[nn.Parameter], world: World) -> Tensor | None:
    """Memory for `SharedAdam`, the same of all ranks; None where it cannot be.

    That is with one rank, ranks on several machines, a GPU, parameters that are not float32, or too little memory.
    """
    is_local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world.size > 1
    is_plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
    if not (is_local and is_plain and world.device.type == "cpu" and hasattr(os, "memfd_create")):
        return None
    rows, numbers = 3 + world.size, sum(_aligned(p.numel()) for p in parameters)
    with ExitStack() as stack:
        owner: list[str | None] = [None]
        if world.is_main:
            owner = [_allocate(4 * rows * numbers, stack)]
        dist.broadcast_object_list(owner)
        memory = None if owner[0] is None else _map(owner[0])
        if world.largest([int(memory is None)])[0] or memory is None:
            return None
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, numbers)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _allocate(size: int, stack: ExitStack) -> str | None:
    """Path under which other processes find new memory until the stack ends; None if there is too little.

    It has no name of its own: it vanishes with the ranks, however they end.
    """
    try:
        descriptor = os.memfd_create("liam-weights", os.MFD_CLOEXEC)
        stack.callback(os.close, descriptor)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        _log.info("no memory to share between ranks (%s); gradients go through gloo", error)
        return None
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _map(path: str) -> mmap.mmap | None:
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError as error:
        _log.info("ranks cannot share memory (%s); gradients go through gloo", error)
        return None
