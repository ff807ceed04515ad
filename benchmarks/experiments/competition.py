"""The competition's data (the paper's Figures 1 and 2): donors nested in sites, multiome and CITE-seq.

Data: the NeurIPS 2021 sets (GSE194122) with obs columns batch (a donor at a site) and Site, or by default stand-ins of
six samples at three sites, each with its own effect on genes, peaks and proteins; the two donors of a site differ by an
effect that is the same at every site.
Expected: without the covariate samples stay apart; removing the sample mixes samples and sites, removing the site mixes
sites and leaves samples apart, and biology is kept by both. Beside the paper: both removed at once, each with a weight
of its own (site 25, sample 1), against the sample alone with either weight.

    python benchmarks/experiments/competition.py --out competition [--max-epochs 30]
    python benchmarks/experiments/competition.py cite.h5mu --batch-key batch --site-key Site
"""

from common import ingested, load, means, measured, parse, show, verdict

PUBLISHED = {
    "multiome": {"VAE": "VAE_100", "site removed": "BAVAE_site_100", "sample removed": "BAVAE_sample_100"},
    "cite": {"VAE": "VAE_ADT_100", "site removed": "BAVAE_ADT_site_100", "sample removed": "BAVAE_ADT_sample_100"},
}


def main() -> None:
    options = parse(__doc__, site_key="replicate")
    site = options.site_key
    shapes = {"multiome": {}, "cite": {"num_peaks": 0, "num_proteins": 40}}
    for name, shape in shapes.items():
        data = load(options, num_conditions=2, condition_effect=0.3, **shape)
        if options.data is not None and ("adt" in data.mod) != (name == "cite"):
            continue
        store = ingested(data, options.out / f"{name}.zarr")
        runs = {
            "VAE": {"model": "vae", "batch_key": None},
            "site removed": {"batch_key": site},
            "sample removed": {},
            "sample removed, alpha 25": {"alpha": 25.0},
            "both removed, site 25, sample 1": {
                "batch_key": [site, options.batch_key],
                "alphas": [f"{site}=25", f"{options.batch_key}=1"],
            },
        }
        found = measured(store, runs, options, covariates=[site])
        show(name, found, PUBLISHED[name])
        mean, column = means(found), f"iLISI of {site}"
        mixes = mean["ilisi"]["sample removed"] > mean["ilisi"]["VAE"]
        sites = mean[column]["site removed"] > mean[column]["VAE"]
        ranks = mean.rank(ascending=False).mean(axis=1)
        print(f"mean rank over all columns: {', '.join(f'{v:.2f} ({n})' for n, v in ranks.sort_values().items())}")
        kept = mean["leiden_nmi"].min() > mean["leiden_nmi"].max() - 0.1
        figures = f"iLISI of samples {', '.join(f'{v:.3f} ({n})' for n, v in mean['ilisi'].items())}"
        figures += f"; of sites {', '.join(f'{v:.3f} ({n})' for n, v in mean[column].items())}"
        verdict(f"{name}: the covariate removed mixes and biology is kept", bool(mixes and sites and kept), figures)


if __name__ == "__main__":
    main()
