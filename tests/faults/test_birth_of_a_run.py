"""A run that is killed while its folder is laid down: the same command makes it as if nothing had been."""

import os
import signal
from pathlib import Path

import pytest
from ranks import run_ranks

from liam_scale.run import RunDirectory
from liam_scale.train import main
from loaders.durable import Staging
from loaders.synthetic import simulate

OPTIONS = ("--batch-key", "sample", "--max-steps", "2", "--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32")

KILLED_AT = """
import os, signal, sys
from liam_scale.train import main
replace, left = os.replace, [int(sys.argv.pop(1))]
def counted(*paths):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
os.replace = counted
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=120, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path


def train(store: Path, out: Path, model: str) -> int:
    return main([str(store), "--out", str(out), "--model", model, *OPTIONS])


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.suffix in (".safetensors", ".json")}


class Killed(BaseException):
    """Nothing catches it, and nothing is cleaned up on its way."""


@pytest.mark.parametrize(("model", "moments"), [("bavae", 3), ("concat", 9)])
def test_killed_before_any_file_of_the_folder_stands_the_same_command_goes_on(
    store: Path, tmp_path: Path, model: str, moments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    replace, discard = os.replace, Staging.discard
    for moment in range(moments):
        left = iter([True] * moment)

        def counted(*paths: str, left: object = left) -> None:
            if not next(left, False):  # type: ignore[call-overload]
                raise Killed
            replace(*paths)

        with monkeypatch.context() as context:
            context.setattr(os, "replace", counted)
            context.setattr(Staging, "discard", lambda self: self._lock.close())
            with pytest.raises(Killed):
                train(store, out, model)
        assert not RunDirectory(out).is_run
    assert Staging.discard is discard
    assert train(store, out, model) == 0
    assert RunDirectory(out).is_finished
    assert not list(out.rglob(".*")), "what the killed ones left is gone"
    straight = tmp_path / "straight" / "run"
    assert train(store, straight, model) == 0
    weights = {name: content for name, content in contents(straight).items() if name.endswith("model.safetensors")}
    assert {name: content for name, content in contents(out).items() if name in weights} == weights


@pytest.mark.parametrize(("model", "moment"), [("concat", 4)])
def test_sigkill_while_the_folder_is_laid_down(store: Path, tmp_path: Path, model: str, moment: int) -> None:
    out = tmp_path / "run"
    done = run_ranks([moment, store, "--out", out, "--model", model, *OPTIONS], 1, code=KILLED_AT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not RunDirectory(out).is_run
    assert train(store, out, model) == 0
    assert RunDirectory(out).is_finished


def test_what_another_program_left_is_not_taken_for_a_run(store: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("precious = true")
    assert train(store, tmp_path, "bavae") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
