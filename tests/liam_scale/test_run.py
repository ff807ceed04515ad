"""The folder of a run: what is damaged is named, and nothing is read or written outside of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import liam_scale
from liam_scale.run import RunDirectory
from liam_scale.train import main


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train_again(run: Path, multiome: Path) -> int:
    options = ["--model.n-hidden", "16", "--n-latent", "4", "--minibatch", "64", "--memory", "64MiB"]
    return main([str(multiome), "--batch-key", "sample", "--max-epochs", "3", "--out", str(run), *options])


def say_parts(run: Path, *parts: str) -> None:
    directory = RunDirectory(run)
    options = (run / "config.toml").read_text()
    directory.create(replace(directory.record(), parts=parts), options, directory.features())


@pytest.mark.parametrize("lost", ["folder", "content"])
def test_a_finished_run_without_its_checkpoints_does_not_start_again(
    run: Path, multiome: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    if lost == "content":
        (run / "checkpoints").mkdir()
    assert train_again(run, multiome) == 1
    assert "but the run has trained (model.safetensors is there)" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == before


def test_a_history_without_a_folder_of_checkpoints_does_not_start_again(
    run: Path, multiome: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    before = (run / "history.csv").read_bytes()
    assert train_again(run, multiome) == 1
    assert "checkpoints is missing, but the run has trained (history.csv is there)" in capsys.readouterr().err
    assert (run / "history.csv").read_bytes() == before


def test_a_run_that_ended_before_its_first_checkpoint_says_that_it_starts_again(
    run: Path, multiome: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "model.safetensors").unlink()
    assert train_again(run, multiome) == 0
    assert "ended before its first checkpoint and starts again at step 0" in caplog.text


@pytest.mark.parametrize("part", ["../outside", "..", ".", "/tmp", "link", "a/b"])
def test_a_part_outside_of_the_folder_is_refused(run: Path, tmp_path: Path, part: str) -> None:
    (tmp_path / "outside").mkdir()
    (run / "link").symlink_to(tmp_path / "outside")
    say_parts(run, part)
    with pytest.raises(ValueError, match="outside of its folder"):
        RunDirectory(run).parts()


def test_checkpoints_are_not_written_through_a_link(run: Path, multiome: Path, tmp_path: Path) -> None:
    shutil.move(run / "checkpoints", tmp_path / "outside")
    (run / "checkpoints").symlink_to(tmp_path / "outside")
    assert train_again(run, multiome) == 2


@pytest.mark.parametrize("text", ["", "[]", "null", '{"sha256": 3}', "\xff"])
def test_a_run_file_of_another_shape_is_named(run: Path, text: str) -> None:
    (run / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(RuntimeError, match=r"run.json is damaged .*restore it from a copy"):
        liam_scale.load_run(run)


def test_one_changed_digit_of_a_prior_is_found(run: Path) -> None:
    entry = json.loads((run / "run.json").read_text())
    entry["data"]["prior_mean"]["rna"][0] += 1e-9
    (run / "run.json").write_text(json.dumps(entry))
    with pytest.raises(RuntimeError, match=r"run.json is damaged .*sha256 differs"):
        liam_scale.load_run(run)


def test_changed_names_of_features_are_found(run: Path) -> None:
    names = json.loads((run / "features.json").read_text())
    names["rna"].reverse()
    (run / "features.json").write_text(json.dumps(names))
    with pytest.raises(RuntimeError, match=r"features.json is damaged .*names differ"):
        RunDirectory(run).features()


def test_damaged_weights_are_named_and_the_training_command_mends_them(run: Path, multiome: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(before[:-4] + b"\0\0\0\1")
    with pytest.raises(RuntimeError, match=r"model.safetensors: damaged .*training command again"):
        liam_scale.load_run(run).model()
    assert train_again(run, multiome) == 0
    assert (run / "model.safetensors").read_bytes() == before
