"""One model of a run: built or taken up from its checkpoint, trained, and its weights kept."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from liam_scale.config import TrainConfig
from liam_scale.continuous import standardised
from liam_scale.kernels.options import check_precision
from liam_scale.model import Liam, ModelData, check_ranks, parameter_key
from liam_scale.model.objective import modality_masks
from liam_scale.resume import changed_options
from liam_scale.run import Ending, RunDirectory, RunRecord
from liam_scale.samples import sample_codes
from liam_scale.tables import to_dotted, to_toml
from liam_scale.training.callbacks import Callback, Told, telling
from liam_scale.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, set_aside
from liam_scale.training.distributed import World
from liam_scale.training.history import History, Row, memorised
from liam_scale.training.optim import build_optimizer, default_max_epochs, kl_schedule
from liam_scale.training.protocols import MinibatchSource
from liam_scale.training.ranks import ToBeRestarted, is_restarted
from liam_scale.training.recorded import check_graph, lacks_graph
from liam_scale.training.skipping import SkippingSource, lost_rows
from liam_scale.training.trainer import Outcome, Trainer
from liam_scale.training.update import NotFinite, Setback
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.sizing import parse_memory
from loaders.stores import Store
from loaders.stores.base import ids_of

logger = logging.getLogger(__name__)

SHIFT_CELLS = 4_096
"""Of which the mean of inferred library sizes is taken, at the end of training."""

VALIDATION_CELLS = 512
"""Cells scored at once at least; there is no backward pass to hold memory for."""

END = tuple(
    f"training.{name}"
    for name in ("max_epochs", "max_steps", "early_stopping", "patience", "patience_steps", "min_delta")
)
"""Options that say when training ends."""

VALIDATION_MEMORY = 4
"""The validation loader has this part of the memory of the training loader."""

RECORDED = ("device", "model", "optim", "loader", "training")
"""Sections of which a change is recorded."""


def check_world(config: TrainConfig, world: World) -> None:
    """Refuse what this device and so many ranks cannot do, before anything is touched.

    Raises
    ------
    ValueError
        Says what to use instead.
    """
    model = config.model
    check_precision(model.precision, impl=model.impl, device=world.device)
    check_ranks(model, world.size)
    has_batch_norm = model.use_batch_norm_encoder or model.use_batch_norm_decoder
    told = {"couples_cells": model.likelihood == "original", "has_batch_norm": has_batch_norm}
    check_graph(config.training.graph, lacks_graph(world.device, num_ranks=world.size, **told))


def fit_part(
    directory: RunDirectory, config: TrainConfig, store: Store, world: World, callbacks: Sequence[Callback] = ()
) -> Outcome:
    """Train the model of a folder to its end, or to a signal; a training that has ended stays ended."""
    world.enters(f"reading {directory.path} and its newest checkpoint")
    record = world.decided(directory.record)
    model = replace(record.model, precision=config.model.precision, impl=config.model.impl)
    config, record = replace(config, model=model), replace(record, model=model)
    checkpoint = _agreed(directory.newest_checkpoint, directory, world)
    if checkpoint is not None and world.decided(partial(_has_ended, directory, record, config)):
        assert record.ending is not None
        return record.ending["outcome"]
    tried: list[dict[str, Any]] = []
    with telling() as told:
        world.decided(partial(told.start, callbacks, directory.path, _step_of(checkpoint), to_dotted(config)))
        while True:
            record, result = _fit(directory, record, config, store, world, checkpoint, told)
            if not isinstance(result, Setback):
                world.barrier()
                told.outcome = result
                if result == "interrupted" and is_restarted():
                    raise ToBeRestarted("training: saved before its end; torchrun starts it again")
                return result
            record, checkpoint = _roll_back(directory, record, result, tried, config, store, world)


def _has_ended(directory: RunDirectory, record: RunRecord, config: TrainConfig) -> bool:
    """Whether the training has, with these options; if so, says how."""
    if record.ending is None or changed_options(config, directory, END) or not directory.has_sound_weights:
        return False
    print(_describe(directory, record.ending))
    return True


def _agreed(find: Callable[[], Checkpoint | None], directory: RunDirectory, world: World) -> Checkpoint | None:
    """The checkpoint that the main rank finds, on all ranks."""
    found: list[Checkpoint] = []

    def step_found() -> int | None:
        found.extend(checkpoint for checkpoint in [find()] if checkpoint is not None)
        return _step_of(found[0]) if found else None

    step = world.decided(step_found)
    if world.is_main:
        return found[0] if found else None
    return None if step is None else load_checkpoint(directory.checkpoints, step)


def _fit(
    directory: RunDirectory,
    record: RunRecord,
    config: TrainConfig,
    store: Store,
    world: World,
    checkpoint: Checkpoint | None,
    told: Told,
) -> tuple[RunRecord, Outcome | Setback]:
    """Train from a checkpoint to the end, to a signal, or to a number that is not finite."""
    world.enters("making the model and reading the first cells")
    with trainer_of(directory, record, config, store, world, told) as trainer:
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if world.is_main:
            record = _go_on(directory, record, config, trainer)
        try:
            outcome = trainer.fit()
        except NotFinite as error:
            return record, error.setback
    if rows := lost_rows(trainer.train_source, trainer.validation_source):
        record = replace(record, skipped=tuple(map(str, ids_of(store, np.array(rows)))))
        if world.is_main:
            directory.write_record(record)
    if outcome != "interrupted" and world.is_main:
        weights = _for_all_samples(trainer.best_weights(), record, store)
        directory.save_weights(weights | _library_shifts(weights, record, config, store))
        at = trainer.at
        ending = Ending(
            outcome=outcome, epoch=at.epoch, step=at.global_step, best_epoch=at.best_epoch, best_step=at.best_step
        )
        directory.write_record(replace(record, ending=ending))
        for name, (lowest, epoch, kept) in memorised(trainer.history.rows, at.best_step).items():
            logger.warning(
                "%s is memorised: its held-out loss was lowest at epoch %d (%.4g nats a cell) and is %.4g with the"
                " weights kept; --weights %s=0.05 would have the other modalities shape the embedding more",
                *(name, epoch, lowest, kept, name),
            )
    return record, outcome


def _for_all_samples(weights: dict[str, Tensor], record: RunRecord, store: Store) -> dict[str, Tensor]:
    """The weights, with what decoders learnt nothing of: samples in which their modality was never measured.

    Rows of these samples still are the noise they began with. They become the mean of those that were learnt, so that a
    modality that a sample lacks is decoded as it is in the mean of the others.
    """
    filled, codes = dict(weights), sample_codes(store, record.batch_key, record.data.samples)
    for name in record.model.modalities:
        rows = store.modality_rows(name)
        is_known = torch.zeros(record.data.num_samples, dtype=torch.bool)
        is_known[np.unique(codes if rows is None else codes[rows >= 0])] = True
        key = f"decoders.{parameter_key(name)}"
        table, theta = (weights.get(f"{key}.{part}") for part in ("linear.sample_weight", "log_theta"))
        is_known = is_known.to(next(iter(weights.values())).device)
        if is_known.all() or not is_known.any():
            continue
        if table is not None:
            filled[f"{key}.linear.sample_weight"] = torch.where(is_known[:, None], table, table[is_known].mean(dim=0))
        if theta is not None and theta.dim() == 2:
            mean = theta[:, is_known].mean(dim=1, keepdim=True)
            filled[f"{key}.log_theta"] = torch.where(is_known, theta, mean)
    return filled


def _library_shifts(
    weights: dict[str, Tensor], record: RunRecord, config: TrainConfig, store: Store
) -> dict[str, Tensor]:
    """What encoders infer of library sizes beside their priors, where a decoder reads them: the mean of some cells."""
    model = Liam(record.model, record.data)
    model.load_state_dict({name: values.cpu() for name, values in weights.items()})
    model.eval()
    sums = {name: [0.0, 0.0] for name in model.modalities if hasattr(model.decoder(name), "library_shift")}
    chosen = replace(config.loader, streams=1, balance=None, resident="off")
    sample, names = sample_codes(store, config.batch_key, record.data.samples), model.modalities
    options: dict[str, Any] = {"seed": config.seed, "transpose": False, "skip_damaged": skips(config)}
    with Loader(store, chosen, sample=sample, modalities=names, **options) as loader, torch.no_grad():
        for minibatch in islice(loader, -(-SHIFT_CELLS // chosen.minibatch)) if sums else ():
            masks = modality_masks(minibatch, names)
            for name, total in sums.items():
                library = model.encoder(name)(minibatch.counts[name], minibatch.sample, None).library
                prior = model.library_prior(name)[0][minibatch.sample]
                total[0] += float((library.mean[:, 0] - prior)[masks[name]].sum())
                total[1] += float(masks[name].sum())
    means = {name: torch.tensor(total / max(1.0, cells)) for name, (total, cells) in sums.items()}
    return {f"decoders.{parameter_key(name)}.library_shift": mean for name, mean in means.items()}


def _roll_back(
    directory: RunDirectory,
    record: RunRecord,
    setback: Setback,
    tried: list[dict[str, Any]],
    config: TrainConfig,
    store: Store,
    world: World,
) -> tuple[RunRecord, Checkpoint | None]:
    """The one place that decides what follows from numbers that are not finite: where training goes on, or its end.

    `tried` are the roll-backs since the last checkpoint. One from which the very next loss is not finite, with other
    noise too, leads nowhere: it is set aside, and the one before takes its place.
    """
    gc.collect()  # DDP's cycles hold the weights of the trainer that has failed.
    newest, moved, most = partial(newest_checkpoint, directory.checkpoints), None, config.training.max_rollbacks
    checkpoint = _agreed(newest, directory, world)
    if tried and _step_of(checkpoint) > tried[-1]["step"]:
        tried.clear()
    is_over, steps_tried = len(tried) >= most, [told["to"] for told in tried]
    if checkpoint and _step_of(checkpoint) == setback.step and (is_over or setback.step in steps_tried):
        world.barrier()
        moved = set_aside(directory.checkpoints, step=setback.step) if world.is_main else directory.checkpoints
        world.barrier()
        checkpoint = _agreed(newest, directory, world)
    what, step = _describe_setback(setback, store), _step_of(checkpoint)
    if is_over or (moved and checkpoint is None):
        helped = f", and {len(tried)} times other noise did not help" if tried else ""
        helped += f"; the checkpoint of that step, from which this follows, is now {moved}" if moved else ""
        raise NotFinite(setback, what=what, tried=helped)
    terms = {term: list(map(str, ids_of(store, np.array(rows[:10])))) for term, rows in setback.rows.items()}
    tried.append({"step": setback.step, "to": step, "terms": terms or {name: [] for name in setback.names}})
    record = replace(record, rollbacks=(*record.rollbacks, tried[-1]), ending=None)
    if world.is_main:
        told = (
            f"training: {what} is not finite after step {setback.step:,}; nothing of it was kept: back to step {step:,}"
        )
        logger.warning("%s, and on with other noise (%d of at most %d times in a row)", told, len(tried), most)
        directory.write_record(record)
    return record, checkpoint


def _step_of(checkpoint: Checkpoint | None) -> int:
    return checkpoint.step if checkpoint is not None else 0


def _describe_setback(setback: Setback, store: Store) -> str:
    found = []
    for term, rows in setback.rows.items():
        ids = ", ".join(map(str, ids_of(store, np.array(rows[:3])))) + (", ..." if len(rows) > 3 else "")
        found.append(f"{term} of {len(rows):,} cell{'s' if len(rows) > 1 else ''} ({ids})")
    return ", ".join(found or setback.names)


@contextmanager
def trainer_of(
    directory: RunDirectory,
    record: RunRecord,
    config: TrainConfig,
    store: Store,
    world: World,
    told: Told | None = None,
) -> Iterator[Trainer]:
    """A trainer at the start of a run, with loaders that live as long as the block."""
    model = Liam(record.model, record.data, seed=config.seed).to(world.device)
    optimizer = build_optimizer(model, config.optim, world)
    optimizer.register_step_post_hook(lambda *_: model.keep_gradients())
    with training_loaders(store, config, record.data, world) as (train_loader, validation_loader):

        def columns() -> Row:
            return {"skipped_cells": len(lost_rows(train_loader, validation_loader))} if skips(config) else {}

        yield Trainer(
            model,
            optimizer,
            train=train_loader,
            validation=validation_loader,
            world=world,
            config=config.training,
            kl=kl_schedule(config.optim, num_cells=store.schema.num_cells),
            max_epochs=config.training.max_epochs or default_max_epochs(store.schema.num_cells),
            seed=config.seed,
            directory=directory.checkpoints,
            history=_history(directory, config, world, told),
            couples_cells=record.model.likelihood == "original",
            other_noise_from=[told["to"] for told in record.rollbacks],
            columns=columns,
            reduce_bf16=config.optim.reduce_bf16,
        )


def skips(config: TrainConfig) -> bool:
    return config.training.on_bad_chunk == "skip"


def seconds_a_step(trainer: Trainer, *, at_least: float) -> float:
    """Mean time of a step with its loading, measured over so many seconds; nothing of it is kept."""
    trainer.model.train()
    minibatches = chain.from_iterable(repeat(trainer.train_source))
    # The first steps compile kernels and fill buffers.
    for minibatch in islice(minibatches, 3):
        trainer.step(minibatch)
    start, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - start < at_least:
        trainer.step(next(minibatches))
        steps += 1
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


@contextmanager
def training_loaders(
    store: Store, config: TrainConfig, data: ModelData, world: World
) -> Iterator[tuple[MinibatchSource, MinibatchSource | None]]:
    """Loaders of this rank's training and validation cells; None where no cell validates."""
    sample = sample_codes(store, config.batch_key, data.samples)
    numbers = standardised(store, data.continuous)
    chosen = config.loader
    assert chosen.streams is not None
    scored = replace(chosen, minibatch=max(chosen.minibatch, VALIDATION_CELLS))
    # Both stand beside each other, and validation reads a twentieth of the cells, in their order.
    less = replace(scored, memory=str(parse_memory(chosen.memory) // VALIDATION_MEMORY))
    with ExitStack() as stack:

        def loader(subset: Literal["train", "validation"], read: LoaderConfig) -> MinibatchSource:
            is_training = subset == "train"
            own = Loader(
                store,
                read,
                sample=sample,
                obs=numbers,
                modalities=tuple(data.num_features),
                seed=config.seed,
                rank=world.rank,
                world=world.size,
                subset=subset,
                shuffle=is_training,
                # A GPU makes what it needs of the counts as stored, a third of the bytes.
                transpose=is_training and world.device.type == "cpu",
                values="float32" if world.device.type == "cpu" else "stored",
                device=world.device,
                skip_damaged=skips(config),
            )
            stack.enter_context(own)
            return SkippingSource(own, world) if skips(config) else own

        try:
            validation = loader("validation", less)
        except ValueError:  # too little for its minibatches
            validation = loader("validation", scored)
        yield loader("train", chosen), validation if validation.num_cells else None


def _history(directory: RunDirectory, config: TrainConfig, world: World, told: Told | None) -> History:
    if not world.is_main:
        return History(None)
    board = directory.path / "tensorboard" if config.training.tensorboard else None
    return History(directory.history, tensorboard=board, tell=None if told is None else told.evaluated)


def _go_on(directory: RunDirectory, record: RunRecord, config: TrainConfig, trainer: Trainer) -> RunRecord:
    """Tell where training goes on, and record the options that are new: the record without an ending."""
    step, changed = trainer.at.global_step, changed_options(config, directory, RECORDED)
    if step:
        print(f"resuming {directory.path} at epoch {trainer.at.epoch}, step {step:,}")
    changes = [{"step": step, "option": key, "before": before, "now": now} for key, before, now in changed]
    record = replace(record, changes=(*record.changes, *changes), ending=None)
    if changed:
        print("\n".join(f"  {key}: {before} until now, {now} from here on" for key, before, now in changed))
        directory.change(record, to_toml(config))
    return record


def _describe(directory: RunDirectory, ending: Ending) -> str:
    best = f", best at epoch {ending['best_epoch']}, step {ending['best_step']:,}" if ending["best_step"] else ""
    return (
        f"{directory.path} has ended and stays as it is ({ending['outcome']} at epoch {ending['epoch']}, step "
        f"{ending['step']:,}{best}); another --max-epochs, --max-steps or --training.patience lets it go on"
    )
