"""A number that is not finite: every rank goes back together, and other noise is tried."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import run_ranks
from safetensors.numpy import load_file

from liam_scale.model.layers import Gaussian
from liam_scale.model.liam import Inference, Liam
from liam_scale.run import RunDirectory
from liam_scale.train import main
from loaders.synthetic import simulate

SHORT = ("--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32", "--training.checkpoint-steps", "5")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path


def train(store: Path, out: Path, *options: object) -> int:
    return main([str(store), "--batch-key", "sample", "--out", str(out), *SHORT, *map(str, options)])


def poison(monkeypatch: pytest.MonkeyPatch, *, step: int, seeds: Callable[[int], bool]) -> list[int]:
    """The latent mean of the minibatch's first cell is NaN at a step, where its noise has such a seed; rows of it."""
    infer, rows = Liam.infer, []

    def poisoned(self: Liam, minibatch: object, noise: object) -> Inference:
        found = infer(self, minibatch, noise)  # type: ignore[arg-type]
        if self.training and noise.step == step and seeds(noise.seed):  # type: ignore[attr-defined]
            is_first = minibatch.place == 0  # type: ignore[attr-defined]
            rows.extend(minibatch.rows[is_first].tolist())  # type: ignore[attr-defined]
            mean = found.latent.mean.masked_fill(is_first[:, None], torch.nan)
            return Inference(found.encoded, Gaussian(mean, found.latent.variance), found.z, found.log_library)
        return found

    monkeypatch.setattr(Liam, "infer", poisoned)
    return rows


def assert_same(one: Path, other: Path) -> None:
    left, right = (load_file(run / "checkpoints" / "step-000000020" / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(right[name], value, err_msg=name)


def test_other_noise_leads_on_from_the_last_checkpoint_and_a_resume_repeats_it(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, halted, straight = (tmp_path / name for name in ("run", "halted", "straight"))
    assert train(store, straight, "--max-steps", 20) == 0
    with monkeypatch.context() as context:
        rows = poison(context, step=7, seeds=lambda seed: seed == 0)
        assert train(store, out, "--max-steps", 20) == 0
        assert train(store, halted, "--max-steps", 15) == 0
    assert f"kl_divergence_z of 1 cell (cell{rows[0]})" in caplog.text
    assert "is not finite after step 7; nothing of it was kept: back to step 5, and on with other noise (1 of at most 2"
    [told] = RunDirectory(out).record().rollbacks
    assert told == {"step": 7, "to": 5, "terms": {"kl_divergence_z": [f"cell{rows[0]}"]}}
    history = pd.read_csv(out / "history.csv")
    assert history["step"].iloc[-1] == 20
    assert np.isfinite(history.to_numpy()).all()
    assert train(store, halted, "--max-steps", 20) == 0
    assert_same(out, halted)
    with pytest.raises(AssertionError):
        assert_same(out, straight)


def test_where_no_noise_helps_it_ends_with_a_cure_that_works(
    store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as context:
        poison(context, step=7, seeds=lambda seed: True)
        assert train(store, out, "--max-steps", 20) == 1
    said = capsys.readouterr().err
    assert caplog.text.count("back to step 5, and on with other noise") == 2
    assert said.count("error: ") == 1
    assert "give a lower --optim.lr" in said
    assert len(RunDirectory(out).record().rollbacks) == 2
    assert train(store, out, "--max-steps", 20, "--lr", "1e-4") == 0
    assert RunDirectory(out).record().changes[0]["option"] == "optim.lr"


def test_a_checkpoint_whose_next_loss_is_not_finite_twice_gives_way_to_the_one_before(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as context:
        poison(context, step=10, seeds=lambda seed: seed < 2 << 48)
        assert train(store, out, "--max-steps", 20) == 0
    assert [told["to"] for told in RunDirectory(out).record().rollbacks] == [10, 5]
    assert (out / "checkpoints" / "unsound-step-000000010").is_dir()


def test_with_no_rollbacks_wanted_the_first_ends_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        poison(context, step=2, seeds=lambda seed: seed == 0)
        assert train(store, tmp_path / "run", "--max-steps", 5, "--training.max-rollbacks", 0) == 1
    assert RunDirectory(tmp_path / "run").record().rollbacks == ()


def test_a_gradient_alone_is_seen_before_its_update(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, out = Liam.forward, tmp_path / "run"

    def broken(self: Liam, minibatch: object, **options: object) -> object:
        objective = forward(self, minibatch, **options)  # type: ignore[arg-type]
        if (options["step"], options["seed"]) != (3, 0):
            return objective
        first = self.decoders["atac"].get_parameter("linear.weight").flatten()[0]
        # The loss stays as it is, and one element of one gradient becomes infinite.
        return replace(objective, loss=objective.loss + (first - first.detach()).sqrt())

    monkeypatch.setattr(Liam, "forward", broken)
    assert train(store, out, "--max-steps", 6) == 0
    assert "gradient of decoders.atac.linear.weight is not finite after step 3" in caplog.text
    assert RunDirectory(out).record().rollbacks == (
        {"step": 3, "to": 0, "terms": {"gradient of decoders.atac.linear.weight": []}},
    )


ONE_RANK = """
import sys
import torch
from liam_scale.model.layers import Gaussian
from liam_scale.model.liam import Inference, Liam
from liam_scale.train import main

infer = Liam.infer
def poisoned(self, minibatch, noise):
    found = infer(self, minibatch, noise)
    if self.training and noise.step == 7 and noise.seed == 0:
        # The first cell of the global minibatch is on one of the ranks.
        mean = found.latent.mean.masked_fill((minibatch.place == 0)[:, None], torch.nan)
        return Inference(found.encoded, Gaussian(mean, found.latent.variance), found.z, found.log_library)
    return found
Liam.infer = poisoned
sys.exit(main(sys.argv[1:]))
"""


def test_a_nan_on_one_of_two_ranks_takes_both_back_and_is_told_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    done = run_ranks([store, "--out", out, "--batch-key", "sample", "--max-steps", 20, *SHORT], 2, code=ONE_RANK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is not finite after step 7") == 1
    with monkeypatch.context() as context:
        rows = poison(context, step=7, seeds=lambda seed: seed == 0)
        assert train(store, tmp_path / "alone", "--max-steps", 20) == 0
    told = {"step": 7, "to": 5, "terms": {"kl_divergence_z": [f"cell{rows[0]}"]}}
    assert RunDirectory(out).record().rollbacks == RunDirectory(tmp_path / "alone").record().rollbacks == (told,)
    columns = [pd.read_csv(run / "history.csv")["train_loss"] for run in (out, tmp_path / "alone")]
    np.testing.assert_allclose(*columns, rtol=1e-5)
