"""Whether what varies gradually between cells survives integration: the cell cycle and a trajectory.

Both as scib 1.1 defines them (Luecken 2022) and the paper of liam takes them, on scanpy and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from liam_scale.evaluation.scored import Codes, Scored, scib_cells

_S = (
    "MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 MLF1IP HELLS RFC2 RPA2 NASP RAD51AP1"
    " GMNN WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 CLSPN POLA1"
    " CHAF1B BRIP1 E2F8"
)
_G2M = (
    "HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF TACC3 FAM64A SMC4 CCNB2 CKAP2L"
    " CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 HN1 CDC20 TTK CDC25C KIF2C RANGAP1 NCAPD2 DLGAP5"
    " CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 G2E3 GAS2L3 CBX5 CENPA"
)
S_GENES, G2M_GENES = _S.split(), _G2M.split()
"""Genes of the phases by human symbol (Tirosh 2016); those of the mouse differ in case alone."""

_FEWEST_GENES = 2
"""Of a phase, without which it has no score."""

_COMPONENTS = 50
"""Principal components whose variance is explained, as scib takes them."""

_FEWEST_CELLS = 10
"""Of a sample, below which nothing is said of it."""


def phase_genes(names: Sequence[str], uri: str) -> tuple[list[int], list[int]]:
    """Places of the genes of S and of G2/M among the names.

    Raises
    ------
    ValueError
        Of a phase fewer than two genes are there.
    """
    place = {name.upper(): i for i, name in enumerate(names)}
    s, g2m = ([place[gene] for gene in genes if gene in place] for genes in (S_GENES, G2M_GENES))
    if min(len(s), len(g2m)) < _FEWEST_GENES:
        raise ValueError(
            f"--cell-cycle: got {len(s)} of the {len(S_GENES)} genes of the S phase and {len(g2m)} of the"
            f" {len(G2M_GENES)} of G2/M among the RNA features of {uri} ({', '.join(names[:3])}, ...); at least"
            f" {_FEWEST_GENES} of each are needed: give features their gene symbols, or leave --cell-cycle out"
        )
    return s, g2m


@dataclass(frozen=True)
class CellCycle:
    """RNA of the scored cells, and its genes of the cell cycle.

    Attributes
    ----------
    expression
        (n, G) log-normalised RNA; rows of cells that lack it are empty.
    genes
        Places of the genes of S and of G2/M.
    """

    expression: scipy.sparse.csr_matrix
    genes: tuple[list[int], list[int]]

    def conservation(self, scored: Scored, samples: Codes) -> float:
        """1 - |after - before| / before, at least 0, as mean over samples.

        Before and after are the shares of variance that the two phases' scores explain in the sample's expression and
        in its embedding.
        """
        found = []
        has_rna = np.diff(self.expression.indptr) > 0
        for sample in np.unique(samples):
            own = np.flatnonzero((samples == sample) & has_rna)
            if len(own) < _FEWEST_CELLS:
                continue
            phases = self._phases(own)
            before = _explained(self.expression[own], phases)
            if before > 0:
                found.append(max(0.0, 1 - abs(_explained(scored.points[own], phases) - before) / before))
        return float(np.mean(found)) if found else np.nan

    def _phases(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(m, 2) scores of S and G2/M (Tirosh 2016): mean of the genes over that of genes expressed alike."""
        import anndata
        import scanpy

        cells = anndata.AnnData(self.expression[rows])
        names = [[cells.var_names[place] for place in places] for places in self.genes]
        scanpy.tl.score_genes_cell_cycle(cells, s_genes=names[0], g2m_genes=names[1])
        return cells.obs[["S_score", "G2M_score"]].to_numpy(np.float64)


def _explained(data: npt.NDArray[np.floating] | scipy.sparse.csr_matrix, phases: npt.NDArray[np.float64]) -> float:
    """Share of the variance of principal components that is linear in the columns of `phases`."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LinearRegression

    width = min(_COMPONENTS, *data.shape)
    if width == min(data.shape):
        data = data if isinstance(data, np.ndarray) else data.toarray()
        decomposition = PCA(width, svd_solver="full")
    else:
        decomposition = PCA(width, svd_solver="arpack", random_state=0)
    components = decomposition.fit_transform(data)
    residual = components - LinearRegression().fit(phases, components).predict(phases)
    variance = components.var(axis=0)
    explained = np.maximum(0, variance - residual.var(axis=0)).sum()
    return float(explained / variance.sum()) if variance.any() else 0.0


@dataclass(frozen=True)
class Trajectory:
    """Pseudotime of the cells, NaN of those that are not on the trajectory; `samples` codes, or None for one sample."""

    pseudotime: npt.NDArray[np.float64]
    samples: Codes | None = None

    def conservation(self, scored: Scored, label: str) -> float:
        """(rho + 1) / 2 of the pseudotime and the diffusion pseudotime of the embedding (Spearman), mean over samples.

        The root is the outermost cell of the label with the lowest mean pseudotime, in the largest connected part of
        the graph of neighbours; cells of other parts have the time 0, and without a root the score is 0.
        """
        import scanpy
        from scipy.sparse.csgraph import connected_components

        own = np.flatnonzero(np.isfinite(self.pseudotime))
        if len(own) < _FEWEST_CELLS:
            return np.nan
        before, after, labels = self.pseudotime[own], np.zeros(len(own)), scored.codes[label][own]
        cells = scib_cells(scored)[own]
        parts = connected_components(cells.obsp["connectivities"], directed=False)[1]
        connected = np.flatnonzero(parts == np.bincount(parts).argmax())
        start = min(np.unique(labels), key=lambda code: before[labels == code].mean())
        candidates = np.flatnonzero(labels[connected] == start)
        if len(candidates) == 0:
            return 0.0
        part = cells[connected].copy()
        scanpy.tl.diffmap(part)
        part.uns["iroot"] = candidates[_outermost(part.obsm["X_diffmap"][:, :3], candidates)]
        scanpy.tl.dpt(part)
        times = part.obs["dpt_pseudotime"].to_numpy(np.float64)
        after[connected] = np.where(times > 1, 0, times)  # infinite where the diffusion does not reach
        samples = np.zeros(len(own), int) if self.samples is None else self.samples[own]
        return (_mean_correlation(before, after, samples) + 1) / 2


def _outermost(coordinates: npt.NDArray[np.floating], candidates: npt.NDArray[np.int64]) -> int:
    """Place of the candidate that most axes call the outermost one on the candidates' side."""
    votes = np.zeros(len(candidates), int)
    for axis in coordinates.T:
        values = axis[candidates]
        votes[values.argmin() if values.mean() < axis.mean() else values.argmax()] += 1
    return int(votes.argmax())


def _mean_correlation(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], samples: Codes) -> float:
    """Spearman's, mean over the samples where both vary."""
    from scipy.stats import rankdata

    found = []
    for sample in np.unique(samples):
        own = samples == sample
        if own.sum() > 1 and np.ptp(before[own]) and np.ptp(after[own]):
            found.append(np.corrcoef(rankdata(before[own]), rankdata(after[own]))[0, 1])
    return float(np.mean(found)) if found else np.nan
