import pytest
import torch

from liam_scale.kernels.options import TILE_BYTES, check_precision, memory_of_tiles, precision_in_use, product_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "options", "reason"),
    [
        ("tf32", {}, "cpu lacks it: NVIDIA GPUs alone have it"),
        ("bf16", {"impl": "reference"}, "'reference' multiplies in the dtype of the weights"),
        ("bf16", {"dtype": torch.float64}, r"the weights are torch\.float64"),
        ("tf32", {"device": torch.device("mps")}, "mps lacks it: NVIDIA GPUs alone have it"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(precision, options, reason):
    options = {"impl": "auto", "device": CPU, **options}
    with pytest.raises(ValueError, match=f"precision: got '{precision}', but .*{reason}; use 'float32'"):
        check_precision(precision, **options)
    check_precision("float32", **options)


@pytest.mark.parametrize(("capability", "is_enough"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_have_float32_alone(monkeypatch, capability, is_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for precision in ("tf32", "bf16"):
        if is_enough:
            check_precision(precision, impl="auto", device=torch.device("cuda", 0))
        else:
            with pytest.raises(ValueError, match=r"cuda:0 \(capability 7\.5\) lacks it"):
                check_precision(precision, impl="auto", device=torch.device("cuda", 0))


def test_without_gradients_every_precision_is_float32():
    weight = torch.zeros(2, 2)
    assert precision_in_use("tf32", False, impl="auto", weight=weight) == "float32"
    with pytest.raises(ValueError, match="precision: got 'tf32'"):
        precision_in_use("tf32", True, impl="auto", weight=weight)
    with pytest.raises(ValueError, match="precision: got 'half'; use one of 'float32', 'tf32', 'bf16'"):
        precision_in_use("half", False, impl="auto", weight=weight)


@pytest.mark.parametrize("callers", ["tf32", "ieee", "none"])
def test_the_callers_own_switch_is_read_and_put_back(callers):
    """torch's older switch raises once the newer one has been used."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older switch alone")
    before = matmul.fp32_precision
    matmul.fp32_precision = callers
    try:
        for precision, wanted in (("tf32", "tf32"), ("float32", "ieee"), ("bf16", "ieee")):
            with product_precision(precision, torch.device("cuda", 0)):
                assert matmul.fp32_precision == wanted
            assert matmul.fp32_precision == callers
    finally:
        matmul.fp32_precision = before


def test_tiles_take_a_share_of_a_gpu(monkeypatch):
    assert memory_of_tiles(CPU) == TILE_BYTES
    for gigabytes, wanted in ((8, 0.5), (24, 1.5), (80, 2)):
        card = type("Card", (), {"total_memory": gigabytes * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        memory_of_tiles.cache_clear()
        assert memory_of_tiles(torch.device("cuda", 0)) == wanted * 2**30
    memory_of_tiles.cache_clear()
