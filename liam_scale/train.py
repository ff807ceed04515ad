"""Train liam: `torchrun --nproc-per-node=N -m liam_scale.train atlas.zarr --batch-key donor --out runs/a`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from liam_scale.command import Command
from liam_scale.config import TrainConfig
from liam_scale.contents import contents_of
from liam_scale.estimate import describe_plan
from liam_scale.finding import chosen, opened
from liam_scale.fitting import check_world, fit_part
from liam_scale.model import ModelConfig
from liam_scale.resume import labels_of, resolved, settle
from liam_scale.run import RunDirectory, part_folder, record_of
from liam_scale.samples import model_data
from liam_scale.tables import to_toml
from liam_scale.training.callbacks import Callback
from liam_scale.training.distributed import describe, join_world, launched_ranks
from liam_scale.training.trainer import Outcome
from loaders.durable import holding
from loaders.stores import Store


def _train_and_tell(config: TrainConfig) -> None:
    directory, outcome = train(config)
    if launched_ranks()[0] == 0 and outcome in ("finished", "stopped early"):
        print(f"{outcome}: weights in {directory.weights if directory.weights.exists() else directory.path}")
        print(f"next: python -m liam_scale.embed {directory.path}")


def train(
    config: TrainConfig, store: Store | None = None, callbacks: Sequence[Callback] = ()
) -> tuple[RunDirectory, Outcome | None]:
    """Train, or go on with, the run in `config.out`; on a store of which all is taken, or as the options say.

    Returns the folder of the run, and how training ended (None after a dry run).

    Raises
    ------
    ValueError
        Options, store and folder do not fit each other; the message says what to change.
    RuntimeError
        The run failed: damaged store, full disk, a loss that is not finite.
    """
    store = store or chosen(opened(config), config)
    models, directory = resolved(config, store), RunDirectory(config.out)
    if config.dry_run:
        settled = settle(config, store, models, launched_ranks()[1])
        if launched_ranks()[0] == 0:
            print(describe_plan(settled, store, models))
        return directory, None
    with join_world(config.device, timeout_seconds=config.training.timeout_seconds) as world, ExitStack() as stack:
        check_world(config, world)

        def begin() -> TrainConfig:
            """The effective options; the folder of the run is there, and locked until the stack ends."""
            settled = settle(config, store, models, world.size)
            stack.enter_context(holding(directory.path))
            if not directory.is_run:
                _create(directory, settled, store, models)
            print(f"device {describe(world)}, precision {settled.model.precision}", flush=True)
            return settled

        world.enters("laying down the folder of the run")
        settled = world.decided(begin)
        for part in world.decided(directory.parts):
            outcome = fit_part(part, settled, store, world, callbacks)
            if outcome == "interrupted":
                break
    return directory, outcome


def _create(directory: RunDirectory, config: TrainConfig, store: Store, models: tuple[ModelConfig, ...]) -> None:
    """Lay down the folder of a new run: one model, or one folder for each model of a late integration."""
    made, contents = [], contents_of(store, labels_of(config))
    for model in models:
        data = model_data(store, model, config.batch_key, config.loader, config.continuous_key)
        features = {name: list(map(str, store.feature_names(name))) for name in model.modalities}
        own = record_of(config, store, model, data, contents)
        made.append((part_folder(model.modalities[0]), own, to_toml(replace(config, model=model)), features))
    if len(made) == 1:
        directory.create(*made[0][1:])
    else:
        record = record_of(config, store, config.model, data, contents, tuple(name for name, *_ in made))
        directory.create(record, to_toml(config), {}, parts=made)


main = Command(
    TrainConfig,
    _train_and_tell,
    prog="python -m liam_scale.train",
    description="Train liam on a store; start it with torchrun for several processes.",
)

if __name__ == "__main__":
    sys.exit(main())
