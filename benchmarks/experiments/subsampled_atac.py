"""ATAC of which a part of the peaks is left (the paper's Figure 3): early integration, late (concat), each alone.

Data: the NeurIPS 2021 multiome of BMMC (GSE194122), or by default a stand-in with the published shape of the problem.
Expected: with 25 % and 10 % of the peaks the early integration keeps the NMI that RNA alone has, late integration loses
some of it and ATAC alone more; MultiVI stands in benchmarks/rivals.

    python benchmarks/experiments/subsampled_atac.py --out subsampled [--max-epochs 30]
"""

from common import ingested, load, means, measured, parse, show, thinned, verdict

RUNS = {name: {"model": name} for name in ("bavae", "concat", "atac-only")}
PUBLISHED = {"bavae": "BAVAE_sample_{}", "concat": "BAVAE_sample_{}_concat", "atac-only": "BAVAE_sample_{}_atac_only"}


def main() -> None:
    options = parse(__doc__)
    data, nmi, column = load(options), {}, f"leiden_nmi:{options.label_key}"
    whole = ingested(data, options.out / "atac-100.zarr")
    alone = measured(whole, {"rna-only": {"model": "rna-only"}}, options)
    show("RNA alone", alone, {"rna-only": "BAVAE_sample_100_rna_only_20dims"})
    for percent in (25, 10):
        store = ingested(thinned(data, percent / 100), options.out / f"atac-{percent}.zarr")
        found = measured(store, RUNS, options)
        show(f"{percent} % of the peaks", found, {run: model.format(percent) for run, model in PUBLISHED.items()})
        nmi[percent] = means(found)[column]
    rna, least = means(alone)[column].iloc[0], nmi[10]
    figures = (
        f"NMI at 10 %: early {least['bavae']:.3f}, late {least['concat']:.3f}, ATAC alone {least['atac-only']:.3f}"
    )
    came_out = least["bavae"] > rna - 0.02 and least["bavae"] > least["concat"] > least["atac-only"]
    verdict("early integration survives weak ATAC better than late", bool(came_out), f"{figures}, RNA alone {rna:.3f}")


if __name__ == "__main__":
    main()
