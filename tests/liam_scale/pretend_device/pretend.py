"""Builds and registers the pretend device of pretend.cpp as `pretend:0`, and reads what it noted.

To be imported before the first backward pass of a process: autograd makes its threads for devices then.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

_extension = cpp_extension.load(
    name="liam_scale_pretend", sources=[str(Path(__file__).with_name("pretend.cpp"))], extra_cflags=["-O1", "-w"]
)
torch.utils.rename_privateuse1_backend("pretend")


class Graph:
    """As `torch.cuda.CUDAGraph`: what is launched while it is recorded, none of which is computed before a replay."""

    recording: Any = None

    @property
    def num_launches(self) -> int:
        return self.recording.num_launches

    def replay(self) -> None:
        self.recording.replay()


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    """As `torch.cuda.graph`."""
    _extension.begin_recording()
    try:
        yield
    finally:
        graph.recording = _extension.end_recording()


_module = types.ModuleType("torch.pretend")
vars(_module).update(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda device: None,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=80 * 2**30, name="pretend"),
    current_stream=lambda device=None: torch.accelerator.current_stream(),
    synchronize=lambda device=None: torch.accelerator.synchronize(),
    Stream=lambda device=None: torch.Stream(device=device or "pretend"),
    Event=lambda: torch.Event(device="pretend"),
    stream=lambda stream: stream,
    CUDAGraph=Graph,
    graph=recording,
)
torch._register_device_module("pretend", _module)
torch.utils.generate_methods_for_privateuse1_backend()

DEVICE = torch.device("pretend", 0)


@dataclass
class Noted:
    """What the device noted in a block: counts by name; of copies also bytes."""

    launches: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    mixed: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())


@contextmanager
def noting(*, refuse_waits: bool = False) -> Iterator[Noted]:
    """Count from here to the end of the block; with `refuse_waits` the first wait for the device is an error."""
    noted = Noted()
    _extension.forget()
    _extension.refuse_waits(refuse_waits)
    try:
        yield noted
    finally:
        _extension.refuse_waits(False)
        vars(noted).update(_extension.noted())
