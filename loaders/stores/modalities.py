"""Which of this package's modalities a name means that others use."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ALIASES = {
    "rna": ("rna", "gex", "gene expression", "gene_expression", "genes", "mrna", "scrna"),
    "atac": ("atac", "peaks", "peak", "chromatin accessibility", "chromatin_accessibility", "scatac"),
    "adt": ("adt", "prot", "protein", "proteins", "antibody capture", "antibody_capture", "cite", "ab"),
}
"""Names of the same thing in muon ("prot"), 10x Genomics ("Gene Expression", "Peaks") and TileDB-SOMA ("RNA")."""

_PEAK = re.compile(r"^(chr)?[0-9A-Za-z_.]+[:_-][0-9]+[-_][0-9]+$")


def modality_of(name: str) -> str | None:
    """The modality a name of another package means, or None where it means none of ours."""
    lowered = name.strip().lower()
    return next((modality for modality, names in ALIASES.items() if lowered in names), None)


def looks_like_peaks(names: Sequence[str] | npt.NDArray[np.str_]) -> bool:
    """Whether features are named as genomic intervals (chr1:100-600): nine in ten of the first thousand."""
    sample = [str(name) for name in names[:1000]]
    return bool(sample) and sum(bool(_PEAK.match(name)) for name in sample) >= 0.9 * len(sample)


def check_modality(name: str) -> str:
    """The modality a user named, under any alias; ValueError where it is none of ours."""
    modality = modality_of(name)
    if modality is None:
        raise ValueError(f"modality: got {name!r}; give one of {', '.join(ALIASES)}")
    return modality
