import pytest
import torch

from liam_scale.model import ModelConfig, check_ranks
from liam_scale.model.layers import BatchNorm


def test_minibatches_of_one_cell_and_none_are_finite_and_change_no_statistics() -> None:
    norm = BatchNorm(3)
    norm(torch.randn(9, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert torch.isfinite(norm(torch.randn(1, 3))).all()
    assert norm(torch.zeros(0, 3)).shape == (0, 3)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("name", ["use_batch_norm_encoder", "use_batch_norm_decoder"])
def test_batch_norm_is_refused_on_several_ranks(name: str) -> None:
    config = ModelConfig(**{name: True})
    check_ranks(config, 1)
    check_ranks(ModelConfig(), 8)
    option = "--model." + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{option}: got True on 2 ranks, .*; train on one rank"):
        check_ranks(config, 2)
