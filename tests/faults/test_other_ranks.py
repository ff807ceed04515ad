"""A training that goes on with other numbers of ranks trains the same cells in the same order to the same losses."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ranks import start_ranks

from liam_scale.run import RunDirectory
from loaders import open_store

RECORDING = """
import os, signal, sys
from liam_scale.model.liam import Liam
from liam_scale.train import main
from loaders import open_store

store = open_store(sys.argv[1])
ids = store.cell_ids(0, store.schema.num_cells)
seen, stop, forward = open(sys.argv.pop(2), "a"), int(sys.argv.pop(2)), Liam.forward
def recorded(self, minibatch, **options):
    if self.training:
        for place, row in zip(minibatch.place.tolist(), minibatch.rows.tolist()):
            seen.write(f"{minibatch.epoch} {options['step']} {place} {ids[row]}\\n")
        seen.flush()
        if options["step"] == stop and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, minibatch, **options)
Liam.forward = recorded
sys.exit(main(sys.argv[1:]))
"""
"""Writes down which cells a rank trains at which step, and is told to stop at one."""

OPTIONS = ("--batch-key", "sample", "--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32", "--lr", "1e-4")
LENGTH = ("--max-steps", 47, "--training.no-early-stopping", "--training.validate-every", "5")
NEVER = -2


def train(store: Path, folder: Path, ranks: int, stop: int) -> pd.DataFrame:
    """Train on so many ranks until a step or to the end; what was trained, by step and place in the minibatch."""
    file = folder / f"cells{stop}"
    options = [*OPTIONS, *LENGTH, "--loader.streams", 4]
    started = start_ranks([store, file, stop, "--out", folder / "run", *options], ranks, code=RECORDING)
    for rank in started:
        code, said = rank.ends()
        assert code == 0, said
    names = ["epoch", "step", "place", "cell"]
    return pd.read_csv(file, sep=" ", names=names).sort_values(["step", "place"], ignore_index=True)


@pytest.mark.slow
def test_one_two_four_three_and_one_ranks_train_what_one_rank_trains(
    store: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "changed").mkdir()
    straight = train(store, tmp_path / "straight", 1, NEVER)
    parts = []
    for ranks, stop in ((1, 3), (2, 13), (4, 22), (3, 34), (1, NEVER)):
        parts.append(train(store, tmp_path / "changed", ranks, stop))
        assert RunDirectory(tmp_path / "changed" / "run").is_finished == (stop == NEVER)
    changed = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(changed, straight)
    record_property("cells", len(changed))
    ids = open_store(store).cell_ids(0, 300)
    in_epochs = [Counter(part["cell"]) for _, part in changed.groupby("epoch")]
    assert len(in_epochs) > 4
    assert all(set(counts.values()) == {1} for counts in in_epochs)
    assert all(set(counts) == set(in_epochs[0]) <= set(ids) for counts in in_epochs[:-1])
    histories = [pd.read_csv(tmp_path / name / "run" / "history.csv") for name in ("straight", "changed")]
    losses = [column for column in histories[0] if "loss" in column or "divergence" in column]
    assert len(losses) > 5
    left, right = (history[losses].to_numpy() for history in histories)
    np.testing.assert_allclose(right, left, rtol=1e-6)
    record_property("largest_difference_in_1e-9", int(np.ceil(1e9 * np.abs(right / left - 1).max())))
