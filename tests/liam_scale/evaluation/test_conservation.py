"""Cell cycle and trajectory: cases with a known answer, and what is refused."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import liam_scale
from liam_scale.evaluation.conservation import G2M_GENES, S_GENES, CellCycle, Trajectory, phase_genes
from liam_scale.evaluation.measures import score
from liam_scale.evaluation.scored import Scored


@pytest.fixture(scope="module")
def cycling() -> tuple[np.ndarray, list[str]]:
    """(200, 137) expression of cells of which a third is in S and a third in G2/M."""
    rng = np.random.default_rng(0)
    names = [*S_GENES[:20], *(gene.capitalize() for gene in G2M_GENES[:17]), *(f"gene{i}" for i in range(100))]
    phase = np.arange(200) % 3
    expression = rng.gamma(2.0, 0.5, (200, 137))
    expression[phase == 1, :20] += 1
    expression[phase == 2, 20:37] += 1
    return expression.astype(np.float32), names


def cell_cycle(points: np.ndarray, expression: np.ndarray, names: list[str]) -> float:
    known = {"cell_cycle": CellCycle(scipy.sparse.csr_matrix(expression), phase_genes(names, "x.zarr"))}
    scored = Scored(points, {"donor": np.arange(len(points)) // 100}, known=known)
    return score(scored, covariates=["donor"], most_cost=0)["cell_cycle", "donor"]


def test_the_cell_cycle_is_kept_by_the_expression_itself_and_lost_in_noise(cycling):
    expression, names = cycling
    assert cell_cycle(expression, expression, names) == pytest.approx(1, abs=1e-4)
    assert cell_cycle(np.random.default_rng(1).normal(size=(200, 40)), expression, names) < 0.5
    # An embedding of the cycle alone has more than twice its share of the variance.
    assert cell_cycle(np.eye(3)[np.arange(200) % 3][:, 1:], expression, names) == 0


def test_cells_without_rna_and_samples_of_few_cells_say_nothing_of_the_cell_cycle(cycling):
    expression, names = cycling
    half = expression.copy()
    half[95:] = 0
    assert cell_cycle(half, half, names) == pytest.approx(1, abs=1e-4)
    none = np.zeros_like(expression)
    assert np.isnan(cell_cycle(expression, none, names))


def trajectory(points: np.ndarray, time: np.ndarray, samples: np.ndarray | None = None) -> float:
    label = np.digitize(time, np.nanquantile(time, [1 / 3, 2 / 3]))
    scored = Scored(points, {"type": label}, known={"time": Trajectory(time, samples)})
    return score(scored, labels=["type"], pseudotimes=["time"], most_cost=0)["trajectory", "time"]


@pytest.mark.slow
def test_a_trajectory_along_a_line_is_kept_in_either_direction_and_one_by_chance_is_not():
    rng = np.random.default_rng(0)
    place = np.sort(rng.random(120))
    points = np.column_stack([10 * place, rng.normal(scale=0.05, size=(120, 2))])
    assert trajectory(points, place) > 0.99
    assert trajectory(points, 1 - place) > 0.99
    assert trajectory(points, place, samples=np.arange(120) % 2) > 0.99
    assert trajectory(points, rng.permutation(place)) == pytest.approx(0.5, abs=0.15)
    off = np.where(np.arange(120) % 3 == 0, np.nan, place)
    assert trajectory(points, off) > 0.98
    assert np.isnan(trajectory(points, np.where(np.arange(120) < 115, np.nan, place)))


def test_what_cannot_be_measured_is_refused_with_the_cure():
    data = anndata.AnnData(
        scipy.sparse.csr_matrix(np.eye(20, 5, dtype=np.float32)),
        obs=pd.DataFrame({"donor": ["a", "b"] * 10, "type": ["t", "u"] * 10}, index=[f"c{i}" for i in range(20)]),
        obsm={"X_liam": np.eye(20, 4, dtype=np.float32)},
    )
    options = {"batch_key": "donor", "label_key": "type", "scib": "none", "baseline": False}
    with pytest.raises(ValueError, match=r"--cell-cycle: got 0 of the 43 genes .* \(0, 1, 2, \.\.\.\).* leave"):
        liam_scale.evaluate(data, cell_cycle=True, **options)
    with pytest.raises(ValueError, match="--pseudotime: obs column: got 'dpt'"):
        liam_scale.evaluate(data, pseudotime="dpt", **options)
    with pytest.raises(ValueError, match="--pseudotime: got 'type', a number in fewer than 3 cells"):
        liam_scale.evaluate(data, pseudotime="type", **options)
    with pytest.raises(ValueError, match="--pseudotime: got a column but no --label-key"):
        liam_scale.evaluate(data, pseudotime="type", batch_key="donor")
    with pytest.raises(ValueError, match="--cell-cycle: got no --batch-key"):
        liam_scale.evaluate(data, cell_cycle=True, label_key="type")
