"""A Zarr store every byte of which is checked when it is read: chunks by their crc32c, metadata by their hash.

Zarr reads a chunk that is missing as zeros, and believes whatever a `zarr.json` says.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, WrapperStore

from loaders.formats.damage import Damaged
from loaders.formats.sharded import verify_chunk
from loaders.formats.storage import identify
from loaders.schema import sha256_of_json

CODECS = {"compressors": (ZstdCodec(), Crc32cCodec())}
"""Options of an array whose chunks are compressed and carry a crc32c."""

_METADATA = "zarr.json"
_CHUNK = re.compile(r"(.*)/c((?:/\d+)*)")
_AXES = (("var", "features"), ("obs", "cells"), ("obsm", "cells"), ("obsmap", "cells"))


@dataclass(frozen=True)
class _Node:
    """What the metadata of a sealed array or group say."""

    is_checked: bool
    """Its chunks must be there."""
    is_sharded: bool = False
    chunk: int = 1
    length: int = 0


SEAL = "liam_scale_sha256"
"""Attribute of an array that was added to a store later, such as an embedding: the hash of its other metadata."""


def hash_metadata(text: bytes) -> str:
    """Hash of the JSON of an array or group, however it is laid out."""
    return sha256_of_json(json.loads(text))[:32]


def seal(array: zarr.Array) -> None:
    """Put the hash of an array's metadata among its attributes, by which its metadata and chunks are guarded."""
    path = array.store_path / _METADATA
    text = sync(path.get())
    assert text is not None
    entry = json.loads(text.to_bytes())
    entry["attributes"].pop(SEAL, None)  # of the embedding that its attributes were taken from
    array.update_attributes({SEAL: sha256_of_json(entry)[:32]})


def hash_all_metadata(root: Path) -> dict[str, str]:
    """Hash of the metadata of every array and group below the root of a store."""
    files = sorted(root.rglob(_METADATA))
    return {
        str(file.parent.relative_to(root)): hash_metadata(file.read_bytes()) for file in files if file.parent != root
    }


def open_sealed(root: zarr.Group, uri: str, metadata: Mapping[str, str]) -> zarr.Group:
    """The same group, of which nothing is read unchecked.

    Parameters
    ----------
    metadata
        Hash of the metadata of each array and group; what is not named here others have added.
    """
    sealed = _SealedStore(root.store_path.store, uri, root.path, metadata)
    return zarr.open_group(sealed, path=root.path, mode="r", zarr_format=3, use_consolidated=False)


def verify_array(array: zarr.Array) -> Iterator[Damaged]:
    """Look at every chunk of an array of a sealed store; nothing is decoded where a checksum says that it is whole."""
    store = array.store_path.store
    length = array.shards or array.chunks
    numbers = [range(-(-size // chunk)) for size, chunk in zip(array.shape, length, strict=True)]
    is_guarded = isinstance(store, _SealedStore) and store.guards(array.path)
    for place in itertools.product(*numbers):
        key = f"{array.path}/{array.metadata.encode_chunk_key(place)}"
        try:
            if is_guarded:
                sync(store.get(key, default_buffer_prototype()))
            else:
                array[tuple(slice(k * chunk, (k + 1) * chunk) for k, chunk in zip(place, length, strict=True))]
        except Damaged as error:
            yield error
        except Exception as error:  # those of codecs are of every kind
            yield Damaged("", array.path, f"chunk {'/'.join(map(str, place))}: {type(error).__name__}: {error}")


class _SealedStore(WrapperStore[Any]):
    """Checks what it hands out; RuntimeError with store, array, chunk and cells where something is wrong."""

    def __init__(self, store: Any, uri: str = "", path: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(store)
        self._uri, self._prefix, self._hashes = uri, f"{path}/" if path else "", dict(metadata or {})
        self._nodes: dict[str, _Node] = {}
        self._folder = store.root / path if isinstance(store, LocalStore) else None
        self._identity = self._identify()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if self._identify() != self._identity:
            raise RuntimeError(
                f"store {self._uri}: got another store at its path since it was opened, or none; start again"
            )
        name = key.removeprefix(self._prefix)
        if name.rpartition("/")[2] == _METADATA:
            self._check_metadata(name.rpartition("/")[0], None if found is None else found.to_bytes())
        elif match := _CHUNK.fullmatch(name):
            self._check_chunk(match[1], match[2], found, is_whole=byte_range is None)
        return found

    def guards(self, path: str) -> bool:
        """Whether each chunk of an array is checked here when it is read."""
        node = self._nodes.get(path.removeprefix(self._prefix))
        return node is not None and node.is_checked and not node.is_sharded

    def _identify(self) -> tuple[int, int] | None:
        return None if self._folder is None else identify(self._folder)

    def _check_metadata(self, path: str, text: bytes | None) -> None:
        expected = self._hashes.get(path)
        if text is None:
            if expected is not None:
                raise self._damaged(path, f"its {_METADATA} is missing")
            return
        try:
            entry, found = json.loads(text), hash_metadata(text)
        except ValueError as error:
            raise self._damaged(path, f"its {_METADATA} is no JSON ({error})") from error
        if expected is None:
            attributes = entry.get("attributes") if isinstance(entry, dict) else None
            expected = attributes.pop(SEAL, None) if isinstance(attributes, dict) else None
            if expected is None:
                return
            found = sha256_of_json(entry)[:32]
        names = [codec.get("name") for codec in entry.get("codecs", ())] if isinstance(entry, dict) else []
        if found != expected:
            # No flipped bit takes a checksum away: another program wrote the column anew, without one.
            if not path.startswith("obs/") or not names or "crc32c" in names:
                raise self._damaged(path, f"its {_METADATA} is not what ingest wrote")
            self._nodes[path] = _Node(False)
        elif names:
            chunk, length = entry["chunk_grid"]["configuration"]["chunk_shape"], entry["shape"]
            is_sharded = names == ["sharding_indexed"]
            self._nodes[path] = _Node(True, is_sharded, (chunk or [1])[0], (length or [1])[0])

    def _check_chunk(self, path: str, numbers: str, found: Any, *, is_whole: bool) -> None:
        node = self._nodes.get(path)
        if node is None or not node.is_checked:
            return
        if found is None:
            difference: str | None = "its file is missing"
        else:
            difference = verify_chunk(found.as_numpy_array()) if is_whole and not node.is_sharded else None
        if difference is None:
            return
        number = int((numbers or "/0").split("/")[1])
        axis = next((of for part, of in _AXES if part in path.split("/")), "cells")
        span = f"{number * node.chunk} to {min(node.length, (number + 1) * node.chunk) - 1}"
        raise self._damaged(path, f"chunk {numbers.lstrip('/') or 0} (the {axis} {span}): {difference}")

    def _damaged(self, path: str, what: str) -> Damaged:
        return Damaged(self._uri, path, what)
