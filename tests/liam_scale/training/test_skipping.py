"""Training around damaged chunks: the same cells are left out on any number of ranks and after any resume, and told."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from liam_scale.run import RunDirectory
from liam_scale.train import main
from liam_scale.training.distributed import World
from liam_scale.training.skipping import SkippingSource, lost_rows
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores import open_store
from loaders.synthetic import simulate

SHORT = ("--batch-key", "sample", "--model.n-hidden", "16", "--n-latent", "4", "--minibatch", "64", "--memory", "64MiB")
COSTS = ["cells_per_second", "waiting_share"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 cells, of which the first chunk of RNA has a flipped bit."""
    path = tmp_path_factory.mktemp("stores") / "damaged.zarr"
    simulate(path, num_cells=600, num_genes=60, num_peaks=150, genes_per_cell=20, peaks_per_cell=40, num_samples=3)
    file = path / "mod/rna/X/data/c/0"
    whole = file.read_bytes()
    file.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    return path


def train(store: Path, out: Path, *options: object) -> int:
    return main([str(store), "--out", str(out), *SHORT, *map(str, options)])


def history(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "history.csv").drop(columns=COSTS)


def test_the_cells_are_left_out_counted_and_listed_and_a_resume_is_exact(
    damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(damaged, straight, "--max-steps", 20, "--on-bad-chunk", "skip") == 0
    assert "mod/rna/X/data: got damaged data: chunk 0 (the cells 0 to " in caplog.text
    assert "cells in damaged chunks are left out until now" in caplog.text
    skipped = RunDirectory(straight).record().skipped
    assert 200 < len(skipped) < 300
    assert history(straight)["skipped_cells"].iloc[-1] == len(skipped)
    for steps in (5, 20):
        assert train(damaged, resumed, "--max-steps", steps, "--on-bad-chunk", "skip") == 0
    assert RunDirectory(resumed).record().skipped == skipped
    names = ["model.safetensors"]
    assert [(resumed / name).read_bytes() for name in names] == [(straight / name).read_bytes() for name in names]


def test_a_minibatch_says_how_many_of_its_cells_are_trained(damaged: Path) -> None:
    with Loader(open_store(damaged), LoaderConfig(minibatch=64), sample="sample", skip_damaged=True) as loader:
        source = SkippingSource(loader, World())
        seen = [(len(minibatch.rows), len(minibatch.lost), minibatch.num_global) for minibatch in source]
    assert all(read == num_global for read, _, num_global in seen)
    assert sum(read + lost for read, lost, _ in seen) == loader.num_cells
    assert source.num_cells == loader.num_cells - len(source.lost)
    assert source.state_dict()["lost"] == lost_rows(source, None)


def test_two_ranks_train_on_the_same_cells_with_the_same_weights(
    damaged: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(damaged, one, "--max-steps", 12, "--on-bad-chunk", "skip") == 0
    options = ("--max-steps", 12, "--on-bad-chunk", "skip")
    done = launch("liam_scale.train", damaged, "--out", two, *SHORT, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(history(one), history(two), rtol=1e-6)
    assert RunDirectory(one).record().skipped == RunDirectory(two).record().skipped


def test_without_the_option_training_stops_and_with_it_it_goes_on(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(damaged, tmp_path / "run", "--max-steps", 12) == 1
    assert "got damaged data: chunk 0" in capsys.readouterr().err
    assert train(damaged, tmp_path / "run", "--max-steps", 12, "--on-bad-chunk", "skip") == 0


def test_a_store_of_which_nothing_can_be_read_is_not_skipped(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(damaged, tmp_path / "s.zarr"))
    (store / "mod/rna/X/data/c/0").unlink()
    assert train(store, tmp_path / "run", "--max-steps", 12, "--on-bad-chunk", "skip") == 1
    assert "none of the 64 cells of epoch 0, step 0 can be read" in capsys.readouterr().err
