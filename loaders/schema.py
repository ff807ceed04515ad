"""What a store holds: its modalities, their features and counts, its obs columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.modalities import PRESETS, Kind, Likelihood, Transform, is_name
from loaders.options import Range, check_options

FORMAT = 3
"""Version of the store's layout; a reader refuses a higher one. Without modalities of other names than the known ones
it is written as version 2, in one part as version 1."""

SCHEMA_KEY = "liam_scale"
"""Key of the schema in the root attributes of a Zarr store; written last, so without it there is no store."""

BARCODE_COLUMNS = ("source_barcode", "barcode")
"""Obs columns of a store with the ids of the cells in their sources, where ingest put the source's name before them.
`barcode`, or the other where the sources themselves have a column `barcode`."""

LONGEST_NAME = 255
"""Bytes of a name of a file: every column of a store is a folder."""


def is_folder_name(name: str) -> bool:
    """Whether a column can be a folder of a store."""
    return (
        not {"/", "\0"} & set(name) and name not in ("", ".", "..", "zarr.json") and len(name.encode()) <= LONGEST_NAME
    )


def check_unique(what: str, names: pd.Index, cure: str) -> None:
    """Refuse names of which one stands twice."""
    if names.is_unique:
        return
    twice = names[names.duplicated()]
    raise ValueError(f"{what}: got {str(twice[0])!r} more than once ({len(twice)} repeats in all); {cure}")


def sha256_of_json(entry: Any) -> str:
    """Hash JSON values, in whatever order and layout they stand."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def sha256_of_names(names: Iterable[str]) -> str:
    """Hash names in their order; two stores with equal hashes have the same features in the same columns."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def hash_names(names: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """(n,) hash of each name (FNV-1a over its characters), the same wherever and beside whatever it stands."""
    # NumPy's variable-width strings have no characters of fixed place.
    texts = np.ascontiguousarray(names if names.dtype.kind == "U" else names.astype(object), dtype=np.str_)
    hashed = np.full(len(texts), 0xCBF29CE484222325, np.uint64)
    for column in texts.view(np.uint32).reshape(len(texts), -1).T:
        # Shorter names are padded with zeros, as far as the longest of these: they must not count.
        hashed = np.where(column > 0, (hashed ^ column) * np.uint64(0x100000001B3), hashed)
    return hashed


@dataclass(frozen=True)
class ObsColumn:
    """One obs column as codes.

    Attributes
    ----------
    codes
        (n,) position in `categories`, -1 where the value is missing.
    categories
        Distinct values as strings, in their order.
    """

    codes: npt.NDArray[np.signedinteger]
    categories: tuple[str, ...]


def unite_categories(columns: Sequence[ObsColumn | int]) -> ObsColumn:
    """Columns below each other, their categories in the order of appearance; a number is that many missing values."""
    given = [column for column in columns if not isinstance(column, int)]
    categories = tuple(dict.fromkeys(category for column in given for category in column.categories))
    place = {category: code for code, category in enumerate(categories)}
    codes = [
        np.full(column, -1, np.int32)
        if isinstance(column, int)
        else np.array([*(place[c] for c in column.categories), -1], np.int32)[column.codes]
        for column in columns
    ]
    return ObsColumn(np.concatenate(codes), categories)


class NewerFormat(ValueError):
    """A later version of this package wrote the store."""


@dataclass(frozen=True)
class ModalitySchema:
    """One CSR matrix of a store."""

    name: str
    num_cells: Annotated[int, Range(least=0)]
    """Cells that have this modality (rows of its matrix)."""
    num_features: Annotated[int, Range(least=0)]
    num_nonzeros: Annotated[int, Range(least=0)]
    value_dtype: str
    """NumPy name of the stored values, the narrowest that holds them: uint8, uint16, uint32 or float32."""
    features_sha256: str
    counts_crc32c: str | None = None
    """Of values, columns and row lengths in their order; None where an older version wrote the store."""
    likelihood: Likelihood | None = None
    """With the transform, what a model takes it for; None of both: what the name stands for."""
    transform: Transform | None = None

    def __post_init__(self) -> None:
        check_options(self)
        preset = PRESETS.get(self.name)
        if self.likelihood is None and self.transform is None and preset is not None:
            object.__setattr__(self, "likelihood", preset.likelihood)
            object.__setattr__(self, "transform", preset.transform)
        if not is_name(self.name) or self.likelihood is None or self.transform is None:
            raise ValueError(f"modality {self.name!r} has no name that one can have, or no likelihood and transform")
        if preset not in (None, self.kind):
            raise ValueError(f"modality {self.name} is {self.kind}")

    @property
    def kind(self) -> Kind:
        assert self.likelihood is not None
        assert self.transform is not None
        return Kind(self.likelihood, self.transform)

    @property
    def nonzeros_per_cell(self) -> float:
        return self.num_nonzeros / max(1, self.num_cells)

    def __str__(self) -> str:
        size = f"{self.num_cells:,} cells × {self.num_features:,} features"
        kind = "" if self.name in PRESETS else f", {self.kind}"
        return f"{self.name}: {size}, {self.nonzeros_per_cell:,.0f} non-zeros a cell, {self.value_dtype}{kind}"


@dataclass(frozen=True)
class Schema:
    """The whole store. Rows of the store are *cells*; a modality holds those cells that have it, in the same order."""

    num_cells: Annotated[int, Range(least=0)]
    modalities: dict[str, ModalitySchema]
    obs_columns: tuple[str, ...]
    is_shuffled: bool
    """Whether cells stand in a seeded random order; if not, the loader needs small blocks and large windows."""
    cells_sha256: str
    """Hash of the cell ids in their order."""
    metadata: dict[str, str] | None = None
    """Hash of the metadata of each array and group, which says that all of them carry checksums; None where an older
    version wrote the store."""
    parts: tuple[Annotated[int, Range(least=0)], ...] = ()
    """Cells of each of the parts that follow each other, each in random order; readers mix them. None: one part."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each modality is."""
        return {name: held.kind for name, held in self.modalities.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which counts stand in which row and column, and what they are."""
        counted = [
            (
                *(name, m.num_cells, m.num_nonzeros, m.features_sha256),
                *([m.counts_crc32c] if m.counts_crc32c else []),
                *([] if name in PRESETS else [m.likelihood, m.transform]),
            )
            for name, m in sorted(self.modalities.items())
        ]
        return hashlib.sha256(json.dumps([self.num_cells, self.cells_sha256, counted]).encode()).hexdigest()

    def __repr__(self) -> str:
        order = "shuffled" if self.is_shuffled else "in the order of their sources"
        order += f" in {len(self.parts)} parts" if self.parts else ""
        columns = ", ".join(map(repr, self.obs_columns)) or "no columns"
        lines = [f"{self.num_cells:,} cells, {order}", *map(str, self.modalities.values()), f"obs: {columns}"]
        return "\n    ".join(lines)

    def to_json(self) -> dict[str, Any]:
        version = FORMAT if self.modalities.keys() - PRESETS else 2 if self.parts else 1
        entry = {"format": version, **asdict(self)}
        if not self.parts:
            del entry["parts"]
        for name in entry["modalities"].keys() & PRESETS:
            del entry["modalities"][name]["likelihood"], entry["modalities"][name]["transform"]
        return {**entry, "sha256": sha256_of_json(entry)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Schema:
        fields = dict(entry)
        sealed = fields.pop("sha256", None)
        if isinstance(fields["format"], int) and fields["format"] > FORMAT:
            raise NewerFormat(
                f"store format: got {fields['format']}, this package reads up to {FORMAT}; update liam-scale"
            )
        if sealed not in (None, sha256_of_json(fields)) or (sealed is None and "metadata" in fields):
            raise ValueError("its sha256 differs")
        del fields["format"]
        modalities = {name: ModalitySchema(**m) for name, m in fields.pop("modalities").items()}
        if not modalities or any(m.name != name for name, m in modalities.items()):
            raise ValueError(f"its modalities are {', '.join(modalities) or 'none'}")
        schema = cls(modalities=modalities, **{**fields, "parts": tuple(fields.get("parts", ()))})
        if schema.parts and sum(schema.parts) != schema.num_cells:
            raise ValueError(f"its parts have {sum(schema.parts)} cells, it has {schema.num_cells}")
        if wrong := [name for name in schema.obs_columns if not is_folder_name(name)]:
            raise ValueError(f"its obs has a column {wrong[0]!r}")
        return schema
