"""One rank decides for all, also where a network file system shows the others less than it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import liam_scale

SCRIPT = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
import torch
from liam_scale.config import TrainConfig
from liam_scale.model import ModelConfig
train_module = __import__("importlib").import_module("liam_scale.train")
from liam_scale.training import checkpoint, distributed
from liam_scale.training.optim import OptimConfig
from liam_scale.training.options import TrainingConfig
from liam_scale.training.trainer import Trainer
from loaders.options import LoaderConfig

folder, rank = Path(sys.argv[1]), int(__import__("os").environ["RANK"])
start, exists, load, candidates = time.monotonic(), Path.exists, checkpoint._load, checkpoint._candidates
if rank == 1:
    # What this rank looked for too early stays invisible to it for a while, and so does the newest checkpoint.
    Path.exists = lambda path, **k: exists(path, **k) and path.name != "run.json"
    checkpoint._candidates = lambda directory: candidates(directory)[1:]
    def late(path):
        if time.monotonic() - start < 4:
            raise RuntimeError("not here yet")
        return load(path)
    checkpoint._load = late
restored, restore = [], Trainer.restore
def watched(trainer, found):
    restore(trainer, found)
    restored.append((trainer.at.global_step, float(sum(p.detach().double().sum() for p in trainer.model.parameters()))))
Trainer.restore = watched

def options(steps):
    return TrainConfig(
        store=(str(folder / "store.zarr"),), out=folder / "run", batch_key=("sample",), device="cpu",
        model=ModelConfig(n_hidden=16, n_latent=4), loader=LoaderConfig(minibatch=64, memory="64MiB"),
        training=TrainingConfig(max_steps=steps, checkpoint_steps=10),
    )

with distributed.join_world("cpu") as world:
    told = []
    def refuse():
        raise ValueError("only the main rank says no")
    try:
        world.decided(refuse)
    except ValueError as error:
        told.append(str(error))
    told.append(world.decided(lambda: f"rank {rank}"))
    # A process joins once: the store at which ranks meet remembers their first addresses.
    train_module.join_world = lambda *_, **options: nullcontext(world)
    train_module.train(options(20))
    train_module.train(options(22))
torch.save((told, restored), folder / f"{rank}.pt")
"""


def test_run_and_checkpoint_are_those_that_the_main_rank_sees(
    multiome: Path, tmp_path: Path, on_ranks: Callable[[str, int], list[Any]]
) -> None:
    (tmp_path / "store.zarr").symlink_to(multiome)
    results = on_ranks(SCRIPT, 2)
    for told, restored in results:
        assert told == ["only the main rank says no", "rank 0"]
        assert [step for step, _ in restored] == [20]
    assert results[0] == results[1]
    assert liam_scale.load_run(tmp_path / "run").history["step"].max() == 22
