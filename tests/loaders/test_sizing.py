"""Sizes follow from memory; the order of cells does not follow from ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.sizing import SHUFFLED_WINDOW, UNSHUFFLED_BLOCK, UNSHUFFLED_WINDOW, choose_sizes

ROOT = Path(__file__).resolve().parents[2]


def sizes(memory=1 << 30, *, window=3_600, output=9_600, minibatch=128, streams=16, world=1, is_shuffled=True, **more):
    return choose_sizes(
        memory=memory,
        window_bytes_per_cell=window,
        output_bytes_per_cell=output,
        minibatch=minibatch,
        streams=streams,
        world=world,
        is_shuffled=is_shuffled,
        **more,
    )


@given(
    memory=st.integers(1 << 22, 1 << 34),
    window=st.floats(100, 30_000),
    output=st.floats(100, 60_000),
    minibatch=st.integers(1, 8_192),
    streams=st.integers(1, 64),
    world=st.integers(1, 16),
    is_shuffled=st.booleans(),
)
def test_what_stands_in_memory_is_no_more_than_asked(memory, window, output, minibatch, streams, world, is_shuffled):
    options = {"window": window, "output": output, "minibatch": minibatch, "streams": streams}
    try:
        chosen = sizes(memory, **options, world=world, is_shuffled=is_shuffled)
    except ValueError:
        return
    windows = 1.25 * streams * chosen.window_cells * window
    ahead = chosen.group_cells * ((chosen.ahead + 1) * output + chosen.ahead * window)
    assert windows + ahead <= memory * 1.001
    assert chosen.group_cells * world >= minibatch
    assert 1 <= chosen.block_cells <= chosen.window_cells
    one = sizes(memory * 64, **options, world=1, is_shuffled=is_shuffled)
    many = sizes(memory * 64, **options, world=world, is_shuffled=is_shuffled)
    assert (one.block_cells, one.window_cells) == (many.block_cells, many.window_cells)


def test_windows_are_no_larger_than_mixing_needs():
    assert sizes(1 << 34).window_cells * 16 == SHUFFLED_WINDOW
    unshuffled = sizes(1 << 34, is_shuffled=False)
    assert (unshuffled.window_cells * 16, unshuffled.block_cells) == (UNSHUFFLED_WINDOW, UNSHUFFLED_BLOCK)
    assert not unshuffled.is_small
    assert sizes(200 << 20, is_shuffled=False).is_small
    assert sizes(1 << 34, is_shuffled=False, min_block=2_048).block_cells == 2_048


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(
        ValueError, match=r"memory: got 64 MiB for minibatches of 4096 cells in 16 streams.*need \d+ MiB"
    ):
        sizes(64 << 20, minibatch=4_096)


PROGRAM = """
import sys, threading
from pathlib import Path
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores.open import open_store

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

path, memory, minibatch, transpose = sys.argv[1:]
store = open_store(path)
config = LoaderConfig(minibatch=int(minibatch), memory=memory)
make = lambda: Loader(store, config, transpose=transpose == "1", subset="all")
next(iter(make()))  # kernels are compiled
warm = Loader(store, LoaderConfig(minibatch=16, memory="100MiB"), subset="all")
next(iter(warm))
warm.close()
del warm
base, peak, over = resident(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
loader = make()
for _ in range(2):
    for minibatch in loader:
        pass
over.set()
thread.join()
print((peak - base) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("transpose", ["0", "1"])
@pytest.mark.parametrize("minibatch", ["128", "1024"])
@pytest.mark.parametrize("memory", [200, 400])
def test_measured_memory_stays_within_the_bound(tmp_path_factory, memory, minibatch, transpose):
    from loaders.synthetic import simulate

    path = tmp_path_factory.getbasetemp() / "sizing.zarr"
    if not path.exists():
        simulate(path, num_cells=40_000, num_genes=8_000, num_peaks=20_000, genes_per_cell=700, peaks_per_cell=900)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), f"{memory}MiB", minibatch, transpose],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(memory, minibatch, transpose, done.stdout)
    assert float(done.stdout) < 1.15 * memory
