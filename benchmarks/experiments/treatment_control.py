"""Treatment and control (the paper's Figure 5): replicate or sample as the covariate to remove, alpha 1 to 1000.

Data: DOGMA-seq of stimulated and control PBMC (GSE156478) with obs columns replicate, sample, condition; by default a
stand-in: six samples, three replicates under two conditions, whose effects on genes and peaks are known.
Expected: removing the replicate, its mixing rises with alpha and that of the condition stays flat; removing the sample,
that of the condition rises too.

    python benchmarks/experiments/treatment_control.py --out treatment [--max-epochs 30]
"""

import subprocess
import sys

import pandas as pd
from common import ROOT, ingested, load, parse, table, verdict

ALPHAS = (1, 5, 25, 100, 1000)


def main() -> None:
    options = parse(__doc__)
    data = load(options, num_conditions=2, condition_effect=0.4)
    store = ingested(data, options.out / "treatment.zarr")
    command = [sys.executable, "-m", "liam_scale.cli", "sweep", str(store), "--out", str(options.out / "sweep")]
    command += ["--batch-key", "replicate", options.batch_key, "--keep-key", "condition"]
    command += ["--label-key", options.label_key, "--alpha", *map(str, ALPHAS), "--seeds", *map(str, options.seeds)]
    command += [] if options.max_epochs is None else ["--max-epochs", str(options.max_epochs)]
    subprocess.run(command, cwd=ROOT, check=True)
    runs = pd.read_csv(options.out / "sweep" / "sweep.csv")
    columns = ["ilisi:replicate", "ilisi:condition", f"leiden_nmi:{options.label_key}"]
    mean, spread = (getattr(runs.groupby(["batch_key", "alpha"])[columns], kind)() for kind in ("mean", "std"))
    shown = mean.map("{:.3f}".format) + " ± " + spread.map("{:.3f}".format)
    rows = [(*index, *row) for index, row in zip(shown.index, shown.to_numpy(), strict=True)]
    print(f"\n{table(('removed', 'alpha', *columns), rows)}\n")
    rise = {key: mean.loc[key].iloc[1:].max() - mean.loc[key].iloc[0] for key in ("replicate", options.batch_key)}
    noise = 2 * spread.mean()
    own, kept = rise["replicate"]["ilisi:replicate"], rise["replicate"]["ilisi:condition"]
    other, bound = rise[options.batch_key]["ilisi:condition"], noise["ilisi:condition"]
    figures = f"replicate rises by {own:.3f}, condition by {kept:.3f}; removing the sample, condition by {other:.3f}"
    came_out = own > noise["ilisi:replicate"] and kept <= max(0.02, bound) and other > max(0.02, bound, kept)
    verdict("the replicate mixes, the condition is kept, and with the sample it is lost", bool(came_out), figures)


if __name__ == "__main__":
    main()
