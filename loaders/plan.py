"""The order of cells: which rank trains which cells at which step of which epoch.

Pure arithmetic on row numbers, no I/O. Everything follows from (seed, epoch) and the row numbers, so a position
(epoch, step) can be sought without replaying what came before it.

Shapes: n rows of the plan, V streams, K steps an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint32]
Order = Literal["shuffled", "ranges", "disk"]

SPLIT, BLOCKS, WINDOW, COPIES = 1, 2, 3, 4
"""Purposes that key the random bits, so that no two uses share a stream of bits."""


def random_bits(count: int, *, seed: int, purpose: int, epoch: int = 0, stream: int = 0, window: int = 0) -> np.ndarray:
    """Return (count,) uint64 random bits, a pure function of the key.

    Philox bits are the same in every NumPy version; `Generator.permutation` promises no such thing.
    """
    key = np.array([seed & (2**64 - 1), purpose], np.uint64)
    counter = np.array([0, window, stream, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


GOLDEN = 0x9E3779B97F4A7C15
"""Step of splitmix64."""


def splitmix64(bits: Any) -> Any:
    """Well mixed uint64 bits of a number or an array of them (Steele, Lea & Flood, OOPSLA 2014)."""
    bits = bits + np.uint64(GOLDEN)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def mix(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash (n,) keys with a seed."""
    salt = random_bits(1, seed=seed, purpose=SPLIT)[0]
    return np.asarray(splitmix64(splitmix64(keys.astype(np.uint64) ^ salt)))


def split(
    keys: npt.NDArray[np.uint64], codes: npt.NDArray[np.integer] | None, *, seed: int, share: float
) -> npt.NDArray[np.bool_]:
    """Choose the validation cells: in every sample the cells whose hashed key is smallest.

    Parameters
    ----------
    keys
        (n,) one number per cell that stays with the cell wherever it stands (a hash of its id, or its row).
    codes
        (n,) sample of each cell, or None for one sample.
    share
        Share of each sample that validates, rounded to the nearest cell; a sample never gives its last cell.

    Returns
    -------
    (n,) bool, True for validation cells.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"validation_share: got {share}, must be at least 0 and below 1")
    chosen = np.zeros(len(keys), np.bool_)
    if share == 0.0 or not len(keys):
        return chosen
    hashed = mix(keys, seed)
    codes = np.zeros(len(keys), np.int32) if codes is None else codes - codes.min()
    sizes = np.bincount(codes)
    take = np.minimum(np.floor(sizes * share + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    # Sorting ten million cells takes seconds: only those that may be chosen are, and all of a sample with too few such.
    near = hashed < np.uint64(min(2**64 - 1, int(2 * share * 2**64)))
    near |= (np.bincount(codes[near], minlength=len(sizes)) < take)[codes]
    rows = np.flatnonzero(near)
    order = rows[np.lexsort((hashed[rows], codes[rows]))]
    sizes = np.bincount(codes[rows], minlength=len(sizes))
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen[order[rank < np.repeat(take, sizes)]] = True
    return chosen


def weighted_rows(rows: Rows, weights: npt.NDArray[np.floating], *, seed: int, epoch: int) -> Rows:
    """Repeat every row so that it stands `weights` times in expectation, the total being the rounded sum.

    Systematic sampling (Madow 1949): each row gets the floor or the ceiling of its weight. Rows of equal weight stand
    together, in random order, so that a class of rows also gets its share up to one row.
    """
    bits = random_bits(len(rows) + 1, seed=seed, purpose=COPIES, epoch=epoch)
    order = np.lexsort((bits[1:], weights))
    total = np.sum(weights, dtype=np.float64)
    edges = np.cumsum(weights[order], dtype=np.float64) * (round(total) / total)
    edges[-1] = round(total)
    offset = float(bits[0] >> np.uint64(11)) * 2.0**-53
    copies = np.empty(len(rows), np.int64)
    copies[order] = np.diff(np.floor(edges + offset), prepend=np.floor(offset)).astype(np.int64)
    return np.repeat(rows, copies)


LEAST_PIECE = 64
"""Cells of a part of a store that are read together at least, where blocks are large: a chunk holds about 256."""


def interleaved(sizes: npt.NDArray[np.integer], *, groups: int) -> npt.NDArray[np.int64]:
    """Order of items that stand in parts of these sizes: each of the groups that are cut has its share of each part.

    A part that has less than a piece worth reading for every group is in every second, third, ... of them, evenly.
    """
    total = int(sizes.sum())
    least = max(1, min(LEAST_PIECE, total // max(1, 8 * groups)))
    of_item = []
    for size in sizes.tolist():
        pieces = max(1, min(groups, size // least))
        piece = np.arange(size, dtype=np.int64) * pieces // max(1, size)
        of_item.append((2 * piece + 1) * groups // (2 * pieces))
    return np.argsort(np.concatenate(of_item), kind="stable")


@dataclass(frozen=True)
class Window:
    """Cells of one stream that are held in memory and shuffled together.

    Attributes
    ----------
    stream, index
        Which window of which stream.
    start, stop
        Cells [start, stop) of the stream.
    pieces
        (p, 2) ranges of the epoch's rows, in the order of reading; together stop - start cells.
    """

    stream: int
    index: int
    start: int
    stop: int
    pieces: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut; `epoch(e)` gives the order of one epoch.

    Attributes
    ----------
    rows
        (n,) rows of the store that take part, ascending.
    parts
        Cells of each part of the store, where each is in a random order of its own; none: it is one.
    minibatch
        Cells of a global minibatch; the last steps of an epoch are not smaller than the others.
    streams
        V. Rank r of W serves the streams r, r + W, r + 2 W, ...
    block_cells, window_cells
        Cells read together, and cells of one stream shuffled together.
    order
        "shuffled"; "ranges": no shuffling, stream v holds the v-th contiguous part of the rows; "disk": no
        shuffling, global minibatches in the order of the rows, stream v holds the v-th part of each.
    row_alignment
        Blocks begin at multiples of this row (the tile of a TileDB-SOMA array); 1 cuts blocks of equal size.
    weights
        (n,) expected copies of each row in an epoch, or None for every row once.
    """

    rows: Rows
    minibatch: int
    streams: int = 16
    block_cells: int = 1024
    window_cells: int = 1024
    seed: int = 0
    order: Order = "shuffled"
    row_alignment: int = 1
    weights: npt.NDArray[np.float32] | None = None
    parts: tuple[int, ...] = ()

    @cached_property
    def num_cells(self) -> int:
        """Cells of an epoch over all ranks."""
        return len(self.rows) if self.weights is None else round(float(np.sum(self.weights, dtype=np.float64)))

    @property
    def num_steps(self) -> int:
        """K."""
        return -(-self.num_cells // self.minibatch)

    @property
    def used_streams(self) -> int:
        """Streams that hold cells.

        With at most half as many streams as cells in a minibatch some stream holds at least K cells, so that no
        global minibatch is empty.
        """
        return min(self.streams, max(1, self.minibatch // 2)) if self.order == "shuffled" else self.streams

    @cached_property
    def block_edges(self) -> npt.NDArray[np.int64]:
        """Cuts of the epoch's rows into blocks, for every epoch the same unless rows are weighted."""
        return self._cut(self.rows)

    @cached_property
    def _mixed(self) -> npt.NDArray[np.int64] | slice:
        """Places of the rows in the order in which blocks are cut: each block has its share of each part."""
        if len(self.parts) < 2 or self.row_alignment > 1:
            return slice(None)
        sizes = np.diff(np.searchsorted(self.rows, np.cumsum((0, *self.parts))))
        return interleaved(sizes, groups=len(self.block_edges) - 1)

    def _cut(self, rows: Rows) -> npt.NDArray[np.int64]:
        count, streams = len(rows), self.used_streams
        if self.row_alignment > 1 and count:
            tile = -(-self.block_cells // self.row_alignment) * self.row_alignment
            edges = np.searchsorted(rows, np.arange(0, int(rows[-1]) + 1 + tile, tile, dtype=np.int64))
            return np.unique(edges).astype(np.int64)
        # At least four blocks a stream, so that small data is shuffled too; as many in each, so that ranks are even.
        size = min(self.block_cells, max(32, count // (4 * streams)))
        blocks = min(count, streams * -(-count // (streams * max(1, size))))
        return np.arange(blocks + 1, dtype=np.int64) * count // max(1, blocks)

    def epoch(self, number: int) -> Epoch:
        """Order of the cells in epoch `number`, a pure function of plan and number."""
        if self.order != "shuffled":
            return Epoch(self, number, self.rows, _sequential_pieces(self))
        edges, mixed = self.block_edges, self._mixed
        rows = self.rows[mixed]
        if self.weights is not None:
            rows = weighted_rows(rows, self.weights[mixed], seed=self.seed, epoch=number)
            edges = self._cut(rows)
        bits = random_bits(len(edges) - 1, seed=self.seed, purpose=BLOCKS, epoch=number)
        order = np.argsort(bits, kind="stable")
        used = self.used_streams
        pieces = [
            _stream_pieces(
                edges, order[v::used], (v + 0.5) / used, self.window_cells, may_split=self.row_alignment == 1
            )
            for v in range(used)
        ]
        empty = (np.empty((0, 2), np.int64), np.zeros(1, np.int64))
        return Epoch(self, number, rows, pieces + [empty] * (self.streams - used))


Pieces = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Of one stream: (p, 2) ranges of rows in order, and where each window begins among them (with an end)."""


def _stream_pieces(
    edges: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int64],
    phase: float,
    window_cells: int,
    *,
    may_split: bool,
) -> Pieces:
    """Blocks of one stream as pieces in windows; the first window is cut short by the stream's phase.

    Streams advance at the same pace, so with equal first windows all would open their next window at the same
    step, and twice the windows would stand in memory. The rest of a split first block comes last; a block that is one
    tile on disk stays whole, as reading half of it costs as much.
    """
    pieces = np.stack((edges[blocks], edges[blocks + 1]), axis=1)
    count = len(pieces)
    if not count:
        return pieces, np.zeros(1, np.int64)
    cells = (pieces[:, 1] - pieces[:, 0]).sum()
    per_window = max(1, round(window_cells * count / max(1, int(cells))))
    first = int(phase * per_window)
    if first == 0 and may_split:
        low, high = pieces[0]
        middle = low + int(phase * per_window * (high - low))
        if low < middle < high:
            pieces = np.concatenate(([[low, middle]], pieces[1:], [[middle, high]]))
        count = len(pieces)
    windows = np.arange(max(1, first), count, per_window, dtype=np.int64)
    return pieces, np.concatenate(([0], windows, [count]))


def _sequential_pieces(plan: Plan) -> list[Pieces]:
    """Pieces of the unshuffled orders: a window is `window_cells` consecutive cells of the stream."""
    count, streams, steps = plan.num_cells, plan.streams, plan.num_steps
    result = []
    for v in range(streams):
        if plan.order == "ranges" or streams == 1:
            low, high = v * count // streams, (v + 1) * count // streams
            cuts = np.append(np.arange(low, high, plan.window_cells, dtype=np.int64), high)
            pieces, per_window = np.stack((cuts[:-1], cuts[1:]), axis=1), 1
        else:
            edges = np.arange(steps + 1, dtype=np.int64) * count // max(1, steps)
            sizes = np.diff(edges)
            pieces = np.stack((edges[:-1] + sizes * v // streams, edges[:-1] + sizes * (v + 1) // streams), axis=1)
            per_window = max(1, plan.window_cells * streams // plan.minibatch)
        result.append((pieces, np.append(np.arange(0, len(pieces), per_window, dtype=np.int64), len(pieces))))
    return result


class Epoch:
    """Order of the cells of one epoch.

    Attributes
    ----------
    rows
        (num_cells,) rows of the store this epoch draws from, in the order in which blocks are cut; a weighted row may
        stand several times.
    stream_cells
        (V,) cells of each stream.
    """

    def __init__(self, plan: Plan, number: int, rows: Rows, pieces: list[Pieces]) -> None:
        self.plan, self.number, self.rows, self._pieces = plan, number, rows, pieces
        self.num_steps = plan.num_steps
        self._piece_ends = [np.cumsum(p[:, 1] - p[:, 0]) for p, _ in pieces]
        self._window_edges = [
            np.concatenate(([0], ends))[windows] for ends, (_, windows) in zip(self._piece_ends, pieces, strict=True)
        ]
        self.stream_cells = np.array([edges[-1] for edges in self._window_edges], np.int64)
        total = max(1, int(self.stream_cells.sum()))
        before = np.cumsum(self.stream_cells) - self.stream_cells
        # Hermite's identity: with these offsets the streams' roundings cancel, and minibatches of equal streams
        # differ by one cell instead of V.
        self._offsets = np.minimum(before * self.num_steps // total, max(0, self.num_steps - 1))

    @cached_property
    def _step_ends(self) -> npt.NDArray[np.int64]:
        return np.stack([np.concatenate(([0], ends)) for ends in self._piece_ends], axis=1)

    def positions(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(len(steps), V) cells that each stream has yielded before each step."""
        steps = np.asarray(steps, np.int64)
        if self.plan.order == "disk" and self.plan.streams > 1:
            return self._step_ends[steps]
        return (steps[:, None] * self.stream_cells + self._offsets) // max(1, self.num_steps)

    def windows(self, stream: int, start: int, stop: int) -> Iterator[Window]:
        """Windows that hold the cells [start, stop) of a stream."""
        if start >= stop:
            return
        edges = self._window_edges[stream]
        index = int(np.searchsorted(edges, start, side="right")) - 1
        pieces, cuts = self._pieces[stream]
        while index < len(edges) - 1 and edges[index] < stop:
            if edges[index] < edges[index + 1]:
                span = pieces[cuts[index] : cuts[index + 1]]
                yield Window(stream, index, int(edges[index]), int(edges[index + 1]), span)
            index += 1

    def window_rows(self, window: Window) -> Rows:
        """(stop - start,) rows of a window in the order of reading."""
        return np.concatenate([self.rows[low:high] for low, high in window.pieces])

    def window_order(self, window: Window) -> npt.NDArray[np.int64]:
        """(stop - start,) place in `window_rows` of each cell of the window, in the order of training."""
        count = window.stop - window.start
        if self.plan.order != "shuffled":
            return np.arange(count)
        bits = random_bits(
            count, seed=self.plan.seed, purpose=WINDOW, epoch=self.number, stream=window.stream, window=window.index
        )
        return np.argsort(bits, kind="stable")

    def cells(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[Rows, npt.NDArray[np.int64], int]:
        """Rows of a rank's share of a minibatch, their places in the global minibatch, and its number of cells.

        The plain definition; the loader assembles many steps at once.
        """
        begin, end = self.positions(np.array([step, step + 1]))
        places = np.cumsum(end - begin) - (end - begin)
        rows, place = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for stream in range(rank, self.plan.streams, world):
            low, high = int(begin[stream]), int(end[stream])
            for window in self.windows(stream, low, high):
                trained = self.window_rows(window)[self.window_order(window)]
                rows.append(trained[max(low, window.start) - window.start : high - window.start])
            place.append(np.arange(high - low) + places[stream])
        return np.concatenate(rows), np.concatenate(place), int((end - begin).sum())
