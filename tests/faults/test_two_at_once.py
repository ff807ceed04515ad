"""Of two commands that write the same thing at once, the second says who is at it and leaves everything as it is."""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import liam_scale
from liam_scale import embed
from liam_scale.decode import main as decode_main
from liam_scale.map import main as map_main
from liam_scale.run import RunDirectory
from liam_scale.sweep import main as sweep_main
from liam_scale.train import main as train_main
from loaders import open_store
from loaders.durable import holding, replacing
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, store with its embedding)."""
    folder = tmp_path_factory.mktemp("embedded")
    simulate(folder / "a.zarr", num_cells=120, num_genes=20, num_peaks=0, genes_per_cell=8, num_samples=2)
    options = {"model": "rna-only", "n_hidden": 8, "n_latent": 3, "max_steps": 2, "minibatch": 32}
    run = liam_scale.train(folder / "a.zarr", out=folder / "run", batch_key="sample", **options)
    run.embed()
    return run.path, folder / "a.zarr"


def refused(capsys: pytest.CaptureFixture[str], other: AbstractContextManager[object], command: object) -> None:
    with other:
        assert command() == 1  # type: ignore[operator]
    said = capsys.readouterr().err
    assert f"process {os.getpid()} on " in said
    assert "wait until it has ended" in said


def test_train(embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = [
        str(embedded[1]),
        "--out",
        str(out),
        "--batch-key",
        "sample",
        "--model",
        "rna-only",
        "--max-steps",
        "1",
    ]
    refused(capsys, holding(out), lambda: train_main(arguments))
    assert not out.exists()
    assert train_main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_embed(embedded: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, store = embedded
    config = embed.EmbedConfig(run=run)
    pieces = run / f"embedding-{embed._fingerprint(config, RunDirectory(run), open_store(store))}"
    refused(capsys, holding(pieces), lambda: embed.main([str(run)]))
    assert embed.main([str(run)]) == 0
    assert not list(run.glob(".*"))


def test_decode(embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = embedded[0], tmp_path / "values.zarr"
    arguments = [str(run), "--out", str(out), "--modality", "rna"]
    other = replacing(out, alone=True)
    with other as path:
        path.mkdir()
        assert decode_main(arguments) == 1
        assert not out.exists()
    assert f"process {os.getpid()} on " in capsys.readouterr().err


def test_map(embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store, out = embedded[0], shutil.copytree(embedded[1], tmp_path / "new.zarr"), tmp_path / "mapped"
    arguments = [str(run), str(store), "--out", str(out), "--max-epochs", "1", "--overwrite"]
    refused(capsys, holding(out), lambda: map_main(arguments))
    assert not out.exists()
    assert map_main(arguments) == 0


def test_sweep(embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    refused(capsys, holding(out), lambda: sweep_main([str(embedded[1]), "--out", str(out), "--batch-key", "sample"]))
    assert not out.exists()
