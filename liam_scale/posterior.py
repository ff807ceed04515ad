"""The latent variables of a store's cells, chunk by chunk: as they stand in obsm, or drawn from a model's posterior.

Shapes: B cells, L latent dimensions, F features, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liam_scale.finding import IN_MEMORY
from liam_scale.model import Liam
from liam_scale.model.decoders import NegativeMultinomialDecoder
from liam_scale.model.layers import Gaussian
from liam_scale.model.noise import Noise
from liam_scale.run import RunDirectory, RunRecord, check_features, check_maker
from liam_scale.samples import sample_codes
from liam_scale.training.distributed import World
from loaders.loader import Loader
from loaders.stores import Store
from loaders.stores.base import check_finite


@dataclass(frozen=True)
class Latents:
    """Cells that follow each other in a store.

    Attributes
    ----------
    rows
        (B,) their rows in the store, int64, ascending.
    mean, variance
        (B, L) posterior before the softmax; without a variance `mean` is a point of the simplex, as embedded.
    seed
        Of the draws, which also rest on the row of the cell and the number of the draw, and on nothing else.
    """

    rows: Tensor
    mean: Tensor
    variance: Tensor | None = None
    seed: int = 0

    def draw(self, number: int) -> Tensor:
        """(B, L) points of the simplex."""
        if self.variance is None:
            return self.mean
        noise = Noise(seed=self.seed, step=number, place=self.rows)
        return torch.softmax(Gaussian(self.mean, self.variance).sample(noise, "z"), dim=1)

    def __getitem__(self, cells: slice) -> Latents:
        return Latents(
            self.rows[cells], self.mean[cells], None if self.variance is None else self.variance[cells], self.seed
        )


def ordered_loader(
    part: RunDirectory, store: Store, *, minibatch: int, memory: str, threads: int | None, world: World
) -> Loader:
    """This rank's range of all cells, in disk order. Only an encoder that sees the sample needs to know it."""
    record = part.record()
    batch_key = record.batch_key if record.model.conditional_encoder else ()
    config = replace(part.loader_config(), resident="off")  # for one pass nothing needs to stay
    return Loader(
        store,
        replace(config, minibatch=minibatch, streams=world.size, memory=memory, threads=threads),
        sample=sample_codes(store, batch_key, record.data.samples) if batch_key else None,
        modalities=record.model.modalities,
        rank=world.rank,
        world=world.size,
        subset="all",
        shuffle=False,
        transpose=False,
        device=world.device,
    )


def single(directory: RunDirectory, verb: str) -> RunRecord:
    """The record of a run of one model.

    Raises
    ------
    ValueError
        It is a late integration, whose models have no common latent space.
    """
    record = directory.record()
    if record.parts:
        raise ValueError(f"run: {directory.path} is a late integration; {verb} one of {', '.join(record.parts)} in it")
    return record


def drawn(
    directory: RunDirectory, model: Liam, store: Store, *, cells: int, memory: str, seed: int
) -> Iterator[Latents]:
    """Posteriors of all cells, about `cells` at a time, by the encoders: the counts are read once."""
    check_features(store, directory.record())
    world = World(device=next(model.parameters()).device)
    with ordered_loader(directory, store, minibatch=cells, memory=memory, threads=None, world=world) as loader:
        for minibatch in loader:
            mean, variance = model.latent(minibatch.to(world.device))
            yield Latents(minibatch.rows.to(world.device), mean, variance, seed)


def embedded(
    directory: RunDirectory, model: Liam, store: Store, *, key: str, cells: int, stores: Sequence[str] = ()
) -> Iterator[Latents]:
    """What `embed` wrote for the cells, `cells` at a time; no counts are read.

    Parameters
    ----------
    stores
        As the user named them, for messages.

    Raises
    ------
    ValueError
        There is no such embedding, or another run's.
    """
    check_embedded(directory, model.num_latent, store, key=key, stores=stores)
    device = next(model.parameters()).device
    for start in range(0, store.schema.num_cells, cells):
        values = store.read_embedding(key, start, min(store.schema.num_cells, start + cells))
        cure = f"write it again with: {_embedding(directory.path, store, key, stores)}"
        check_finite(store, values, start, what=_name(store, key), cure=cure)
        rows = torch.arange(start, start + len(values), device=device)
        yield Latents(rows, torch.from_numpy(values).to(device))


def check_embedded(
    directory: RunDirectory, num_latent: int, store: Store, *, key: str, stores: Sequence[str] = ()
) -> None:
    """Refuse a store in which this run's embedding is not what stands under a name of obsm."""
    what, embed = _name(store, key), _embedding(directory.path, store, key, stores)
    held = store.embedding_attributes(key)
    if not held:
        raise ValueError(f"{what}: there is no such embedding; write it with: {embed}")
    again = _embedding(directory.path, store, key, stores, overwrite=True)
    cure = f"read it with that run, or write this one's first: {again}"
    check_maker(held, directory.record().id, what=what, cure=cure)
    width = store.read_embedding(key, 0, 1).shape[1]
    if width != num_latent:
        raise ValueError(f"{what} has {width} dimensions, the model {num_latent}; write its embedding with: {embed}")


def _name(store: Store, key: str) -> str:
    return f"obsm[{key!r}] of {store.uri}"


def _embedding(run: Path, store: Store, key: str, stores: Sequence[str], *, overwrite: bool = False) -> str:
    """What writes the embedding of a store: a command, or a line of Python for one in memory."""
    if store.uri.endswith(IN_MEMORY):
        return f"run.embed(data, key={key!r}{', overwrite=True' * overwrite})"
    given = ["--store", *stores] if stores else []
    command = ["python -m liam_scale.embed", str(run), *given, "--key", key, *["--overwrite"] * overwrite]
    return f"{' '.join(command)} (run.embed in Python)"


@torch.no_grad()
def shares(
    model: Liam, modality: str, z_BL: Tensor, sample_B: Tensor, numbers: Mapping[str, Tensor] | None = None
) -> Tensor:
    """(B, F) share of every feature of a modality in the cell's total, as decoded for a sample, and for the values of
    continuous covariates (standardised, by column; none: their means).

    ATAC and other NM modalities: the probability of a peak among all peaks, exp(l_f) / sum exp(l), with the library
    size that the encoder infers in the mean of the sample's cells. (It is a third of their total on simulated cells:
    at the total itself their deviance is 2.6 nats a count, at what is inferred 2.3, and 2.7 of the mean profile.)
    """
    decoder, inputs_BK = model.decoder(modality), model.decoder_inputs(z_BL, numbers)
    if isinstance(decoder, NegativeMultinomialDecoder):
        log_library_B = model.library_prior(modality)[0][sample_B]
        if decoder.uses_library:
            log_library_B = log_library_B + decoder.get_buffer("library_shift")
        return torch.softmax(decoder.logits(inputs_BK, log_library_B, sample_B), dim=1)
    return decoder.scale(inputs_BK, sample_B)


def group_codes(store: Store, groupby: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) group of each cell in an obs column, -1 where it has no value, and the names of the groups.

    Raises
    ------
    ValueError
        There is no such column, or no cell has a value in it.
    """
    try:
        column = store.obs_column(groupby)
    except ValueError as error:
        raise ValueError(f"--groupby: {error}") from None
    if not (column.codes >= 0).any():
        raise ValueError(f"--groupby: got {groupby}, in which no cell of {store.uri} has a value; name another column")
    return column.codes, tuple(column.categories)
