import mudata
import numpy as np
import pytest
import zarr
from identifying import identifying_counts, identifying_store, identifying_value

from loaders.synthetic import simulate, simulate_mudata

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"),
    # SciPy's remark on unsigned indices, which it then casts.
    pytest.mark.filterwarnings("ignore:indices array has non-integer dtype:UserWarning"),
]


def test_identifying_values_tell_cells_features_and_modalities_apart():
    cells, features = np.meshgrid(np.arange(300), np.arange(200), indexing="ij")
    rna = identifying_value(cells, features)
    assert rna.min() >= 1
    assert rna.max() <= 60_000
    rows = {tuple(row) for row in rna[:, :4].tolist()}
    assert len(rows) == 300
    assert len({tuple(column) for column in rna[:4].T.tolist()}) == 200
    atac = identifying_value(cells, features, modality="atac")
    assert (rna == atac).mean() < 0.001
    assert identifying_value(7, 9)[0] == rna[7, 9]


def test_identifying_counts_hold_the_identifying_value_everywhere():
    counts = identifying_counts(200, 60, modality="adt", maximum=250, first_cell=11).tocoo()
    np.testing.assert_array_equal(
        counts.data, identifying_value(counts.row + 11, counts.col, modality="adt", maximum=250)
    )
    assert 10 < counts.nnz / 200 < 20
    assert 96 - 11 not in counts.row


def test_identifying_store_reads_back_with_mudata(tmp_path):
    out = tmp_path / "toy.zarr"
    schema = identifying_store(out, num_cells=150, num_features={"rna": 40, "atac": 90}, absent={"atac": [1]})
    read = mudata.read_zarr(out)
    assert schema.modalities["atac"].num_cells == 100
    assert read.obs_names.tolist() == [f"cell{c}" for c in range(150)]
    atac_cells = [c for c in range(150) if c % 3 != 1]
    expected = identifying_counts(150, 90, modality="atac")[atac_cells].toarray()
    np.testing.assert_array_equal(read["atac"].X.toarray(), expected)
    np.testing.assert_array_equal(read["rna"].X.toarray(), identifying_counts(150, 40).toarray())
    assert read["atac"].obs_names.tolist() == [f"cell{c}" for c in atac_cells]
    assert read.obs["cell_type"].isna().sum() == 18
    np.testing.assert_array_equal(read["rna"].obs["total_counts"], identifying_counts(150, 40).sum(axis=1).A1)


def test_simulated_store_meets_the_sparsity_asked_for(tmp_path):
    schema = simulate(
        tmp_path / "s.zarr", num_cells=3000, num_genes=2500, num_peaks=9000, num_proteins=40, genes_per_cell=200,
        peaks_per_cell=500, num_samples=3,
    )  # fmt: skip
    assert schema.modalities["rna"].nonzeros_per_cell == pytest.approx(200, rel=0.1)
    assert schema.modalities["atac"].nonzeros_per_cell == pytest.approx(500, rel=0.1)
    assert schema.modalities["adt"].nonzeros_per_cell > 15
    assert schema.is_shuffled
    assert schema.obs_columns[:3] == ("sample", "donor", "cell_type")


def test_a_simulated_cell_does_not_depend_on_threads_or_on_how_many_follow(tmp_path):
    options = {"num_genes": 300, "num_peaks": 500, "genes_per_cell": 40, "peaks_per_cell": 60, "seed": 5}
    simulate(tmp_path / "a.zarr", num_cells=5000, threads=2, **options)
    simulate(tmp_path / "b.zarr", num_cells=2500, threads=1, **options)
    a, b = mudata.read_zarr(tmp_path / "a.zarr"), mudata.read_zarr(tmp_path / "b.zarr")
    for name in ("rna", "atac"):
        assert (a[name].X[:2500] != b[name].X).nnz == 0
    assert a.obs["cell_type"].tolist()[:2500] == b.obs["cell_type"].tolist()
    other = simulate_mudata(num_cells=2500, **{**options, "seed": 6})
    assert (other["rna"].X != b["rna"].X).nnz > 1000


def test_simulated_truth_is_in_the_counts():
    options = {
        "num_cells": 2000,
        "num_types": 3,
        "num_samples": 2,
        "num_genes": 400,
        "num_peaks": 0,
        "genes_per_cell": 80,
    }
    data = simulate_mudata(**options, seed=1)
    counts = data["rna"].X.toarray()
    assert (counts == np.round(counts)).all()
    profiles = counts / counts.sum(axis=1, keepdims=True)
    types, samples = data.obs["cell_type"].to_numpy(), data.obs["sample"].to_numpy()
    names = sorted(set(types))
    for sample in sorted(set(samples)):
        centres = np.stack([profiles[(types == name) & (samples == sample)].mean(axis=0) for name in names])
        inside = samples == sample
        nearest = (np.sqrt(profiles[inside]) @ np.sqrt(centres).T).argmax(axis=1)
        assert (np.array(names)[nearest] == types[inside]).mean() > 0.9
    log_effect = [np.log(counts[(types == names[0]) & (samples == s)].sum(axis=0) + 1.0) for s in sorted(set(samples))]
    alone = simulate_mudata(**options, seed=1, sample_effect=0.0)
    flat = alone["rna"].X.toarray()
    log_flat = [np.log(flat[(types == names[0]) & (samples == s)].sum(axis=0) + 1.0) for s in sorted(set(samples))]
    assert np.std(log_effect[0] - log_effect[1]) > 1.25 * np.std(log_flat[0] - log_flat[1])


def test_counts_follow_the_poisson_law_they_claim():
    # One feature's counts over cells of equal depth and profile: variance over mean is one. Here the depth varies,
    # so the law is checked on shares: features of equal rate have equal means, within 5 standard errors.
    data = simulate_mudata(
        num_cells=4000, num_types=2, num_samples=1, num_peaks=0, num_genes=50, genes_per_cell=20, sample_effect=0.0
    )
    counts = data["rna"].X.toarray()
    rare = counts[:, counts.mean(axis=0).argsort()[5]]
    assert rare.var() / rare.mean() == pytest.approx(1.0, abs=0.35)


def test_mosaic_samples_lack_their_modality(tmp_path):
    simulate(
        tmp_path / "m.zarr", num_cells=600, num_genes=100, num_peaks=200, genes_per_cell=20, peaks_per_cell=30,
        num_samples=3, mosaic=(("rna", "atac"), ("rna",), ("atac",)),
    )  # fmt: skip
    read = mudata.read_zarr(tmp_path / "m.zarr")
    sample = read.obs["sample"].to_numpy()
    np.testing.assert_array_equal(np.ravel(read.obsm["rna"]), sample != "donor2")
    np.testing.assert_array_equal(np.ravel(read.obsm["atac"]), sample != "donor1")
    assert read["rna"].n_obs == (sample != "donor2").sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"genes_per_cell": 90}, "got 90 of 100 features"),
        ({"mosaic": (("rna", "adt"),)}, "mosaic: got 'adt', simulated are rna, atac"),
        ({"num_types": 1}, "give at least 1 sample and 2 types"),
    ],
)
def test_impossible_simulations_are_refused_before_anything_is_written(tmp_path, wrong, message):
    options = {"num_genes": 100, "num_peaks": 200, "genes_per_cell": 20, "peaks_per_cell": 30}
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "x.zarr", num_cells=10, **{**options, **wrong})
    assert not list(tmp_path.iterdir())


def test_simulated_store_has_uint8_counts_in_checked_chunks(tmp_path):
    simulate(tmp_path / "s.zarr", num_cells=100, num_genes=300, num_peaks=0, genes_per_cell=50)
    data = zarr.open_array(tmp_path / "s.zarr" / "mod" / "rna" / "X" / "data", mode="r")
    assert data.dtype == np.uint8
    assert "crc32c" in str(data.metadata.to_dict()["codecs"])


def test_a_replicate_is_seen_under_every_condition_and_shares_its_effect():
    options = {"num_genes": 300, "num_peaks": 0, "genes_per_cell": 120, "num_samples": 6, "num_types": 2}
    data = simulate_mudata(num_cells=1500, num_conditions=2, sample_effect=0.8, condition_effect=0.8, **options)
    columns = data.obs[["sample", "replicate", "condition"]].drop_duplicates()
    assert len(columns) == 6
    assert columns.groupby(["replicate", "condition"], observed=True).size().tolist() == [1] * 6
    counts = data.mod["rna"].to_df().groupby(data.obs["sample"].to_numpy()).sum() + 1
    logs = np.log(counts.div(counts.sum(axis=1), axis=0)).to_numpy()
    logs -= logs.mean(axis=0)
    alike = np.corrcoef(logs)
    shared = [alike[a, b] for a, b in ((0, 1), (0, 2))]  # the same replicate; the same condition
    assert min(shared) > alike[0, 3] + 0.2, "samples 0 and 3 share neither"


def test_conditions_that_do_not_divide_the_samples_are_refused():
    with pytest.raises(ValueError, match="num_conditions: got 2 for 3 samples"):
        simulate_mudata(num_cells=10, num_samples=3, num_conditions=2)


def test_samples_of_a_site_share_its_effect_and_have_their_own():
    options = {"num_genes": 300, "num_peaks": 0, "genes_per_cell": 120, "num_samples": 6, "num_types": 2}
    data = simulate_mudata(num_cells=1500, num_sites=3, sample_effect=0.4, site_effect=0.8, **options)
    columns = data.obs[["sample", "site"]].drop_duplicates().sort_values("sample")
    assert columns["site"].tolist() == ["site0", "site0", "site1", "site1", "site2", "site2"]
    counts = data.mod["rna"].to_df().groupby(data.obs["sample"].to_numpy()).sum() + 1
    logs = np.log(counts.div(counts.sum(axis=1), axis=0)).to_numpy()
    logs -= logs.mean(axis=0)
    alike = np.corrcoef(logs)
    assert min(alike[0, 1], alike[2, 3], alike[4, 5]) > max(alike[0, 2], alike[1, 4], alike[3, 5]) + 0.5
    assert alike[0, 1] < 0.95, "two samples of a site differ"


def test_sites_that_do_not_divide_the_samples_are_refused():
    with pytest.raises(ValueError, match="num_sites: got 2 for 3 samples"):
        simulate_mudata(num_cells=10, num_samples=3, num_sites=2)
