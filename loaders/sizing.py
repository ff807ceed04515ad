"""What the machine gives: from one amount of memory to the sizes of blocks, windows and read-ahead; and its cores."""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

SHUFFLED_WINDOW = 32_768
"""Cells of all windows together where the store is shuffled: larger ones mix no better."""

UNSHUFFLED_WINDOW = 65_536
"""The same where cells stand in a meaningful order; with fewer, minibatches are visibly uneven (architecture.md)."""

UNSHUFFLED_BLOCK = 64
"""Cells of a block where cells stand in a meaningful order."""

GROUP_BYTES = 48 << 20
"""Output gathered in one go: large enough to hide the 0.3 ms a gather costs besides its cells, small enough for the
cache."""

GROUP_CELLS = 4_096
"""The most cells gathered in one go, unless the minibatch is larger."""


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_memory(amount: str | int) -> int:
    """Bytes of "512MiB", "1GiB", "2 GB" or a plain number.

    Raises
    ------
    ValueError
        The text is no amount of memory, or none above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", str(amount).upper())
    number = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if number < 1:
        raise ValueError(f"memory: got {amount!r}; give an amount such as 512MiB or 2GiB")
    return int(number)


def describe_memory(num_bytes: float) -> str:
    """An amount as `parse_memory` reads it."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


@dataclass(frozen=True)
class Sizes:
    """How the loader cuts the cells of a store.

    Attributes
    ----------
    block_cells, window_cells
        Cells read together, and cells of one stream shuffled together.
    group_cells
        Cells gathered in one go.
    ahead
        Gathered groups that may stand finished before the consumer asks.
    is_small
        Whether memory did not allow the windows this store should have.
    """

    block_cells: int
    window_cells: int
    group_cells: int
    ahead: int
    is_small: bool = False


def choose_sizes(
    *,
    memory: int,
    window_bytes_per_cell: float,
    output_bytes_per_cell: float,
    minibatch: int,
    streams: int,
    world: int,
    threads: int = 1,
    is_shuffled: bool,
    min_block: int = 1,
) -> Sizes:
    """Sizes whose memory stays below `memory` when one rank serves all streams.

    Half is for the windows in use, and that half knows nothing of ranks and minibatch: the order of cells
    must not change with them. The other half is for what is gathered ahead.

    Parameters
    ----------
    memory
        Bytes of windows and read-ahead of all modalities.
    threads
        That gather groups at the same time.
    window_bytes_per_cell, output_bytes_per_cell
        Mean bytes of a cell in a window and in a finished minibatch, over all modalities.
    min_block
        Smallest block the store reads well (a TileDB-SOMA tile).

    Raises
    ------
    ValueError
        Memory does not hold two minibatches and one block a stream.
    """
    half = memory / 2
    share = -(-minibatch // world)
    smallest = max(16, min_block)
    # A group ahead stands finished, and its windows beside those in use; one more group is with the consumer.
    most = max(3, threads + 2)
    per_cell = [(k + 1) * output_bytes_per_cell + k * window_bytes_per_cell for k in range(1, most + 1)]
    # Partly used windows of streams that have just opened the next one: a quarter of all windows at most.
    held = int(half / (1.25 * window_bytes_per_cell))
    if share * per_cell[0] > half or held < streams * smallest:
        needed = 2 * max(share * per_cell[0], streams * smallest * 1.25 * window_bytes_per_cell)
        raise ValueError(
            f"memory: got {memory / 2**20:.0f} MiB for minibatches of {minibatch} cells in {streams} streams, which"
            f" need {needed / 2**20:.0f} MiB; give more memory, or fewer cells a minibatch"
        )
    ahead = max(k for k in (1, 2, 3) if share * per_cell[k - 1] <= half)
    group = min(GROUP_CELLS, int(GROUP_BYTES / output_bytes_per_cell), int(half / per_cell[ahead - 1]))
    # A large minibatch is a group and so a task of one thread: more threads want more groups, as memory allows.
    ahead = max([ahead, *(k for k in range(4, most + 1) if max(share, group) * per_cell[k - 1] <= half)])
    wanted = SHUFFLED_WINDOW if is_shuffled else UNSHUFFLED_WINDOW
    window = max(smallest, min(held, wanted) // streams)
    block = window if is_shuffled else max(min_block, min(window, UNSHUFFLED_BLOCK))
    return Sizes(block, window, max(share, group), ahead, is_small=held < wanted)


def tell_sizes(uri: str, sizes: Sizes, streams: int) -> None:
    """Of a store whose cells stand in a meaningful order."""
    _log.info(
        "%s is not shuffled: reading blocks of %d cells, shuffling %d cells together; an ingest makes a"
        " shuffled store, which is read several times faster",
        uri,
        sizes.block_cells,
        sizes.window_cells * streams,
    )
    if sizes.is_small:
        _log.warning(
            "%s is not shuffled and memory allows windows of %d cells: minibatches may be uneven; give the loader more"
            " memory, or ingest the store",
            uri,
            sizes.window_cells * streams,
        )


def num_cores() -> int:
    """Cores this process may use; those of the machine where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks() -> int:
    """Processes of this run on this machine, as torchrun tells."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_memory() -> int:
    """Bytes that processes may still take: of the machine, or of the container; the largest number where none tells."""
    free = [sys.maxsize]
    with suppress(OSError):
        kilobytes = re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
        free += [int(kilobytes[1]) << 10] if kilobytes else []
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def gpu_threads() -> int:
    """Reader threads of a process that feeds a GPU: its share of the cores of its machine, at most 16."""
    return max(1, min(16, num_cores() // local_ranks()))


def default_threads() -> int:
    """Threads of a pool whose user chose no number: the cores, at most 4, beyond which readers and writers idle."""
    return min(4, num_cores())
