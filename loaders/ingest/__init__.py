"""Source files -> one shuffled, checked store."""

from loaders.ingest.growing import append, merge
from loaders.ingest.run import ingest
from loaders.ingest.writer import ModalityLayout, StoreWriter

__all__ = ["ModalityLayout", "StoreWriter", "append", "ingest", "merge"]
