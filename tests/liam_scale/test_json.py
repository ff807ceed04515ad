"""--json: one JSON document on stdout, everything else on stderr, in one way for all commands that answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import liam_scale
from liam_scale.cli import COMMANDS, command
from liam_scale.command import plain
from loaders.stores import open_store


def told(capsys: pytest.CaptureFixture[str], word: str, *arguments: object, code: int = 0) -> tuple[Any, str]:
    capsys.readouterr()
    assert command(word)([*map(str, arguments), "--json"]) == code
    said = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(said.out, parse_constant=refuse), said.err


def test_the_commands_that_answer_are_those_that_were_agreed_on() -> None:
    assert [w for w in COMMANDS if command(w).answers] == ["ingest", "evaluate", "sweep", "info", "check"]


def test_what_json_lacks_is_null_or_text() -> None:
    value = {"a": (np.float32(2), float("nan"), Path("x")), 1: np.array([1, 2]), "b": np.inf, "c": True, "d": None}
    assert plain(value) == {"a": [2.0, None, "x"], "1": [1, 2], "b": None, "c": True, "d": None}


def test_ingest_names_the_store_and_the_next_command(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = told(capsys, "ingest", multiome, "--out", tmp_path / "a.zarr")
    assert (found["uri"], found["cells"]) == (str(tmp_path / "a.zarr"), 600)
    assert found["modalities"]["rna"]["num_features"] == 60
    assert found["next"] == f"liam-scale train {tmp_path / 'a.zarr'} --batch-key sample --out runs/a"
    assert "read and check" in err
    assert told(capsys, "info", tmp_path / "a.zarr")[0]["modalities"]["rna"]["num_cells"] == 600


def test_a_failure_is_told_on_stderr_with_the_document(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(multiome, tmp_path / "s.zarr")
    (store / "obs/sample/codes/c/0").unlink()
    found, err = told(capsys, "check", store, code=1)
    assert [damage["array"] for damage in found["damages"]] == ["obs/sample/codes"]
    assert err.startswith("error: ")
    assert command("info")([str(tmp_path / "absent.zarr"), "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_evaluate_gives_a_row_for_each_measure(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(shutil.copytree(multiome, tmp_path / "s.zarr"))
    values = np.random.default_rng(0).standard_normal((600, 3)).astype(np.float32)
    store.write_embedding("X_liam", values, {})
    options = ["--batch-key", "sample", "--label-key", "cell_type", "--scib", "none"]
    found, _ = told(capsys, "evaluate", store.uri, *options, "--out", tmp_path / "e", "--no-plots")
    assert (found["cells"], found["scored"], found["imputation"]) == (600, 600, None)
    row = next(row for row in found["measures"] if row["measure"] == "label_accuracy")
    assert row["PCA"] > row["X_liam"]
    assert (row["of"], row["better"], row["X_liam ±"]) == ("cell_type", "higher", None)
    assert str(tmp_path / "e" / "metrics.csv") in found["written"]


def sweep_options(store: Path, out: Path) -> list[object]:
    options = [store, "--out", out, "--batch-key", "sample", "--label-key", "cell_type"]
    return [*options, "--alpha", "1", "--seeds", "0", "--max-epochs", "1", "--no-plots"]


def test_a_sweep_for_slurm_names_its_script(multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, err = told(capsys, "sweep", *sweep_options(multiome, tmp_path / "s"), "--slurm")
    assert found == {"waiting": 1, "script": str(tmp_path / "s" / "sweep.sbatch")}
    assert "1 runs are to be trained" in err


@pytest.mark.slow
def test_a_sweep_gives_its_runs_and_what_it_recommends(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """scib-metrics compiles for 20 seconds."""
    options, run = sweep_options(multiome, tmp_path / "s"), tmp_path / "s/runs/bavae-sample-alpha1-seed0"
    liam_scale.train(multiome, out=run, batch_key="sample", alpha=1, max_epochs=1)
    assert told(capsys, "sweep", *options, "--slurm")[0] == {"waiting": 0, "script": None}
    found, err = told(capsys, "sweep", *options)
    assert [run["alpha"] for run in found["runs"]] == [1.0]
    assert found["recommendation"]["alpha"] is None
    assert found["recommendation"]["text"].startswith("no recommendation: ")
    assert str(tmp_path / "s" / "sweep.csv") in found["written"]
    assert "scoring bavae, sample, alpha 1, seed 0" in err
