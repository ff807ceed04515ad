"""Killed at random moments, from its first instant on, a training goes on with the same command to the same bytes."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Rank, start_ranks

from liam_scale.run import RunDirectory

OPTIONS = ("--batch-key", "sample", "--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32")
LENGTH = ("--max-steps", "150", "--training.checkpoint-steps", "3", "--loader.streams", "4")


def arguments(store: Path, out: Path, model: str) -> list[str]:
    return [str(store), "--out", str(out), "--model", model, *OPTIONS, *LENGTH, "--timeout", "60"]


def reached(out: Path) -> dict[str, int]:
    """Step of the newest checkpoint of each part."""
    steps: dict[str, int] = {}
    for path in out.rglob("checkpoints/step-*"):
        part = str(path.parent)
        steps[part] = max(steps.get(part, 0), int(path.name[-9:]))
    return steps


def ends(ranks: list[Rank], victims: list[int], moment: float) -> list[int]:
    """Kill some ranks at a moment after their start; the codes with which all end."""
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and any(rank.is_alive() for rank in ranks):
        time.sleep(0.005)
    for victim in victims:
        ranks[victim].kill()
    codes = []
    for rank in ranks:
        code, said = rank.ends()
        assert "Traceback" not in said, said
        codes.append(code)
    return codes


def weights(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("model.safetensors"))}


def kill(store: Path, folder: Path, *, kills: int, ranks: int, model: str, seed: int, longest: float) -> int:
    """Train to the end again and again until there were so many kills; how many runs that took."""
    chance, done, runs = random.Random(seed), 0, 0
    straight = folder / "straight"
    assert set(ends(start_ranks(arguments(store, straight, model), ranks), [], 600)) == {0}
    while done < kills:
        out = folder / f"run{runs}"
        runs += 1
        while not (RunDirectory(out).is_run and RunDirectory(out).is_finished):
            before = reached(out)
            is_last = done >= kills
            victims = chance.choice([*([rank] for rank in range(ranks)), list(range(ranks))])
            moment = 600 if is_last else chance.uniform(0, longest)
            codes = ends(start_ranks(arguments(store, out, model), ranks), victims, moment)
            assert set(codes) <= {0, 1, -9}, codes
            assert not is_last or set(codes) == {0}
            done += -9 in codes
            after = reached(out)
            assert all(after[part] >= step for part, step in before.items()), "no checkpoint is lost"
        assert weights(out) == weights(straight)
        assert not [path for path in out.rglob(".*") if path.name.endswith(".partial")]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ranks", "kills", "longest"),
    [("concat", 1, 8, 4.0), ("bavae", 2, 60, 6.0), ("concat", 2, 20, 8.0), ("concat", 1, 20, 8.0)],
)
def test_kills_of_any_rank_or_all(
    store: Path,
    tmp_path: Path,
    model: str,
    ranks: int,
    kills: int,
    longest: float,
    record_property: Callable[[str, object], None],
) -> None:
    runs = kill(store, tmp_path, kills=kills, ranks=ranks, model=model, seed=kills, longest=longest)
    record_property("kills", kills)
    record_property("runs", runs)
