"""The folder of a run: what stands where, and how a trained model is read back.

`config.toml` effective options · `run.json` what the model knows of the data · `features.json` names of the features ·
`history.csv` · `checkpoints/` · `model.safetensors` best weights, written last: a run without it is not finished.
A run of several models (`concat`) holds one such folder for each of its parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.training.checkpoint import write_text_atomically
from loaders.options import LoaderConfig

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class RunRecord:
    """What must be known of a run to use its model on a store."""

    stores: tuple[str, ...]
    batch_key: str | None
    seed: int
    model: ModelConfig
    """Resolved: no field is None."""
    data: ModelData
    fingerprint: str
    """Of the schema that the model was trained on."""
    features_sha256: dict[str, str]
    parts: tuple[str, ...] = ()
    """Folders of the models of a late integration; empty for a single model."""
    id: str | None = None
    """Name by which its embeddings know the run; None where an older version made it."""

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"model": self.model.to_json(), "data": self.data.to_json()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> RunRecord:
        fields = dict(entry)
        fields["model"] = ModelConfig.from_json(fields["model"])
        fields["data"] = ModelData.from_json(fields["data"])
        fields["stores"], fields["parts"] = tuple(fields["stores"]), tuple(fields["parts"])
        return cls(**fields)


@dataclass(frozen=True)
class RunDirectory:
    """Paths and contents of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
        """
        try:
            return RunRecord.from_json(json.loads((self.path / RUN_FILE).read_text()))
        except FileNotFoundError:
            raise ValueError(f"run: {self.path} holds no run (no {RUN_FILE}); name the --out of a training") from None

    def parts(self) -> list[RunDirectory]:
        """The run itself, or the runs of a late integration, in the order of their embeddings."""
        parts = self.record().parts
        return [RunDirectory(self.path / part) for part in parts] if parts else [self]

    def saved_options(self) -> dict[str, Any]:
        """The effective options the run was made with, as nested tables."""
        return tomllib.loads((self.path / "config.toml").read_text())

    def loader_config(self) -> LoaderConfig:
        return LoaderConfig(**self.saved_options()["loader"])

    def features(self) -> dict[str, list[str]]:
        """Feature names per modality, in the order of the model's columns."""
        return json.loads((self.path / "features.json").read_text())

    def create(self, record: RunRecord, options: str, features: dict[str, list[str]]) -> None:
        """Lay the folder down; `run.json` comes last."""
        record = self.identified(record, options)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path / "config.toml", options)
        write_text_atomically(self.path / "features.json", json.dumps(features))
        write_text_atomically(self.path / RUN_FILE, json.dumps(record.to_json(), indent=1))

    def identified(self, record: RunRecord, options: str) -> RunRecord:
        """The record with the id of a run here: the folder's name, and a hash of its path, options and data.

        The same training into the same folder has the same id; a folder that is moved keeps its own.
        """
        path, named = self.path.resolve(), dataclasses.replace(record, id=None)
        digest = hashlib.sha256(json.dumps([str(path), options, named.to_json()]).encode()).hexdigest()
        return dataclasses.replace(record, id=f"{path.name}-{digest[:12]}")

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        partial = self.path / f".{WEIGHTS_FILE}.partial"
        save_file({name: value.detach().contiguous().cpu() for name, value in weights.items()}, partial)
        partial.replace(self.weights)

    def load_model(self) -> Liam:
        """The trained model on the CPU, in evaluation mode.

        Raises
        ------
        ValueError
            The folder holds no run, or one that has not finished.
        """
        record = self.record()
        if not self.weights.exists():
            raise ValueError(
                f"run: {self.path} has not finished training (no {WEIGHTS_FILE}); "
                "run its training command again, it goes on where it stopped"
            )
        model = Liam(record.model, record.data)
        model.load_state_dict(load_file(self.weights))
        return model.eval()
