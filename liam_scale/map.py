"""Map: place the cells of new samples into a trained model (`liam-scale map runs/a new.zarr`).

As scArches does (Lotfollahi et al., Nature Biotechnology 2022): all weights stay, and only what belongs to the new
samples is trained: their rows in the decoders and library encoders, their dispersions. liam's encoder of z sees no
sample (except in models with a conditional encoder), so the place of a new cell does not depend on that training;
decoding and likelihoods of the new samples do.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import tyro
from anndata import AnnData
from mudata import MuData
from torch import Tensor

from liam_scale.command import Command
from liam_scale.config import TrainConfig
from liam_scale.continuous import standardised
from liam_scale.embed import EmbedConfig, check_replaces, embed_store
from liam_scale.finding import open_stores, stores_of
from liam_scale.fitting import training_loaders
from liam_scale.labels import check_labelled, transfer_labels
from liam_scale.model import Liam, ModelData
from liam_scale.run import RunDirectory, RunRecord
from liam_scale.samples import model_data
from liam_scale.tables import to_toml
from liam_scale.training.devices import Device, check_device, device_of
from liam_scale.training.distributed import World
from liam_scale.training.history import History
from liam_scale.training.optim import KLSchedule, OptimConfig, build_optimizer
from liam_scale.training.options import TrainingConfig
from liam_scale.training.trainer import Trainer
from loaders.durable import holding, replacing
from loaders.modalities import agreed
from loaders.options import LoaderConfig, Range, check_options
from loaders.sizing import parse_memory
from loaders.stores import MatchedStore, Store, open_known

LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class MapConfig:
    """Place the cells of new samples into a trained model and write their embedding."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store with the new cells; its features are matched by name, missing ones count as zero."""
    out: Path | None = None
    """Folder of the extended run; default: `mapped-<store>` in the run's folder."""
    batch_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns with the sample; default: those of the run."""
    layer: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Layer with the counts of a store that no ingest made, raw: AnnData's raw; default: as in the training."""
    max_epochs: Annotated[int, Range(least=1)] = 20
    """Epochs of training the parameters of the new samples."""
    peaks: Literal["names", "overlap"] = "names"
    """How ATAC is matched: by name, or each peak to the one of the run with which it shares most bases."""
    label_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column of the training's store: label the new cells by their neighbours there, in labels.csv of `out`."""
    reference: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE ...")] = ()
    """With `--label-key`: store with the labelled cells; default: that of the training."""
    neighbors: Annotated[int, Range(least=1)] = 50
    """Labelled cells that a new one is compared with."""
    unknown: Annotated[float, Range(least=0, most=1)] = 0.5
    """Uncertainty (one minus the probability of a label) above which a cell is "unknown"."""
    key: str = "X_liam"
    """Name of the embedding in obsm."""
    overwrite: bool = False
    """Replace an embedding of that name that another run made."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "512MiB"
    """Memory of the loader."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the order of cells and of the noise."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        parse_memory(self.memory)


def _map_and_tell(config: MapConfig) -> None:
    directory = map_store(config)
    print(f'wrote obsm["{config.key}"] to {config.store}; the extended model is in {directory.path}')
    if config.label_key is not None:
        labels = pd.read_csv(directory.path / LABELS_FILE, usecols=["label"])["label"]
        shown = ", ".join(f"{name} {count:,}" for name, count in labels.value_counts().items())
        print(f"wrote {directory.path / LABELS_FILE}: {shown}")


def map_store(config: MapConfig, query: AnnData | MuData | None = None, reference: Store | None = None) -> RunDirectory:
    """Extend a trained model by the samples of a store, and embed its cells.

    Parameters
    ----------
    query
        The cells in memory, instead of what `config.store` names.
    reference
        The labelled cells, in the place of what `config.reference` names or of the store of the training.

    Returns
    -------
    Folder of the extended run, which knows old and new samples.

    Raises
    ------
    ValueError
        The run has several models or has not finished, `out` holds something else, or the store shares no features with
        the model.
    """
    source = RunDirectory(config.run)
    record = source.record()
    if record.parts:
        raise ValueError(f"run: {config.run} is a late integration; map into one of {', '.join(record.parts)} in it")
    if query is not None and config.out is None:
        raise ValueError("--out: data in memory have no name; name the folder of the extended run, out=...")
    reference = _reference(config, source, reference)
    out = config.out or config.run / f"mapped-{Path(config.store).stem}"
    directory, layer = RunDirectory(out), config.layer or record.layer
    if not directory.is_run:
        directory.check_free()
    model = source.load_model()
    if config.label_key is not None:
        check_labelled(source, label_key=config.label_key, key=config.key, reference=reference)
    kinds = record.data.kinds
    if query is None:
        held = open_stores([config.store], kinds, foreign_layer=layer)
    else:
        held = open_known(query, kinds, foreign_layer=layer)
    store = _matched(config, source, held)
    standardised(store, record.data.continuous)  # refuses a store without the columns that decoders read
    batch_key = _keys(config, record)
    loader_config = replace(source.loader_config(), streams=16, memory=config.memory)
    own = model_data(store, record.model, batch_key, loader_config)
    data = united_samples(record.data, own)
    extended, masks = extend(model, data)
    training = _training(config, extended, batch_key=batch_key, layer=layer, loader=loader_config, out=out)
    new_record = replace(
        record,
        stores=training.store,
        batch_key=batch_key,
        model=extended.config,
        data=data,
        fingerprint=store.schema.fingerprint + (config.peaks == "overlap") * "-overlap",
        contents=None,
        where=None,
        layer=layer,
        matches=config.peaks,
        skipped=(),
        changes=(),
        ending=None,
    )
    options = to_toml(training)
    if not config.overwrite:
        check_replaces(store, config.key, directory.identified(new_record, options).id)
    with holding(out):
        if not directory.is_run:
            directory.create(new_record, options, source.features())
        elif directory.record() != directory.identified(new_record, options):
            raise ValueError(f"--out: {out} holds a run of other options or data; name a new folder")
        if masks:
            _train(extended, masks, training, store, new_record, directory, World(device=device_of(config.device)))
        directory.save_weights(extended.state_dict())
        shared = {name: getattr(config, name) for name in ("key", "overwrite", "memory", "device")}
        embed_store(EmbedConfig(run=out, **shared), store)
        if config.label_key is not None:
            _label(config, source, store, directory, reference)
    return directory


def _reference(config: MapConfig, source: RunDirectory, reference: Store | None) -> Store | None:
    """The labelled cells that were given; refuses some of which nothing would be read."""
    named = " ".join(config.reference) if reference is None else reference.uri
    if named and config.label_key is None:
        raise ValueError(
            f"--reference: got {named}, and no --label-key; name the column of it with the labels, or leave it out"
        )
    return stores_of(source, config.reference) if reference is None and config.reference else reference


def _training(config: MapConfig, model: Liam, *, loader: LoaderConfig, **options: Any) -> TrainConfig:
    """Options of the training of what is new."""
    return TrainConfig(
        store=(config.store,),
        continuous_key=tuple(model.data.continuous),
        seed=config.seed,
        model=model.config,
        loader=loader,
        optim=OptimConfig(weight_decay=0.0),
        training=TrainingConfig(max_epochs=config.max_epochs),
        **options,
    )


def _keys(config: MapConfig, record: RunRecord) -> tuple[str, ...]:
    """Obs columns of the new cells' samples."""
    keys = config.batch_key or record.batch_key
    if len(keys) != len(record.batch_key):
        raise ValueError(
            f"--batch-key: got {' '.join(keys)}; the run has {' '.join(record.batch_key) or 'none'}: give as many, in "
            "that order"
        )
    return keys


def _matched(config: MapConfig, source: RunDirectory, held: Store) -> MatchedStore:
    """The store with the features of the run; refuses one whose modalities are something else than the run's."""
    kinds = source.record().data.kinds
    seen = {name: kind for name, kind in held.schema.kinds.items() if name in kinds}
    agreed([(held.uri, seen), (str(config.run), kinds)])
    return MatchedStore(held, source.features(), by_overlap=config.peaks == "overlap", kinds=kinds)


def _label(
    config: MapConfig, source: RunDirectory, store: Store, directory: RunDirectory, reference: Store | None
) -> None:
    """Label the new cells as their neighbours in the reference, which must hold the run's embedding."""
    assert config.label_key is not None
    labels = transfer_labels(
        source,
        store,
        label_key=config.label_key,
        key=config.key,
        neighbors=config.neighbors,
        unknown=config.unknown,
        seed=config.seed,
        reference=reference,
    )
    with replacing(directory.path / LABELS_FILE) as path:
        labels.to_csv(path, float_format="%.4g")


def united_samples(old: ModelData, new: ModelData) -> ModelData:
    """Samples and priors of a model, followed by those that only the new data have."""
    added = [i for i, name in enumerate(new.samples) if name not in old.samples]
    return replace(
        old,
        samples=(*old.samples, *(new.samples[i] for i in added)),
        prior_mean={m: (*v, *(new.prior_mean[m][i] for i in added)) for m, v in old.prior_mean.items()},
        prior_variance={m: (*v, *(new.prior_variance[m][i] for i in added)) for m, v in old.prior_variance.items()},
        covariates={
            name: (*values, *(others[i] for i in added))
            for (name, values), others in zip(old.covariates.items(), new.covariates.values(), strict=True)
        },
    )


def extend(model: Liam, data: ModelData) -> tuple[Liam, dict[str, Tensor]]:
    """A copy of a model with more samples; what belongs to a new one starts as the mean of the old ones.

    Returns
    -------
    The copy, with all else frozen, and for every parameter that grew a mask that is 1 where it is new.
    """
    # The few rows that are trained do not need the precision of the run, which this device may not have.
    extended = Liam(replace(model.config, alpha=0.0, alphas=(), precision="float32"), data)
    old = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in extended.named_parameters():
            before = old.get(name)
            if before is None:
                # A model of one sample has no table of samples; a row of zeros changes nothing.
                parameter.zero_()
                masks[name] = torch.ones_like(parameter)
            elif before.shape == parameter.shape:
                parameter.copy_(before)
                parameter.requires_grad_(False)
            else:
                masks[name] = _grow(parameter, before)
        known = dict(model.named_buffers())
        for name, buffer in extended.named_buffers():
            if buffer.shape == known[name].shape:  # those of samples follow from the data
                buffer.copy_(known[name])
    return extended, masks


def _grow(parameter: Tensor, before: Tensor) -> Tensor:
    """Copy the old samples into a larger table in place; the mask of what is new."""
    axis = next(i for i, (a, b) in enumerate(zip(parameter.shape, before.shape, strict=True)) if a != b)
    count = before.shape[axis]
    mask = torch.ones_like(parameter)
    parameter.copy_(before.mean(dim=axis, keepdim=True).expand_as(parameter))
    parameter.narrow(axis, 0, count).copy_(before)
    mask.narrow(axis, 0, count).zero_()
    return mask


def _train(
    model: Liam,
    masks: dict[str, Tensor],
    config: TrainConfig,
    store: Store,
    record: RunRecord,
    directory: RunDirectory,
    world: World,
) -> None:
    """Train what is new. Adam without weight decay leaves a parameter whose gradient is always zero as it is."""
    model.to(world.device)
    for name, parameter in model.named_parameters():
        if name in masks:
            mask = masks[name].to(world.device)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    with training_loaders(store, config, record.data, world) as (train_loader, validation_loader):
        assert config.training.max_epochs is not None
        trainer = Trainer(
            model,
            build_optimizer(model, config.optim, world),
            train=train_loader,
            validation=validation_loader,
            world=world,
            config=config.training,
            kl=KLSchedule("epochs", 0.0, 1.0),
            max_epochs=config.training.max_epochs,
            seed=config.seed,
            directory=directory.checkpoints,
            history=History(directory.history),
            couples_cells=record.model.likelihood == "original",
        )
        checkpoint = directory.newest_checkpoint()
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if trainer.fit() == "interrupted":
            raise KeyboardInterrupt
        model.load_state_dict(trainer.best_weights())


main = Command(MapConfig, _map_and_tell, prog="liam-scale map", description="New samples into a trained model.")

if __name__ == "__main__":
    sys.exit(main())
