"""Options come from TOML and flags; errors come as one block."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from liam_scale.command import parse, run, to_toml


@dataclass(frozen=True)
class Inner:
    """Inner options."""

    alpha: float = 1.0
    """A weight."""
    early: bool = True
    """A switch."""
    names: tuple[str, ...] = ()
    """Some names."""


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


def read(*argv: str) -> Options:
    return parse(
        Options, argv, prog="test", description="Test.", short={"--alpha": "--model.alpha"}, positional="store"
    )


def test_flags_reach_their_section_in_long_and_short_form() -> None:
    options = read("a.zarr", "b.zarr", "--out", "runs/a", "--alpha=5", "--model.no-early")
    assert options == Options(("a.zarr", "b.zarr"), Path("runs/a"), None, Inner(5.0, False))


def test_the_saved_options_read_back_as_they_were(tmp_path: Path) -> None:
    options = Options(("a b.zarr", "c.zarr"), Path("out"), "donor", Inner(2.5, False, ("x", "y")))
    (tmp_path / "run.toml").write_text(to_toml(options))
    assert read("--config", str(tmp_path / "run.toml")) == options


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(Options(("a.zarr",), Path("out"), "donor", Inner(2.5, False))))
    options = read("other.zarr", "--config", str(file), "--alpha", "7", "--model.early", "--out", "elsewhere")
    assert options == Options(("other.zarr",), Path("elsewhere"), "donor", Inner(7.0, True))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[model]\nalhpa = 1\n", "alhpa"), ("[model]\nalpha = 'much'\n", "much")],
)
def test_a_wrong_key_or_value_in_the_file_is_a_usage_error(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        read("a.zarr", "--out", "x", "--config", str(file))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml cannot be read"):
        read("a.zarr", "--out", "x", "--config", str(tmp_path / "absent.toml"))
    (tmp_path / "bad.toml").write_text("alpha : 1")
    with pytest.raises(ValueError, match="not valid TOML"):
        read("a.zarr", "--out", "x", "--config", str(tmp_path / "bad.toml"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("--alpha: got -1; give 0 or more"), 2, "error: --alpha: got -1; give 0 or more\n"),
        (RuntimeError("disk: full"), 1, "error: disk: full\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'\n  --debug shows where it happened\n"),
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


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("no")

    assert run(fail, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err
