"""The folder of a run: what stands where, how a trained model is read back, and on which store it works.

`config.toml` effective options · `run.json` what the model knows of the data · `features.json` names of the features ·
`history.csv` · `checkpoints/` · `model.safetensors` best weights, written last: a run without it is not finished.
A run of several models (`concat`) holds one such folder for each of its parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from liam_scale.config import TrainConfig
from liam_scale.model import Liam, ModelConfig, ModelData, parameter_key
from liam_scale.tables import as_tuple, from_table, read_toml, to_table
from liam_scale.training.checkpoint import Checkpoint, load_weights, newest_checkpoint, save_weights
from liam_scale.training.trainer import Outcome
from loaders.durable import gone_on_error, leftovers, remove_leftovers, replacing, write_text
from loaders.modalities import PRESETS, agreed
from loaders.options import LoaderConfig, check_options, read_table
from loaders.schema import is_folder_name, sha256_of_json, sha256_of_names
from loaders.stores import Store

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"
RUN_ATTRIBUTE = "liam_scale_run"
"""Attribute of an embedding in obsm: the id of the run that made it."""


class Cells(TypedDict):
    """Number of the cells, and digests of their ids."""

    number: int
    in_order: str
    in_any_order: str


class Labels(TypedDict):
    """Digest of the labels of an obs column, and the number of cells of each."""

    in_order: str
    cells: dict[str, int]


class Contents(TypedDict):
    """What a store held (`contents.contents_of`)."""

    cells: Cells
    labels: dict[str, Labels]
    counts: dict[str, str]


class Ending(TypedDict):
    """How training ended."""

    outcome: Outcome
    epoch: int
    step: int
    best_epoch: int
    best_step: int


@dataclass(frozen=True)
class RunRecord:
    """What must be known of a run to use its model on a store."""

    stores: tuple[str, ...]
    batch_key: tuple[str, ...]
    seed: int
    model: ModelConfig
    """Resolved: no field is None."""
    data: ModelData
    fingerprint: str
    """Of the schema that the model was trained on."""
    features_sha256: dict[str, str]
    contents: Contents | None = None
    """None where an older version made the run."""
    where: str | None = None
    """Which cells of the stores; None: all."""
    layer: str | None = None
    """Layer with the counts, where no ingest made a store; None: X."""
    matches: Literal["names", "overlap"] | None = None
    """How features of its stores are found, where a mapping made the run; None: they are those of the model."""
    parts: tuple[str, ...] = ()
    """Folders of the models of a late integration; empty for a single model."""
    id: str | None = None
    """Name by which its embeddings know the run; None where an older version made it."""
    changes: tuple[dict[str, Any], ...] = ()
    """Options that were changed when training went on: `step`, `option`, `before`, `now`."""
    rollbacks: tuple[dict[str, Any], ...] = ()
    """Returns to a checkpoint from a number that was not finite: after `step`, `to` step, `terms` with ids of cells."""
    skipped: tuple[str, ...] = ()
    """Ids of the cells in damaged chunks that training left out (`--on-bad-chunk skip`)."""
    ending: Ending | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"model": self.model.to_json(), "data": self.data.to_json()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> RunRecord:
        fields = {**entry, "batch_key": as_tuple(entry["batch_key"])}
        fields["model"] = ModelConfig.from_json(fields["model"])
        fields["data"] = ModelData.from_json(fields["data"])
        for name in ("stores", "parts", "changes", "rollbacks", "skipped"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


@dataclass(frozen=True)
class RunDirectory:
    """Paths and contents of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self._inside("checkpoints")

    @property
    def history(self) -> Path:
        return self.path / "history.csv"

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def is_run(self) -> bool:
        return (self.path / RUN_FILE).exists()

    @property
    def is_finished(self) -> bool:
        return self.is_run and all(part.weights.exists() for part in self.parts())

    def record(self) -> RunRecord:
        """What the run knows.

        Raises
        ------
        ValueError
            The folder holds no run.
        RuntimeError
            Its file is damaged.
        """
        file = self.path / RUN_FILE
        try:
            entry = read_table(file)
            if entry.pop("sha256", None) not in (None, sha256_of_json(entry)):
                raise ValueError("its sha256 differs")
            return RunRecord.from_json(entry)
        except FileNotFoundError:
            raise ValueError(f"run: {self.path} holds no run (no {RUN_FILE}); name the --out of a training") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from error

    def parts(self) -> list[RunDirectory]:
        """The run itself, or the runs of a late integration, in the order of their embeddings."""
        parts = self.record().parts
        return [RunDirectory(self._inside(part)) for part in parts] if parts else [self]

    def _inside(self, name: str) -> Path:
        """A folder of the run; one that a downloaded run places elsewhere would be written to."""
        path = self.path / name
        if not is_folder_name(name) or path.resolve() != self.path.resolve() / name:
            raise ValueError(f"run: {self.path} has {name!r} outside of its folder; put the folder itself there")
        return path

    def saved_options(self) -> dict[str, Any]:
        """The effective options the run was made with, as nested tables."""
        return to_table(self._saved_config())

    def loader_config(self) -> LoaderConfig:
        return self._saved_config().loader

    def _saved_config(self) -> TrainConfig:
        file = self.path / "config.toml"
        try:
            config = from_table(TrainConfig, read_toml(file), absent=None)
            if dataclasses.replace(config.loader).streams is None:  # a copy, as making one checks the values
                raise ValueError("it does not say loader.streams")
            return config
        except (OSError, ValueError) as error:
            raise _damaged(file, str(error)) from error

    def features(self) -> dict[str, list[str]]:
        """Feature names per modality, in the order of the model's columns."""
        file = self.path / "features.json"
        try:
            names = read_table(file)
            found = {name: sha256_of_names(own) for name, own in names.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(file, str(error)) from error
        if found != self.record().features_sha256:
            raise _damaged(file, f"the names differ from those that {RUN_FILE} has the sha256 of")
        return names

    def check_free(self) -> None:
        """Refuse to make a run where something else stands; a run that was killed while it was made is made again."""
        is_free = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        if not is_free and not leftovers(self.path / RUN_FILE):
            raise ValueError(f"--out: {self.path} exists and is not a run; name a new folder")

    def create(
        self, record: RunRecord, options: str, features: dict[str, list[str]], *, parts: Sequence[tuple[Any, ...]] = ()
    ) -> None:
        """Lay the folder down, and those of its parts (name, record, options, features).

        `run.json` comes last; until then the hidden folder in which it grows says what the rest is.
        """
        names = "checkpoints", "config.toml", "features.json", *(name for name, *_ in parts)
        with replacing(self.path / RUN_FILE) as file, gone_on_error(self.path, names):
            for name, *own in parts:
                RunDirectory(self.path / name).create(*own)
            self.checkpoints.mkdir(exist_ok=True)
            write_text(self.path / "config.toml", options)
            write_text(self.path / "features.json", json.dumps(features))
            file.write_text(_sealed(self.identified(record, options)))

    def write_record(self, record: RunRecord) -> None:
        write_text(self.path / RUN_FILE, _sealed(record))

    def change(self, record: RunRecord, options: str) -> None:
        """Go on with other options, which the record tells."""
        self.write_record(record)
        write_text(self.path / "config.toml", options)

    def identified(self, record: RunRecord, options: str) -> RunRecord:
        """The record with the id of a run here: the folder's name, and a hash of its path, options and data.

        The same training into the same folder has the same id; a folder that is moved keeps its own.
        """
        named = dataclasses.replace(record, id=None, changes=(), rollbacks=(), skipped=(), ending=None)
        path = self.path.resolve()
        said = json.dumps([str(path), options, named.to_json()])
        return dataclasses.replace(record, id=f"{path.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}")

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        remove_leftovers(self.path / "*")
        save_weights(self.weights, weights)

    @property
    def has_sound_weights(self) -> bool:
        try:
            load_weights(self.weights)
        except RuntimeError:
            return False
        return True

    def newest_checkpoint(self) -> Checkpoint | None:
        """Where training goes on; None for a run that has not saved yet.

        Raises
        ------
        RuntimeError
            There are checkpoints, but none is sound; or they are gone, though the run has trained.
        """
        found = newest_checkpoint(self.checkpoints)
        if found is None and (self.weights.exists() or (self.history.exists() and not self.checkpoints.is_dir())):
            raise RuntimeError(
                f"resume: {self.checkpoints} is {'empty' if self.checkpoints.is_dir() else 'missing'}, but the run has "
                f"trained ({(self.weights if self.weights.exists() else self.history).name} is there); put the folder "
                "back, or start again with another --out"
            )
        if found is None and self.history.exists():
            logger.warning("%s ended before its first checkpoint and starts again at step 0", self.path)
        return found

    def load_model(self) -> Liam:
        """The trained model on the CPU, in evaluation mode.

        Raises
        ------
        ValueError
            The folder holds no run, or one that has not finished.
        RuntimeError
            The weights are damaged.
        """
        record = self.record()
        if not self.weights.exists():
            raise ValueError(
                f"run: {self.path} has not finished training (no {WEIGHTS_FILE}); "
                "run its training command again, it goes on where it stopped"
            )
        weights = load_weights(self.weights)
        try:
            # Looked at before a model of any size that a file may ask for takes the memory.
            asked = {
                f"encoders.{parameter_key(name)}.layer.weight": (size, record.model.n_hidden)
                for name, size in record.data.num_features.items()
            }
            if any(name not in weights or weights[name].shape != shape for name, shape in asked.items()):
                raise RuntimeError("sizes differ")
            model = Liam(record.model, record.data)
            model.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.path / RUN_FILE, f"its model is not that of {WEIGHTS_FILE}: {error}") from error
        return model.eval()


def _sealed(record: RunRecord) -> str:
    """The text of run.json, with the sha256 of its entries."""
    entry = record.to_json()
    return json.dumps({**entry, "sha256": sha256_of_json(entry)}, indent=1)


def _damaged(file: Path, found: str) -> RuntimeError:
    return RuntimeError(f"run: {file} is damaged ({found}); restore it from a copy, or train again with another --out")


def check_features(store: Store, record: RunRecord) -> None:
    """Refuse a store whose features are not those of the model, column by column, or are of another kind."""
    for name, expected in record.features_sha256.items():
        held = store.schema.modalities.get(name)
        if held is None:
            raise ValueError(
                f"store: {store.uri} has no modality {name}, which the model reads "
                f"(it holds {', '.join(store.schema.modalities)}); ingest the cells with that modality"
            )
        if held.features_sha256 != expected:
            raise ValueError(
                f"store: {name} of {store.uri} has {held.num_features:,} features that are not those of the run "
                f"({record.data.num_features[name]:,}) in the same order; `liam-scale map` matches features by name"
            )
    seen = {name: held.kind for name, held in store.schema.modalities.items() if name in record.data.kinds}
    agreed([(store.uri, seen), ("the run", record.data.kinds)])


def record_of(
    config: TrainConfig,
    store: Store,
    model: ModelConfig,
    data: ModelData,
    contents: Contents | None = None,
    parts: tuple[str, ...] = (),
) -> RunRecord:
    """What a run remembers of its data."""
    modalities = store.schema.modalities
    return RunRecord(
        stores=config.store,
        batch_key=config.batch_key,
        seed=config.seed,
        model=model,
        data=data,
        fingerprint=store.schema.fingerprint,
        features_sha256={name: modalities[name].features_sha256 for name in data.num_features},
        contents=contents,
        where=config.where,
        layer=config.layer,
        parts=parts,
    )


def part_folder(modality: str) -> str:
    """Folder of a model of a late integration; modalities may be called as what else stands in the folder of a run."""
    return modality if modality in PRESETS else f"mod.{modality}"


def attributes_of(run: str | None) -> dict[str, str]:
    """What an embedding of a run of this id carries; nothing for a run made before runs had ids."""
    return {} if run is None else {RUN_ATTRIBUTE: run}


def check_maker(held: Sequence[Mapping[str, Any]], run: str | None, *, what: str, cure: str) -> None:
    """Refuse an embedding that another run made; remark where nothing says whether it did.

    Parameters
    ----------
    held
        Attributes of the embedding, one entry for each store that holds it; none: there is no embedding yet.
    run
        Id of the run that is to read or to replace it; None where an older version made that run.
    what, cure
        How the message begins and ends.

    Raises
    ------
    ValueError
        Another run made it.
    """
    makers = {entry.get(RUN_ATTRIBUTE) for entry in held}
    others = sorted(str(maker) for maker in makers - {run, None})
    if others and run is not None:
        raise ValueError(f"{what}: got an embedding that run {' and '.join(others)} made, not run {run}; {cure}")
    if makers and (None in makers or run is None):
        logger.info("%s: it or the run has no id, so that nothing says whether this run made it", what)
