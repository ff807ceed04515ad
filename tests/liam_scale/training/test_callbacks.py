"""Callbacks of real short trainings: what they hear, when, and what their own errors do."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import liam_scale
from liam_scale import Callback

OPTIONS: dict[str, Any] = {"batch_key": "sample", "n_hidden": 8, "n_latent": 4, "minibatch": 128, "memory": "64MiB"}


class Recorder(Callback):
    """Writes down what it hears; `at` fails in the event of that name."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.at, self.error = at, error or OSError("no network")

    def _hear(self, event: str, what: Any) -> None:
        self.heard.append((event, what))
        if event == self.at:
            raise self.error

    def started(self, folder: Path, step: int, options: dict[str, Any]) -> None:
        self._hear("started", (folder, step, options))

    def evaluated(self, row: dict[str, float]) -> None:
        self._hear("evaluated", row)

    def ended(self, outcome: str) -> None:
        self._hear("ended", outcome)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.heard]


def test_a_training_tells_its_start_every_row_and_its_end(multiome: Path, tmp_path: Path) -> None:
    one, out = Recorder(), tmp_path / "run"
    run = liam_scale.train(multiome, out=out, max_epochs=2, alpha=5, callbacks=[one, Callback()], **OPTIONS)
    assert one.events == ["started", "evaluated", "evaluated", "ended"]
    folder, step, options = one.heard[0][1]
    assert (folder, step, options["model.alpha"], options["batch_key"]) == (out, 0, 5.0, ["sample"])
    json.dumps(options)
    rows = run.history.to_dict("records")
    assert [row["step"] for _, row in one.heard[1:3]] == [row["step"] for row in rows]
    assert one.heard[2][1] == pytest.approx(rows[1], nan_ok=True)
    assert one.heard[-1][1] == "finished"

    again = Recorder()
    liam_scale.train(multiome, out=out, max_epochs=2, alpha=5, callbacks=[again], **OPTIONS)
    assert again.heard == [], "a run that has ended is not trained"
    liam_scale.train(multiome, out=out, max_epochs=3, alpha=5, callbacks=[again], **OPTIONS)
    assert again.heard[0][1][1] == rows[1]["step"]
    assert again.events == ["started", "evaluated", "ended"]


@pytest.mark.parametrize("event", ["evaluated", "ended"])
def test_a_logger_that_fails_is_left_out_and_training_goes_on(
    event: str, multiome: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Recorder(event), Recorder()
    with caplog.at_level(logging.WARNING):
        run = liam_scale.train(multiome, out=tmp_path / "run", max_epochs=2, callbacks=[broken, sound], **OPTIONS)
    assert run.record.ending is not None
    assert broken.events[-1] == event
    assert sound.events == ["started", "evaluated", "evaluated", "ended"]
    assert f"Recorder.{event} failed (OSError: no network); it is left out from here on" in caplog.text


def test_a_logger_that_cannot_start_stops_the_training_before_its_first_step(multiome: Path, tmp_path: Path) -> None:
    first, one = Recorder(), Recorder("started")
    with pytest.raises(OSError, match="no network"):
        liam_scale.train(multiome, out=tmp_path / "run", max_epochs=1, callbacks=[first, one], **OPTIONS)
    assert one.events == ["started"]
    assert first.heard[1:] == [("ended", "failed")]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("error", "outcome", "options"),
    [(KeyboardInterrupt(), "interrupted", {}), (None, "failed", {"lr": 1e6, "max_rollbacks": 0})],
)
def test_an_end_that_was_not_wanted_is_told_too(
    error: BaseException | None, outcome: str, options: dict[str, Any], multiome: Path, tmp_path: Path
) -> None:
    one = Recorder("evaluated" if error else "", error)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        liam_scale.train(multiome, out=tmp_path / "run", max_epochs=3, callbacks=[one], **OPTIONS, **options)
    assert one.heard[-1] == ("ended", outcome)


def test_what_is_no_callback_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"callbacks: got <.*print>; give objects of subclasses of liam_scale.Callback"
    ):
        liam_scale.train("nowhere.zarr", out=tmp_path / "run", callbacks=[print])  # type: ignore[list-item]


@pytest.mark.slow
def test_of_several_ranks_the_main_one_tells(multiome: Path, on_ranks: Callable[[str, int], list[Any]]) -> None:
    heard = on_ranks(
        "import os, sys, torch, liam_scale\n"
        "class One(liam_scale.Callback):\n"
        "    heard = 0\n"
        "    def started(self, *_): self.heard += 1\n"
        "    def evaluated(self, row): self.heard += 10\n"
        "    def ended(self, outcome): self.heard += 100\n"
        "one = One()\n"
        f"liam_scale.train({str(multiome)!r}, out=sys.argv[1] + '/run', batch_key='sample', max_epochs=1, n_hidden=8,"
        " callbacks=[one])\n"
        "torch.save(one.heard, f'{sys.argv[1]}/{os.environ[\"RANK\"]}.pt')\n",
        2,
    )
    assert heard == [111, 0]


def test_the_loggers_of_the_docs_log_a_training(
    multiome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stand-ins that know the signatures of wandb 0.22 and mlflow 3."""
    page = (Path(__file__).parents[3] / "docs" / "python.md").read_text()
    section = page.partition("## Loggers")[2].partition("\n## ")[0]
    logged: list[tuple[str, Any]] = []

    def init(*, project: str, id: str, resume: str, config: dict[str, Any]) -> None:
        logged.append((id, config["model.n_hidden"]))

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        assert all(isinstance(value, int | float) for value in metrics.values())
        logged.append(("mlflow", step))

    modules = {
        "wandb": {
            "init": init,
            "log": lambda data, step: logged.append(("wandb", step)),
            "finish": lambda exit_code: logged.append(("finish", exit_code)),
        },
        "mlflow": {
            "start_run": lambda run_name: logged.append(("start_run", run_name)),
            "log_params": lambda params: logged.append(("params", params["batch_key"])),
            "log_metrics": log_metrics,
            "end_run": lambda status: logged.append(("end_run", status)),
        },
    }
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))  # type: ignore[arg-type]
    scope: dict[str, Any] = {"liam_scale": liam_scale}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.S)[:2]:
        exec(block, scope)
    callbacks = [scope["ToWandb"](), scope["ToMlflow"]()]
    run = liam_scale.train(multiome, out=tmp_path / "a", max_epochs=1, callbacks=callbacks, **OPTIONS)
    step = run.history["step"].iloc[-1]
    assert logged == [
        ("a", 8),
        ("start_run", "a"),
        ("params", ["sample"]),
        ("wandb", step),
        ("mlflow", step),
        ("finish", 0),
        ("end_run", "FINISHED"),
    ]
