"""A disk that is full at any moment of a training, a decoding, an evaluation: said with the path, nothing lost."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks

import liam_scale
from liam_scale.decode import main as decode
from liam_scale.evaluate import main as evaluate
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


def wanting(command: list[object], disk: Path) -> str | None:
    """Train on two ranks until the disk is full; the name of what has no room, as it is told."""
    codes, said = zip(*(rank.ends() for rank in start_ranks(command, 2)), strict=True)
    if not any(codes):
        return None
    assert codes == (1, 1)
    told = "".join(said)
    assert told.count("disk full") == told.count("error") == 1, told
    assert not re.search(r"Traceback|gloo|c10d", told)
    assert not list(disk.rglob(".*.partial"))
    [path] = re.findall(r"writing (\S+): disk full", told)
    assert Path(path).is_relative_to(disk / "run")
    return Path(path).name


def test_of_two_ranks_the_one_that_writes_tells_of_the_full_disk_and_both_end(
    store: Path, disk_of: Callable[[str], Path]
) -> None:
    disk = disk_of("84k")
    assert wanting([store, "--out", disk / "run", *OPTIONS], disk)


@pytest.mark.slow
def test_two_ranks_go_on_to_the_same_bytes_wherever_their_disk_was_full(
    store: Path, tmp_path: Path, disk_of: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    run_ranks([store, "--out", tmp_path / "straight", *OPTIONS], 2).check_returncode()
    names = []
    for pages in (4, 5, 12, 20, 21, 22, 35, 36, 37, 50, 60, 75, 90):
        disk = disk_of(f"{4 * pages}k")
        command = [store, "--out", disk / "run", *OPTIONS]
        if name := wanting(command, disk):
            names.append(name)
            resize(disk, "4m")
            again = run_ranks(command, 2)
            assert again.returncode == 0, again.stderr
        files = (run / "model.safetensors" for run in (disk / "run", tmp_path / "straight"))
        assert next(files).read_bytes() == next(files).read_bytes()
    assert "history.csv" in names
    assert any(name.startswith("step-") for name in names)
    record_property("disks_full_on_two_ranks", len(names))


def test_an_evaluation_whose_disk_is_full_leaves_the_table_of_the_one_before(
    store: Path, straight: Path, disk_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    liam_scale.load_run(straight).embed()
    disk = disk_of("4m")
    table = disk / "scores" / "metrics.csv"
    arguments = [str(store), "--label-key", "cell_type", "--out", str(table.parent), "--scib", "none", "--no-plots"]
    assert evaluate(arguments) == 0
    before = table.read_bytes()
    assert evaluate([*arguments, "--max-cells", "200"]) == 0
    other = table.read_bytes()
    assert other != before
    (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free))
    assert evaluate(arguments) == 1
    assert f"writing {table}: disk full" in capsys.readouterr().err
    assert table.read_bytes() == other
    (disk / "others").unlink()
    assert evaluate(arguments) == 0
    assert table.read_bytes() == before


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
