"""The command that looks at a store: its report, as text and JSON, and its exit code."""

import json
import shutil
from pathlib import Path

import pytest

import liam_scale
from liam_scale.check import main
from liam_scale.train import main as train


def test_a_sound_store_is_told_so_with_code_0(multiome: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(multiome)]) == 0
    said = capsys.readouterr()
    assert f"{multiome}: sound (" in said.out
    assert said.err == ""


def test_a_damaged_store_is_told_place_by_place_with_code_1(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(multiome, store)
    (store / "obs/sample/codes/c/0").unlink()
    (store / "mod/rna/X/data/c/0").write_bytes(b"")
    assert main([str(store)]) == 1
    said = capsys.readouterr()
    assert "  obs/sample/codes: chunk 0 (the cells 0 to 599): its file is missing\n" in said.out
    assert "  mod/rna/X/data: chunk 0 (the cells 0 to " in said.out
    assert "error: " in said.err
    assert "copy or download the store again" in said.err
    assert main([str(store), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["is_sound"]
    assert {"array": "obs/sample/codes", "what": "chunk 0 (the cells 0 to 599): its file is missing"} in report[
        "damages"
    ]


def test_in_python_it_returns_what_the_command_prints(multiome: Path, tmp_path: Path) -> None:
    assert liam_scale.check(str(multiome)).is_sound
    store = tmp_path / "s.zarr"
    shutil.copytree(multiome, store)
    (store / "obs/sample/codes/c/0").unlink()
    report = liam_scale.check(store, threads=1)
    assert [damage.array for damage in report.damages] == ["obs/sample/codes"]
    first, second = repr(report).splitlines()
    assert first.startswith(f"{store}: damaged (")
    assert second == "  obs/sample/codes: chunk 0 (the cells 0 to 599): its file is missing"


def test_no_store_is_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_damage_that_stops_a_command_names_the_check(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(multiome, store)
    (store / "obs/sample/codes/c/0").unlink()
    assert train([str(store), "--batch-key", "sample", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "a check of the store lists all of it; copy or download it again" in said
    assert "`liam-scale check STORE`" in said
