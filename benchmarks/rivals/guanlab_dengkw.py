"""Guanlab-dengkw, of the joint embedding of NeurIPS 2021, re-implemented from the team's published program.

Known: truncated SVD of each modality to 73 components of RNA and 27 of ADT, or 38 of RNA and 62 of ATAC; each cell's
components standardized within each modality; side by side, 100 in all. Nothing of the batch is removed.
Assumed: the challenge's normalized matrices, which the team took, are here log RNA of 10,000 counts, centred log-ratios
of ADT and ATAC as present or absent.
"""

import argparse
from typing import Any

from contract import compete, normalized

WIDTHS = {"rna adt": (73, 27), "rna atac": (38, 62)}


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, None]:
    import numpy
    from sklearn.decomposition import TruncatedSVD

    blocks = []
    for (name, modality), width in zip(data.mod.items(), WIDTHS[" ".join(data.mod)], strict=True):
        values = (modality.X > 0).astype(float) if name == "atac" else normalized(name, modality.X)
        own = TruncatedSVD(width, random_state=arguments.seed).fit_transform(values)
        blocks.append((own - own.mean(axis=1, keepdims=True)) / own.std(axis=1, keepdims=True))
    return numpy.concatenate(blocks, axis=1), None


if __name__ == "__main__":
    compete(fit, "scikit-learn")
