"""The history speaks scvi-tools' names and is a CSV that is always whole."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from liam_scale.training.distributed import World
from liam_scale.training.history import History, Meter, memorised, summarise


def test_totals_follow_from_the_terms() -> None:
    terms = {
        "reconstruction_loss_rna": 30.0,
        "reconstruction_loss_atac": 10.0,
        "kl_divergence_z": 4.0,
        "kl_divergence_l_rna": 2.0,
        "adversarial_loss": 8.0,
    }
    row = summarise(terms, 2, "train")
    assert row["reconstruction_loss_train"] == 20.0
    assert row["kl_local_train"] == 3.0
    assert row["elbo_train"] == 23.0
    assert row["reconstruction_loss_atac_train"] == 5.0
    assert row["adversarial_loss_train"] == 4.0


def test_the_losses_shown_after_a_resume_are_means_over_the_cells_since() -> None:
    # 100 cells of all ranks came with the checkpoint, to the main rank; 20 followed, of which 10 are its own.
    meter = Meter(World(rank=0, size=2), {"train_loss": 700.0}, cells=100)
    meter.add({"train_loss": torch.tensor(30.0), "kl_divergence_z": torch.tensor(5.0)}, cells=20)
    assert meter.glance() == {"train_loss": 3.0, "kl_divergence_z": 0.5}


def test_rows_with_new_columns_make_a_readable_csv(tmp_path: Path) -> None:
    history = History(tmp_path / "history.csv")
    history.append({"epoch": 0, "step": 10, "elbo_train": 1.5})
    history.append({"epoch": 1, "step": 20, "elbo_train": 1.25, "elbo_validation": 2.0})
    frame = pd.read_csv(tmp_path / "history.csv")
    assert frame["elbo_train"].tolist() == [1.5, 1.25]
    assert frame["step"].tolist() == [10, 20]
    assert frame["elbo_validation"].isna().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_events_are_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    history = History(None, tensorboard=tmp_path / "events")
    history.append({"epoch": 0, "step": 10, "elbo_train": 1.5})
    history.close()
    assert any(p.name.startswith("events.out") for p in (tmp_path / "events").iterdir())


def test_a_modality_that_is_memorised_is_told_although_the_sum_falls() -> None:
    def row(epoch: int, rna: float, atac: float, **more: float) -> dict[str, float]:
        parts = {"reconstruction_loss_rna": rna, "reconstruction_loss_atac": atac, **more}
        return {"epoch": epoch, "step": 10 * epoch, **summarise(parts, 1.0, "validation")}

    rows = [row(1, 900, 110), row(2, 800, 100), row(3, 700, 100.9), row(4, 600, 104), row(5, 900, 120)]
    assert memorised(rows, 40) == {"atac": (100.0, 2, 104.0)}
    assert memorised(rows, 30) == {}, "1 % is noise"
    assert memorised(rows, 20) == memorised(rows, 0) == memorised([], 10) == {}
    alone = [{name: value for name, value in one.items() if "atac" not in name} for one in rows]
    assert memorised(alone, 50) == {}, "early stopping sees it"
