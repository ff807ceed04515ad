"""python ray_train.py /shared/atlas.zarr sample /shared/runs/a 4 [options]"""

import os
import subprocess
import sys
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_rank(given: dict[str, Any]) -> None:
    """Ray sets RANK, WORLD_SIZE and MASTER_ADDR; MASTER_PORT it keeps for itself."""
    port = int(os.environ["MASTER_PORT"]) + 1
    environment = {**os.environ, "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "liam_scale.train", given["store"]]
    command += ["--batch-key", given["batch_key"], "--out", given["out"]]
    command += given["options"]
    subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    store, batch_key, out, ranks, *options = sys.argv[1:]
    given = {"store": store, "batch_key": batch_key, "out": out, "options": options}
    has_gpu = torch.cuda.is_available()
    TorchTrainer(
        train_rank,
        train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=int(ranks), use_gpu=has_gpu),
        # After a lost worker all ranks start again, from the newest checkpoint.
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
