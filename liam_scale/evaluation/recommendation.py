"""Which alpha the runs of a sweep speak for, and why; or why they speak for none.

Of each configuration (model, covariate removed, alpha) there are as many runs as seeds. Means over seeds are compared,
and the spread between seeds says what counts as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

CONFIGURATION = ["model", "batch_key", "alpha"]
"""Columns of a sweep's table that say what was trained; runs of one configuration differ by their seed."""

BIOLOGY = ("leiden_nmi", "leiden_ari", "label_accuracy")
"""Measures whose mean, over all label columns, is called biology."""

MIXING = "ilisi"
"""Measure of a covariate that is called mixing; of a covariate to keep, it should not rise."""

_MIXED_ENOUGH = 0.95
_UNMOVED = 0.02
"""A difference of a measure between 0 and 1 below which nobody would choose."""


@dataclass(frozen=True)
class Recommendation:
    """What a sweep recommends; `alpha` and the rest are None where it recommends nothing, and `reason` says why."""

    reason: str
    alpha: float | None = None
    batch_key: str | None = None
    model: str | None = None

    def __str__(self) -> str:
        if self.alpha is None:
            return f"no recommendation: {self.reason}"
        return f"recommended: alpha {self.alpha:g} with {self.batch_key} ({self.model}): {self.reason}"


def columns_of(batch_key: str) -> tuple[str, ...]:
    """Obs columns that a configuration removes at once: those of `site+donor` are two."""
    return tuple(batch_key.split("+"))


def summarised(runs: pd.DataFrame, *, keep: Sequence[str] = ()) -> pd.DataFrame:
    """The runs with what a choice looks at: `mixing` of the covariate removed (mean over several), `kept` (mean over
    `keep`), `biology`.

    Parameters
    ----------
    runs
        A row for each run: `CONFIGURATION`, `seed`, and a column `measure:column` for each measure of an obs column.
    """
    names = pd.Series(runs.columns, index=runs.columns).str.partition(":")[0]
    biology = runs[[name for name in runs.columns if names[name] in BIOLOGY]]
    kept = runs[[f"{MIXING}:{key}" for key in keep if f"{MIXING}:{key}" in runs]]
    mixing = [
        np.mean([row.get(f"{MIXING}:{column}", np.nan) for column in columns_of(row["batch_key"])])
        for _, row in runs.iterrows()
    ]
    own = runs[[*CONFIGURATION, "seed"]]
    return own.assign(mixing=np.asarray(mixing, float), kept=kept.mean(axis=1), biology=biology.mean(axis=1))


def recommend(runs: pd.DataFrame, *, keep: Sequence[str] = ()) -> Recommendation:
    """The smallest alpha that mixes within 5 % of the best and keeps biology within one standard deviation of the best.

    What is to be kept may mix no more than at the smallest alpha of the covariate and model with which it mixes least.
    Among several that have such an alpha the one of the best biology is taken. Nothing is recommended from one alpha,
    from one seed, without labels, or where the spread between seeds is larger than what alpha changes.
    """
    curves = [curve for _, curve in summarised(runs, keep=keep).groupby(["model", "batch_key"])]
    kept = min(curve.loc[curve["alpha"] == curve["alpha"].min(), "kept"].mean() for curve in curves)
    found = [_of_curve(curve, keep=keep, least_kept=kept) for curve in curves]
    sound = [(biology, -i, one) for i, (one, biology) in enumerate(found) if one.alpha is not None]
    if sound:
        return max(sound)[2]
    reasons = dict.fromkeys(one.reason for one, _ in found)
    return Recommendation("; ".join(reasons))


def _of_curve(curve: pd.DataFrame, *, keep: Sequence[str], least_kept: float) -> tuple[Recommendation, float]:
    """What one curve over alpha says, and the biology of its choice."""
    key, model = curve["batch_key"].iloc[0], curve["model"].iloc[0]
    grouped = curve.groupby("alpha")[["mixing", "kept", "biology"]]
    mean, num_seeds = grouped.mean(), int(grouped.size().min())
    if refusal := _cannot_compare(mean, num_seeds, key):
        return Recommendation(refusal), np.nan
    spread = np.sqrt(grouped.var(ddof=1).mean())
    # Two means over n seeds differ by chance by less than this in 19 of 20 cases.
    by_chance = 2 * np.sqrt(2 / num_seeds) * spread
    moved = mean.max() - mean.min()
    if not (moved > np.maximum(by_chance, _UNMOVED))[["mixing", "biology"]].any():
        return Recommendation(_no_effect(key, moved, by_chance)), np.nan
    best_mixing, best_biology = mean["mixing"].idxmax(), mean["biology"].idxmax()
    fits = pd.DataFrame(
        {
            "mixing": mean["mixing"] >= _MIXED_ENOUGH * mean["mixing"].max(),
            "biology": mean["biology"] >= mean["biology"].max() - spread["biology"],
            "kept": ~(mean["kept"] > least_kept + max(_UNMOVED, np.nan_to_num(by_chance["kept"]))),
        }
    )
    if not fits.all(axis=1).any():
        return Recommendation(_no_compromise(key, mean, fits, keep)), np.nan
    alpha = min(alpha for alpha, does in zip(mean.index, fits.all(axis=1), strict=True) if does)
    chosen, above = mean.loc[alpha], mean.loc[mean.index > alpha]
    reason = (
        f"mixing of {key} (iLISI) {chosen['mixing']:.3f}, within 5 % of the best ({mean['mixing'].max():.3f} at alpha"
        f" {best_mixing:g}); biology {chosen['biology']:.3f}, within one standard deviation between seeds"
        f" ({spread['biology']:.3f}) of the best ({mean['biology'].max():.3f} at alpha {best_biology:g})"
    )
    if keep:
        reason += f"; {' and '.join(keep)} (iLISI) {chosen['kept']:.3f}, where it mixes least {least_kept:.3f}"
    if len(above):
        fall = chosen["biology"] - above["biology"].iloc[-1]
        word = f"falls by {fall:.3f}" if fall > spread["biology"] else "stays within the spread"
        reason += f"; above, at alpha {above.index[-1]:g}, biology {word}"
    return Recommendation(reason, alpha, key, model), chosen["biology"]


def _cannot_compare(mean: pd.DataFrame, num_seeds: int, key: str) -> str:
    if len(mean) < 2:
        return f"{key} has one alpha, {mean.index[0]:g}; give --alpha several"
    if num_seeds < 2:
        return "one seed says nothing of the spread between runs; give --seeds 0 1 2"
    if mean["biology"].isna().any():
        return "what mixing costs is not known without labels; give --label-key"
    if mean["mixing"].isna().any():
        return f"{key} has one value among the scored cells, or its mixing was not measured"
    return ""


def _no_effect(key: str, moved: pd.Series, by_chance: pd.Series) -> str:
    if (by_chance[["mixing", "biology"]] > _UNMOVED).any():
        return (
            f"between alphas, mixing of {key} differs by {moved['mixing']:.3f} and biology by {moved['biology']:.3f},"
            f" where seeds alone make up to {by_chance['mixing']:.3f} and {by_chance['biology']:.3f}; more --seeds may"
            " tell the alphas apart"
        )
    return (
        f"alpha makes no difference with {key} (mixing differs by {moved['mixing']:.3f}, biology by"
        f" {moved['biology']:.3f}); keep the smallest"
    )


def _no_compromise(key: str, mean: pd.DataFrame, fits: pd.DataFrame, keep: Sequence[str]) -> str:
    alone = {name: fits.index[fits[name]].tolist() for name in fits}
    listed = {name: ", ".join(f"{alpha:g}" for alpha in alphas) or "none" for name, alphas in alone.items()}
    kept = f", {' and '.join(keep)} is kept at {listed['kept']}" if keep else ""
    return (
        f"with {key} no alpha has both: mixing is within 5 % of the best at {listed['mixing']}, biology within one"
        f" standard deviation of the best at {listed['biology']}{kept}; choose by what the analysis needs, or try"
        " values between"
    )


def ranks(
    runs: pd.DataFrame, *, better: dict[str, str], keep: Sequence[str] = (), remove: Sequence[str] = ()
) -> pd.DataFrame:
    """Rank of each configuration (1 is best) in each measure, and the mean ranks: the paper's table.

    Parameters
    ----------
    better
        By key of the measure: `higher`, `lower` or `towards 1`. Of a covariate in `keep` the other end is better.
    remove
        Covariates whose mixing counts besides those of the column `batch_key`.

    Returns
    -------
    A row a configuration, best first; columns `overall` (mean of the two that follow), `removal`, `conservation`, and
    the measures.
    """
    measures = [name for name in runs.columns if name.partition(":")[0] in better]
    mean = runs.groupby(CONFIGURATION)[measures].mean()
    covariates = {*(column for key in runs["batch_key"] for column in columns_of(key)), *keep, *remove}
    found = {}
    for name in measures:
        key, _, column = name.partition(":")
        values = (mean[name] - 1).abs() if better[key] == "towards 1" else mean[name]
        is_ascending = (better[key] != "higher") != (column in keep)
        found[name] = values.rank(ascending=is_ascending, method="average")
    table = pd.DataFrame(found)
    removal = [name for name in measures if name.partition(":")[2] in covariates]
    conservation = [name for name in measures if name not in removal]
    sides = pd.DataFrame({"removal": table[removal].mean(axis=1), "conservation": table[conservation].mean(axis=1)})
    return pd.concat([sides.mean(axis=1).rename("overall"), sides, table], axis=1).sort_values("overall")
