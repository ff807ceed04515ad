"""What is wrong with a store that is not what was written."""

from __future__ import annotations

from pathlib import Path


class Damaged(RuntimeError):
    """An array of a store is not what was written: the one message of all damage that is found while reading.

    Parameters
    ----------
    store, array
        Where it stands.
    what
        Chunk, cells, and what is wrong with them.
    is_of_chunk
        It is one chunk that cannot be read; reading it again would not help, and all others may be sound.
    """

    def __init__(self, store: str, array: str, what: str, *, is_of_chunk: bool = False) -> None:
        self.array, self.what, self.is_of_chunk = array, what, is_of_chunk
        again = "embed again" if array.startswith("obsm/") else "copy or download it again, or ingest again"
        super().__init__(f"{store}/{array}: got damaged data: {what}; a check of the store lists all of it; {again}")


class DamagedChunk(Exception):
    """A chunk is missing or not what was written.

    Attributes
    ----------
    chunk
        Its number in the array.
    file
        The shard that holds it.
    entries
        Elements [start, stop) of the array that it holds.
    """

    def __init__(self, message: str, *, chunk: int, file: Path, entries: tuple[int, int]) -> None:
        super().__init__(message)
        self.chunk, self.file, self.entries = chunk, file, entries


class ReplacedStore(DamagedChunk):
    """Another store stands where this one did."""
