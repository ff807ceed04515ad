"""Killed at any moment and started again, commands leave what one straight run leaves."""

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

import liam_scale
from liam_scale.sweep import SweepConfig, members_of
from liam_scale.train import main as train
from loaders import open_store
from loaders.synthetic import simulate

KILLED_AT = """
import os, signal, sys
from liam_scale import embed
from liam_scale.cli import main
embed.CELLS_PER_STEP, embed.STEPS_PER_PIECE = 50, 1
if "evaluate" in sys.argv or "sweep" in sys.argv:  # a UMAP takes longer than all the rest
    from liam_scale.evaluation import plots
    plots.umap_coordinates = lambda points, seed: points[:, :2]
moment, folder, fsync, done = int(sys.argv.pop(1)), sys.argv.pop(1), os.fsync, 0
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def count():
    global done
    if done == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
def seen(event, given):
    if event in changes or event == "open" and given[2] & writing:
        path = os.fsdecode(given[0]) if isinstance(given[0], (str, bytes, os.PathLike)) else ""
        if path.startswith(folder) or path and not os.path.isabs(path):
            count()
def flushed(descriptor):
    count()
    fsync(descriptor)
sys.addaudithook(seen)
os.fsync = flushed
code = main(sys.argv[1:])
print(done)
sys.exit(code)
"""
"""Every change of a file and every flush is a moment, which is the same in every run but for the order of threads."""

RESULTS = {
    "ingest": ["out.zarr"],
    "embed": ["a.zarr/obsm/X_liam"],
    "decode": ["out.zarr"],
    "map": ["a.zarr/obsm/X_liam", "mapped/run.json", "mapped/model.safetensors"],
    "evaluate": ["scores/metrics.csv", "scores/umap.png", "scores/loss.png"],
    "sweep": [
        *("sweep/sweep.csv", "sweep/ranks.csv", "sweep/sweep.png", "sweep/runs/{run}.zarr"),
        *("sweep/runs/{run}-evaluation/metrics.csv", "sweep/runs/{run}-evaluation/umap.png"),
    ],
}
"""What each command makes: whole, the old one or the new one, at every moment, and the same bytes in the end."""

SWEEP = ("--alpha", "1", "--seeds", "0", "--max-epochs", "1", "--model", "rna-only")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a source, a run, and an embedding, all values of which are shifted by one."""
    folder = tmp_path_factory.mktemp("prepared")
    simulate(folder / "a.zarr", num_cells=300, num_genes=20, num_peaks=0, genes_per_cell=8, num_samples=2)
    liam_scale.read_store(folder / "a.zarr")["rna"].write_h5ad(folder / "source.h5ad")
    shutil.copytree(folder / "a.zarr", folder / "out.zarr")
    options = {"model": "rna-only", "n_hidden": 8, "n_latent": 3, "max_steps": 2, "minibatch": 32}
    liam_scale.train(folder / "a.zarr", out=folder / "run", batch_key="sample", **options).embed()
    store = open_store(folder / "a.zarr")
    values, attributes = store.read_embedding("X_liam", 0, 300), store.embedding_attributes("X_liam")[0]
    store.write_embedding("X_liam", values + 1, attributes)
    return folder


def command(word: str, folder: Path, *, draw: bool) -> list[str]:
    store, run = str(folder / "a.zarr"), str(folder / "run")
    scored = ["--batch-key", "sample", "--label-key", "cell_type", *([] if draw else ["--no-plots"])]
    return {
        "ingest": ["ingest", f"rna={folder / 'source.h5ad'}", "--out", str(folder / "out.zarr"), "--overwrite"],
        "embed": ["embed", run, "--store", store],
        "decode": ["decode", run, "--store", store, "--modality", "rna", "--out", str(folder / "out.zarr")],
        "map": ["map", run, store, "--out", str(folder / "mapped"), "--max-epochs", "1", "--overwrite"],
        "evaluate": ["evaluate", store, *scored, "--scib", "none", "--out", str(folder / "scores"), "--run", run],
        "sweep": ["sweep", store, *scored, "--out", str(folder / "sweep"), *SWEEP],
    }[word]


def laid_out(prepared: Path, folder: Path, word: str) -> str:
    """The folder in which a command is run and killed; the name of the sweep's run, of which the training is done."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    if word == "decode":
        shutil.rmtree(folder / "out.zarr")
    config = SweepConfig(
        (str(folder / "a.zarr"),), folder / "sweep", ("sample",), (1.0,), (0,), ("rna-only",), max_epochs=1
    )
    [run] = members_of(config)
    if word == "sweep" and not (trained := folder.with_name("trained")).exists():
        assert train(run.command[run.command.index("liam_scale.train") + 1 :]) == 0
        shutil.copytree(run.folder, trained)
    elif word == "sweep":
        shutil.copytree(trained, run.folder)
    return run.folder.name


def start(arguments: list[str], folder: Path, moment: int = -1) -> subprocess.CompletedProcess[str]:
    return run_ranks([moment, folder, *arguments], 1, code=KILLED_AT)


def contents(path: Path) -> dict[str, bytes]:
    """Of a file, or of every file below a folder; empty where there is none."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize(
    ("word", "kills"),
    [
        ("evaluate", 2),
        *(pytest.param(word, 20, marks=pytest.mark.slow) for word in RESULTS),
    ],
)
def test_a_killed_command_leaves_the_old_result_or_the_new_and_then_that_of_a_straight_run(
    prepared: Path, tmp_path: Path, word: str, kills: int, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "here"
    run = laid_out(prepared, folder, word)
    arguments, names = command(word, folder, draw=kills > 2), [name.format(run=run) for name in RESULTS[word]]
    old = [contents(folder / name) for name in names]
    straight = start(arguments, folder)
    assert straight.returncode == 0, straight.stderr
    new, made = [contents(folder / name) for name in names], set(contents(folder))
    assert old != new

    laid_out(prepared, folder, word)
    number, codes = int(straight.stdout.split()[-1]), []
    for moment in np.linspace(0, number - 1, kills).astype(int):
        codes.append(start(arguments, folder, int(moment)).returncode)
        for name, *states in zip(names, old, new, strict=True):
            assert contents(folder / name) in states, (name, moment)
        assert np.isfinite(open_store(folder / "a.zarr").read_embedding("X_liam", 0, 300)).all()
    assert set(codes) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in codes
    record_property("kills", codes.count(-signal.SIGKILL))

    last = start(arguments, folder)
    assert last.returncode == 0, last.stderr
    assert [contents(folder / name) for name in names] == new
    assert set(contents(folder)) == made
