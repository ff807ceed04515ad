"""Commands are started by the interpreter that runs, and shown as a user of its environment types them."""

import sys
from pathlib import Path

import pytest

from liam_scale.launching import python


def test_another_environment_of_the_same_interpreter_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment's python is a link to that of the system, which knows none of its packages."""
    (tmp_path / "python").symlink_to(Path(sys.executable).resolve())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python() == [sys.executable]


def test_python_is_called_so_where_it_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(link))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python() == ["python"]
