"""The demo: its commands are real ones, it refuses foreign folders, it goes on, and it shows what it promises."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest

from liam_scale.cli import COMMANDS
from liam_scale.cli import command as of_word
from liam_scale.demo import DemoConfig, Step, _run_step, demo_steps, main
from liam_scale.launching import environment, ranks

ROOT = Path(__file__).resolve().parents[2]


def parsed(command: tuple[str, ...]):
    """The options of a demo command, by the parser of the command itself."""
    place = next(i for i, word in enumerate(command) if word.removeprefix("liam_scale.") in COMMANDS)
    return of_word(command[place].removeprefix("liam_scale.")).parse(command[place + 1 :])


@pytest.mark.parametrize("multiome", [False, True])
def test_commands_follow_from_each_other(tmp_path, multiome):
    steps = demo_steps(DemoConfig(out=tmp_path, multiome=multiome, max_epochs=7))
    ingest, train, embed, evaluate = (step.command for step in steps[-4:])
    store = ingest[ingest.index("--out") + 1]
    source = ingest[ingest.index("ingest") + 1]
    assert Path(source).is_file() or steps[0].makes == Path(source)
    trained = parsed(train)
    assert trained.store == (store,)
    assert trained.batch_key == ("donor",)
    assert trained.training.max_epochs == 7
    assert parsed(embed).run == trained.out
    evaluated = parsed(evaluate)
    assert (evaluated.store, evaluated.run, evaluated.out) == (store, trained.out, tmp_path)
    assert (evaluated.batch_key, evaluated.label_key) == (("donor",), ("cell_type",))
    assert all("--nproc-per-node=2" in command for command in (train, embed))


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
    reason="no name of its own for a process here",
)
def test_ranks_meet_where_the_name_of_the_host_does_not_resolve(tmp_path):
    """As in a container without a network."""
    lines = "import torch.distributed as dist", "dist.init_process_group('gloo')", "dist.barrier()"
    (tmp_path / "meet.py").write_text("\n".join(lines) + "\nprint('met')\ndist.destroy_process_group()\n")
    named = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid; exec "$@"', "sh", *ranks(2), "meet"]
    asked = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 90}
    assert subprocess.run(named, env=environment(), **asked).stdout.count("met") == 2


def test_shipped_data_is_small_and_whole():
    command = demo_steps(DemoConfig())[0].command
    source = Path(command[command.index("ingest") + 1])
    assert source.stat().st_size < 1_000_000
    data = mudata.read_h5mu(source)
    assert data.n_obs == 1600
    has = {m: np.isin(data.obs_names, data.mod[m].obs_names) for m in ("rna", "adt")}
    by_donor = pd.DataFrame(has, index=data.obs["donor"].to_numpy()).groupby(level=0).mean()
    assert by_donor.loc["p1"].tolist() == [1, 0]
    assert by_donor.loc["p2"].tolist() == [0, 1]
    assert (by_donor.loc[["p3", "p4"]] == 1).all(axis=None)
    assert data.obs["cell_type"].nunique() == 8
    assert all((m.X.data == np.round(m.X.data)).all() and m.X.data.min() > 0 for m in data.mod.values())
    assert (source.parent / "LICENSE-scmidas.txt").read_text().startswith("Copyright")
    assert "GSE164378" in (source.parent / "README.md").read_text()


def test_a_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.doc").touch()
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "holds thesis.doc, not written by this demo; name a new folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert "which is a file" in capsys.readouterr().err


def test_the_other_demo_is_foreign(tmp_path, capsys):
    (tmp_path / "pbmc.zarr").mkdir()
    assert main([str(tmp_path), "--multiome"]) == 2
    assert "holds pbmc.zarr" in capsys.readouterr().err


def test_a_failing_command_is_named(tmp_path, capfd):
    step = Step("Fail", (sys.executable, "-c", "import sys; sys.exit(3)"))
    with pytest.raises(RuntimeError, match=r"ended with exit code 3; .* goes on at this step"):
        _run_step(step, "[1/1]")
    assert f"$ {sys.executable} -c 'import sys; sys.exit(3)'" in capfd.readouterr().out


SAVING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("saved").touch()))
pathlib.Path("started").touch()
time.sleep(100)
"""


def test_a_demo_that_is_told_to_end_has_its_command_save_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def send():
        while not Path("started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(KeyboardInterrupt, match="; the same command goes on"):
        _run_step(Step("Train", (sys.executable, "-c", SAVING)), "[1/1]")
    sender.join()
    assert Path("saved").exists()


def test_what_is_there_is_not_made_again(tmp_path, capfd):
    made = tmp_path / "made"
    step = Step("Make", (sys.executable, "-c", f"open({str(made)!r}, 'x')"), made)
    _run_step(step, "[1/1]")
    _run_step(step, "[1/1]")
    assert "left out" in capfd.readouterr().out


def run_demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "liam_scale.cli", "demo", str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--multiome",)])
def test_the_whole_demo(tmp_path, options):
    out = tmp_path / "demo"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_demo(out, *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Three minutes of two cores, whatever else the machine is doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 360
    table = pd.read_csv(out / "metrics.csv", index_col=0)
    assert table.loc["same_sample_ratio", "X_liam"] < table.loc["same_sample_ratio", "PCA"]
    assert table.loc["label_accuracy", "X_liam"] > table.loc["label_accuracy", "PCA"] - 0.02
    assert all((out / name).stat().st_size > 20_000 for name in ("umap.png", "loss.png"))
    assert done.stdout.count("\n$ ") == 4 + len(options)
    again = run_demo(out, *options)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("left out") == 2 + len(options)
