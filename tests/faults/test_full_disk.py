"""A disk that is full at any moment of a training or of a decoding: said with the path, nothing lost, and gone on."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import liam_scale
from liam_scale.decode import main as decode
from liam_scale.run import RunDirectory
from liam_scale.train import main as train

OPTIONS = ("--batch-key", "sample", "--max-steps", "6", "--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32")
OPTIONS = (*OPTIONS, "--training.checkpoint-steps", "2", "--training.validate-every", "2")


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train([str(store), "--out", str(out), *OPTIONS]) == 0
    return out


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


# In pages of 4 KiB; the whole run takes about 90.
SIZES = range(4, 100)


@pytest.mark.parametrize("pages", [pytest.param(n, marks=[] if n % 12 == 4 else pytest.mark.slow) for n in SIZES])
def test_a_training_whose_disk_is_full_goes_on_when_there_is_room(
    store: Path,
    straight: Path,
    disk_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    pages: int,
) -> None:
    disk = disk_of(f"{4 * pages}k")
    out = disk / "run"
    code, said = train([str(store), "--out", str(out), *OPTIONS]), capsys.readouterr().err
    if code:
        assert code == 1
        assert "disk full" in said
        assert str(out) in said
        assert "Traceback" not in said
        assert not list(disk.rglob(".*.partial"))
        resize(disk, "4m")
        assert train([str(store), "--out", str(out), *OPTIONS]) == 0
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    told = [(run / "history.csv").read_text().splitlines() for run in (out, straight)]
    assert [line.split(",")[:2] for line in told[0]] == [line.split(",")[:2] for line in told[1]]
    assert RunDirectory(out).is_finished


def test_a_decoding_whose_disk_is_full_leaves_nothing_and_works_when_there_is_room(
    straight: Path, disk_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    liam_scale.load_run(straight).embed()
    disk = disk_of("24k")
    arguments = [str(straight), "--out", str(disk / "a.zarr"), "--modality", "rna"]
    assert decode(arguments) == 1
    said = capsys.readouterr().err
    assert "disk full" in said
    assert str(disk / "a.zarr") in said
    assert not list(disk.iterdir())
    resize(disk, "4m")
    assert decode(arguments) == 0
