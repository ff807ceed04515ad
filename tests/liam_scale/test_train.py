"""Training on real stores: any number of ranks, killed and resumed, refused where it must be."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from ranks import start_ranks, wait_for
from safetensors.numpy import load_file

import liam_scale
from liam_scale.config import TrainConfig
from liam_scale.run import RunDirectory
from liam_scale.train import main, train
from liam_scale.training.options import TrainingConfig
from loaders.options import LoaderConfig

Command = Callable[..., subprocess.CompletedProcess[str]]

SHORT = ("--model.n-hidden", "16", "--n-latent", "4", "--minibatch", "64", "--memory", "64MiB")


def weights(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


def newest(path: Path) -> dict[str, np.ndarray]:
    return load_file(sorted((path / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def run_main(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_run_learns_and_leaves_what_the_docs_list(multiome: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_main(multiome, "--batch-key", "sample", "--out", out, "--max-epochs", 8, *SHORT) == 0
    history = pd.read_csv(out / "history.csv")
    assert len(history) == 8
    for name in ("train_loss", "elbo_train", "reconstruction_loss_atac_validation", "kl_divergence_z_train"):
        assert np.isfinite(history[name]).all()
    assert history["elbo_validation"].iloc[-1] < history["elbo_validation"].iloc[0]
    assert {p.name for p in out.iterdir()} >= {"config.toml", "run.json", "features.json", "model.safetensors"}


def test_thirty_steps_are_bit_identical_with_a_sigkill_in_the_middle(
    multiome: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    arguments = [
        str(multiome),
        "--batch-key",
        "sample",
        "--max-steps",
        "30",
        "--training.checkpoint-steps",
        "1",
        *SHORT,
    ]
    assert run_main(*arguments, "--out", tmp_path / "straight") == 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    [process] = start_ranks([*arguments, "--out", tmp_path / "killed"], 1)
    wait_for(lambda: any(int(p.name[-9:]) >= 7 for p in checkpoints.glob("step-*")), [process])
    process.kill()
    assert process.ends()[0] == -signal.SIGKILL
    reached = max(int(p.name[-9:]) for p in checkpoints.glob("step-*"))
    assert 7 <= reached < 30
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert run_main(*arguments, "--out", tmp_path / "killed") == 0
    for name, value in newest(tmp_path / "straight").items():
        np.testing.assert_array_equal(newest(tmp_path / "killed")[name], value, err_msg=name)
    columns = ["epoch", "step", "train_loss", "validation_loss"]
    histories = [pd.read_csv(tmp_path / run / "history.csv")[columns] for run in ("straight", "killed")]
    pd.testing.assert_frame_equal(*histories)


def test_sigterm_saves_and_ends_with_code_0_and_another_number_of_ranks_goes_on(
    multiome: Path, tmp_path: Path, launch: Command, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    arguments = [str(multiome), "--batch-key", "sample", "--out", str(out), *SHORT, "--training.no-early-stopping"]
    [process] = start_ranks([*arguments, "--max-epochs", 400], 1)
    wait_for((out / "history.csv").exists, [process])
    process.kill(signal.SIGTERM)
    assert process.ends()[0] == 0
    said = process.out.read_text()
    assert "the same command goes on" in said
    step = int(sorted((out / "checkpoints").glob("step-*"))[-1].name[-9:])
    done = launch("liam_scale.train", *arguments, "--max-steps", step + 5, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"step {step:,}" in done.stdout
    assert (out / "model.safetensors").exists()


def test_the_loss_curve_is_the_same_on_one_two_and_three_ranks(trimodal: Path, tmp_path: Path, launch: Command) -> None:
    arguments = (trimodal, "--batch-key", "sample", "--max-epochs", 3, *SHORT)
    curves = []
    for ranks in (1, 2, 3):
        done = launch("liam_scale.train", *arguments, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
        curves.append(pd.read_csv(tmp_path / str(ranks) / "history.csv"))
    for other in curves[1:]:
        for name in ("train_loss", "validation_loss", "adversarial_loss_train", "reconstruction_loss_adt_validation"):
            np.testing.assert_allclose(other[name], curves[0][name], rtol=2e-4, err_msg=name)


def test_more_ranks_than_cells_in_a_minibatch_still_train(multiome: Path, tmp_path: Path, launch: Command) -> None:
    arguments = (multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--minibatch", 2, "--max-steps", 4)
    done = launch("liam_scale.train", *arguments, "--model.n-hidden", 8, ranks=3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["cvae", "cdvae", "avae", "cevae", "batchvae", "rna-only", "atac-only"])
def test_every_model_of_the_paper_trains_by_name(multiome: Path, tmp_path: Path, model: str) -> None:
    arguments = (multiome, "--batch-key", "sample", "--model", model, "--max-steps", 3, *SHORT)
    assert run_main(*arguments, "--out", tmp_path / "run") == 0


def test_the_vae_needs_no_sample_and_concat_stands_side_by_side(multiome: Path, tmp_path: Path) -> None:
    assert run_main(multiome, "--model", "vae", "--max-steps", 3, *SHORT, "--out", tmp_path / "vae") == 0
    assert (
        run_main(
            multiome, "--model", "concat", "--batch-key", "sample", "--max-steps", 3, *SHORT, "--out", tmp_path / "two"
        )
        == 0
    )
    parts = RunDirectory(tmp_path / "two").parts()
    assert [part.path.name for part in parts] == ["rna", "atac"]
    assert RunDirectory(tmp_path / "two").is_finished


@pytest.mark.slow
def test_the_original_likelihood_is_the_same_on_two_ranks(multiome: Path, tmp_path: Path, launch: Command) -> None:
    arguments = (multiome, "--batch-key", "sample", "--max-epochs", 2, *SHORT, "--model.likelihood", "original")
    curves = []
    for ranks in (1, 2):
        done = launch("liam_scale.train", *arguments, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
        curves.append(pd.read_csv(tmp_path / str(ranks) / "history.csv"))
    np.testing.assert_allclose(curves[1]["train_loss"], curves[0]["train_loss"], rtol=2e-4)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    for word in ("600 cells", "parameters", "memory", "time", 'model = "bavae"', "streams = 16"):
        assert word in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_measures_the_steps_that_its_estimate_rests_on(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liam_scale.estimate.SECONDS_MEASURED", 0.1)
    arguments = (multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--max-epochs", 20_000, *SHORT)
    start = time.perf_counter()
    assert run_main(*arguments, "--dry-run") == 0
    waited = time.perf_counter() - start
    said = re.search(r"= ([\d,]+) steps of 64 cells; ([\d.]+) (s|min|h) to .* by the (\d+) ms", capsys.readouterr().out)
    assert said is not None
    step = int(said[4]) / 1e3
    assert 0 < step < waited
    seconds = float(said[2]) * {"s": 1, "min": 60, "h": 3600}[said[3]]
    assert seconds == pytest.approx(int(said[1].replace(",", "")) * step, rel=0.5 / int(said[4]) + 0.05)


def test_a_finished_run_is_left_as_it_is(multiome: Path, tmp_path: Path) -> None:
    arguments = (multiome, "--batch-key", "sample", "--max-steps", 3, *SHORT, "--out", tmp_path / "run")
    assert run_main(*arguments) == 0
    before = weights(tmp_path / "run")
    assert run_main(*arguments) == 0
    for name, value in weights(tmp_path / "run").items():
        np.testing.assert_array_equal(value, before[name])


def test_early_stopping_waits_for_evaluations_and_for_steps(multiome: Path, tmp_path: Path) -> None:
    arguments = (multiome, "--batch-key", "sample", "--max-epochs", 12, "--lr", 0, "--training.patience", 2, *SHORT)
    assert run_main(*arguments, "--training.patience-steps", 1, "--out", tmp_path / "short") == 0
    assert pd.read_csv(tmp_path / "short" / "history.csv")["epoch"].tolist() == [0, 1, 2]
    assert run_main(*arguments, "--out", tmp_path / "long") == 0
    assert len(pd.read_csv(tmp_path / "long" / "history.csv")) == 12


def test_from_python_the_options_have_the_same_names(multiome: Path, tmp_path: Path) -> None:
    run = liam_scale.train(
        multiome, out=tmp_path / "run", batch_key="sample", max_steps=3, n_hidden=16, n_latent=4, alpha=5.0
    )
    assert run.record.model.alpha == 5.0
    assert liam_scale.load_run(tmp_path / "run").history["step"].tolist()[-1] == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_epoch'"):
        liam_scale.train(multiome, out=tmp_path / "other", max_epoch=3)  # type: ignore[call-arg]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_main(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("precision", "impl"), [("tf32", "auto"), ("bf16", "reference")])
def test_a_precision_that_the_device_lacks_is_refused_before_a_folder_is_made(
    multiome: Path, tmp_path: Path, precision: str, impl: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=f"precision: got '{precision}', but .*; use 'float32'"):
        liam_scale.train(multiome, out=out, batch_key="sample", device="cpu", precision=precision, impl=impl)
    assert not out.exists()


def test_a_missing_batch_key_lists_the_columns(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, multiome, "--batch-key", "donr", "--out", tmp_path / "run")
    assert "--batch-key: obs column: got 'donr'" in said
    assert "sample" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_key_with_missing_values_counts_them(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.zarr"
    shutil.copytree(multiome, store)
    codes = zarr.open_group(store, mode="r+", use_consolidated=False)["obs"]["sample"]["codes"]
    changed = codes[:]
    changed[[3, 8]] = -1
    codes[:] = changed
    said = refused(capsys, store, "--batch-key", "sample", "--out", tmp_path / "run")
    assert "got 2 of 600 cells without a value" in said


def test_a_modality_that_the_store_lacks_is_named(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, multiome, "--model.modalities", "rna", "adt", "--out", tmp_path / "run")
    assert "adt" in said
    assert "rna, atac" in said


def test_an_out_that_is_something_else_is_left_alone(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    said = refused(capsys, multiome, "--out", tmp_path)
    assert "exists and is not a run" in said
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_resuming_with_other_options_names_them(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_main(multiome, "--batch-key", "sample", "--max-steps", 2, *SHORT, "--out", out) == 0
    said = refused(capsys, multiome, "--batch-key", "sample", "--alpha", 7, *SHORT, "--out", out)
    assert "--model.alpha: got 7.0, the run has 1.0" in said
    said = refused(capsys, multiome, "--batch-key", "sample", *SHORT, "--out", out, "--resume", "never")
    assert "--resume is never" in said


def test_resuming_on_another_store_is_refused(
    multiome: Path, trimodal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ("--batch-key", "sample", "--model.modalities", "rna", "atac", *SHORT, "--out", out)
    assert run_main(multiome, *options, "--max-steps", 2) == 0
    said = refused(capsys, trimodal, *options)
    assert "is not what" in said
    assert "cells: it has 400, the run 600" in said


def test_more_ranks_than_streams_are_refused_on_every_rank(multiome: Path, tmp_path: Path, launch: Command) -> None:
    arguments = (multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--loader.streams", 2)
    done = launch("liam_scale.train", *arguments, ranks=3)
    assert done.returncode != 0
    assert "ranks: got 3, but there are 2 streams" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_not_there_is_one_block_without_a_traceback(tmp_path: Path, launch: Command) -> None:
    done = launch("liam_scale.train", tmp_path / "absent.zarr", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "absent.zarr" in done.stderr
    assert "Traceback" not in done.stderr


def test_unequal_memory_does_not_change_what_is_trained(multiome: Path, tmp_path: Path) -> None:
    """A run resumed with more memory keeps its order of cells."""
    options = {"batch_key": ("sample",), "store": (str(multiome),)}
    small = LoaderConfig(minibatch=64, memory="32MiB")
    steps = TrainingConfig(max_steps=3)
    straight, _ = train(TrainConfig(out=tmp_path / "a", loader=small, training=TrainingConfig(max_steps=12), **options))
    other, _ = train(TrainConfig(out=tmp_path / "b", loader=small, training=steps, **options))
    large = LoaderConfig(minibatch=64, memory="1GiB")
    train(TrainConfig(out=tmp_path / "b", loader=large, training=TrainingConfig(max_steps=12), **options))
    for name, value in newest(straight.path).items():
        np.testing.assert_array_equal(newest(other.path)[name], value, err_msg=name)


def test_nothing_is_read_from_a_run_that_a_kill_left_empty(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no run"):
        liam_scale.load_run(tmp_path / "run")
