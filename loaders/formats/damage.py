"""What is wrong with a store that is not what was written."""

from __future__ import annotations


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
        The name of the shard that holds it.
    entries
        Elements [start, stop) of the array that it holds.
    """

    def __init__(self, message: str, *, chunk: int, file: str, entries: tuple[int, int]) -> None:
        super().__init__(message)
        self.chunk, self.file, self.entries = chunk, file, entries


class ReplacedStore(DamagedChunk):
    """Another store stands where this one did."""


def said_by(error: BaseException) -> str:
    """Type and message of a library's error, without the lines below the first in which obstore shows requests."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def unreachable(where: str, error: BaseException) -> RuntimeError | None:
    """The error of a remote store that does not answer, where this one of obstore says so."""
    if not type(error).__module__.startswith("obstore"):
        return None
    return RuntimeError(
        f"{where}: cannot be fetched ({said_by(error)}); see that the server answers and lets you read, then"
        f" run the same command again"
    )
