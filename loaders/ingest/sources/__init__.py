"""Sources of an ingest: which cells and modalities a file holds, and its counts in pieces."""

from loaders.ingest.sources.open import open_source
from loaders.ingest.sources.parts import Part, Source

__all__ = ["Part", "Source", "open_source"]
