"""Options come from TOML and flags; errors come as one block."""

import logging
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

import liam_scale
from liam_scale import cli
from liam_scale.command import Command, as_typed, run
from liam_scale.config import TrainConfig
from liam_scale.ingest import IngestConfig
from liam_scale.tables import to_toml
from liam_scale.train import main as train


@dataclass(frozen=True)
class Inner:
    """Inner options."""

    alpha: Annotated[float, tyro.conf.arg(aliases=["--alpha"])] = 1.0
    """A weight."""
    early: bool = True
    """A switch."""
    names: tuple[str, ...] = ()
    """Some names."""
    kind: Literal["a", "b"] | None = None
    """Which."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"--model.alpha: got {self.alpha}; give 0 or more")


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    store: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Stores."""
    out: Path
    """Where."""
    key: str | None = None
    """Optional."""
    model: Inner = field(default_factory=Inner)


command = Command(Options, lambda options: None, prog="test", description="Test.")


def read(*argv: str) -> Options:
    return command.parse(argv)


def test_flags_reach_their_section_in_long_and_short_form() -> None:
    options = read("a.zarr", "b.zarr", "--out", "runs/a", "--alpha=5", "--model.no-early")
    assert options == Options(("a.zarr", "b.zarr"), Path("runs/a"), None, Inner(5.0, False))


def test_the_saved_options_read_back_as_they_were(tmp_path: Path) -> None:
    options = Options(("a b.zarr", "c.zarr"), Path("out"), "donor", Inner(2, False, ("x", "y"), "b"))
    (tmp_path / "run.toml").write_text(to_toml(options))
    again = read("--config", str(tmp_path / "run.toml"))
    assert again == options
    assert type(again.model.alpha) is float


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(Options(("a.zarr",), Path("out"), "donor", Inner(2.5, False, ("x",), "b"))))
    options = read("other.zarr", f"--config={file}", "--alpha", "7", "--model.early", "--out", "elsewhere")
    assert options == Options(("other.zarr",), Path("elsewhere"), "donor", Inner(7.0, True, ("x",), "b"))
    options = read("--config", str(file), "--key", "None", "--model.kind", "None")
    assert (options.key, options.model.kind) == (None, None)


def test_a_file_may_say_a_part_and_the_command_line_the_rest(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("store = 'a.zarr'\n[model]\nalpha = -1\n")
    options = read("--config", str(tmp_path / "run.toml"), "--out", "x", "--alpha", "3")
    assert options == Options(("a.zarr",), Path("x"), None, Inner(3.0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[model]\nalhpa = 1\n", "run.toml: model.alhpa: there is no such option; choose among model.alpha"),
        (b"stroe = 'a'", "run.toml: stroe: there is no such option; choose among store"),
        (b"[model]\nalpha = 'much'\n", "run.toml: model.alpha: got 'much'; give a finite number"),
        (b"[model]\nalpha = true\n", "run.toml: model.alpha: got True; give a finite number"),
        (b"[model]\nearly = 1\n", "run.toml: model.early: got 1; give true or false"),
        (b"[model]\nnames = [1]\n", "run.toml: model.names: got 1; give a text in quotes"),
        (b"[model]\nkind = 'c'\n", "run.toml: model.kind: got 'c'; choose one of a, b"),
        (b"model = 'x'\n", "run.toml: model: got 'x'; give a table, [model]"),
        (b"key = 5\n", "run.toml: key: got 5; give a text in quotes"),
        (b"[model]\nalpha = -1\n", "error: --model.alpha: got -1.0; give 0 or more"),
        (b"alpha : 1", "run.toml is not TOML in UTF-8 (Expected '=' after a key"),
        ("key = 'Köln'".encode("latin-1"), "run.toml is not TOML in UTF-8 ('utf-8' codec can't decode byte 0xf6"),
        (None, "run.toml cannot be read (No such file or directory); name a TOML file, such as config.toml of a run"),
    ],
)
def test_what_a_file_says_wrongly_is_one_block_with_file_key_value_and_cure(
    tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    assert command(["a.zarr", "--out", "x", "--config", str(tmp_path / "run.toml")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: --")
    assert error.count("\n") == 1


def test_a_folder_of_a_run_given_as_file_names_the_file_in_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--config", str(trained)]) == 2
    assert f"(Is a directory); name {trained / 'config.toml'}\n" in capsys.readouterr().err


def test_training_from_the_options_of_a_run_repeats_it(trained: Path, tmp_path: Path) -> None:
    file = trained / "config.toml"
    assert to_toml(train.parse(["--config", str(file)])) == file.read_text()
    assert train(["--config", str(file), "--out", str(tmp_path / "again")]) == 0
    weights = [folder / "model.safetensors" for folder in (trained, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alpha", "-1"], "error: --model.alpha: got -1.0; give 0 or more\n"),
        (["--alpha", "x"], "--alpha"),
        (["--bogus", "3"], "--bogus"),
        (["--config"], "--config"),
    ],
)
def test_a_wrong_flag_is_one_block_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = command(["a.zarr", "--out", "x", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_one_rank_of_several_says_what_is_wrong_with_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        command(["a.zarr", "--bogus"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("--alpha: got -1; give 0 or more"), 2, "error: --alpha: got -1; give 0 or more\n"),
        (RuntimeError("disk: full"), 1, "error: disk: full\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'\n  --debug shows where it happened\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: [Errno 32] Broken pipe\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_block_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run(fail) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        (IngestConfig, "sample_key: none; give sample_from_file=True", "--sample-key: none; give --sample-from-file"),
        (IngestConfig, "a.h5ad: give layer='raw' or rna=a.h5ad", "a.h5ad: give --layer raw or rna=a.h5ad"),
        (TrainConfig, "minibatch: got 0; give at least 1", "--loader.minibatch: got 0; give at least 1"),
        (TrainConfig, "store: got none; name a store", "store: got none; name a store"),
    ],
)  # fmt: skip
def test_what_the_loaders_say_of_an_argument_is_told_in_the_words_of_the_command(
    kind: type, message: str, said: str
) -> None:
    assert as_typed(message, kind) == said


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("no")

    assert run(fail, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_verbose_logs_versions_and_options_with_their_place(environment: dict[str, str]) -> None:
    code = "import sys; from liam_scale.map import main; sys.exit(main(['nowhere', 'x.zarr', '--verbose']))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"rank 0 liam_scale.command: liam-scale {liam_scale.__version__}, torch" in done.stderr
    assert 'run = "nowhere"\nstore = "x.zarr"\n' in done.stderr
    assert "error: run: nowhere holds no run" in done.stderr


def test_without_verbose_other_libraries_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: logging.getLogger("numba.core").info("chatter")) == 0
    assert "chatter" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--print-completion zsh"])
def test_a_reader_that_leaves_ends_the_command_in_silence(arguments: str, environment: dict[str, str]) -> None:
    # The last word of the pipe takes nothing, so that the first write finds it gone.
    line = f"{sys.executable} -m liam_scale.cli {arguments} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "usage: liam-scale COMMAND"),
        (["--version"], 0, f"liam-scale {liam_scale.__version__}"),
        (["bogus"], 2, "error: command: got 'bogus'; choose one of ingest, train"),
        (["--print-completion"], 2, "error: --print-completion: got ''; choose one of bash, zsh, tcsh"),
        (["--print-completion", "fish"], 2, "got 'fish'; choose one of bash, zsh, tcsh"),
    ],
)
def test_the_first_word_is_a_command_or_a_question(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out)


def test_the_shell_completes_commands_and_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", "bash"])
    assert not stop.value.code
    script = capsys.readouterr().out
    assert all(word in script for word in (*cli.COMMANDS, "--sample-key", "--n-latent", "--max-cells"))
    (tmp_path / "script").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "script"], check=True)
