"""The reader of sharded arrays against zarr-python, and against disks that lie."""

import itertools

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from loaders.formats.damage import DamagedChunk
from loaders.formats.sharded import ShardedArray, UnsupportedArray

CODECS = {
    "ours": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()],
    "lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")],
    "zstd in blosc": [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")],
    "not shuffled": [BloscCodec(cname="lz4hc", clevel=9, shuffle="noshuffle"), Crc32cCodec()],
    "zstd": [ZstdCodec(level=1)],
    "raw": [],
    "raw with checksum": [Crc32cCodec()],
}


def make(path, values, *, chunk, per_shard, compressors=CODECS["ours"], **options):
    array = zarr.create_array(
        path, data=values, chunks=(chunk,), shards=(chunk * per_shard,), compressors=compressors, **options
    )
    return ShardedArray(path), array


def numbers(count, dtype, *, seed=0, is_random=False):
    rng = np.random.default_rng(seed)
    high = 250 if np.dtype(dtype).itemsize == 1 else 60_000
    values = rng.integers(1, high, count) if is_random else 1 + np.arange(count) // 3 % high
    return values.astype(dtype)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32", "int64"])
def test_any_range_equals_zarr(tmp_path, codecs, dtype):
    values = numbers(50_000, dtype)
    ours, theirs = make(tmp_path / "a", values, chunk=7_000, per_shard=3, compressors=CODECS[codecs])
    for start, stop in [(0, 50_000), (0, 1), (49_999, 50_000), (6_999, 7_001), (20_000, 22_000), (3, 3), (100, 49_000)]:
        out = np.empty(stop - start, dtype)
        ours.read_into(start, out)
        assert np.array_equal(out, theirs[start:stop])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Chunks of many blosc blocks, compressible, incompressible and mixed."""
    folder = tmp_path_factory.mktemp("big")
    arrays = []
    for dtype, is_random in itertools.product(["uint8", "uint16", "uint32"], [False, True]):
        values = numbers(1_100_000, dtype, is_random=is_random)
        values[300_000:500_000] = numbers(200_000, dtype, is_random=not is_random)
        name = f"{dtype}{is_random}"
        arrays.append((make(folder / name, values, chunk=400_000, per_shard=2)[0], values))
    return arrays


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(0, 1_100_000), st.integers(0, 1_100_000))
def test_parts_of_chunks(big, which, a, b):
    ours, values = big[which]
    out = np.zeros(abs(a - b), values.dtype)
    ours.read_into(min(a, b), out)
    assert np.array_equal(out, values[min(a, b) : max(a, b)])


def test_every_block_of_a_chunk_alone(big):
    for ours, values in big:
        for start in range(0, 400_000, 8_000):
            out = np.zeros(900, values.dtype)
            ours.read_into(start, out)
            assert np.array_equal(out, values[start : start + 900])


def test_index_at_the_start_and_zeros_left_out(tmp_path):
    values = numbers(1_000, "uint16")
    values[200:300] = 0
    sharding = zarr.codecs.ShardingCodec(
        chunk_shape=(100,), codecs=[zarr.codecs.BytesCodec(), BloscCodec()], index_location="start"
    )
    array = zarr.create_array(
        tmp_path / "a", shape=values.shape, dtype=values.dtype, chunks=(500,), serializer=sharding, compressors=None
    )
    array[:] = values
    out = np.ones(1_000, np.uint16)
    ShardedArray(tmp_path / "a").read_into(0, out)
    assert np.array_equal(out, values)


@pytest.mark.parametrize("codecs", ["ours", "raw with checksum"])
def test_every_flipped_bit_is_found(tmp_path, codecs):
    values = numbers(4_000, "uint16", is_random=True)
    make(tmp_path / "a", values, chunk=1_000, per_shard=4, compressors=CODECS[codecs])
    shard = tmp_path / "a" / "c" / "0"
    sound = shard.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(sound), 100):
        broken = bytearray(sound)
        broken[place] ^= 1 << int(rng.integers(8))
        shard.write_bytes(broken)
        with pytest.raises(DamagedChunk):
            ShardedArray(tmp_path / "a").read_into(0, np.empty(4_000, np.uint16))


def test_damage_names_the_chunk_and_its_entries(tmp_path):
    values = numbers(4_500, "uint16", is_random=True)
    make(tmp_path / "a", values, chunk=1_000, per_shard=2)
    (tmp_path / "a" / "c" / "1").unlink()
    with pytest.raises(DamagedChunk, match="cannot be opened: No such file") as error:
        ShardedArray(tmp_path / "a").read_into(0, np.empty(4_500, np.uint16))
    assert (error.value.chunk, error.value.entries) == (2, (2_000, 3_000))
    shard = tmp_path / "a" / "c" / "2"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(DamagedChunk, match="shorter than the index") as error:
        ShardedArray(tmp_path / "a").read_into(4_200, np.empty(10, np.uint16))
    assert error.value.entries == (4_000, 4_500)


def test_a_chunk_missing_from_its_shard_is_damage_not_zeros(tmp_path):
    values = numbers(2_000, "uint16")
    values[1_000:] = 0
    ours, theirs = make(tmp_path / "a", values, chunk=1_000, per_shard=2)
    assert theirs[1_500] == 0
    with pytest.raises(DamagedChunk, match="missing from its shard"):
        ours.read_into(900, np.empty(200, np.uint16))


def test_layouts_for_zarr_python_are_refused_with_a_reason(tmp_path):
    values = numbers(100, "uint16")
    zarr.create_array(tmp_path / "plain", data=values, chunks=(10,))
    zarr.create_array(tmp_path / "v2", data=values, chunks=(10,), zarr_format=2)
    zarr.create_array(tmp_path / "gzip", data=values, chunks=(10,), shards=(50,), compressors=zarr.codecs.GzipCodec())
    zarr.create_array(tmp_path / "two", data=values.reshape(10, 10), chunks=(5, 5), shards=(10, 10))
    for name, reason in {
        "plain": "not sharded",
        "v2": "not a Zarr v3 array",
        "gzip": r"bytes \+ gzip",
        "two": "one-dimensional",
        "nothing": "not a Zarr v3 array",
    }.items():
        with pytest.raises(UnsupportedArray, match=reason):
            ShardedArray(tmp_path / name)


def test_many_shards_keep_few_files_open(tmp_path):
    values = numbers(20_000, "uint16")
    ours, _ = make(tmp_path / "a", values, chunk=50, per_shard=2)
    out = np.empty(20_000, np.uint16)
    ours.read_into(0, out)
    assert np.array_equal(out, values)
    assert len(ours._files) == 64
