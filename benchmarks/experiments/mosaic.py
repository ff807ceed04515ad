"""Mosaics (the paper's Figure 4): samples that lack a modality, more and more of them.

Data: the NeurIPS 2021 multiome of BMMC (GSE194122), or by default a stand-in of six samples. Of the samples in their
order `full` leaves RNA alone in one and ATAC alone in another, `a` in two each, and in `b` one sample has RNA alone and
three ATAC alone; the paper's own designs are of its sites, so its figures stand beside them for the order alone.
Expected: cells with one modality mix with the rest, biology falls little from full to a, and what is missing is imputed
better than by the mean profile.

    python benchmarks/experiments/mosaic.py --out mosaic [--max-epochs 30]
"""

import pandas as pd
from common import ingested, load, means, measured, parse, show, verdict, without

LOST = {
    "full": {0: "atac", 1: "rna"},
    "a": {0: "atac", 1: "rna", 2: "atac", 3: "rna"},
    "b": {0: "atac", 1: "rna", 2: "rna", 3: "rna"},
}


def main() -> None:
    options = parse(__doc__)
    data = load(options)
    samples = sorted(data.obs[options.batch_key].astype(str).unique())
    truth, parts = ingested(data, options.out / "paired.zarr"), []
    parts.append(measured(truth, {"paired": {}}, options))
    for name, lost in LOST.items():
        mosaic = without(data, options.batch_key, {samples[place]: [modality] for place, modality in lost.items()})
        has = [modality.obs_names for modality in mosaic.mod.values()]
        mosaic.obs["modalities"] = [
            "both" if all(cell in names for names in has) else "one" for cell in mosaic.obs_names
        ]
        store = ingested(mosaic, options.out / f"mosaic-{name}.zarr")
        parts.append(measured(store, {name: {}}, options, covariates=["modalities"], truth=truth))
    found = pd.concat(parts)
    models = {"paired": "liam_paired_full", "full": "liam_mosaic_full", "a": "liam_mosaic_a", "b": "liam_mosaic_b"}
    show("samples that lack a modality", found, models)
    mean = means(found)
    nmi = mean[f"leiden_nmi:{options.label_key}"]
    loss = nmi["paired"] - nmi[["full", "a", "b"]]
    gain = mean["imputed atac deviance, mean profile"] - mean["imputed atac deviance"]
    figures = f"NMI falls by {', '.join(f'{loss[name]:.3f} ({name})' for name in loss.index)}; deviance of imputed ATAC"
    figures += f" below the mean profile's by {', '.join(f'{value:.3f}' for value in gain.dropna())}"
    verdict("a mosaic costs little biology", bool((loss < 0.06).all() and (gain.dropna() > 0).all()), figures)


if __name__ == "__main__":
    main()
