"""Adam shared out among ranks: real processes, whose weights must be those of DDP and an Adam of their own."""

from typing import Any

import pytest
import torch
from ranks import run_ranks

SCRIPT = """
import os
import sys
import torch
from torch import nn
from liam_scale.training.distributed import averaging, join_world
from liam_scale.training.optim import OptimConfig, build_optimizer, load_optimizer_tensors, optimizer_tensors
from liam_scale.training.shared_adam import SharedAdam, share_memory
from liam_scale.training.update import Soundness

def make():
    torch.manual_seed(0)
    # Of the last one's bias, one number, all but one rank have no part.
    return nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 1))

def train(model, world, config, steps, broken_at=None, moments=None, in_bf16=False):
    optimizer = build_optimizer(model, config, world)
    if moments is not None:
        load_optimizer_tensors(model, optimizer, moments)
    soundness, shared = Soundness(optimizer, world), isinstance(optimizer, SharedAdam)
    module = model if shared else averaging(model, world, in_bf16=in_bf16)
    for step in steps:
        inputs = torch.randn(5, 13, generator=torch.Generator().manual_seed(100 * step + world.rank))
        module(inputs).pow(2).sum().backward()
        if step == broken_at and world.rank == world.size - 1:
            model[0].weight.grad[-1, -1] = float("nan")  # of the part of one rank
        if shared:
            optimizer.average()
        soundness.judge()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    taken = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    world.barrier()  # before another step changes what is shared
    return shared, weights, taken, soundness.updates

with join_world("cpu") as world:
    config = OptimConfig(lr=0.01)
    plain = train(make(), world, OptimConfig(lr=0.01, shard=False), range(6))
    shared = train(make(), world, config, range(6))
    half = train(make(), world, config, range(3))
    model = make()
    model.load_state_dict(half[1])
    resumed = train(model, world, config, range(3, 6), moments=half[2])
    broken = train(make(), world, config, range(6), broken_at=3)
    rounded = train(make(), world, OptimConfig(lr=0.01, shard=False), range(6), in_bf16=True)
    double = share_memory(list(make().double().parameters()), world)
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if the ranks were on several machines
    elsewhere = share_memory(list(make().parameters()), world)
    torch.save([plain, shared, resumed, half, broken, rounded, double, elsewhere], f"{sys.argv[1]}/{world.rank}.pt")
"""


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks([folder], request.param, code=SCRIPT).check_returncode()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_weights_and_moments_are_those_of_ranks_that_each_do_all_of_it(ranks: list[Any]) -> None:
    for plain, shared, *_ in ranks:
        assert (plain[0], shared[0]) == (False, True)
        if len(ranks) == 2:
            assert equal(plain[1], shared[1])
        for mine, theirs in zip(shared[1:3], plain[1:3], strict=True):
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert equal(shared[1], ranks[0][1][1])


def test_training_goes_on_from_moments_that_were_saved_to_the_bit(ranks: list[Any]) -> None:
    for _, shared, resumed, *_ in ranks:
        assert equal(shared[1], resumed[1])
    # The main rank saves.
    assert equal(ranks[0][1][2], ranks[0][2][2])


def test_a_gradient_that_one_rank_alone_sees_broken_withholds_the_update_of_all(ranks: list[Any]) -> None:
    for _, _, _, half, broken, *_ in ranks:
        assert broken[3] == 3
        assert equal(broken[1], half[1])


def test_gradients_averaged_in_bfloat16_are_the_same_on_all_ranks_and_close_to_those_in_float32(
    ranks: list[Any],
) -> None:
    for plain, *_, rounded, _, _ in ranks:
        assert equal(rounded[1], ranks[0][5][1])
        assert not equal(rounded[1], plain[1])
        for name, value in plain[1].items():
            torch.testing.assert_close(rounded[1][name], value, rtol=0, atol=0.01 * 6 * 2**-7)


def test_doubles_and_several_machines_share_nothing(ranks: list[Any]) -> None:
    assert [rank[6:] for rank in ranks] == [[None, None]] * len(ranks)
