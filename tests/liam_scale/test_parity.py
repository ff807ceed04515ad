"""Parity with the original liam: every golden case of a folder.

`LIAM_GOLDEN=dir pytest tests/liam_scale/test_parity.py` runs on any folder of the golden format; without it
`../shared/reference/golden` beside the checkout is used, and the tests skip where it is absent.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.model import CellTerms, Inference, Liam, library_priors
from liam_scale.model.noise import Noise
from liam_scale.model.original import as_original, from_original
from loaders.minibatch import Minibatch, SparseCounts

GOLDEN = Path(
    os.environ.get("LIAM_GOLDEN", Path(__file__).resolve().parents[2] / ".." / "shared" / "reference" / "golden")
)
SUITES = ("traj_", "nm_", "nb_", "library_", "logistic_")
CASES = sorted(p.stem for p in GOLDEN.glob("*.json") if not p.stem.startswith(SUITES))
TRAJECTORIES = sorted(p.stem for p in GOLDEN.glob("traj_*.json"))
WEIGHTS = [(kl, factor) for kl in (0, 0.5, 1) for factor in (1, 25)]
ABSENT = pytest.mark.skip(reason=f"no golden values in {GOLDEN} (set LIAM_GOLDEN)")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Arrays this small are slower on several threads (64 s against 10 s on a shared machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases(names: list[str]) -> Any:
    return pytest.mark.parametrize("case", names or [pytest.param("", marks=ABSENT)])


@functools.lru_cache(maxsize=4)
def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = GOLDEN / f"{name}.json"
    if not (GOLDEN / f"{name}.npz").exists():
        pytest.skip(f"no {name}.npz in {GOLDEN} (set LIAM_GOLDEN)")
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return (json.loads(path.read_text()) if path.exists() else {}), {k: archive[k] for k in archive.files}


def under(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def second_of(meta: dict[str, Any]) -> str:
    return "adt" if meta["cls"].endswith("_ADT") else "atac"


def build(meta: dict[str, Any], state: dict[str, np.ndarray], dtype: torch.dtype, impl: str = "auto") -> Liam:
    model = from_original(state, meta["ctor"], cls=meta["cls"], likelihood="original", priors="original", impl=impl)
    return model.to(dtype)


def minibatch(
    model: Liam, meta: dict[str, Any], x: np.ndarray, y: np.ndarray, sample: np.ndarray, dtype: torch.dtype
) -> Minibatch:
    wide = np.float64 if dtype == torch.float64 else np.float32
    dense = {"rna": x, second_of(meta): y}
    counts = {
        name: SparseCounts.from_scipy(scipy.sparse.csr_matrix(dense[name].astype(wide))) for name in model.modalities
    }
    cells = len(sample)
    return Minibatch(
        counts=counts,
        present={name: torch.ones(cells, dtype=torch.bool) for name in counts},
        sample=torch.from_numpy(sample),
        place=torch.arange(cells),
        rows=torch.arange(cells),
        num_global=cells,
    )


def given_noise(meta: dict[str, Any], values: dict[str, np.ndarray], step: int | None = None) -> dict[str, Tensor]:
    names = {"z": "eps_z", "rna.library": "eps_l", f"{second_of(meta)}.library": "eps_d"}
    return {
        layer: torch.from_numpy(values[name] if step is None else values[name][step]) for layer, name in names.items()
    }


def evaluate(case: str, dtype: torch.dtype) -> tuple[Liam, Minibatch, Inference, CellTerms]:
    meta, values = read(case)
    model = build(meta, under(values, "param/"), dtype).eval()
    cells = minibatch(model, meta, values["in/x"], values["in/y"], values["in/batch"], dtype)
    noise = Noise(seed=0, step=0, place=cells.place, given=given_noise(meta, under(values, "in/")))
    inference = model.infer(cells, noise)
    return model, cells, inference, model.cell_terms(cells, inference, cell_weight=1 / cells.num_cells)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 2e-5


def close(ours: Tensor | np.ndarray, theirs: np.ndarray, dtype: torch.dtype, name: str) -> None:
    """Compare on the scale of the array; where the original overflowed to NaN, ours has to be finite."""
    got = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    got = got.reshape(theirs.shape)
    assert np.isfinite(got).all(), name
    known = np.isfinite(theirs)
    scale = np.abs(theirs[known]).max(initial=1e-12)
    error = np.abs(got[known] - theirs[known]).max(initial=0.0) / scale
    assert error <= tolerance(dtype), f"{name}: {error:.3g} of its scale"


def suffix(dtype: torch.dtype) -> str:
    return "64" if dtype == torch.float64 else ""


@DTYPES
@cases(CASES)
def test_intermediates(case: str, dtype: torch.dtype) -> None:
    meta, values = read(case)
    model, cells, inference, _ = evaluate(case, dtype)
    second = second_of(meta)
    expected = under(values, f"inf{suffix(dtype)}/") | under(values, f"gen{suffix(dtype)}/")
    ours: dict[str, Tensor] = {
        "qz_m": inference.latent.mean,
        "qz_v": inference.latent.variance,
        "z": inference.z,
    }
    for name, (h, q, draw) in {
        "rna": ("h_gene", "ql", "library"),
        second: ("h_y", "qd", "ADT_library" if second == "adt" else "atac_library"),
    }.items():
        if name not in model.modalities:
            continue
        encoded = inference.encoded[name]
        ours[h] = encoded.hidden
        if encoded.library is not None:
            ours |= {f"{q}_m": encoded.library.mean, f"{q}_v": encoded.library.variance}
            ours[draw] = inference.log_library[name]
    ours |= generated(model, inference, cells)
    # Not handed out: the hidden layers of the library encoders, which their means and variances are read from.
    expected = {name: value for name, value in expected.items() if name not in ("h_l", "h_d")}
    assert set(ours) == set(expected)
    for name, value in ours.items():
        close(value, expected[name], dtype, name)


def generated(model: Liam, inference: Inference, cells: Minibatch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, letter in (("rna", "x"), ("adt", "y")):
        if name in model.modalities:
            decoder = model.decoders[name]
            scale = decoder.scale(inference.z, cells.sample)
            size = torch.exp(inference.log_library[name].clamp(max=15)) + 1e-4
            found |= {f"p{letter}_scale": scale, f"p{letter}_rate": scale * size[:, None]}
            found[f"p{letter}_r"] = reference.theta_of(decoder.log_theta, cells.sample)
    if "atac" in model.modalities:
        decoder = model.decoders["atac"]
        found["logits"] = decoder.logits(inference.z, inference.log_library.get("atac"), cells.sample)
        found["r"] = decoder.dispersion(cells.sample)
    if model.adversary is not None:
        found["adversarial"] = model.adversary(inference.z, cells.sample)
    return found


def reconstruction(model: Liam, inference: Inference, cells: Minibatch, name: str) -> Tensor:
    """(B,) reconstruction loss of all cells, also those that the objective leaves out."""
    ones = torch.ones(cells.num_cells, dtype=inference.z.dtype)
    library = inference.log_library.get(name)
    decoder = model.decoders[name]
    _, ll = decoder.log_likelihood(cells.counts[name], inference.z, library, cells.sample, cell_weight_B=ones)
    return -ll


@DTYPES
@cases(CASES)
def test_loss_terms_of_each_cell(case: str, dtype: torch.dtype) -> None:
    meta, values = read(case)
    model, cells, inference, terms = evaluate(case, dtype)
    expected = under(values, f"loss{suffix(dtype)}/")
    second = second_of(meta)
    zeros = torch.zeros(cells.num_cells, dtype=dtype)
    ours = {
        "kl_divergence_z": terms.kl_z,
        "kl_divergence_l": terms.kl_library.get("rna", zeros),
        "kl_divergence_d": terms.kl_library.get(second, zeros),
        "adversarial_loss": terms.adversarial.get("adversarial_loss", zeros),
    }
    for label, name in (("rna", "rna"), ("y", second)):
        is_used = name in model.modalities
        mask = terms.masks.get(name, torch.ones_like(zeros))
        ours[f"reconst_{label}"] = reconstruction(model, inference, cells, name) if is_used else zeros
        close(terms.reconstruction.get(name, zeros), expected[f"reconst_{label}"] * mask.numpy(), dtype, "masked")
        if f"mask_{label}" in expected:
            np.testing.assert_array_equal(mask.numpy(), expected[f"mask_{label}"])
    for name, value in ours.items():
        close(value, expected[name], dtype, name)


@cases(CASES)
def test_the_per_cell_likelihood_is_the_intended_one(case: str) -> None:
    """Up to the original's epsilon of 1e-10 in its logarithms: 1e-5 where no probability is near it."""
    meta, values = read(case)
    if "loss64/reconst_y_percell_intended" not in values or "stress" in case:
        pytest.skip("no finite per-cell values in this case")
    state = under(values, "param/")
    model = from_original(state, meta["ctor"], cls=meta["cls"], likelihood="per-cell").double().eval()
    cells = minibatch(model, meta, values["in/x"], values["in/y"], values["in/batch"], torch.float64)
    noise = Noise(seed=0, step=0, place=cells.place, given=given_noise(meta, under(values, "in/")))
    ours = reconstruction(model, model.infer(cells, noise), cells, "atac")
    np.testing.assert_allclose(ours.numpy(), values["loss64/reconst_y_percell_intended"], rtol=1e-5)


@DTYPES
@cases(CASES)
def test_totals_and_gradients(case: str, dtype: torch.dtype) -> None:
    meta, values = read(case)
    totals = meta["total_loss_f64" if dtype == torch.float64 else "total_loss"]
    for kl, factor in WEIGHTS:
        model, cells, _, terms = evaluate(case, dtype)
        fixed = meta["ctor"].get("factor_adversarial_loss") == 0.0
        alpha = 0.0 if fixed else float(factor)
        objective = terms.objective(kl_weight=kl, alphas={"adversarial_loss": alpha}, cell_weight=1 / cells.num_cells)
        key = f"kl{kl}_f{factor}"
        close(objective.loss, np.array(totals[key]), dtype, key)
        objective.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        ours = as_original(model, gradients)
        expected = under(values, f"grad{suffix(dtype)}/{key}/")
        if dtype == torch.float64:
            assert set(ours) == set(expected)
        assert not set(ours) & set(meta["param_no_grad"])
        for name, value in expected.items():
            close(ours[name], value, dtype, f"{key}/{name}")


@cases(CASES)
def test_the_state_comes_back_as_it_was(case: str) -> None:
    meta, values = read(case)
    state = under(values, "param/")
    model = build(meta, state, torch.float32)
    back = as_original(model, model.state_dict())
    assert set(back) <= set(state)
    for name, array in back.items():
        assert np.array_equal(array, state[name]), name


@DTYPES
@cases(TRAJECTORIES)
def test_forty_adam_steps(case: str, dtype: torch.dtype) -> None:
    meta, values = read(case)
    model = build(meta, under(values, "init/"), dtype).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
    start, expected = under(values, "init/"), under(values, "f64/" if dtype == torch.float64 else "f32/")
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    for step in range(meta["steps"]):
        rows = values["rows"][step]
        cells = minibatch(model, meta, values["x"][rows], values["y"][rows], values["batch"][rows], dtype)
        objective = model(
            cells,
            step=step,
            seed=0,
            kl_weight=float(values["kl_weight"][step]),
            cell_weight=1 / cells.num_cells,
            noise=given_noise(meta, values, step),
        )
        np.testing.assert_allclose(objective.loss.item(), expected["loss"][step], rtol=2e-5 if bound > 1e-9 else 1e-9)
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        for name, value in under(expected, f"step{step + 1}/").items():
            found = as_original(model, model.state_dict()).get(name, start[name])
            np.testing.assert_allclose(found, value, rtol=0, atol=bound, err_msg=name)
    trained = as_original(model, model.state_dict())
    for name, value in under(expected, "final/").items():
        np.testing.assert_allclose(trained.get(name, start[name]), value, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", ["full", "mosaic_batches", "mosaic_rows", "single", "absent_batch", "adt"])
@pytest.mark.parametrize("kind", ["rna", "y"])
def test_library_priors(case: str, kind: str) -> None:
    _, values = read("library_priors")
    if f"{case}/{kind}_log_means" not in values:
        pytest.skip(f"case {case} has no {kind}")
    counts = values[f"{case}/{'x' if kind == 'rna' else 'y'}"]
    means, variances = values[f"{case}/{kind}_log_means"][0], values[f"{case}/{kind}_log_vars"][0]
    sample = values[f"{case}/batch"]
    # The original sums float32 rows in float32.
    got = library_priors(counts.sum(axis=1), sample, num_samples=len(means), priors="original")
    np.testing.assert_allclose(got[0], means, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got[1], variances, rtol=1e-5, atol=1e-7)


def as_kernel_input(targets: np.ndarray, logits: np.ndarray, dtype: torch.dtype) -> tuple[SparseCounts, list[Tensor]]:
    """Counts, hidden, weight and bias whose output layer yields exactly the given logits."""
    wide = np.float64 if dtype == torch.float64 else np.float32
    counts = SparseCounts.from_scipy(scipy.sparse.csr_matrix(targets.astype(wide)))
    weight = torch.from_numpy(logits.astype(wide).T.copy())
    return counts, [torch.eye(len(logits), dtype=dtype), weight, torch.zeros(logits.shape[1], dtype=dtype)]


@pytest.mark.parametrize("dispersion", ["batch", "const"])
def test_negative_multinomial_table_of_coupled_minibatches(dispersion: str) -> None:
    _, values = read("nm_likelihood")
    for k, rows in enumerate(values["batch_rows"]):
        counts, layer = as_kernel_input(values["targets"][rows], values["logits"][rows], torch.float64)
        r = values["r"][rows] if dispersion == "batch" else values["const_r"]
        dispersions = torch.from_numpy(np.asarray(r, dtype=np.float64)).requires_grad_()
        layer[1].requires_grad_()
        loss, ll = negative_multinomial(
            counts, *layer, dispersions, cell_weight=torch.ones(len(rows), dtype=torch.float64), likelihood="original"
        )
        np.testing.assert_allclose(ll.numpy(), values[f"{dispersion}_orig_f64"][k], rtol=1e-9)
        if dispersion == "batch":
            (-loss).backward()
            assert layer[1].grad is not None
            assert dispersions.grad is not None
            close(layer[1].grad.T, values["batch_grad_logits_f64"][k], torch.float64, "logits")
            close(dispersions.grad, values["batch_grad_r_f64"][k], torch.float64, "r")


@DTYPES
def test_negative_multinomial_table_of_single_cells(dtype: torch.dtype) -> None:
    """Against 60 digits: within the float64 rounding of lgamma, and in float32 no worse than the original (+ 1e-6)."""
    _, values = read("nm_likelihood")
    counts, layer = as_kernel_input(values["targets"], values["logits"], dtype)
    r = torch.from_numpy(values["r"]).to(dtype)
    ones = torch.ones(len(r), dtype=dtype)
    _, ll = negative_multinomial(counts, *layer, r, cell_weight=ones, likelihood="per-cell")
    exact = values["single_exact_noeps"]
    error = np.abs(ll.double().numpy() - exact) / np.maximum(1.0, np.abs(exact))
    assert np.isfinite(error).all()
    if dtype == torch.float64:
        assert error.max() < 1e-9
    else:
        moderate = values["r"] <= 100
        assert error[moderate].max() <= 1.32e-5 + 1e-6
        assert error.max() <= 1.32e-2 + 1e-6


@DTYPES
def test_negative_binomial_table(dtype: torch.dtype) -> None:
    _, values = read("nb_likelihood")
    x, mu, theta = (torch.from_numpy(values[name]).to(dtype) for name in ("x", "mu", "theta"))
    mu.requires_grad_()
    theta.requires_grad_()
    ll = reference.negative_binomial(x, mu, theta)
    exact = values["exact_eps"]
    error = np.abs(ll.detach().double().numpy() - exact) / np.maximum(1.0, np.abs(exact))
    if dtype == torch.float32:
        assert error[values["theta"] <= 1e3].max() <= 6.4e-4
        return
    np.testing.assert_allclose(ll.detach().numpy(), values["orig_f64"], rtol=1e-9, atol=1e-9)
    ll.sum().backward()
    for name, tensor in (("mu", mu), ("theta", theta)):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), values[f"grad_{name}_f64"], rtol=1e-9, atol=1e-9)
