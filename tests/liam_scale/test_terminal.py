"""Every command as it is typed: in a pseudo-terminal, whose bars must be readable on 80 columns and on 200."""

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from liam_scale import cli
from liam_scale.demo import DemoConfig, demo_steps
from liam_scale.train import main as train_main

SHORT = ("--model.n-hidden", "16", "--n-latent", "4", "--memory", "64MiB")


def read_all(descriptor: int, into: list[bytes]) -> None:
    """What a terminal was told, until nobody can write to it any more."""
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 65536):
            into.append(chunk)


def open_terminal(columns: int) -> tuple[int, int]:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    return master, slave


def in_terminal(work: Callable[[], int], columns: int = 80) -> tuple[int, str]:
    """Exit code of a command of this process whose output is a pseudo-terminal, and what it said there."""
    master, slave = open_terminal(columns)
    said: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(master, said))
    reader.start()
    with open(slave, "w", buffering=1) as terminal:
        assert terminal.isatty()
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            code = work()
    reader.join()
    os.close(master)
    return code, b"".join(said).decode()


def frames(said: str) -> list[str]:
    """Every state of the bars, one after the other."""
    return [frame for frame in re.split(r"[\r\n]+", said) if frame.strip()]


@pytest.fixture
def tick_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar's second is over at every look, as it is now and then on a slow machine."""
    from liam_scale.training.progress import LossProgress

    monkeypatch.setattr(LossProgress, "is_due", property(lambda self: self._is_shown))


@pytest.mark.usefixtures("tick_at_once")
@pytest.mark.parametrize("minibatch", [57, 114])
def test_train_shows_losses_when_an_evaluation_has_just_emptied_the_meter(
    multiome: Path, tmp_path: Path, minibatch: int
) -> None:
    """570 training cells: epochs of 10 and 5 steps, so that looks and evaluations fall on one step."""
    arguments = [multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--max-epochs", 4, *SHORT]
    code, said = in_terminal(lambda: train_main([*map(str, arguments), "--minibatch", str(minibatch)]))
    assert code == 0, said
    assert re.search(r"epoch 3  train_loss \d", said)
    assert "finished: weights in" in said


@pytest.mark.parametrize(("columns", "parts"), [(80, ("cells/s",)), (200, ("cells/s", "validation_loss", "waiting"))])
def test_the_bar_of_a_training_fits_its_terminal(
    multiome: Path, tmp_path: Path, columns: int, parts: tuple[str, ...]
) -> None:
    arguments = [multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--max-epochs", 2, *SHORT]
    code, said = in_terminal(lambda: train_main([str(argument) for argument in arguments]), columns)
    assert code == 0, said
    bars = [frame for frame in frames(said) if "%|" in frame]
    assert "100%" in bars[-1]
    assert max(map(len, bars)) <= columns
    for part in ("epoch 1", "train_loss", *parts):
        assert part in bars[-1]


def test_a_terminal_without_a_size_gets_lines(multiome: Path, tmp_path: Path) -> None:
    arguments = [multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--max-steps", 3, *SHORT]
    code, said = in_terminal(lambda: train_main([str(argument) for argument in arguments]), columns=0)
    assert code == 0, said
    assert "epoch 0  step 3/3  train_loss" in said


def test_a_run_that_ends_before_the_first_line_is_due_still_tells_its_losses(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [multiome, "--batch-key", "sample", "--out", tmp_path / "run", "--max-steps", 3, *SHORT]
    assert train_main([str(argument) for argument in arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 1
    assert re.match(r"epoch 0  step 3/3  train_loss \d.* cells/s  validation_loss \d", lines[0])


def test_ingest_counts_its_cells_on_a_bar_and_says_what_it_wrote(tmp_path: Path) -> None:
    source = demo_steps(DemoConfig())[0].command
    arguments = [
        "ingest",
        source[source.index("ingest") + 1],
        "--sample-key",
        "donor",
        "--out",
        str(tmp_path / "a.zarr"),
    ]
    code, said = in_terminal(lambda: cli.main(arguments))
    assert code == 0, said
    assert any("100%|" in frame and len(frame) <= 80 for frame in frames(said))
    assert "wrote" in frames(said)[-5]


@pytest.fixture(scope="module")
def own_store(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store, to write embeddings into."""
    return shutil.copytree(multiome, tmp_path_factory.mktemp("terminal") / "own.zarr")


@pytest.fixture(scope="module")
def in_order(own_store: Path, trained: Path) -> dict[str, tuple[int, str]]:
    """What the commands after a training say, each in a terminal of its own."""
    out = own_store.parent
    commands = {
        "embed": [trained, "--store", own_store],
        "decode": [trained, "--store", own_store, "--out", out / "decoded.zarr", "--modality", "rna"],
        "map": [trained, own_store, "--out", out / "mapped", "--max-epochs", 2, "--overwrite"],
        "evaluate": [own_store, "--batch-key", "sample", "--no-plots", "--scib", "none"],
    }
    return {
        name: in_terminal(lambda name=name, words=words: cli.main([name, *map(str, words)]))
        for name, words in commands.items()
    }


@pytest.mark.parametrize(
    ("command", "says"),
    [("embed", 'wrote obsm["X_liam"]'), ("decode", "wrote "), ("map", "extended model"), ("evaluate", "X_liam")],
)
def test_commands_after_a_training_work_in_a_terminal(
    in_order: dict[str, tuple[int, str]], command: str, says: str
) -> None:
    code, said = in_order[command]
    assert code == 0, said
    assert says in said
    assert all(len(frame) <= 80 for frame in frames(said) if "%|" in frame)
    assert ("100%|" in said) == (command in ("embed", "map"))


@pytest.mark.slow
def test_the_demo_runs_as_it_is_typed(tmp_path: Path, environment: dict[str, str]) -> None:
    master, slave = open_terminal(80)
    said: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(master, said))
    reader.start()
    command = [sys.executable, "-m", "liam_scale.cli", "demo", str(tmp_path / "demo"), "--max-epochs", "20"]
    done = subprocess.run(command, env=environment, stdin=slave, stdout=slave, stderr=slave, timeout=300, check=False)
    os.close(slave)
    reader.join()
    os.close(master)
    assert done.returncode == 0, b"".join(said).decode()
    assert (tmp_path / "demo" / "umap.png").exists()
