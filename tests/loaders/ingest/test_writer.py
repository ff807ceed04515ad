import json
from concurrent.futures import ThreadPoolExecutor

import mudata
import numpy as np
import pandas as pd
import pytest
import zarr
from identifying import identifying_counts
from zarr.codecs import BloscCodec, Crc32cCodec

from loaders.csr import SparseRows, index_dtype, narrowest_dtype
from loaders.ingest.shards import CHUNKS_PER_SHARD, ShardWriter, create_sharded
from loaders.ingest.writer import ModalityLayout, StoreWriter
from loaders.schema import SCHEMA_KEY


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 100 * CHUNKS_PER_SHARD, 100 * CHUNKS_PER_SHARD + 7, 15_000])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_shards_are_those_zarr_writes_byte_for_byte(tmp_path, length, dtype):
    values = (np.arange(length) * 7 % 251).astype(dtype)
    ours = zarr.open_group(tmp_path / "ours", mode="w", zarr_format=3)
    with ThreadPoolExecutor(3) as pool:
        folder = create_sharded(ours, "x", length=length, dtype=dtype, chunk_length=100)
        writer = ShardWriter(folder, dtype=dtype, chunk_length=100, pool=pool)
        for start in range(0, length, 333):
            writer.append(values[start : start + 333])
        writer.close()
    theirs = zarr.open_group(tmp_path / "theirs", mode="w", zarr_format=3).create_array(
        "x",
        shape=(length,),
        chunks=(100,),
        shards=(100 * CHUNKS_PER_SHARD,),
        dtype=dtype,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()],
        # zarr-python leaves out chunks that hold only the fill value; an all-zero chunk of counts does not exist.
        config={"write_empty_chunks": True},
    )
    theirs[:] = values
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours/x", mode="r")[:], values)
    for file in sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs/x").rglob("*")):
        if (tmp_path / "theirs" / file).is_file():
            mine, other = (tmp_path / "ours" / file).read_bytes(), (tmp_path / "theirs" / file).read_bytes()
            assert json.loads(mine) == json.loads(other) if file.name == "zarr.json" else mine == other, file


def test_a_flipped_bit_is_found_by_zarr_too(tmp_path):
    group = zarr.open_group(tmp_path / "g", mode="w", zarr_format=3)
    with ThreadPoolExecutor(1) as pool:
        folder = create_sharded(group, "x", length=2000, dtype=np.uint8, chunk_length=500)
        writer = ShardWriter(folder, dtype=np.uint8, chunk_length=500, pool=pool)
        writer.append(np.random.default_rng(0).integers(0, 255, 2000).astype(np.uint8))
        writer.close()
    shard = tmp_path / "g/x/c/0"
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(tmp_path / "g/x", mode="r")[:]


def test_narrowest_types():
    assert [narrowest_dtype(n) for n in (0, 255, 256, 65_535, 65_536, 2**32 - 1)] == [
        np.uint8, np.uint8, np.uint16, np.uint16, np.uint32, np.uint32,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got a value of 4294967296, a store holds up to 4294967295"):
        narrowest_dtype(2**32)
    assert [index_dtype(n) for n in (10, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]


def layout(num_features, **options):
    return ModalityLayout(pd.DataFrame(index=[f"f{n}" for n in range(num_features)]), np.uint16, 20, **options)


def rows_of(counts):
    return SparseRows(counts.indptr.astype(np.int64), counts.indices, counts.data.astype(np.uint16), counts.shape[1])


def test_leaving_without_finish_leaves_nothing(tmp_path):
    def interrupted():
        with StoreWriter(tmp_path / "o.zarr", modalities={"rna": layout(30)}) as writer:
            writer.append("rna", rows_of(identifying_counts(500, 30)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_layout_of_a_store(tmp_path):
    counts = identifying_counts(700, 30)
    with StoreWriter(tmp_path / "o.zarr", modalities={"rna": layout(30)}) as writer:
        writer.append("rna", rows_of(counts[:300]))
        writer.append("rna", rows_of(counts[300:]))
        obs = pd.DataFrame({"sample": ["a"] * 700, "depth": np.arange(700.0)})
        schema = writer.finish(cell_ids=np.array([f"c{n}" for n in range(700)]), obs=obs, provenance={"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["o.zarr"]
    root = zarr.open_group(tmp_path / "o.zarr", mode="r")
    assert root.attrs[SCHEMA_KEY] == json.loads(json.dumps(schema.to_json()))
    matrix = root["mod/rna/X"]
    assert (matrix["data"].dtype, matrix["indices"].dtype, matrix["indptr"].dtype) == (np.uint16, np.uint16, np.int64)
    assert matrix["data"].chunks == matrix["indices"].chunks == (256 * 20,)
    assert matrix["data"].shards == (256 * 20 * CHUNKS_PER_SHARD,)
    read = mudata.read_zarr(tmp_path / "o.zarr")
    np.testing.assert_array_equal(read["rna"].X.toarray(), counts.toarray())
    assert read.uns["liam_scale"]["seed"] == 1
    assert read.obs["depth"].tolist() == list(range(700))


def test_unknown_modality_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="modality: got 'chip', this package knows rna, atac, adt"):
        StoreWriter(tmp_path / "o.zarr", modalities={"chip": layout(3)})
    assert not list(tmp_path.iterdir())
