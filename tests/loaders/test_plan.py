"""The plan: every cell once, the same order for every number of ranks, seeks that read little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.plan import Plan, random_bits, split, weighted_rows

SHAPES = {
    "count": st.integers(1, 3_000),
    "minibatch": st.integers(1, 600),
    "streams": st.integers(1, 24),
    "block_cells": st.integers(1, 300),
    "window_cells": st.integers(1, 900),
    "seed": st.integers(0, 2**63),
}


def make(count, minibatch, streams, block_cells, window_cells, seed, **options):
    rows = np.cumsum(random_bits(count, seed=seed, purpose=9) % np.uint64(4) + np.uint64(1)).astype(np.uint32)
    return Plan(rows, minibatch, streams, block_cells, window_cells, seed, **options)


def global_order(plan, epoch, world):
    """Rows of each global minibatch in the order of their places, merged over ranks."""
    minibatches, order = [], plan.epoch(epoch)
    for step in range(plan.num_steps):
        parts = [order.cells(step, rank=rank, world=world) for rank in range(world)]
        rows, place = (np.concatenate([part[i] for part in parts]) for i in range(2))
        assert len({part[2] for part in parts}) == 1
        assert np.array_equal(np.sort(place), np.arange(parts[0][2]))
        minibatches.append(rows[np.argsort(place)])
    return minibatches


@settings(max_examples=60, deadline=None)
@given(**SHAPES, world=st.integers(1, 24), epoch=st.integers(0, 5))
def test_every_cell_once_for_every_number_of_ranks(world, epoch, **shape):
    plan = make(**shape)
    world = min(world, plan.streams)
    order = plan.epoch(epoch)
    edges = order.positions(np.arange(plan.num_steps + 1))
    assert np.all(edges[0] == 0)
    assert np.array_equal(edges[-1], order.stream_cells)
    sizes = np.diff(edges.sum(axis=1))
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= plan.streams
    rows = [order.window_rows(w) for v in range(plan.streams) for w in order.windows(v, 0, int(edges[-1, v]))]
    assert np.array_equal(np.sort(np.concatenate(rows)), plan.rows)
    for step in {0, plan.num_steps // 2, plan.num_steps - 1}:
        whole, place, total = order.cells(step)
        assert np.array_equal(place, np.arange(total))
        parts = [order.cells(step, rank=rank, world=world) for rank in range(world)]
        merged = np.empty_like(whole)
        merged[np.concatenate([p[1] for p in parts])] = np.concatenate([p[0] for p in parts])
        assert np.array_equal(merged, whole)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 127, 1_000, 4_097])
@pytest.mark.parametrize("minibatch", [1, 2, 7, 128, 5_000])
def test_an_epoch_step_by_step(count, minibatch):
    plan = make(count, minibatch, 16, 64, 128, seed=3)
    if plan.num_steps > 600:
        pytest.skip("slow in Python; the property test covers it without walking all steps")
    one, three = global_order(plan, 0, 1), global_order(plan, 0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))
    assert np.array_equal(np.sort(np.concatenate(one)), plan.rows)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 100_000),
    minibatch=st.integers(1, 8_192),
    streams=st.integers(1, 64),
    block_cells=st.integers(64, 4_096),
    window_cells=st.integers(64, 8_192),
    seed=st.integers(0, 2**32),
)
def test_up_to_a_hundred_thousand_cells(**shape):
    plan = make(**shape)
    order = plan.epoch(2)
    edges = order.positions(np.arange(plan.num_steps + 1))
    sizes = np.diff(edges.sum(axis=1))
    assert sizes.sum() == shape["count"]
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= plan.used_streams
    assert np.all(np.diff(edges, axis=0) >= 0)
    rows = [order.window_rows(w) for v in range(plan.streams) for w in order.windows(v, 0, int(edges[-1, v]))]
    assert np.array_equal(np.sort(np.concatenate(rows)), plan.rows)


def test_streams_and_minibatches_are_even():
    plan = make(100_000, 128, 16, 1024, 1024, seed=1)
    order = plan.epoch(2)
    sizes = np.diff(order.positions(np.arange(plan.num_steps + 1)).sum(axis=1))
    assert sizes.max() - sizes.min() <= 2
    shares = order.stream_cells / order.stream_cells.mean()
    assert shares.max() / shares.min() < 1.001


def test_new_order_per_epoch_and_seed_same_order_for_the_same_key():
    first = np.concatenate(global_order(make(2_000, 128, 8, 64, 128, seed=5), 0, 1))
    again = np.concatenate(global_order(make(2_000, 128, 8, 64, 128, seed=5), 0, 1))
    epoch = np.concatenate(global_order(make(2_000, 128, 8, 64, 128, seed=5), 1, 1))
    assert np.array_equal(first, again)
    assert np.mean(first == epoch) < 0.02
    plan = make(2_000, 128, 8, 64, 128, seed=5)
    other = Plan(plan.rows, 128, 8, 64, 128, seed=6)
    assert np.mean(first == np.concatenate(global_order(other, 0, 1))) < 0.02


def test_windows_open_at_different_steps_and_a_seek_needs_one_or_two_a_stream():
    plan = make(64_000, 128, 16, 1024, 1024, seed=0)
    order = plan.epoch(0)
    opened = []
    for step in range(plan.num_steps):
        begin, end = order.positions(np.array([step, step + 1]))
        windows = [list(order.windows(v, int(begin[v]), int(end[v]))) for v in range(16)]
        assert max(len(w) for w in windows) <= 2
        opened.append(sum(w.start >= begin[w.stream] for ws in windows for w in ws))
    assert max(opened[1:]) <= 2


@settings(max_examples=30, deadline=None)
@given(**SHAPES, world=st.integers(1, 5), order=st.sampled_from(["ranges", "disk"]))
def test_fixed_orders_keep_the_order_of_the_rows(world, order, **shape):
    shape["streams"] = world
    plan = make(**shape, order=order)
    if plan.num_steps > 300:
        return
    minibatches = global_order(plan, 0, world)
    assert np.array_equal(np.sort(np.concatenate(minibatches)), plan.rows)
    if order == "disk":
        assert np.array_equal(np.concatenate(minibatches), plan.rows)
    else:
        for rank in range(world):
            mine = np.concatenate([plan.epoch(0).cells(k, rank=rank, world=world)[0] for k in range(plan.num_steps)])
            low, high = (r * len(plan.rows) // world for r in (rank, rank + 1))
            assert np.array_equal(mine, plan.rows[low:high])


def test_blocks_begin_at_tiles_where_asked():
    rows = np.flatnonzero(np.arange(50_000) % 19).astype(np.uint32)
    plan = Plan(rows, 128, 4, 2_000, 2_000, row_alignment=2048)
    assert np.array_equal(rows[plan.block_edges[:-1]] // 2048, np.arange(25))
    assert np.array_equal(np.sort(np.concatenate(global_order(plan, 0, 1))), rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.floats(0.01, 0.6), st.integers(0, 2**32))
def test_split_takes_the_share_of_every_sample(sizes, share, seed):
    codes = np.repeat(np.arange(len(sizes)), sizes)
    keys = np.arange(len(codes), dtype=np.uint64)
    chosen = split(keys, codes, seed=seed, share=share)
    for sample, size in enumerate(sizes):
        assert chosen[codes == sample].sum() == min(int(size * share + 0.5), size - 1)
    moved = np.argsort(random_bits(len(codes), seed=seed, purpose=9))
    assert np.array_equal(split(keys[moved], codes[moved], seed=seed, share=share), chosen[moved])


def test_split_refuses_a_share_of_one():
    with pytest.raises(ValueError, match=r"validation_share: got 1\.0"):
        split(np.arange(3, dtype=np.uint64), None, seed=0, share=1.0)


def test_weights_are_expected_copies():
    rows = np.arange(400, dtype=np.uint32)
    weights = np.where(rows < 100, 2.5, 0.25).astype(np.float32)
    copies = np.zeros(400)
    for epoch in range(200):
        drawn = weighted_rows(rows, weights, seed=1, epoch=epoch)
        assert len(drawn) == 325
        counts = np.bincount(drawn, minlength=400)
        assert np.all((counts == np.floor(weights)) | (counts == np.ceil(weights)))
        copies += counts / 200
    assert abs(copies[:100].mean() - 2.5) < 0.01
    assert np.abs(copies - weights).max() < 0.2
    plan = Plan(rows, 32, 4, 16, 32, weights=weights)
    assert plan.num_cells == 325
    assert sum(len(m) for m in global_order(plan, 3, 2)) == 325


def relative_entropy(plan, types, num_types):
    """Mean and smallest entropy of the types in a minibatch, relative to that of a full shuffle."""
    order = plan.epoch(0)

    def entropy(rows):
        shares = np.bincount(types[rows], minlength=num_types) / len(rows)
        return -(shares[shares > 0] * np.log(shares[shares > 0])).sum()

    got = [entropy(order.cells(step)[0]) for step in range(0, plan.num_steps, 5)]
    full = np.argsort(random_bits(len(types), seed=1, purpose=9))
    expected = np.mean([entropy(full[k : k + plan.minibatch]) for k in range(0, len(full) - plan.minibatch, 5_000)])
    return np.mean(got) / expected, np.min(got) / expected


def test_small_blocks_and_large_windows_mix_a_store_sorted_by_type():
    types = np.repeat(np.arange(20), 10_000)
    rows = np.arange(len(types), dtype=np.uint32)
    mean, lowest = relative_entropy(Plan(rows, 1_024, 16, block_cells=64, window_cells=4_096), types, 20)
    assert mean > 0.99
    assert lowest > 0.97
    mean, lowest = relative_entropy(Plan(rows, 1_024, 16, block_cells=2_048, window_cells=2_048), types, 20)
    assert lowest < 0.9
    mixed = types[np.argsort(random_bits(len(types), seed=3, purpose=9))]
    mean, lowest = relative_entropy(Plan(rows, 1_024, 16, block_cells=2_048, window_cells=2_048), mixed, 20)
    assert mean > 0.999
    assert lowest > 0.99


def test_blocks_of_a_store_in_parts_take_their_share_of_each_part_in_long_pieces() -> None:
    sizes, block = (60_000, 30_000, 9_000, 1_000), 1_000
    plan = Plan(np.arange(100_000, dtype=np.uint32), 500, block_cells=block, window_cells=block, parts=sizes)
    epoch = plan.epoch(0)
    assert np.array_equal(np.sort(epoch.rows), plan.rows)
    part = np.searchsorted(np.cumsum(sizes), epoch.rows, side="right")
    shares = np.array([np.bincount(own, minlength=4) for own in np.split(part, plan.block_edges[1:-1])])
    assert np.abs(shares[:, :3] - np.array(sizes[:3]) / len(shares)).max() <= 64
    assert (np.diff(np.flatnonzero(part == 3)) > 1).sum() == 1_000 // 64 - 1, "few cells come in pieces worth reading"
    assert (np.diff(epoch.rows.astype(np.int64)) != 1).sum() <= 3.3 * len(shares)
    one = Plan(plan.rows, 500, block_cells=block, window_cells=block, parts=(100_000,))
    assert np.array_equal(one.epoch(0).rows, plan.rows)
