"""The ranks of a run: who am I, and how do we agree."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liam_scale.kernels.backends import triton_serves
from liam_scale.kernels.device.compiled import can_compile
from liam_scale.training.devices import Device, device_of, name_of
from liam_scale.training.ranks import AgreedError, launched_ranks
from liam_scale.training.signals import interrupts_end_at_once
from liam_scale.training.watch import Watch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run; size 1 outside torchrun."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def enters(self, phase: str) -> None:
        """This rank begins something, as all others do: what they tell of it should it never end."""
        if self.watch is not None:
            self.watch.enters(phase)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks; every rank gets the same result."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: list[int]) -> list[int]:
        """Element-wise maximum over ranks: how ranks agree that one of them wants something."""
        if self.size == 1:
            return values
        flags = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [int(flag) for flag in flags.tolist()]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def decided(self, decide: Callable[[], T]) -> T:
        """What the main rank finds, on all ranks: they may see another file system. Its error ends them all."""
        if self.size == 1:
            return decide()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = decide()
            except Exception as error:
                dist.broadcast_object_list([None, (isinstance(error, ValueError), str(error))])
                raise
        dist.broadcast_object_list(found)
        if found[1] is not None:
            is_refused, message = found[1]
            raise ValueError(message) if is_refused else AgreedError(message)
        return found[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def describe(world: World) -> str:
    """Device, ranks, what joins them, and which kernels serve there: the first line of a training."""
    backend = backend_of(world.device) if world.size > 1 else ""
    if backend == "nccl":
        backend += " " + ".".join(map(str, torch.cuda.nccl.version()))
    ranks = f"{world.size} ranks over {backend}" if world.size > 1 else "1 rank"
    return f"{name_of(world.device)}, {ranks}, {_kernels(world.device)} kernels"


def _kernels(device: torch.device) -> str:
    if device.type == "cuda" and triton_serves(device):
        return "Triton"
    return "compiled" if device.type == "cpu" or (device.type == "cuda" and can_compile("cuda")) else "plain"


def backend_of(device: torch.device) -> str:
    """What collectives go through."""
    return "nccl" if device.type == "cuda" else "gloo"


def averaging(model: nn.Module, world: World, *, in_bf16: bool) -> nn.Module:
    """The model in DDP, whose backward pass makes each gradient the mean over ranks.

    Parameters
    ----------
    in_bf16
        What goes between ranks is rounded to bfloat16, half of the bytes; the mean stands in float32 again.
    """
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Buffers (priors) never change, so no forward pass need send them; torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    module = DistributedDataParallel(model, device_ids=devices, **options)
    if in_bf16:
        # DDP takes no annotations that are texts.
        module.register_comm_hook(world.size, lambda state, bucket: _mean_in_bf16(state, bucket))
    return module


def _mean_in_bf16(size: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """As `bf16_compress_hook` of torch, which refuses gloo."""
    whole = bucket.buffer()
    rounded = whole.div(size).to(torch.bfloat16)
    done: Any = dist.all_reduce(rounded, async_op=True)
    return done.get_future().then(lambda _: whole.copy_(rounded))


@contextmanager
def join_world(device: Device = "auto", *, timeout_seconds: float | None = None) -> Iterator[World]:
    """Join the ranks that torchrun or a scheduler started: gloo on CPU, NCCL on GPU (one GPU a rank).

    Parameters
    ----------
    timeout_seconds
        Time in which some rank must begin something new; otherwise those that are behind are named, and all end.

    Raises
    ------
    ValueError
        `device="cuda"` on a machine without a CUDA device.
    LostRank
        Another rank is gone.
    """
    rank, size = launched_ranks()
    chosen = device_of(device)
    if size == 1:
        yield World(device=chosen)
        return
    # Naming the device has NCCL connect at once: a rank that is missing is found here and not in the first step.
    at_once: dict[str, Any] = {"device_id": chosen} if chosen.type == "cuda" else {}
    watch = None if timeout_seconds is None else Watch(rank, size, timeout_seconds=timeout_seconds)
    try:
        # The watch ends what takes too long, in words; the backends' own end follows should it not.
        limit = timedelta(seconds=60 + (timeout_seconds or 30 * 60))
        with interrupts_end_at_once():
            dist.init_process_group(backend_of(chosen), timeout=limit, **at_once)
            world = World(rank, size, chosen, watch)
            hosts = world.gather(socket.gethostname())
            if watch is not None:
                watch.joined(hosts)
            yield world
    except BaseException as error:
        told = error if watch is None else watch.explained(error)
        # Peers may stand in a collective, for which NCCL's farewell waits: the process ends without one.
        if chosen.type == "cpu" and dist.is_initialized():
            dist.destroy_process_group()
        if told is error:
            raise
        raise told from error
    finally:
        if watch is not None:
            watch.close()
    dist.destroy_process_group()
