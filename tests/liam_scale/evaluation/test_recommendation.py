"""What a sweep recommends on landscapes whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from liam_scale.evaluation.recommendation import ranks, recommend, summarised

ALPHAS = (1.0, 5.0, 25.0, 100.0, 1000.0)
BETTER = {"ilisi": "higher", "leiden_nmi": "higher", "same_sample_ratio": "towards 1", "pcr": "lower"}


def runs_of(
    mixing: Callable[[int], float],
    biology: Callable[[int], float],
    *,
    kept: Callable[[int], float] = lambda i: 0.1,
    noise: float = 0.005,
    seeds: int = 3,
    key: str = "replicate",
) -> pd.DataFrame:
    """Runs whose i-th alpha has these means; seeds lie evenly around them."""
    around = np.linspace(-1, 1, seeds) if seeds > 1 else np.zeros(1)
    return pd.DataFrame(
        {
            "model": "bavae",
            "batch_key": key,
            "alpha": alpha,
            "seed": seed,
            f"ilisi:{key}": mixing(i) + noise * by,
            "ilisi:condition": kept(i) + noise * by,
            "leiden_nmi:cell_type": biology(i) - noise * by,
        }
        for i, alpha in enumerate(ALPHAS)
        for seed, by in enumerate(around)
    )


KNEE = runs_of(lambda i: (0.1, 0.3, 0.5, 0.51, 0.51)[i], lambda i: (0.8, 0.8, 0.8, 0.79, 0.5)[i])


def test_the_smallest_alpha_at_the_knee_is_recommended_with_its_reason() -> None:
    found = recommend(KNEE)
    assert (found.alpha, found.batch_key) == (25.0, "replicate")
    assert "within 5 % of the best (0.510 at alpha 100)" in found.reason
    assert "at alpha 1000, biology falls by 0.300" in found.reason


def test_the_smallest_alpha_is_enough_where_mixing_is_there_and_biology_falls() -> None:
    found = recommend(runs_of(lambda i: 0.5, lambda i: (0.8, 0.8, 0.7, 0.6, 0.5)[i]))
    assert found.alpha == 1.0


def test_a_flat_landscape_gets_no_recommendation() -> None:
    found = recommend(runs_of(lambda i: 0.4, lambda i: 0.8))
    assert found.alpha is None
    assert "alpha makes no difference with replicate" in found.reason


def test_an_effect_smaller_than_the_spread_between_seeds_gets_no_recommendation() -> None:
    found = recommend(runs_of(lambda i: 0.3 + 0.02 * i, lambda i: 0.8 - 0.01 * i, noise=0.1))
    assert found.alpha is None
    assert "more --seeds" in found.reason


def test_no_alpha_is_recommended_where_none_has_both_mixing_and_biology() -> None:
    found = recommend(runs_of(lambda i: 0.1 * i, lambda i: 0.9 - 0.1 * i))
    assert found.alpha is None
    assert "mixing is within 5 % of the best at 1000, biology within one standard deviation of the best at 1" in str(
        found
    )


def test_one_seed_one_alpha_or_no_labels_are_refused_with_the_option_that_helps() -> None:
    assert "--seeds" in recommend(runs_of(lambda i: i, lambda i: i, seeds=1)).reason
    assert "--alpha" in recommend(KNEE[KNEE["alpha"] == 5]).reason
    assert "--label-key" in recommend(KNEE.drop(columns="leiden_nmi:cell_type")).reason


def test_an_alpha_that_mixes_what_is_to_be_kept_is_not_recommended() -> None:
    rising = runs_of(
        lambda i: (0.1, 0.49, 0.5, 0.51, 0.51)[i], lambda i: 0.8, kept=lambda i: (0.1, 0.1, 0.3, 0.4, 0.5)[i]
    )
    assert recommend(rising, keep=["condition"]).alpha == 5.0
    late = runs_of(lambda i: (0.1, 0.3, 0.5, 0.51, 0.51)[i], lambda i: 0.8, kept=lambda i: 0.1 * i)
    assert recommend(late, keep=["condition"]).alpha is None


def test_among_covariates_the_one_with_the_better_biology_is_recommended() -> None:
    other = runs_of(lambda i: (0.1, 0.3, 0.5, 0.51, 0.51)[i], lambda i: 0.6, key="sample")
    found = recommend(pd.concat([other, KNEE], ignore_index=True))
    assert found.batch_key == "replicate"


def test_a_covariate_that_takes_what_is_to_be_kept_with_it_is_not_recommended() -> None:
    """A sample of a replicate under a condition: removed, the condition mixes from the smallest alpha on."""
    shape = (0.1, 0.3, 0.5, 0.51, 0.51)
    taking = runs_of(lambda i: shape[i], lambda i: 0.9, kept=lambda i: 0.8, key="sample")
    keeping = runs_of(lambda i: shape[i], lambda i: 0.7, kept=lambda i: 0.05, key="replicate")
    found = recommend(pd.concat([taking, keeping], ignore_index=True), keep=["condition"])
    assert found.batch_key == "replicate"
    assert "condition (iLISI) 0.05" in found.reason
    assert recommend(taking, keep=["condition"]).batch_key == "sample", "nothing to compare it with"


def test_ranks_follow_the_direction_of_each_measure() -> None:
    runs = pd.DataFrame(
        {
            "model": "bavae",
            "batch_key": "donor",
            "alpha": [1.0, 10.0],
            "seed": 0,
            "ilisi:donor": [0.2, 0.4],
            "same_sample_ratio:donor": [1.3, 0.9],
            "ilisi:condition": [0.1, 0.3],
            "leiden_nmi:type": [0.8, 0.7],
        }
    )
    table = ranks(runs, better=BETTER, keep=["condition"])
    best = table.loc[("bavae", "donor", 10.0)]
    assert best[["ilisi:donor", "same_sample_ratio:donor"]].tolist() == [1.0, 1.0]
    assert best[["ilisi:condition", "leiden_nmi:type"]].tolist() == [2.0, 2.0]
    assert table["conservation"].tolist() == [1.0, 2.0] or table["conservation"].tolist() == [2.0, 1.0]


def test_of_columns_removed_at_once_the_mean_mixing_counts_and_each_ranks_as_removal() -> None:
    both = KNEE.assign(batch_key="replicate+donor", **{"ilisi:donor": KNEE["ilisi:replicate"] + 0.2})
    assert summarised(both)["mixing"].to_numpy() == pytest.approx(KNEE["ilisi:replicate"].to_numpy() + 0.1)
    found = recommend(both)
    assert (found.alpha, found.batch_key) == (25.0, "replicate+donor")
    table = ranks(both, better=BETTER)
    assert table["removal"].to_numpy() == pytest.approx(table[["ilisi:replicate", "ilisi:donor"]].mean(axis=1))


def test_covariates_named_beside_the_ones_removed_rank_as_removal_too() -> None:
    table = ranks(KNEE, better=BETTER, remove=["condition"])
    assert table["removal"].to_numpy() == pytest.approx(table[["ilisi:replicate", "ilisi:condition"]].mean(axis=1))
    assert table["conservation"].to_numpy() == pytest.approx(table["leiden_nmi:cell_type"])
