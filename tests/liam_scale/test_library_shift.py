"""Where the decoder of an NM modality is asked: at the library sizes that the encoder infers, from which it learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch

import liam_scale
from liam_scale.map import extend, united_samples
from liam_scale.model import Liam, ModelData
from liam_scale.posterior import shares
from liam_scale.samples import sample_codes
from liam_scale.trained import Run
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores import open_store

SMALL: dict[str, Any] = {"n_hidden": 8, "n_latent": 4, "minibatch": 64, "max_epochs": 3}


@pytest.fixture(scope="module")
def run(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return liam_scale.train(multiome, batch_key="sample", out=tmp_path_factory.mktemp("shift") / "run", **SMALL)


def test_a_training_ends_with_the_mean_of_what_is_inferred(run: Run, multiome: Path) -> None:
    model, store = run.directory.load_model(), open_store(str(multiome))
    codes = sample_codes(store, ("sample",), model.data.samples)
    found, cells = 0.0, 0
    config = LoaderConfig(minibatch=64, streams=1)
    with Loader(store, config, sample=codes, subset="train", transpose=False) as loader, torch.no_grad():
        for minibatch in loader:
            library = model.encoder("atac")(minibatch.counts["atac"], minibatch.sample, None).library
            prior = model.library_prior("atac")[0][minibatch.sample]
            found += float((library.mean[:, 0] - prior).sum())
            cells += len(prior)
    shift = model.decoder("atac").get_buffer("library_shift")
    assert shift != 0
    torch.testing.assert_close(float(shift), found / cells, rtol=1e-4, atol=1e-5)
    assert not hasattr(model.decoder("rna"), "library_shift")


def test_shares_are_decoded_there(run: Run) -> None:
    model = run.directory.load_model()
    decoder = model.decoder("atac")
    z, sample = torch.full((2, 4), 0.25), torch.tensor([0, 2])
    log_library = model.library_prior("atac")[0][sample] + decoder.get_buffer("library_shift")
    with torch.no_grad():
        expected = torch.softmax(decoder.logits(z, log_library, sample), dim=1)  # type: ignore[operator]
        assert torch.equal(shares(model, "atac", z, sample), expected)


def test_weights_from_before_are_decoded_as_they_were(run: Run) -> None:
    model = run.directory.load_model()
    state = model.state_dict()
    del state["decoders.atac.library_shift"]
    older = Liam(model.config, model.data)
    older.load_state_dict(state)
    assert older.decoder("atac").get_buffer("library_shift") == 0


def test_a_model_of_more_samples_keeps_its_buffers(multiome: Path, tmp_path: Path) -> None:
    options = {**SMALL, "use_batch_norm_encoder": True, "batch_key": "sample", "out": tmp_path / "run"}
    model = liam_scale.train(multiome, **options).directory.load_model()
    more = ModelData.from_json({**model.data.to_json(), "samples": ["a", "b", "other"]})
    extended, _ = extend(model, united_samples(model.data, more))
    assert extended.data.num_samples > model.data.num_samples
    known = dict(model.named_buffers())
    kept = {name: buffer for name, buffer in extended.named_buffers() if "prior" not in name}
    assert {name.rpartition(".")[2] for name in kept} >= {"library_shift", "running_mean", "running_var"}
    assert all(torch.equal(known[name], buffer) for name, buffer in kept.items())
