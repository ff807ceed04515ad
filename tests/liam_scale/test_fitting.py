"""A run that loses its numbers stops before it keeps them, goes on with another learning rate, and ends once."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from liam_scale.run import RunDirectory
from liam_scale.train import main
from liam_scale.training.checkpoint import newest_checkpoint

SHORT = ("--model.n-hidden", "16", "--n-latent", "4", "--memory", "64MiB")


def run_main(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def assert_sound(run: Path) -> None:
    """Every number that a later command could take up is finite."""
    files = [*(run / "checkpoints").glob("step-*/*.safetensors"), *run.glob("*.safetensors")]
    for file in files:
        for name, value in load_file(file).items():
            assert np.isfinite(value).all(), (file, name)


@pytest.mark.parametrize(
    ("lr", "minibatch", "options"),
    [
        ("1e6", 64, ()),
        ("100", 57, ()),  # ten steps an epoch: every look at the losses falls on an evaluation
        ("1e6", 64, ("--max-steps", 1)),  # the evaluation of the end is the first to see it
        ("100", 64, ("--training.checkpoint-steps", 1)),
    ],
)
def test_a_learning_rate_that_ends_in_nan_is_an_error_whose_cure_works(
    multiome: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lr: str,
    minibatch: int,
    options: tuple[object, ...],
) -> None:
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT, "--minibatch", minibatch)
    assert run_main(*arguments, "--max-steps", 30, "--lr", lr, *options) == 1
    said = capsys.readouterr().err
    assert "is not finite after step 1; nothing of it was kept" in said
    assert "give a lower --optim.lr" in said
    assert not (out / "model.safetensors").exists()
    assert_sound(out)
    assert run_main(*arguments, "--max-steps", 30, "--lr", "1e-3") == 0
    assert_sound(out)
    history = pd.read_csv(out / "history.csv")
    assert history["step"].iloc[-1] == 30
    assert np.isfinite(history.to_numpy()).all()


def test_a_run_that_breaks_later_keeps_its_checkpoints_and_goes_on_from_them(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT, "--minibatch", 64)
    assert run_main(*arguments, "--max-steps", 12, "--training.checkpoint-steps", 5) == 0
    before = load_file(out / "model.safetensors")
    assert run_main(*arguments, "--max-steps", 30, "--training.checkpoint-steps", 1, "--lr", "1e6") == 1
    moved = out / "checkpoints" / "unsound-step-000000013"
    assert f"is now {moved}" in capsys.readouterr().err
    assert moved.is_dir()
    for name, value in load_file(out / "model.safetensors").items():
        np.testing.assert_array_equal(value, before[name])
    assert run_main(*arguments, "--max-steps", 30) == 0
    assert "at epoch 1, step 12" in capsys.readouterr().out
    assert_sound(out)


def test_ranks_stop_together_before_the_update_and_one_tells_it(
    multiome: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT, "--lr", "100", "--max-steps", 20)
    done = launch("liam_scale.train", *arguments, "--training.checkpoint-steps", 1, ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("error: training: ") == 1
    assert done.stderr.count("is not finite after step 1") == 2, "a roll-back, and the end"
    assert newest_checkpoint(out / "checkpoints") is None


def test_what_changes_neither_model_nor_order_may_change_and_is_recorded(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT)
    assert run_main(*arguments, "--max-steps", 3) == 0
    changed = ("--lr", "5e-4", "--training.patience", 3, "--precision", "bf16", "--loader.threads", 1)
    assert run_main(*arguments, "--max-steps", 6, *changed) == 0
    assert "optim.lr: 0.001 until now, 0.0005 from here on" in capsys.readouterr().out
    record = RunDirectory(out).record()
    assert {change["step"] for change in record.changes} == {3}
    assert {change["option"]: change["now"] for change in record.changes} == {
        "optim.lr": 5e-4,
        "model.precision": "bf16",
        "training.patience": 3,
        "training.max_steps": 6,
        "loader.threads": 1,
    }
    assert record.model.precision == "bf16"
    assert RunDirectory(out).saved_options()["optim"]["lr"] == 5e-4


@pytest.mark.parametrize(
    "options", [("--optim.eps", "0.1"), ("--model.alpha", 3), ("--loader.balance", "sample"), ("--minibatch", 32)]
)
def test_what_changes_the_model_or_the_order_is_refused(
    trained: Path, multiome: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
) -> None:
    same = (multiome, "--batch-key", "sample", "--out", trained, *SHORT, "--minibatch", 64, "--max-epochs", 3)
    assert run_main(*same, *options) == 2
    assert "was made with other options" in capsys.readouterr().err


def test_early_stopping_ends_at_an_evaluation_once_and_says_how(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine steps an epoch; patience of 10 steps more would be over in the middle of one."""
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT, "--minibatch", 64, "--max-epochs", 30)
    patience = ("--lr", 0, "--training.patience", 1, "--training.patience-steps", 10)
    assert run_main(*arguments, *patience) == 0
    assert "stopped early: weights in" in capsys.readouterr().out
    history = pd.read_csv(out / "history.csv")
    assert history["step"].tolist() == [9, 18, 27]
    ending = json.loads((out / "run.json").read_text())["ending"]
    assert ending == {"outcome": "stopped early", "epoch": 2, "step": 27, "best_epoch": 0, "best_step": 9}
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".owner"}
    assert run_main(*arguments, *patience) == 0
    said = capsys.readouterr().out
    assert "has ended and stays as it is (stopped early at epoch 2, step 27, best at epoch 0, step 9)" in said
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_stop_in_mid_epoch_leaves_no_half_row_and_an_ended_run_goes_on_only_when_asked(
    multiome: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = (multiome, "--batch-key", "sample", "--out", out, *SHORT, "--minibatch", 64)
    assert run_main(*arguments, "--max-steps", 12) == 0
    assert pd.read_csv(out / "history.csv")["step"].tolist() == [9, 12]
    copy = shutil.copytree(out, tmp_path / "copy")
    assert run_main(multiome, "--batch-key", "sample", "--out", copy, *SHORT, "--minibatch", 64, "--max-steps", 18) == 0
    assert pd.read_csv(copy / "history.csv")["step"].tolist() == [9, 12, 18]
    assert RunDirectory(copy).record().ending["step"] == 18


def test_weights_have_the_rights_of_other_files(trained: Path) -> None:
    assert (trained / "model.safetensors").stat().st_mode == (trained / "run.json").stat().st_mode
