"""A step of training recorded once as a graph of the device and replayed: one launch instead of hundreds.

What is recorded has one size and one place, so that minibatches are padded: with cells that count nowhere, and with
entries of value 0 that belong to the last of them.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from liam_scale.kernels.device.noise import signed, step_key
from liam_scale.training.distributed import World
from liam_scale.training.options import Graph
from liam_scale.training.update import Given, Objective, Step, Update
from loaders.minibatch import Minibatch, SparseCounts

CELLS_STEP = 16
"""Padded cells are a multiple of it; the minibatches of a plan differ by fewer."""
SPARE_ENTRIES = 1.25
"""Entries that there is room for, of those of the first minibatch; one with more has the step recorded again."""
WARM_UPS = 3
"""Steps of a size that are launched one by one first: kernels are compiled, and Adam's moments made."""


def lacks_graph(device: torch.device, *, num_ranks: int, couples_cells: bool, has_batch_norm: bool) -> str | None:
    """Why the steps of such a training cannot be recorded, or None."""
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "CUDAGraph"):
        return f"{device} records no steps"
    if num_ranks > 1:
        return f"{num_ranks} ranks average their gradients between the launches of a step"
    if couples_cells:
        return "likelihood 'original' sums over all cells of a minibatch, and would count padding"
    if has_batch_norm:
        return "batch norm averages over all cells of a minibatch, and would count padding"
    return None


def check_graph(graph: Graph, reason: str | None) -> None:
    """Refuse `on` where steps cannot be recorded.

    Raises
    ------
    ValueError
        Says why.
    """
    if graph == "on" and reason is not None:
        raise ValueError(f"--training.graph: got on, but {reason}; use auto")


def as_recorded(update: Update, graph: Graph, world: World, *, couples_cells: bool) -> Step:
    """The update, recorded where that is wanted and possible.

    Raises
    ------
    ValueError
        As `check_graph`.
    """
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in update.module.modules())
    reason = lacks_graph(world.device, num_ranks=world.size, couples_cells=couples_cells, has_batch_norm=has_batch_norm)
    check_graph(graph, reason)
    return RecordedUpdate(update, must=graph == "on") if graph != "off" and reason is None else update


class Capacity:
    """Memory on the device for minibatches of up to so many cells and entries, at one place.

    Parameters
    ----------
    first
        A minibatch that has to fit, on the device.
    before
        What was too small for it; all that fitted there fits here.
    """

    def __init__(self, first: Minibatch, before: Capacity | None = None) -> None:
        device = first.sample.device
        # at least one cell of padding, to which the entries of padding belong
        cells = (first.num_cells // CELLS_STEP + 1) * CELLS_STEP
        cells = max(cells, len(before._sample) if before else 0)
        self._counts: dict[str, SparseCounts] = {}
        self._present: dict[str, Tensor] = {}
        for name, counts in first.counts.items():
            needed = 1024 * (int(len(counts.indices) * SPARE_ENTRIES) // 1024 + 1)
            entries = max(needed, len(before._counts[name].indices) if before else 0)
            # features of the padding are spread, so that none of them gets all its entries
            indices = torch.arange(entries, dtype=torch.int32, device=device) % counts.num_features
            values = torch.empty(entries, dtype=counts.values.dtype, device=device)
            indptr = torch.zeros(cells + 1, dtype=torch.int32, device=device)
            self._counts[name] = SparseCounts(indptr, indices, values, counts.num_features, is_padded=True)
            self._present[name] = torch.zeros(cells, dtype=torch.bool, device=device)
        self._sample: Tensor = torch.zeros(cells, dtype=torch.int64, device=device)
        self._place = torch.zeros_like(self._sample)
        self._counted = torch.zeros(cells, dtype=torch.bool, device=device)
        self._obs = {name: torch.zeros(cells, dtype=own.dtype, device=device) for name, own in first.obs.items()}
        self._kl_weight, self._cell_weight = (torch.zeros((), device=device) for _ in range(2))
        self._key = torch.zeros((), dtype=torch.int64, device=device)

    def holds(self, minibatch: Minibatch) -> bool:
        own = self._counts
        return minibatch.num_cells < len(self._sample) and all(
            len(counts.indices) <= len(own[name].indices) and counts.values.dtype == own[name].values.dtype
            for name, counts in minibatch.counts.items()
        )

    def filled(self, minibatch: Minibatch, given: Given) -> tuple[Minibatch, Given, Tensor]:
        """The minibatch, what is given of its step, and the key of its noise, in this memory."""
        cells = minibatch.num_cells
        for name, counts in minibatch.counts.items():
            own, entries = self._counts[name], len(counts.indices)
            own.indptr[: cells + 1].copy_(counts.indptr)
            own.indptr[cells + 1 : -1].fill_(entries)
            own.indptr[-1:].fill_(len(own.indices))
            own.indices[:entries].copy_(counts.indices)
            own.values[:entries].copy_(counts.values)
            # bytes: CUDA has no fill of uint16
            own.values[entries:].view(torch.uint8).zero_()
            _fill(self._present[name], minibatch.present[name])
        _fill(self._sample, minibatch.sample)
        _fill(self._place, minibatch.place)
        for name, column in self._obs.items():
            _fill(column, minibatch.obs[name])
        self._counted[:cells].fill_(True)
        self._counted[cells:].zero_()
        self._kl_weight.fill_(given.kl_weight)
        self._cell_weight.fill_(given.cell_weight)
        self._key.fill_(signed(step_key(seed=given.seed, step=given.step), 64))
        # new objects around the same memory: they remember totals that they were asked for
        counts_here = {name: replace(counts) for name, counts in self._counts.items()}
        held: dict[str, Any] = {"counted": self._counted, "obs": self._obs}
        here = Minibatch(counts_here, self._present, self._sample, self._place, self._place, 0, **held)
        return here, replace(given, kl_weight=self._kl_weight, cell_weight=self._cell_weight), self._key


def _fill(memory: Tensor, values: Tensor) -> None:
    memory[: len(values)].copy_(values)
    memory[len(values) :].zero_()


class RecordedUpdate:
    """An update that records itself once its kernels are warm, and is replayed from then on.

    A minibatch that does not fit has it warm up and be recorded again, with room for what came before. Where recording
    fails, one warning says so, and steps are launched one by one; `must` makes an error of it.
    """

    def __init__(self, update: Update, *, must: bool = False) -> None:
        self._update, self._must = update, must
        self._capacity: Capacity | None = None
        self._graph: Any = None
        self._objective: Objective | None = None
        self._warm_ups, self._is_off = 0, False

    def __call__(self, minibatch: Minibatch, given: Given) -> Objective:
        if self._is_off:
            return self._update(minibatch, given)
        if self._capacity is None or not self._capacity.holds(minibatch):
            self._graph, self._objective = None, None
            self._capacity, self._warm_ups = Capacity(minibatch, self._capacity), 0
        here, given_here, key = self._capacity.filled(minibatch, given)
        if self._graph is None and self._warm_ups < WARM_UPS:
            self._warm_ups += 1
            return self._beside(here, given_here, key)
        if self._graph is None:
            try:
                self._record(here, given_here, key)
            except RuntimeError as error:
                self._give_up(error)
                return self._update(minibatch, given)
        self._graph.replay()
        assert self._objective is not None
        return self._objective

    def _beside(self, minibatch: Minibatch, given: Given, key: Tensor) -> Objective:
        """Launch by launch, on a stream beside the main one, as what is recorded: libraries keep memory by stream."""
        device = minibatch.sample.device
        module = torch.get_device_module(device)
        current, beside = module.current_stream(device), module.Stream(device)
        beside.wait_stream(current)
        with module.stream(beside):
            objective = self._update(minibatch, given, noise_key=key)
        current.wait_stream(beside)
        return objective

    def _record(self, minibatch: Minibatch, given: Given, key: Tensor) -> None:
        """Note the launches of a step; nothing of it is computed yet."""
        module = torch.get_device_module(minibatch.sample.device)
        graph = module.CUDAGraph()
        with module.graph(graph):
            self._objective = self._update(minibatch, given, noise_key=key)
        self._graph = graph

    def _give_up(self, error: RuntimeError) -> None:
        reason = " ".join(str(error).strip().split("\n\n")[0].split())
        if self._must:
            raise RuntimeError(
                f"--training.graph: got on, but a step cannot be recorded: {reason}; use auto"
            ) from error
        warnings.warn(
            f"--training.graph: a step cannot be recorded ({reason}); launching steps one by one, slower. Give off to "
            "leave it out without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        self._is_off, self._capacity, self._objective = True, None, None
        self._update.optimizer.zero_grad(set_to_none=True)
