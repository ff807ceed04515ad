"""Which geometry of the embedding suits neighbours: its values, their square roots (Hellinger), or their log-ratios.

    python benchmarks/geometry.py a.h5ad b.h5ad --batch-key batch --label-key cell_type [--key X_liam] [--cells 3000]

Each file or store holds an embedding in obsm, or in X where it has no such key (the published latents). Cells are drawn
at random; a row is a file and a geometry.
"""

from __future__ import annotations

import argparse

import anndata
import numpy as np
from harness import describe_machine, table

from liam_scale.evaluation.measures import score
from liam_scale.evaluation.scored import Scored

GEOMETRIES = {
    "values": lambda z: z,
    "square roots": np.sqrt,
    "log-ratios": lambda z: np.log(z + 1e-6) - np.log(z + 1e-6).mean(axis=1, keepdims=True),
}
COLUMNS = {
    "label_purity": "same label among 15",
    "label_accuracy": "label across samples",
    "macro_recall": "macro recall",
    "leiden_nmi": "NMI",
    "same_sample_ratio": "same-sample / expected",
    "ilisi": "iLISI",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--batch-key", required=True)
    parser.add_argument("--label-key", required=True)
    parser.add_argument("--key", default="X_liam")
    parser.add_argument("--cells", type=int, default=3_000)
    options = parser.parse_args()
    describe_machine()
    rows = []
    for file in options.files:
        data = anndata.read_h5ad(file) if file.endswith(".h5ad") else anndata.read_zarr(file)
        drawn = np.random.default_rng(0).permutation(data.n_obs)[: options.cells]
        points = np.asarray(data.obsm.get(options.key, data.X), np.float64)[drawn]
        columns = {"sample": options.batch_key, "label": options.label_key}
        codes = {name: data.obs[key].astype("category").cat.codes.to_numpy()[drawn] for name, key in columns.items()}
        for name, transform in GEOMETRIES.items():
            scored = Scored(transform(np.maximum(points, 0)), codes)
            found = score(scored, covariates=["sample"], labels=["label"], most_cost=1)
            first = {key: value for (key, _), value in found.items()}
            rows.append((file.rsplit("/", 1)[-1], name, *(f"{first[key]:.3f}" for key in COLUMNS)))
            print("\t".join(rows[-1]), flush=True)
    print(f"\n{table(('embedding', 'geometry', *COLUMNS.values()), rows)}")


if __name__ == "__main__":
    main()
