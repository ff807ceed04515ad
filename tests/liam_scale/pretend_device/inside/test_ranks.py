"""Two ranks with a pretend device each, of which one has twice the streams of the other."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import liam_scale

RANKS = Path(__file__).parents[1] / "pretend_ranks.py"


def test_uneven_ranks_train_as_one_process_on_the_cpu(multiome: Path, tmp_path: Path) -> None:
    """With the likelihood that couples the ranks' cells at every step; in the second epoch rows are there that came."""
    options = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "streams": 3, "max_steps": 14}
    options["resident"] = "on"
    one = liam_scale.train(
        multiome, out=tmp_path / "one", batch_key="sample", device="cpu", likelihood="original", **options
    )
    given = ["--batch-key", "sample", "--config", str(tmp_path / "one" / "config.toml"), "--device", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(RANKS)]
    command += [str(multiome), "--out", str(tmp_path / "two"), "--debug", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    two = liam_scale.load_run(tmp_path / "two")
    losses = ["step", "train_loss", "validation_loss"]
    pd.testing.assert_frame_equal(two.history[losses], one.history[losses], rtol=1e-5)
    for name, weight in one.model().state_dict().items():
        np.testing.assert_allclose(two.model().state_dict()[name], weight, rtol=1e-3, atol=1e-5, err_msg=name)
