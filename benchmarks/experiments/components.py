"""Components of liam (the paper's Figure 4A): every model of the paper on the same cells, alpha 1, 25 and 100.

Data: the NeurIPS 2021 multiome of BMMC (GSE194122), or by default a stand-in of six samples; small draws of real data
are in benchmarks/ablation.py.
Expected: without a conditional decoder samples stay apart (VAE, batchVAE, CEVAE, and AVAE but for a large alpha); with
it they mix, a little more with the adversary, and biology is kept.

    python benchmarks/experiments/components.py --out components [--max-epochs 30]
    python benchmarks/experiments/components.py multiome.h5mu --batch-key batch
"""

from common import MODELS, PUBLISHED, ingested, load, means, measured, parse, ranked, show, verdict

MIXING = ("bavae", "cvae", "cdvae")


def main() -> None:
    options = parse(__doc__)
    store = ingested(load(options), options.out / "components.zarr")
    runs = {}
    for name, title in MODELS.items():
        model, _, alpha = name.partition("-x")
        seen = {"batch_key": None} if model == "vae" else {}
        runs[title] = {"model": model, **seen, **({"alpha": float(alpha)} if alpha else {})}
    found = measured(store, runs, options)
    show("models of the paper", found, {title: PUBLISHED[name] for name, title in MODELS.items()})
    print(f"mean ranks, 1 is best\n\n{ranked(found, options).round(2).to_string()}\n")
    mean = means(found)
    mixing, nmi = mean[f"ilisi:{options.batch_key}"], mean[f"leiden_nmi:{options.label_key}"]
    mixed = [MODELS[name] for name in MIXING]
    apart = [MODELS[name] for name in ("avae", "cevae", "batchvae", "vae")]
    came_out = mixing[mixed].min() > mixing[apart].max() and nmi[mixed].min() > nmi.max() - 0.05
    figures = f"iLISI {', '.join(f'{value:.3f} ({name})' for name, value in mixing.items())}"
    verdict("conditional decoders mix samples, the rest does not, and biology is kept", bool(came_out), figures)


if __name__ == "__main__":
    main()
