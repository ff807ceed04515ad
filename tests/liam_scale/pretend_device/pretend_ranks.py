"""`torchrun pretend_ranks.py ARGUMENTS`: the training command, whose ranks have a pretend device each.

Its collectives go through gloo by way of the host, as no library knows the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pretend
import torch
import torch.distributed as dist
from torch import Tensor

from liam_scale.train import main
from liam_scale.training import devices, distributed
from liam_scale.training.trainer import Trainer


class ByWayOfTheHost(dist.ProcessGroup):
    """gloo, for tensors of any device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "pretend"

    def _through(self, tensors: list[Tensor], work: Callable[[list[Tensor]], Any]) -> dist.Work:
        host = [tensor.cpu() for tensor in tensors]
        done = work(host)
        done.wait()
        for tensor, found in zip(tensors, host, strict=True):
            if tensor.device.type != "cpu":
                tensor.copy_(found)
        return Done(tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts if opts is not None else dist.AllreduceOptions()
        return self._through(tensors, lambda host: self._gloo.allreduce(host, opts))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._through(tensors, lambda host: self._gloo.broadcast(host, opts))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        (into,), host = outputs, [tensor.cpu() for tensor in inputs]
        return self._through(into, lambda hosts: self._gloo.allgather([hosts], host))

    def barrier(self, opts: Any = None) -> dist.Work:
        self._gloo.barrier().wait()
        return Done([])


class Done(dist.Work):
    """Work that has ended."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self._future


def use_pretend_devices() -> None:
    """`--device auto` finds a pretend device on every rank, and joins them."""
    dist.Backend.register_backend("pretend", ByWayOfTheHost, devices=["pretend", "cpu"])
    devices.gpu = lambda: pretend.DEVICE
    distributed.backend_of = lambda device: "pretend"
    Trainer.step = watched(Trainer.step)


def watched(step: Callable[..., None]) -> Callable[..., None]:
    """A step that wants every launch on one device, and says how many there were."""

    def watch(trainer: Trainer, *arguments: object) -> None:
        with pretend.noting() as noted:
            step(trainer, *arguments)
        assert noted.num_launches > 300
        assert trainer.world.device == pretend.DEVICE

    return watch


if __name__ == "__main__":
    use_pretend_devices()
    sys.exit(main(sys.argv[1:]))
