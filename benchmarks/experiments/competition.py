"""The competition's data (the paper's Figures 1 and 2): donors nested in sites, multiome and CITE-seq.

Data: the NeurIPS 2021 sets (GSE194122) with obs columns batch (a donor at a site) and Site, or by default stand-ins of
six samples, two at each of three sites: a site has an effect on genes, peaks and proteins (0.6), a sample a smaller one
of its own on top (0.3).
Expected: without the covariate samples stay apart; removing the sample mixes samples and sites, removing the site mixes
sites and leaves samples apart, and biology is kept by both. Beside the paper: both removed at once, each with a weight
of its own (site 25, sample 1), ranked among the models with one weight.

    python benchmarks/experiments/competition.py --out competition [--max-epochs 30]
    python benchmarks/experiments/competition.py cite.h5mu --batch-key batch --site-key Site
"""

from common import ingested, load, means, measured, parse, ranked, show, verdict

PUBLISHED = {
    "multiome": {"VAE": "VAE_100", "site removed": "BAVAE_site_100", "sample removed": "BAVAE_sample_100"},
    "cite": {"VAE": "VAE_ADT_100", "site removed": "BAVAE_ADT_site_100", "sample removed": "BAVAE_ADT_sample_100"},
}
SHAPES = {"multiome": {}, "cite": {"num_peaks": 0, "num_proteins": 40}}
BOTH = "both removed, site 25, sample 1"


def main() -> None:
    options = parse(__doc__, site_key="site", shapes=" ".join(SHAPES))
    site, sample = options.site_key, options.batch_key
    runs = {
        "VAE": {"model": "vae", "batch_key": None},
        "site removed": {"batch_key": site},
        "site removed, alpha 25": {"batch_key": site, "alpha": 25.0},
        "sample removed": {},
        "sample removed, alpha 25": {"alpha": 25.0},
        BOTH: {"batch_key": [site, sample], "alphas": [f"{site}=25", f"{sample}=1"]},
    }
    for name in options.shapes.split():
        data = load(options, num_sites=3, site_effect=0.6, sample_effect=0.3, **SHAPES[name])
        if options.data is not None and ("adt" in data.mod) != (name == "cite"):
            continue
        store = ingested(data, options.out / f"{name}.zarr")
        found = measured(store, runs, options, covariates=[site])
        show(name, found, PUBLISHED[name])
        mean = means(found)
        samples, sites = (mean[f"ilisi:{key}"] for key in (sample, site))
        mixes = samples["sample removed"] > samples["VAE"] and sites["site removed"] > sites["VAE"]
        nmi = mean[f"leiden_nmi:{options.label_key}"]
        figures = f"iLISI of samples {', '.join(f'{v:.3f} ({n})' for n, v in samples.items())}"
        figures += f"; of sites {', '.join(f'{v:.3f} ({n})' for n, v in sites.items())}"
        kept = nmi.drop("VAE").min() > nmi.max() - 0.1
        verdict(f"{name}: the covariate removed mixes and biology is kept", bool(mixes and kept), figures)
        table = ranked(found, options, remove=[site])
        print(f"mean ranks, 1 is best\n\n{table.round(2).to_string()}\n")
        overall = table["overall"]
        single = overall.drop(BOTH)
        figures = f"mean rank {overall[BOTH]:.2f} against {single.min():.2f} of {single.idxmin()}"
        verdict(f"{name}: two alphas beat the best single one", overall[BOTH] < single.min(), figures)


if __name__ == "__main__":
    main()
