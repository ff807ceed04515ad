"""Gradients that a kernel forms itself: where they are written, and how autograd receives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Formed:
    """A gradient formed in the forward pass.

    Attributes
    ----------
    gradient
        d loss / d parameter, in the parameter's shape.
    is_buffer
        It stands in a persistent buffer that becomes the parameter's `.grad`; else autograd takes it.
    """

    gradient: Tensor
    is_buffer: bool = False


def checked_buffer(buffers: Mapping[str, Tensor] | None, name: str, parameter: Tensor) -> Tensor | None:
    """The persistent tensor for this parameter's gradient, or None where autograd shall have a fresh one."""
    if buffers is None or name not in buffers or not parameter.requires_grad:
        return None
    buffer = buffers[name]
    if not parameter.is_leaf:
        raise ValueError(
            f"grad_buffers[{name!r}]: its tensor is computed from others; give buffers for parameters only"
        )
    if (buffer.shape, buffer.dtype, buffer.device) != (parameter.shape, parameter.dtype, parameter.device):
        raise ValueError(
            f"grad_buffers[{name!r}]: got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, the parameter is "
            f"{tuple(parameter.shape)} {parameter.dtype} on {parameter.device}; make it with torch.empty_like"
        )
    if not buffer.is_contiguous():
        raise ValueError(f"grad_buffers[{name!r}]: got strides {buffer.stride()}; make it contiguous")
    if parameter.grad is not None and is_same_memory(parameter.grad, buffer):
        raise RuntimeError(
            f"grad_buffers[{name!r}]: the parameter's gradient of an earlier step still stands there; "
            "call optimizer.zero_grad(set_to_none=True) before the next forward pass"
        )
    return buffer


def kept_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers for the next step: the memory in which the gradients of this one stand."""
    # `.data` counts its own versions, where the views into a bucket of DDP share one counter.
    return {name: p.grad.data for name, p in parameters.items() if p.grad is not None}


@dataclass(frozen=True)
class Targets:
    """Where the gradients of some parameters are written: their buffers, or fresh memory."""

    tensors: tuple[Tensor, ...]
    are_buffers: tuple[bool, ...]

    def formed(self) -> list[Formed]:
        return [Formed(t, b) for t, b in zip(self.tensors, self.are_buffers, strict=True)]


def make_targets(buffers: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Targets:
    """Uninitialised memory for the gradients of the parameters."""
    tensors = tuple(
        torch.empty_like(parameter, memory_format=torch.contiguous_format) if buffer is None else buffer.detach()
        for buffer, parameter in zip(buffers, parameters, strict=True)
    )
    return Targets(tensors, tuple(buffer is not None for buffer in buffers))


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def mark_written(buffer: Tensor) -> int:
    """Tell torch that a kernel wrote into the buffer; returns its version, by which a later write is noticed."""
    buffer[:0].zero_()
    return buffer._version


def adopt(parameter: Tensor, buffer: Tensor) -> None:
    """Make a filled buffer the parameter's gradient, or add it to the gradient it has."""
    if parameter.grad is None:
        parameter.grad = buffer
    else:
        with torch.no_grad():
            parameter.grad.add_(buffer)


def attach(loss: Tensor, inputs: Sequence[Tensor], formed: Sequence[Formed | None]) -> Tensor:
    """The loss as a function of its inputs, whose gradients are known already."""
    return _Attached.apply(loss, tuple(formed), *inputs)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, formed: tuple[Formed | None, ...], *inputs: Tensor) -> Tensor:
        ctx.formed, ctx.inputs = formed, inputs
        ctx.versions = [mark_written(f.gradient) if f is not None and f.is_buffer else None for f in formed]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        # on the CPU, where looking costs nothing, gradients are left alone if the factor is 1
        is_one = upstream.device.type == "cpu" and upstream.item() == 1.0
        is_kept = _keeps_graph()
        formed = ctx.formed
        if formed is None:
            raise RuntimeError("backward: called twice; call it with retain_graph=True the first time")
        if not is_kept:
            ctx.formed = None  # autograd takes a gradient over without copying it only if nobody else holds it
        taken = [p.requires_grad and f is not None for f, p in zip(formed, ctx.inputs, strict=True)]
        for entry, version in compress(zip(formed, ctx.versions, strict=True), taken):
            if version is not None and entry.gradient._version != version:
                raise RuntimeError(
                    "grad_buffers: a buffer was written again between forward and backward; "
                    "call backward before the next forward pass, or leave grad_buffers out"
                )
        if is_kept:
            scaled = (f.gradient * upstream if is_taken else None for f, is_taken in zip(formed, taken, strict=True))
            return None, None, *scaled
        if not is_one:
            torch._foreach_mul_([entry.gradient for entry in compress(formed, taken)], upstream)
        for entry, parameter in compress(zip(formed, ctx.inputs, strict=True), taken):
            if entry.is_buffer:
                adopt(parameter, entry.gradient)
        handed = (is_taken and not f.is_buffer for f, is_taken in zip(formed, taken, strict=True))
        return None, None, *(f.gradient if is_handed else None for f, is_handed in zip(formed, handed, strict=True))


def _keeps_graph() -> bool:
    """Whether this backward pass was called with retain_graph=True; True where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else bool(tell())
