"""Components of liam on real data: every model of the paper, three seeds, in the form of the paper's Figure 4A.

    python benchmarks/ablation.py bmmc-multiome bmmc-cite --seeds 0 1 2

Data sets by name as in quality.py. Where `shared/reference/published-scores.csv` stands beside the checkout, the
published scores of the full data are shown beside the measured ones: they are on 62,501 or 90,261 cells and by scib,
so what is comparable is the order of the models, not the values.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from harness import ROOT, describe_machine, table
from quality import DATA_SETS, SHARED, DataSet, python

MODELS = {
    "bavae": "BAVAE (alpha 1)",
    "bavae-x25": "BAVAE (alpha 25)",
    "cvae": "CVAE",
    "cdvae": "CDVAE",
    "avae": "AVAE (alpha 1)",
    "avae-x100": "AVAE (alpha 100)",
    "cevae": "CEVAE",
    "batchvae": "batchVAE",
    "vae": "VAE",
}

PUBLISHED = {
    "bavae": "BAVAE_sample_100",
    "bavae-x25": "BAVAE_sample_100_x25.0",
    "cvae": "CVAE_sample_100",
    "cdvae": "CDVAE_sample_100",
    "avae": "AVAE_sample_100_x1",
    "avae-x100": "AVAE_sample_100_x100",
    "cevae": "CEVAE_sample_100",
    "batchvae": "batchVAE_sample_100",
    "vae": "VAE_100",
}

MEASURES = {
    "label_purity": "label purity",
    "label_accuracy": "label from other samples",
    "kmeans_nmi": "NMI",
    "same_sample_ratio": "same-sample neighbours / expected",
}


def published_scores() -> dict[str, dict[str, str]]:
    """Scores of the paper on the full multiome data, by model."""
    path = SHARED.parent / "reference" / "published-scores.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["model"]: row for row in csv.DictReader(file) if "/Multiome/" in row["file"]}


def measure(data: DataSet, store: Path, model: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one model, embed, score; in two processes as a user would."""
    from liam_scale.evaluate import EvaluateConfig, evaluate

    name, _, factor = model.partition("-x")
    run, key = folder / f"{model}-{seed}", f"X_{model}_{seed}"
    options = ["--batch-key", data.batch_key] if name != "vae" else []
    options += ["--alpha", factor] if factor else []
    python("-m", "liam_scale.train", store, "--out", run, "--model", name, "--seed", seed, *options)
    python("-m", "liam_scale.embed", run, "--key", key)
    config = EvaluateConfig(
        str(store), embedding=key, batch_key=data.batch_key, label_key=data.label_key, scib="none", baseline=False
    )
    scores = evaluate(config).table[key]
    shutil.rmtree(run)
    return {name: float(scores[name]) for name in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=list(DATA_SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    describe_machine()
    published = published_scores()
    for name in options.data:
        data = DATA_SETS[name]
        folder = Path(tempfile.mkdtemp(prefix="liam-ablation-"))
        store = folder / "store.zarr"
        python("-m", "liam_scale.cli", "ingest", data.file, "--out", store)
        rows = []
        for model in options.models:
            results = [measure(data, store, model, seed, folder) for seed in options.seeds]
            print(json.dumps({"data": name, "model": model, "results": results}), flush=True)
            cells = []
            for key in MEASURES:
                own = [result[key] for result in results]
                spread = statistics.stdev(own) if len(own) > 1 else 0.0
                cells.append(f"{statistics.mean(own):.3f} ± {spread:.3f}")
            row = published.get(PUBLISHED[model], {})
            shown = " / ".join(f"{float(row[key]):.3f}" for key in ("nmi", "iLISI_batch") if row.get(key))
            rows.append((MODELS[model], *cells, shown))
        print(f"\n{name}, {len(options.seeds)} seeds\n")
        header = ("model", *MEASURES.values(), "published, full multiome data: NMI / iLISI")
        print(table(header, rows), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
