"""ATAC of which a part of the peaks is left (the paper's Figure 3): early integration, late (concat), each alone.

Data: the NeurIPS 2021 multiome of BMMC (GSE194122), or by default a stand-in of so few counts that RNA alone
does not tell all types (NMI about 0.7, published 0.78).
Expected: with 25 % and 10 % of the peaks the early integration keeps the NMI that RNA alone has, late integration loses
some of it and ATAC alone more; MultiVI stands in benchmarks/rivals.

    python benchmarks/experiments/subsampled_atac.py --out subsampled [--max-epochs 30]
"""

from common import ingested, load, means, measured, parse, show, thinned, verdict

RUNS = {name: {"model": name} for name in ("bavae", "concat", "atac-only")}
PUBLISHED = {"bavae": "BAVAE_sample_{}", "concat": "BAVAE_sample_{}_concat", "atac-only": "BAVAE_sample_{}_atac_only"}


def main() -> None:
    options = parse(__doc__)
    data, column = load(options, genes_per_cell=50), f"leiden_nmi:{options.label_key}"
    whole = ingested(data, options.out / "atac-100.zarr")
    alone = measured(whole, {"rna-only": {"model": "rna-only"}}, options)
    show("RNA alone", alone, {"rna-only": "BAVAE_sample_100_rna_only_20dims"})
    for percent in (25, 10):
        store = ingested(thinned(data, percent / 100), options.out / f"atac-{percent}.zarr")
        found = measured(store, RUNS, options)
        show(f"{percent} % of the peaks", found, {run: model.format(percent) for run, model in PUBLISHED.items()})
    rna, least = means(alone)[column].iloc[0], means(found)[column]
    noise = found.groupby("run")[column].std().max()
    figures = f"NMI at 10 %: {', '.join(f'{value:.3f} ({run})' for run, value in least.items())}; RNA alone {rna:.3f}"
    figures += f"; seeds differ by {noise:.3f}"
    came_out = least["bavae"] > rna - noise and least["bavae"] - noise > least["concat"] > least["atac-only"]
    verdict("early integration survives weak ATAC better than late", bool(came_out), figures)


if __name__ == "__main__":
    main()
