"""The library size's weights: a parameter of their own, and a column of the weight wherever it is written or read."""

from typing import Any

import torch

from liam_scale.model import Liam, ModelConfig
from liam_scale.model.layers import Draw


def test_a_state_with_the_librarys_weights_as_a_column_is_written_and_read(data: Any) -> None:
    """As the original has them, and older checkpoints."""
    before = Liam(ModelConfig(n_hidden=6, n_latent=4), data(("rna", "atac")), seed=1)
    decoder = before.decoders["atac"]
    assert (decoder.weight.shape, decoder.library_weight.shape) == ((21, 6), (21,))
    state = before.state_dict()
    assert not [name for name in state if "library_weight" in name]
    assert torch.equal(state["decoders.atac.weight"][:, :6], decoder.weight)
    assert torch.equal(state["decoders.atac.weight"][:, 6], decoder.library_weight)
    after = Liam(ModelConfig(n_hidden=6, n_latent=4), data(("rna", "atac")), seed=2)
    assert after.load_state_dict(state) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    z, sample = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    logits = after.decoders["atac"].logits(z, torch.full((5,), 2.0), sample)
    torch.testing.assert_close(logits, decoder.logits(z, torch.full((5,), 2.0), sample))


def test_first_weights_are_those_of_one_layer_with_an_input_more(data: Any) -> None:
    model = Liam(ModelConfig(n_hidden=6, n_latent=4), data(("rna", "atac")), seed=1)
    joint = Draw(1, "atac.decoder").uniform("weight", (21, 7), num_inputs=7)
    assert torch.equal(model.state_dict()["decoders.atac.weight"], joint)


def test_without_library_sizes_there_are_no_weights_for_them(data: Any) -> None:
    model = Liam(ModelConfig(n_hidden=6, n_latent=4, use_atac_libsize=False), data(("rna", "atac")))
    assert model.decoders["atac"].library_weight is None
    assert model.state_dict()["decoders.atac.weight"].shape == (21, 6)
    assert model.load_state_dict(model.state_dict()) == ([], [])
