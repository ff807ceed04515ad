"""From the host to a GPU: a group of minibatches by one copy of page-locked memory, on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loaders.buffers import Pool
from loaders.device_rows import Arrival, settled
from loaders.minibatch import Minibatch

Memory = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sent:
    """Minibatches that are on their way.

    Attributes
    ----------
    arrivals
        Of modalities whose rows stay there.
    block
        The memory on the device that all their tensors share.
    arrived
        Event of the device, to be waited for there.
    """

    minibatches: list[Minibatch]
    arrivals: Mapping[str, Arrival]
    block: Tensor
    arrived: Any
    by: Handover

    def receive(self) -> list[Minibatch]:
        """Have the device wait for them, not the host."""
        self.by.wait_for(self)
        return settled(self.minibatches, self.arrivals)


class Handover:
    """Sends groups of minibatches to a device, from any thread, and keeps their memory on the host until it is read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._under_way: deque[tuple[Any, Memory]] = deque()
        self.pool = Pool(allocate=self._page_locked)

    def _page_locked(self, num_bytes: int) -> Memory:
        self._module.set_device(self.device)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()

    def send(self, minibatches: list[Minibatch], arrivals: Mapping[str, Arrival], block: Memory) -> Sent:
        """Start the copy of a block, whose parts all their tensors are."""
        arrived, host = self._module.Event(), torch.from_numpy(block)
        with self._module.stream(self._stream):
            copy = host.to(self.device, non_blocking=True)
            arrived.record(self._stream)
        self._under_way.append((arrived, block))
        move = _moved(host, copy)
        moved = [minibatch.map_tensors(move) for minibatch in minibatches]
        return Sent(moved, {name: own.map_tensors(move) for name, own in arrivals.items()}, copy, arrived, self)

    def wait_for(self, sent: Sent) -> None:
        """From here on this thread's stream of the device computes with what was sent."""
        stream = self._module.current_stream(self.device)
        stream.wait_event(sent.arrived)
        # Else its memory could be given away on the stream of the copies while this one still computes.
        sent.block.record_stream(stream)
        # Copies end in the order in which they began.
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()


def _moved(host: Tensor, copy: Tensor) -> Callable[[Tensor], Tensor]:
    """What finds in the copy the part that a tensor is of the host's block."""

    def move(tensor: Tensor) -> Tensor:
        start = tensor.data_ptr() - host.data_ptr() if tensor.numel() else 0
        return copy[start : start + tensor.nbytes].view(tensor.dtype)

    return move
