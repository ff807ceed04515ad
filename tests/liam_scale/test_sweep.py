"""A sweep: its commands are ordinary ones, what is finished is not done again, and its pages show what they should."""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from liam_scale.cli import command as of_word
from liam_scale.command import run
from liam_scale.evaluation.report import best_in_rows, table, text, write_report
from liam_scale.run import RunDirectory
from liam_scale.sweep import Member, SweepConfig, _settle, _train, members_of, sweep
from loaders.durable import holding
from loaders.synthetic import simulate


def config_of(store: Path, out: Path, **options) -> SweepConfig:
    keys = {"batch_key": ("sample",), "label_key": ("cell_type",), "alpha": (1.0, 25.0), "seeds": (0, 1)}
    return SweepConfig((str(store),), out, max_epochs=1, **{**keys, **options})


def test_every_run_is_a_training_command_that_the_parser_takes(tmp_path: Path) -> None:
    options = tmp_path / "more.toml"
    options.write_text("[optim]\nlr = 0.01\n")
    config = config_of(Path("a.zarr"), tmp_path / "s", batch_key=("donor", "site+donor"), options=options)
    members = members_of(config)
    assert len(members) == len({one.folder for one in members}) == 8
    assert config.columns == ("donor", "site")
    for one in members:
        parsed = of_word("train").parse(one.command[one.command.index("liam_scale.train") + 1 :])
        columns = ("donor",) if one.batch_key == "donor" else ("site", "donor")
        assert (parsed.batch_key, parsed.model.alpha, parsed.seed) == (columns, one.alpha, one.seed)
        assert (parsed.out, parsed.training.max_epochs, parsed.optim.lr) == (one.folder, 1, 0.01)


def test_what_cannot_be_swept_is_refused_before_anything_is_trained(multiome: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    with pytest.raises(ValueError, match=r"--label-key: obs column: got 'celltype', which .* columns are: .*cell_type"):
        sweep(config_of(multiome, out, label_key=("celltype",)))
    with pytest.raises(ValueError, match="--batch-key: got none"):
        config_of(multiome, out, batch_key=())
    with pytest.raises(ValueError, match="--keep-key: got sample, which --batch-key removes"):
        config_of(multiome, out, batch_key=("cell_type+sample",), keep_key=("sample",))
    with pytest.raises(ValueError, match="--alpha: got -1"):
        config_of(multiome, out, alpha=(-1.0,))
    assert not out.exists()


def test_a_sweep_grows_by_alphas_but_not_by_other_training_options(multiome: Path, tmp_path: Path) -> None:
    config = config_of(multiome, tmp_path / "s")
    _settle(config)
    _settle(replace(config, alpha=(1.0, 50.0), seeds=(0, 1, 2)))
    with pytest.raises(ValueError, match=r"--out: .* holds a sweep with another store, --options, --max-epochs"):
        _settle(replace(config, max_epochs=2))


def test_an_array_job_has_a_line_for_each_run(multiome: Path, tmp_path: Path, capsys) -> None:
    assert sweep(config_of(multiome, tmp_path / "s", slurm=True)) is None
    commands = (tmp_path / "s" / "commands.txt").read_text().splitlines()
    script = tmp_path / "s" / "sweep.sbatch"
    assert len(commands) == 4
    assert "--array=1-4" in script.read_text()
    assert f"sbatch {script}" in capsys.readouterr().out
    (tmp_path / "s" / "commands.txt").write_text("true\necho number two of $SLURM_ARRAY_TASK_ID\n")
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "number two of 2\n"


class Page(html.parser.HTMLParser):
    """Tags of a page, each closed again, and what it would load from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.open += [] if tag in ("meta", "img") else [tag]
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_one_page_that_stands_alone_and_marks_the_best(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a <b>": [0.1, 1.4], "other": [0.5, 0.9]}, index=["nmi", "ratio"])
    best = best_in_rows(frame, ["higher", "towards 1"])
    path = write_report(
        tmp_path / "r.html", title="T", sections={"": [text("x < y")], "Empty": [], "S": [table(frame, best=best)]}
    )
    page = Page(path)
    assert page.open == []
    assert page.links == []
    shown = path.read_text(encoding="utf-8")
    assert "a &lt;b&gt;" in shown
    assert "x &lt; y" in shown
    assert "Empty" not in shown
    assert re.findall(r'class="best">([\d.]+)', shown) == ["0.500", "0.900"]


TRAINING = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(0.2)
    out.with_suffix(".saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
out.with_suffix(".started").touch()
time.sleep(100)
"""
FINISHING = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
while (taken := out.with_suffix(".late")).exists():
    if out.with_suffix(".held").exists():
        taken.unlink()
        sys.exit(1)
    time.sleep(0.01)
out.mkdir()
"""


def members_that(code: str, folder: Path, number: int) -> list[Member]:
    """Runs whose training is a small script."""
    folders = [folder / f"run{seed}" for seed in range(number)]
    return [
        Member("bavae", "sample", 1.0, seed, one, (sys.executable, "-c", code, str(one)))
        for seed, one in enumerate(folders)
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_a_signal_has_the_trainings_at_work_save_and_then_ends_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup")

    def send() -> None:
        while len(list(tmp_path.glob("*.started"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    members = members_that(TRAINING, tmp_path, 3)
    assert run(lambda: _train(members, config_of(tmp_path / "a.zarr", tmp_path, jobs=2), 0)) == 130
    sender.join()
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".log"}
    assert left == {"run0.started", "run0.saved", "run1.started", "run1.saved"}
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on"


def test_a_run_that_another_process_trains_is_waited_for_while_others_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is held from the beginning, one is taken by a process that was a little faster."""
    monkeypatch.setattr(RunDirectory, "is_finished", property(lambda directory: directory.path.exists()))
    held, late, free = members = members_that(FINISHING, tmp_path, 3)
    late.folder.with_suffix(".late").touch()
    begun: list[Path] = []

    def other() -> None:
        with ExitStack() as stack:
            stack.enter_context(holding(held.folder))
            begun.append(held.folder)
            while not late.log.exists():
                time.sleep(0.01)
            with holding(late.folder):
                late.folder.with_suffix(".held").touch()
                while not free.folder.exists():
                    time.sleep(0.01)
                time.sleep(0.5)
            assert not held.folder.exists()

    process = threading.Thread(target=other)
    process.start()
    while not begun:
        time.sleep(0.01)
    _train(members, config_of(tmp_path / "a.zarr", tmp_path), 0)
    process.join()
    said = capsys.readouterr().out
    for one in (held, late):
        assert one.folder.exists()
        assert said.count(f"waiting for {one}: {one.folder}: process {os.getpid()} on ") == 1
    assert "not finished" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", 1), ("SIGTERM", 2), ("SIGINT", 2)])
def test_a_sweep_that_is_ended_leaves_no_training_at_work_and_goes_on_from_what_it_saved(
    tmp_path: Path, environment: dict[str, str], name: str, ranks: int
) -> None:
    store, out = tmp_path / "a.zarr", tmp_path / "s"
    simulate(store, num_cells=600, num_genes=60, num_peaks=0, genes_per_cell=20, num_samples=3)
    options = tmp_path / "more.toml"
    options.write_text("[training]\nearly_stopping = false\n")
    command = [sys.executable, "-m", "liam_scale.sweep", store, "--out", out, "--batch-key", "sample", "--no-plots"]
    command += ["--model", "rna-only", "--alpha", "1", "25", "--seeds", "0", "--max-epochs", "400", "--jobs", "2"]
    command += ["--ranks", ranks, "--options", options]
    heeding = [sys.executable, "-c", HEEDING, *map(str, command)]
    with subprocess.Popen(heeding, env=environment, stderr=subprocess.PIPE, text=True) as first:
        while len(histories := list(out.glob("runs/*/history.csv"))) < 2:
            assert first.poll() is None
            time.sleep(0.1)
        first.send_signal(getattr(signal, name))
        _, said = first.communicate(timeout=120)
    assert first.returncode == 130
    assert said.splitlines()[-1] == "interrupted; the same command goes on"
    for history in histories:
        with holding(history.parent):
            assert list(history.parent.glob("checkpoints/step-*"))
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for history in histories:
        assert "resuming " in history.parent.with_suffix(".log").read_text()
        assert not (pd.read_csv(history)["step"].diff().dropna() <= 0).any()


HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
"""Where the tests run in the background of a shell, Ctrl-C is ignored."""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_page_shows_what_it_found(tmp_path: Path, environment: dict[str, str]) -> None:
    """SIGKILL of the sweep alone: the training at work goes on by itself, and the next sweep waits for it."""
    store, out = tmp_path / "a.zarr", tmp_path / "s"
    simulate(store, num_cells=600, num_genes=60, num_peaks=150, genes_per_cell=20, peaks_per_cell=40, num_samples=3)
    command = [sys.executable, "-m", "liam_scale.sweep", store, "--out", out, "--batch-key", "sample"]
    command += ["--label-key", "cell_type", "--alpha", "1", "25", "--seeds", "0", "1", "--max-epochs", "3"]
    first = subprocess.Popen([*map(str, command)], env=environment)
    runs = out / "runs"
    while not list(runs.glob("*/model.safetensors")):
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/model.safetensors")}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert finished == {path: path.stat().st_mtime_ns for path in finished}, "a finished run is not trained again"
    assert "recommend" in done.stdout
    found = pd.read_csv(out / "sweep.csv")
    assert found[["alpha", "seed"]].to_numpy().tolist() == [[1, 0], [1, 1], [25, 0], [25, 1]]
    assert found.filter(regex="^(ilisi|leiden_nmi):").notna().all(axis=None)
    for page in (out / "sweep.html", *runs.glob("*-evaluation/report.html")):
        assert Page(page).links == []
    assert len(list(runs.glob("*-evaluation/report.html"))) == 4
    again = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert "$ " not in again.stdout, "nothing is trained again"
    array = subprocess.run([*map(str, command), "--slurm"], env=environment, capture_output=True, text=True)
    assert array.stdout.startswith("all runs are finished")
    assert not (out / "sweep.sbatch").exists()
    _opens_in_a_browser(out / "sweep.html", tmp_path / "page.png")


def _opens_in_a_browser(page: Path, picture: Path) -> None:
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        return
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,2000"]
    seen = subprocess.run(
        [browser, *options, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in seen.stderr
