"""Minibatches of sparse cells from a store. The path of a minibatch:

1. `selection` chooses the cells of the subset, `sizing` the cells of blocks and windows that memory allows.
2. `plan` orders the cells of an epoch, stream by stream and window by window, from the seed alone.
3. `windows` reads the rows of a window, one modality at a time, by the fastest way its `formats.matrix` offers.
4. `assemble` gathers the cells of a few steps from the windows, transposes them and cuts them into minibatches.
5. `prefetch` runs 3 and 4 ahead on threads and keeps their order; `buffers` uses their memory again.
6. The loader hands a `minibatch` out and moves its position, which `state_dict` saves and `seek` sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch.utils.data

from loaders.assemble import Group, Slice, assemble, output_bytes, output_formats, plan_group
from loaders.buffers import Pool
from loaders.device_rows import has_given_up
from loaders.handover import Handover, Sent
from loaders.minibatch import Minibatch
from loaders.options import LoaderConfig, Size, checked
from loaders.plan import Epoch, Plan, Window
from loaders.prefetch import Prefetch, Task, Workers, result_of
from loaders.selection import columns_of, sample_codes, select_rows, weights_of
from loaders.sizing import Sizes, choose_sizes, default_threads, gpu_threads, parse_memory, tell_sizes
from loaders.stores.base import Store, ids_of
from loaders.windows import (
    ModalityInput,
    WindowCells,
    WindowRows,
    keeping,
    open_inputs,
    order_window,
    read_window,
)

Ready = list[Minibatch] | Sent
"""A gathered group: on the host, or on its way to a device."""

Subset = Literal["train", "validation", "all"]

FIXED_ORDER_WINDOW = {"all": 2_048, "train": 2_048, "validation": 512}
"""Cells of a window without shuffling. Validation cells lie far apart, so that a window reads 20 times as many cells;
several small ones are read at the same time."""


@dataclass(frozen=True)
class OpenWindow:
    """A window that is being read: its cells, and per modality its rows."""

    cells: Task[WindowCells]
    parts: Mapping[str, Task[WindowRows]]


class Loader(torch.utils.data.IterableDataset[Minibatch]):
    """Streams minibatches of all modalities of a store; every cell of the subset once an epoch.

    Iterating yields the minibatches of the current epoch from the current position on, and then moves to the next
    epoch. One iterator is active at a time. `torch.utils.data.DataLoader(loader, batch_size=None)` works too.

    Parameters
    ----------
    store
        An open store; see `loaders.open_store`.
    config
        What a user chooses; default: `LoaderConfig()`. Its `balance` holds where cells are shuffled.
    sample
        What becomes `Minibatch.sample`: an obs column without missing values, or (n,) codes of the cells.
    modalities
        Names of the modalities to read; default: all the store has.
    seed
        Of the validation split and of the order of cells.
    rank, world
        This process among those that share the minibatches.
    subset
        "train", "validation" or "all" cells.
    shuffle
        False: a fixed order. "all" gives every rank one contiguous range of rows; the other subsets give global
        minibatches in the order of the rows.
    transpose
        Whether counts also carry their transpose, which training needs.
    obs
        Further obs columns whose codes to hand out; or numbers to hand out as they are, (n,) by name.
    values
        Type in which counts are handed out: float32, which models compute with, or "stored": the store's own, mostly
        uint8, which takes 5 instead of 8 bytes an entry to copy to a device. Transformed modalities are float32.
    weights
        (n,) expected copies of each cell in an epoch, instead of `balance`; shuffled order only.
    skip_damaged
        Leave the cells of damaged chunks out and name them (`Minibatch.lost`), where our own reader reads them.
    drop
        (n,) bool, True for cells to leave out, or per obs column the categories to leave out.
    device
        GPU on which minibatches are handed out: a group of them is copied from page-locked memory while the ones before
        are computed with. None: they stay on the host.

    Raises
    ------
    ValueError
        An option that does not fit the store or another option.
    """

    def __init__(
        self,
        store: Store,
        config: LoaderConfig | None = None,
        *,
        sample: str | npt.NDArray[np.integer] | None = None,
        modalities: Sequence[str] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        subset: Subset = "train",
        shuffle: bool = True,
        transpose: bool = True,
        obs: Sequence[str] | Mapping[str, npt.NDArray[np.floating]] = (),
        values: Literal["float32", "stored"] = "float32",
        weights: npt.NDArray[np.floating] | None = None,
        drop: npt.NDArray[np.bool_] | Mapping[str, Sequence[str]] | None = None,
        device: torch.device | None = None,
        skip_damaged: bool = False,
    ) -> None:
        config = config or LoaderConfig()
        minibatch, streams = config.minibatch, config.streams_for(world)
        transforms = config.transforms(store.schema.kinds)
        _check_ranks(streams, rank, world)
        self.store, self.rank, self.world, self._skip_damaged = store, rank, world, skip_damaged
        inputs = open_inputs(store, modalities)
        self._outputs = output_formats(inputs, transforms, transpose=transpose, values=values)
        self._handover = Handover(device) if device is not None and device.type != "cpu" else None
        self._pool = self._handover.pool if self._handover else Pool()
        self._sample = None if sample is None else sample_codes(store, sample)
        self._obs = columns_of(store, obs)
        self._threads = config.threads or (gpu_threads() if self._handover else default_threads())
        rows = select_rows(store, self._sample, subset=subset, share=config.validation_share, seed=seed, drop=drop)
        drawn = weights if weights is not None else config.balance if shuffle else None
        # Transposes do not stay on a device; and a cell that is drawn twice would come there twice.
        there = self._handover.device if self._handover and not transpose and drawn is None else None
        dtypes = {name: output.value_dtype for name, output in self._outputs.items()}
        self._sources, self._on_device = keeping(inputs, store, config.resident, there, cells=rows, dtypes=dtypes)
        self._sizes = sizes = self._choose_sizes(config, is_shuffled=store.schema.is_shuffled or not shuffle)
        self._plan = Plan(
            rows,
            minibatch,
            streams if shuffle else world,
            sizes.block_cells,
            sizes.window_cells if shuffle else min(sizes.window_cells, FIXED_ORDER_WINDOW[subset]),
            seed,
            order="shuffled" if shuffle else "ranges" if subset == "all" else "disk",
            row_alignment=store.row_alignment if shuffle else 1,
            weights=None if drawn is None else weights_of(store, drawn, rows, is_allowed=shuffle),
            parts=store.schema.parts,
        )
        if shuffle and not store.schema.is_shuffled:
            tell_sizes(store.uri, sizes, streams)
        self._epoch, self._step, self.waited_seconds = 0, 0, 0.0
        self._workers: Workers | None = None

    def _choose_sizes(self, config: LoaderConfig, *, is_shuffled: bool) -> Sizes:
        return choose_sizes(
            memory=parse_memory(config.memory),
            window_bytes_per_cell=sum(source.bytes_per_cell for source in self._sources.values()),
            output_bytes_per_cell=output_bytes(self._sources, self._outputs, minibatch=config.minibatch),
            minibatch=config.minibatch,
            streams=config.streams_for(self.world),
            world=self.world,
            threads=self._threads,
            is_shuffled=is_shuffled,
            min_block=self.store.row_alignment,
        )

    @property
    def num_cells(self) -> int:
        """Cells of an epoch of this subset, over all ranks."""
        return self._plan.num_cells

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.num_steps

    @property
    def streams(self) -> int:
        return self._plan.streams

    @property
    def window_cells(self) -> int:
        """Cells of one stream that are shuffled together."""
        return self._plan.window_cells

    @property
    def epoch(self) -> int:
        """Epoch of the next minibatch."""
        return self._epoch

    @property
    def step(self) -> int:
        """Step within the epoch of the next minibatch."""
        return self._step

    def __len__(self) -> int:
        return self.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; the position within the current epoch is kept."""
        if epoch != self._epoch:
            self.seek(epoch, 0)

    def seek(self, epoch: int, step: int) -> None:
        """Go on with this step of this epoch; an iterator in use ends."""
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"position: got epoch {epoch}, step {step}; epochs count from 0, steps from 0 to {self.steps_per_epoch}"
            )
        self._stop()
        self._epoch, self._step = epoch, step

    def cell_ids(self, minibatch: Minibatch) -> npt.NDArray[np.str_]:
        """(B,) ids of a minibatch's cells; for messages and results, as they are read on request."""
        return ids_of(self.store, minibatch.rows.cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Position after the minibatch last handed out, and what the order of cells rests on."""
        return {"epoch": self._epoch, "step": self._step, "plan": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the minibatch at which the state was taken, on any number of ranks.

        Streams, blocks and windows are taken from the state, so that the order stays the same though memory or
        the number of ranks changed.

        Raises
        ------
        ValueError
            The state is of other cells, another seed or another minibatch.
        """
        saved, mine = dict(state["plan"]), self._identity()
        for key in ("cells", "seed", "minibatch", "order", "fingerprint"):
            if saved[key] != mine[key]:
                raise ValueError(
                    f"loader state: got {key} {saved[key]!r}, this loader has {mine[key]!r};"
                    f" resume with the {key} of the run, or begin a new run"
                )
        if self._plan.order == "shuffled":
            if saved["streams"] < self.world:
                raise ValueError(
                    f"loader state: got {saved['streams']} streams for {self.world} ranks;"
                    f" resume on at most {saved['streams']} ranks"
                )
            cut = {key: checked(key, saved[key], Size) for key in ("streams", "block_cells", "window_cells")}
            self._plan = replace(self._plan, **cut)
        self.seek(int(state["epoch"]), int(state["step"]))

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "cells": plan.num_cells,
            "seed": plan.seed,
            "minibatch": plan.minibatch,
            "order": plan.order,
            "fingerprint": self.store.schema.fingerprint,
            "streams": plan.streams,
            "block_cells": plan.block_cells,
            "window_cells": plan.window_cells,
        }

    def __iter__(self) -> Iterator[Minibatch]:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError(
                "num_workers: got a DataLoader with worker processes, each of which would yield every cell;"
                " set num_workers=0: the loader reads ahead on threads of its own"
            )
        self._stop()
        return self._iterate()

    def _iterate(self) -> Iterator[Minibatch]:
        epoch = self._plan.epoch(self._epoch)
        if self._handover and has_given_up(self._on_device, self._handover.device):
            self._on_device = {}
        workers = self._workers = Workers(self._threads)
        groups = Prefetch(workers, self._schedule(epoch, self._step, workers), ahead=self._sizes.ahead)
        try:
            before = self.waited_seconds
            for ready in groups:
                self.waited_seconds = before + groups.waited_seconds
                minibatches = ready.receive() if isinstance(ready, Sent) else ready
                minibatches.reverse()
                del ready
                while minibatches:
                    minibatch = minibatches.pop()
                    is_last = minibatch.step + 1 == epoch.num_steps
                    self._epoch = minibatch.epoch + is_last
                    self._step = 0 if is_last else minibatch.step + 1
                    yield minibatch
                    del minibatch
        finally:
            workers.close()
            if self._plan.order != "shuffled":
                # The next pass is far away, and the memory is better with the training cells until then.
                self._forget_buffers()

    def _forget_buffers(self) -> None:
        pools = [pool for source in self._sources.values() for pool in (source.indices_pool, source.values_pool)]
        for pool in (self._pool, *pools):
            pool.clear()

    def _schedule(self, epoch: Epoch, step: int, workers: Workers) -> Iterator[Task[Ready]]:
        """Tasks that gather the groups of an epoch; each first submits the windows it opens.

        Windows are held until the last group that needs them has been submitted, and then by that group's task.
        """
        steps, width = max(1, self._sizes.group_cells * self.world // self._plan.minibatch), 1
        open_windows: dict[tuple[int, int], OpenWindow] = {}
        number = 0
        while step < epoch.num_steps:
            # The first groups are small, so that the first minibatch comes early.
            stop = min(epoch.num_steps, step + min(steps, width))
            width *= 4
            group = plan_group(epoch, step, stop, rank=self.rank, world=self.world)
            spans: list[tuple[Window, int, int]] = []
            for stream, (low, high) in zip(range(self.rank, self._plan.streams, self.world), group.spans, strict=True):
                spans += [
                    (w, max(int(low), w.start) - w.start, min(int(high), w.stop) - w.start)
                    for w in epoch.windows(stream, int(low), int(high))
                ]
            keys = [(window.stream, window.index) for window, _, _ in spans]
            for key, (window, _, _) in zip(keys, spans, strict=True):
                if key not in open_windows:
                    open_windows[key] = self._open(epoch, window, workers, priority=2 * number)
            held = [(open_windows[key], low, high) for key, (_, low, high) in zip(keys, spans, strict=True)]
            yield workers.submit(
                partial(self._gather, epoch.number, group, held),
                priority=2 * number + 1,
                after=[task for window, _, _ in held for task in window.parts.values()],
            )
            del held
            for key, (window, _, high) in zip(keys, spans, strict=True):
                if window.start + high == window.stop:
                    del open_windows[key]
            step, number = stop, number + 1

    def _open(self, epoch: Epoch, window: Window, workers: Workers, *, priority: int) -> OpenWindow:
        cells = workers.submit(partial(order_window, epoch, window), priority=priority)
        parts = {
            name: workers.submit(partial(_read, source, cells, self._skip_damaged), priority=priority, after=[cells])
            for name, source in self._sources.items()
        }
        return OpenWindow(cells, parts)

    def _gather(self, epoch: int, group: Group, held: Sequence[tuple[OpenWindow, int, int]]) -> Ready:
        slices = [
            Slice(
                result_of(window.cells).trained,
                {name: result_of(task) for name, task in window.parts.items()},
                low,
                high,
            )
            for window, low, high in held
        ]
        more: dict[str, Any] = {"sample": self._sample, "obs": self._obs, "on_device": self._on_device}
        minibatches, arrivals, block = assemble(slices, group, self._outputs, self._pool, epoch=epoch, **more)
        return minibatches if self._handover is None else self._handover.send(minibatches, arrivals, block)

    def close(self) -> None:
        """Stop the reader threads and free their memory; an iterator that is still in use ends with an error."""
        self._stop()
        self._forget_buffers()
        for rows in self._on_device.values():
            rows.give_up()

    def _stop(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read(source: ModalityInput, cells: Task[WindowCells], skip_damaged: bool) -> WindowRows:
    window = result_of(cells)
    return read_window(source, window.read, window.order, skip_damaged=skip_damaged)


def _check_ranks(streams: int, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank: got {rank} of {world} ranks; ranks count from 0 to {world - 1}")
    if streams < world:
        raise ValueError(f"streams: got {streams} for {world} ranks; give at least as many streams as ranks")
