"""The stores of a run: where they were at its training, or where they are found after the run was moved."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from liam_scale.config import TrainConfig
from liam_scale.contents import differences
from liam_scale.run import RunDirectory, RunRecord
from liam_scale.tables import names_in
from loaders.formats.root import local_path
from loaders.modalities import PRESETS, Kind, Kinds, check_found, declared
from loaders.stores import MatchedStore, Store, choose, open_known

_log = logging.getLogger(__name__)

IN_MEMORY = " in memory"
"""How a run calls the store that it was trained on where that is an AnnData or MuData: "MuData in memory"."""

_ANEW = "give the store anew, as --store STORE (map: --reference STORE) or liam_scale.load_run(run, store=STORE)"


def open_stores(
    uris: Sequence[str], kinds: Kinds = PRESETS, *, layer: str | None = None, foreign_layer: str | None = None
) -> Store:
    """One store, or several chained as one data set; `kinds` says what modalities of other names are.

    `layer` and `foreign_layer` are those of `loaders.stores.open_known`.
    """
    if uris[0].endswith(IN_MEMORY):
        raise ValueError(
            f"store: the run was trained on {uris[0]}; give the object again, run.embed(data), or store=data of its "
            "other methods, reference=data for its labels, or liam_scale.train(data, ...); or a store made of it"
        )
    one_or_all = uris[0] if len(uris) == 1 else list(uris)
    return open_known(one_or_all, kinds, layer=layer, foreign_layer=foreign_layer)


def kinds_of(directory: RunDirectory) -> dict[str, Kind]:
    """What the modalities of a run are."""
    return {name: kind for part in directory.parts() for name, kind in part.record().data.kinds.items()}


def opened(config: TrainConfig) -> Store:
    """All of the store of a training."""
    kinds = declared(config.modality)
    store = open_stores(config.store, kinds, layer=config.layer)
    check_found(kinds, store.schema.modalities, store.uri)
    return store


def chosen(store: Store, config: TrainConfig) -> Store:
    """The cells and features of a store that a training takes."""
    return choose(store, where=config.where, features=None if config.features is None else names_in(config.features))


def stores_of(directory: RunDirectory, given: Sequence[str] = ()) -> Store:
    """The store that is given, with all its cells, or that of the training, several chained, with those it took.

    One that no longer stands where it was is looked for in the folder of the run and in those above it: under its own
    path where that was relative, and under its name. What is found must be what the run was trained on.

    Raises
    ------
    ValueError
        It is in none of these places, or something else is.
    """
    record = directory.record()
    if given:
        return seen_by(directory, open_stores(given, kinds_of(directory), foreign_layer=record.layer))
    found = [_found(directory, uri) for uri in record.stores]
    opened = open_stores(found, kinds_of(directory), foreign_layer=record.layer)
    store = seen_by(directory, choose(opened, where=record.where))
    if tuple(found) != record.stores:
        _check_found(store, directory, record)
        _log.info("run %s was moved: its store is %s", directory.path, store.uri)
    return store


def seen_by(directory: RunDirectory, store: Store) -> Store:
    """The store with the features of the run alone, where it has all of them and others beside.

    A run that a mapping made takes any store as the mapping does.
    """
    features, matches = _features(directory), directory.record().matches
    if matches is not None:
        return MatchedStore(store, features, by_overlap=matches == "overlap", kinds=kinds_of(directory))
    held = {name: store.feature_names(name) for name in features if name in store.schema.modalities}
    has_all = len(held) == len(features) and all(set(features[name]) <= set(own.tolist()) for name, own in held.items())
    has_more = any(len(own) > len(features[name]) for name, own in held.items())
    return MatchedStore(store, features) if has_all and has_more else store


def _features(directory: RunDirectory) -> dict[str, list[str]]:
    return {name: own for part in directory.parts() for name, own in part.features().items()}


def _found(directory: RunDirectory, uri: str) -> str:
    path = None if uri.endswith(IN_MEMORY) else local_path(uri)
    if path is None or path.exists():
        return uri
    home = directory.path.resolve()
    places = [path.name] if path.is_absolute() else [str(path), path.name]
    candidates = [folder / place for folder in (home, *home.parents) for place in places]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        raise ValueError(
            f"store: {uri}, on which {directory.path} was trained, is not there, nor is {path.name} in the folder of "
            f"the run or above it; {_ANEW}"
        )
    return str(found)


def _check_found(store: Store, directory: RunDirectory, record: RunRecord) -> None:
    """Refuse another store of that name; what an older version or a mapping made does not remember its store."""
    if record.contents is None:
        return
    lines = differences(record.contents, store, _features(directory))
    if lines:
        raise ValueError(
            f"store: {store.uri} has the name of the store that {directory.path} was trained on and is another one:\n  "
            + "\n  ".join(lines)
            + f"\n  {_ANEW}"
        )
