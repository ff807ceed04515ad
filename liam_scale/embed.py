"""Embed: `torchrun --nproc-per-node=N -m liam_scale.embed runs/a` writes obsm["X_liam"] into the store."""

from __future__ import annotations

import hashlib
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import anndata
import h5py
import numpy as np
import torch
import tyro
import zarr

from liam_scale.command import Command
from liam_scale.finding import stores_of
from liam_scale.model import Liam, logistic_normal_mean
from liam_scale.model.layers import Gaussian
from liam_scale.model.noise import Noise
from liam_scale.posterior import ordered_loader
from liam_scale.run import RunDirectory, attributes_of, check_features, check_maker
from liam_scale.training.devices import Device, check_device, device_of
from liam_scale.training.distributed import World, join_world
from liam_scale.training.ranks import launched_ranks
from loaders.durable import holding, replacing, sha256_of
from loaders.ecosystem import write_anndata
from loaders.formats.root import HDF5_SUFFIXES, open_root
from loaders.loader import Loader
from loaders.minibatch import Minibatch
from loaders.options import Range, check_options
from loaders.progress import Progress
from loaders.schema import SCHEMA_KEY
from loaders.sizing import parse_memory
from loaders.stores import Store, embeddings
from loaders.stores.base import check_finite, glance_at_counts

CELLS_PER_STEP = 1_024
"""Cells embedded at once, over all ranks."""

STEPS_PER_PIECE = 16
"""Steps between files of finished rows: a restarted embedding repeats at most one such piece a rank."""

Kind = Literal["mean", "latent-mean", "latent-variance", "sample"]


@dataclass(frozen=True)
class EmbedConfig:
    """Embed the cells of a store with a trained model. Under torchrun every process embeds its own range of cells."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    store: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE ...")] = ()
    """Store to embed, or several chained; default: those of the training."""
    out: Path | None = None
    """Write a separate AnnData here instead of into the store: .h5ad, or a Zarr folder."""
    key: str = "X_liam"
    """Name of the embedding in obsm."""
    overwrite: bool = False
    """Replace an embedding of that name that another run made."""
    kind: Kind = "mean"
    """mean: E[softmax(N(m, v))]; latent-mean, latent-variance: m, v before the softmax; sample: one draw of softmax."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "512MiB"
    """Memory of the loader."""
    threads: Annotated[int | None, Range(least=1)] = None
    """Reader threads of one process."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the draws of `sample`."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        parse_memory(self.memory)


def _embed_and_tell(config: EmbedConfig) -> None:
    where = embed(config)
    if launched_ranks()[0] == 0:
        reader = _reader(where)
        print(f'wrote obsm["{config.key}"] to {where}' + (f'; read it with {reader}("{where}")' if reader else ""))


def _reader(where: str) -> str | None:
    """The function that reads a store of the scverse."""
    if where.endswith(".h5ad"):
        return "anndata.read_h5ad"
    try:
        attributes = open_root(where).attrs
    except ValueError:
        # A TileDB-SOMA experiment, or several stores.
        return None
    if SCHEMA_KEY in attributes:
        return "liam_scale.read_store"
    return {"MuData": "mudata.read_zarr", "anndata": "anndata.read_zarr"}.get(str(attributes.get("encoding-type")))


def embed(config: EmbedConfig) -> str:
    """Write the embedding of every cell, in the order of the store's cells.

    Finished pieces stay beside the run until all are there, so an interrupted embedding goes on where it was.

    Returns
    -------
    Where the embedding stands: the store's uri, or `out`.

    Raises
    ------
    ValueError
        The run is not finished, the store has other features or samples or holds another run's embedding of that name,
        or `out` exists.
    """
    store = stores_of(RunDirectory(config.run), config.store)
    glance_at_counts(store, store.schema.modalities)
    return embed_store(config, store)


def embed_store(config: EmbedConfig, store: Store) -> str:
    """`embed` for a store that is already open."""
    directory = RunDirectory(config.run)
    models = [part.load_model() for part in directory.parts()]
    for part in directory.parts():
        check_features(store, part.record())
    if config.out is not None and config.out.exists():
        raise ValueError(f"--out: {config.out} exists; name a new folder")
    if config.out is not None and config.out.suffix in HDF5_SUFFIXES and config.out.suffix != ".h5ad":
        raise ValueError(
            f"--out: got {config.out}, an embedding is written as .h5ad or AnnData Zarr; "
            f"name {config.out.with_suffix('.h5ad')}"
        )
    if config.out is None and not config.overwrite:
        check_replaces(store, config.key, directory.record().id)
    pieces = directory.path / f"embedding-{_fingerprint(config, directory, store)}"
    is_main = launched_ranks()[0] == 0
    with holding(pieces) if is_main else nullcontext(), join_world(config.device) as world:
        pieces.mkdir(exist_ok=True)
        for index, (part, model) in enumerate(zip(directory.parts(), models, strict=True)):
            _embed_part(config, part, model.to(world.device), store, world, pieces / str(index))
        world.barrier()
        if world.is_main:
            _write(config, store, pieces, len(models), attributes_of(directory.record().id))
            shutil.rmtree(pieces)
        world.barrier()
    return str(config.out) if config.out else store.uri


def check_replaces(store: Store, key: str, run: str | None) -> None:
    """Refuse to write over the embedding that another run left in a store."""
    cure = "name another --key, or replace it with --overwrite"
    what = f"--key: obsm[{key!r}] of {store.uri}"
    check_maker(store.embedding_attributes(key), run, what=what, cure=cure)


def _fingerprint(config: EmbedConfig, directory: RunDirectory, store: Store) -> str:
    digest = hashlib.sha256(f"{store.schema.fingerprint} {config.kind} {config.seed}".encode())
    for part in directory.parts():
        digest.update(sha256_of(part.weights).encode())
    return digest.hexdigest()[:16]


def compute(config: EmbedConfig, store: Store | None = None) -> np.ndarray:
    """The embedding in memory, (cells, latent) float32 in the order of the store's cells; writes nothing."""
    directory = RunDirectory(config.run)
    store = store or stores_of(directory, config.store)
    glance_at_counts(store, store.schema.modalities)
    columns, world = [], World(device=device_of(config.device))
    for part in directory.parts():
        check_features(store, part.record())
        model = part.load_model().to(world.device)
        whole = np.empty((store.schema.num_cells, model.num_latent), dtype=np.float32)
        loader = _loader(config, part, store, world)
        with torch.no_grad():
            for minibatch in loader:
                rows, values = _embed_minibatch(config, model, minibatch.to(world.device))
                whole[rows] = values
        columns.append(whole)
    return np.concatenate(columns, axis=1)


def _loader(config: EmbedConfig, part: RunDirectory, store: Store, world: World) -> Loader:
    return ordered_loader(
        part, store, minibatch=CELLS_PER_STEP, memory=config.memory, threads=config.threads, world=world
    )


def _embed_part(config: EmbedConfig, part: RunDirectory, model: Liam, store: Store, world: World, pieces: Path) -> None:
    """Embed this rank's cells in pieces, from the first that is not there on."""
    pieces.mkdir(exist_ok=True)
    loader = _loader(config, part, store, world)
    steps = loader.steps_per_epoch
    files = [pieces / f"{world.size:04d}-{world.rank:04d}-{n:08d}.npz" for n in range(0, steps, STEPS_PER_PIECE)]
    done = next((n for n, file in enumerate(files) if not file.exists()), len(files))
    if done == len(files):
        return
    loader.seek(0, done * STEPS_PER_PIECE)
    minibatches = iter(loader)
    progress = Progress("embed", steps, unit="steps", done=done * STEPS_PER_PIECE, is_shown=world.is_main)
    with torch.no_grad(), progress:
        for file in files[done:]:
            own = islice(minibatches, STEPS_PER_PIECE)
            parts = [_embed_minibatch(config, model, minibatch.to(world.device)) for minibatch in own]
            rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
            with replacing(file) as path:
                np.savez(path, rows=rows, values=values)
            progress.advance(len(parts))


def _embed_minibatch(config: EmbedConfig, model: Liam, minibatch: Minibatch) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the store and embedding of the cells of a minibatch."""
    mean, variance = model.latent(minibatch)
    if config.kind == "mean":
        values = logistic_normal_mean(mean, variance)
    elif config.kind == "sample":
        draw = Noise(seed=config.seed, step=0, place=minibatch.rows)
        values = torch.softmax(Gaussian(mean, variance).sample(draw, "z"), dim=1)
    else:
        values = mean if config.kind == "latent-mean" else variance
    return minibatch.rows.cpu().numpy(), values.float().cpu().numpy()


def _write(config: EmbedConfig, store: Store, pieces: Path, num_models: int, attributes: dict[str, str]) -> None:
    """Put the pieces together in cell order (80 bytes a cell at 20 dimensions), and the whole in its place."""
    embedding = np.concatenate([_joined(pieces / str(n), store) for n in range(num_models)], axis=1)
    check_finite(
        store,
        embedding,
        0,
        what=f"embed: {config.run} on {store.uri}",
        cure="see where its history.csv stops being finite, and train again with a lower --lr",
    )
    if config.out is None:
        store.write_embedding(config.key, embedding, attributes)
        return
    data = anndata.AnnData(obs=store.obs_frame())
    with replacing(config.out) as path:
        if config.out.suffix == ".h5ad":
            data.obsm[config.key] = embedding
            data.write_h5ad(path)
            with h5py.File(path, "r+") as file:
                file["obsm"][config.key].attrs.update(attributes)
        else:
            write_anndata(data, path)
            root = zarr.open_group(path, mode="r+", use_consolidated=False)
            embeddings.write(root, config.key, embedding, attributes)


def _joined(pieces: Path, store: Store) -> np.ndarray:
    """(cells, latent) values of one model, of every cell and finite."""
    whole: np.ndarray | None = None
    seen = np.zeros(store.schema.num_cells, dtype=bool)
    for file in sorted(pieces.glob("*[0-9].npz")):
        try:
            with np.load(file) as piece:
                rows, values = piece["rows"], piece["values"]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            file.unlink()
            raise RuntimeError(
                f"embed: {file} was damaged ({error}) and is removed; run the same command again"
            ) from error
        if whole is None:
            whole = np.empty((len(seen), values.shape[1]), dtype=np.float32)
        whole[rows] = values
        seen[rows] = True
    assert whole is not None, "a store has cells"
    assert seen.all(), "every cell is in a piece"
    return whole


main = Command(
    EmbedConfig,
    _embed_and_tell,
    prog="python -m liam_scale.embed",
    description="Write the embedding of a trained model into a store.",
)

if __name__ == "__main__":
    sys.exit(main())
