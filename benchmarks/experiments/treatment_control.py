"""Treatment and control (the paper's Figure 5): replicate or sample as the covariate to remove, alpha 1 to 1000.

Data: DOGMA-seq of stimulated and control PBMC (GSE156478) with obs columns replicate, sample, condition; by default a
stand-in: six samples, three replicates under two conditions, whose effects on genes and peaks are known.
Expected: removing the replicate, its mixing rises with alpha and that of the condition stays flat; removing the sample,
that of the condition rises too. Of the stand-in the mixture of types of every cell is known: the sweep, which sees
labels alone, should recommend an alpha at which neighbours in other replicates tell it as well as anywhere.

    python benchmarks/experiments/treatment_control.py --out treatment [--max-epochs 30]
"""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from common import ingested, load, parse, table, verdict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from liam_scale.sweep import SweepConfig, members_of, sweep

ALPHAS = (1.0, 25.0, 1000.0)
TRUTH = ["true mixture, R2", "condition told"]


def main() -> None:
    options = parse(__doc__)
    data = load(options, num_conditions=2, condition_effect=0.4)
    store = ingested(data, options.out / "treatment.zarr")
    config = SweepConfig(
        (str(store),),
        out=options.out / "sweep",
        batch_key=("replicate", options.batch_key),
        keep_key=("condition",),
        label_key=(options.label_key,),
        alpha=ALPHAS,
        seeds=tuple(options.seeds),
        max_epochs=options.max_epochs,
        plots=False,
    )
    found = sweep(config)
    assert found is not None
    runs, recommended = found.table, found.recommendation
    columns = ["ilisi:replicate", "ilisi:condition", f"leiden_nmi:{options.label_key}"]
    if options.data is None:
        told = [_told(member.embedding, data.obs) for member in members_of(config)]
        runs, columns = pd.concat([runs, pd.DataFrame(told, columns=TRUTH)], axis=1), [*columns, *TRUTH]
    grouped = runs.groupby(["batch_key", "alpha"])[columns]
    mean, spread = grouped.mean(), grouped.std()
    shown = mean.map("{:.3f}".format) + " ± " + spread.map("{:.3f}".format)
    rows = [(*index, *row) for index, row in zip(shown.index, shown.to_numpy(), strict=True)]
    print(f"\n{table(('removed', 'alpha', *columns), rows)}\n\n{found.ranks.iloc[:, :3].round(2)}\n\n{recommended}\n")
    first = {key: mean.loc[key].iloc[0] for key in ("replicate", options.batch_key)}
    kept, lost = (one["ilisi:condition"] for one in first.values())
    figures = f"iLISI of the condition at alpha {ALPHAS[0]:g}: {kept:.3f}, removing the sample {lost:.3f}"
    came_out = kept + 2 * spread["ilisi:condition"].iloc[0] < lost / 2
    verdict("the replicate is removed and the condition kept; with the sample it is lost", bool(came_out), figures)
    rise = mean.loc["replicate"]["ilisi:replicate"].iloc[1:].max() - first["replicate"]["ilisi:replicate"]
    noise = 2 * spread.loc["replicate"]["ilisi:replicate"].mean()
    verdict("the replicate mixes more with a larger alpha", bool(rise > noise), f"by {rise:.3f}, noise {noise:.3f}")
    if options.data is None and recommended.alpha is not None:
        truth = mean[TRUTH[0]]
        chosen, best = truth[recommended.batch_key, recommended.alpha], truth.max()
        figures = f"R2 {chosen:.3f}, best {best:.3f} at alpha {truth.idxmax()[1]:g} with {truth.idxmax()[0]}"
        is_best = chosen >= best - np.sqrt(runs.groupby(["batch_key", "alpha"])[TRUTH[0]].var().mean())
        verdict("the recommended alpha tells the truth within one sd of the best", bool(is_best), figures)


def _told(embedding: Path, truth: pd.DataFrame) -> tuple[float, float]:
    """How well a cell's 15 nearest neighbours in other replicates tell its mixture of types and its condition."""
    held = anndata.read_zarr(embedding)
    obs, points = truth.loc[held.obs_names], held.obsm["X_liam"]
    types = obs["cell_type"].cat.categories
    weights = obs["own_weight"].to_numpy()[:, None]
    own, other = (pd.get_dummies(obs[c].astype(pd.CategoricalDtype(types))) for c in ("cell_type", "mixed_with"))
    mixture = weights * own.to_numpy() + (1 - weights) * other.to_numpy()
    condition, replicates = obs["condition"].astype(str).to_numpy(), obs["replicate"].to_numpy()
    guessed, right = np.empty_like(mixture), np.empty(len(obs))
    for replicate in np.unique(replicates):
        inside = replicates == replicate
        near = KNeighborsRegressor(15).fit(points[~inside], mixture[~inside])
        guessed[inside] = near.predict(points[inside])
        voted = KNeighborsClassifier(15).fit(points[~inside], condition[~inside]).predict(points[inside])
        right[inside] = voted == condition[inside]
    left = np.square(mixture - guessed).sum() / np.square(mixture - mixture.mean(axis=0)).sum()
    return 1 - float(left), float(right.mean())


if __name__ == "__main__":
    main()
