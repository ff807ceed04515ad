"""Killed at any moment and started again, commands leave what one straight run leaves."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

import liam_scale
from loaders import open_store
from loaders.synthetic import simulate

KILLED_AT = """
import os, signal, sys
from liam_scale import embed
from liam_scale.cli import main
embed.CELLS_PER_STEP, embed.STEPS_PER_PIECE = 50, 1
fsync, left = os.fsync, [int(sys.argv.pop(1))]
def counted(descriptor):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return fsync(descriptor)
os.fsync = counted
sys.exit(main(sys.argv[1:]))
"""
"""Every write ends in a flush: a number of flushes is a moment that is the same in every run."""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a run and the store's embedding, all values of it shifted by one."""
    folder = tmp_path_factory.mktemp("embedded")
    simulate(folder / "a.zarr", num_cells=300, num_genes=20, num_peaks=0, genes_per_cell=8, num_samples=2)
    options = {"model": "rna-only", "n_hidden": 8, "n_latent": 3, "max_steps": 2, "minibatch": 32}
    liam_scale.train(folder / "a.zarr", out=folder / "run", batch_key="sample", **options).embed()
    return folder


def command(word: str, folder: Path) -> list[str]:
    store, run = str(folder / "a.zarr"), str(folder / "run")
    return {
        "embed": ["embed", run, "--store", store],
        "decode": ["decode", run, "--store", store, "--modality", "rna", "--out", str(folder / "out.zarr")],
        "map": ["map", run, store, "--out", str(folder / "mapped"), "--max-epochs", "1", "--overwrite"],
        "ingest": ["ingest", f"rna={folder / 'source.h5ad'}", "--out", str(folder / "out.zarr"), "--overwrite"],
    }[word]


def start(arguments: list[str], moment: int) -> int:
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(moment), *arguments], capture_output=True, timeout=120)
    return done.returncode


def contents(path: Path) -> dict[str, bytes]:
    """Of every file below a path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [20])
@pytest.mark.parametrize(("word", "out", "flushes"), [("ingest", "out.zarr", 60)])
def test_a_killed_command_leaves_the_old_result_or_the_new_and_then_that_of_a_straight_run(
    embedded: Path,
    tmp_path: Path,
    word: str,
    out: str,
    flushes: int,
    number: int,
    record_property: Callable[[str, object], None],
) -> None:
    straight = shutil.copytree(embedded, tmp_path / "straight")
    folder = shutil.copytree(embedded, tmp_path / "killed")
    for place in (straight, folder):
        liam_scale.read_store(place / "a.zarr")["rna"].write_h5ad(place / "source.h5ad")
    assert start(command(word, straight), 10**9) == 0
    expected = contents(straight / out)
    codes = []
    for moment in range(0, flushes, max(1, flushes // number)):
        codes.append(start(command(word, folder), moment))
        if (folder / out).exists():
            assert codes[-1] == 0 or open_store(folder / out).schema.num_cells == 300
    record_property("kills", codes.count(-signal.SIGKILL))
    assert set(codes) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in codes
    assert start(command(word, folder), 10**9) == 0
    found = contents(folder / out)
    assert found.keys() == expected.keys()
    # The path of the source stands in a store's provenance, and times in neither.
    differing = [
        name for name in expected if found[name] != expected[name] and name != "zarr.json" and "uns/" not in name
    ]
    assert not differing
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".partial")]


def result(word: str, folder: Path) -> np.ndarray:
    if word == "decode":
        return np.asarray(zarr.open_group(folder / "out.zarr", mode="r")["X"][:])
    return open_store(folder / "a.zarr").read_embedding("X_liam", 0, 300)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["embed", "decode", "map"])
def test_killed_at_twenty_moments_it_leaves_what_a_straight_run_leaves(
    embedded: Path, tmp_path: Path, word: str
) -> None:
    straight = shutil.copytree(embedded, tmp_path / "straight")
    assert start(command(word, straight), 10**9) == 0
    folder = shutil.copytree(embedded, tmp_path / "killed")
    store = open_store(folder / "a.zarr")
    old = store.read_embedding("X_liam", 0, 300) + 1
    if word != "decode":
        store.write_embedding("X_liam", old, store.embedding_attributes("X_liam")[0])
    codes = []
    for moment in range(20):
        codes.append(start(command(word, folder), moment))
        if codes[-1] == 0:
            break
        if word != "decode":
            shown = result(word, folder)
            assert np.array_equal(shown, old) or np.array_equal(shown, result(word, straight))
        else:
            assert not (folder / "out.zarr").exists()
    assert set(codes) <= {0, -signal.SIGKILL}
    assert len(codes) > 5
    if codes[-1] != 0:
        assert start(command(word, folder), 10**9) == 0
    np.testing.assert_array_equal(result(word, folder), result(word, straight))
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".partial")]
