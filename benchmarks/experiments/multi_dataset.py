"""The extended case of several data sets: multiome and CITE-seq, integrated as one mosaic with RNA in common.

Data: two MuData with the same genes, joined before, with an obs column technology (multiome, cite); by default a
stand-in of six samples of which three have RNA and ATAC and three RNA and ADT.
Expected: the technologies mix although no cell has ATAC and ADT, as well as by RNA alone, and biology is kept.

    python benchmarks/experiments/multi_dataset.py --out datasets [--max-epochs 30]
"""

from common import ingested, load, means, measured, parse, show, verdict, without


def main() -> None:
    options = parse(__doc__)
    data = load(options, num_proteins=40)
    truth = None
    if options.data is None:
        truth = ingested(data, options.out / "truth.zarr")
        samples = sorted(data.obs[options.batch_key].astype(str).unique())
        half = len(samples) // 2
        lost = {sample: ["adt" if place < half else "atac"] for place, sample in enumerate(samples)}
        data = without(data, options.batch_key, lost)
        is_cite = data.obs[options.batch_key].astype(str).isin(samples[half:])
        data.obs["technology"] = is_cite.map({True: "cite", False: "multiome"})
    store = ingested(data, options.out / "datasets.zarr")
    runs = {f"alpha {alpha}": {"alpha": float(alpha)} for alpha in (1, 25)}
    found = measured(store, {"RNA alone": {"model": "rna-only"}}, options, covariates=["technology"])
    both = measured(store, runs, options, covariates=["technology"], truth=truth)
    show("RNA alone", found)
    show("all modalities", both)
    mean, alone = means(both), means(found).iloc[0]
    nmi = f"leiden_nmi:{options.label_key}"
    mixes = mean["ilisi:technology"].max() > 0.5 * alone["ilisi:technology"]
    kept = mean[nmi].max() > alone[nmi] - 0.03
    figures = f"iLISI of technologies {mean['ilisi:technology'].max():.3f}, of RNA alone"
    figures += f" {alone['ilisi:technology']:.3f}; NMI {mean[nmi].max():.3f}, {alone[nmi]:.3f}"
    verdict("data sets of two technologies integrate through RNA", bool(mixes and kept), figures)


if __name__ == "__main__":
    main()
