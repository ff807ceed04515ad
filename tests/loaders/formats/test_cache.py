"""Blocks of remote objects on a local disk: whatever is read, in whatever order, is what is there."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.formats import cache as module
from loaders.formats.cache import BlockCache, the_cache, use_cache

BLOCK = 64
CONTENT = np.arange(1_000, dtype=np.uint32).view(np.uint8)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


class Remote:
    """An object whose requests are counted."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int) -> bytes:
        self.requests.append((start, stop))
        return CONTENT[start:stop].tobytes()

    def read(self, cache: BlockCache, start: int, stop: int, name: str = "a") -> None:
        into = np.zeros(stop - start, np.uint8)
        cache.read(name, len(CONTENT), start, into, self.fetch)
        np.testing.assert_array_equal(into, CONTENT[start:stop])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 400)), max_size=8))
def test_every_range_is_that_of_the_object_and_no_block_is_fetched_twice(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    cache, remote = BlockCache(tmp_path_factory.mktemp("cache"), 1 << 20), Remote()
    for start, length in ranges:
        remote.read(cache, start, min(len(CONTENT), start + length))
    fetched = [block for start, stop in remote.requests for block in range(start // BLOCK, -(-stop // BLOCK))]
    assert len(fetched) == len(set(fetched))


def test_blocks_that_are_missing_side_by_side_come_with_one_request_and_stay(tmp_path: Path) -> None:
    remote = Remote()
    remote.read(BlockCache(tmp_path, 1 << 20), 70, 700)
    assert remote.requests == [(64, 704)]
    remote.read(BlockCache(tmp_path, 1 << 20), 64, 704)
    assert len(remote.requests) == 1


def test_another_version_of_an_object_is_fetched_anew(tmp_path: Path) -> None:
    cache, remote = BlockCache(tmp_path, 1 << 20), Remote()
    remote.read(cache, 0, 10, "a, first version")
    remote.read(cache, 0, 10, "a, second version")
    assert len(remote.requests) == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, harm: str) -> None:
    remote = Remote()
    remote.read(BlockCache(tmp_path, 1 << 20), 0, 64)
    (block,) = tmp_path.rglob("*.block")
    content = bytearray(block.read_bytes())
    content[3] ^= 1
    block.write_bytes({"flip": bytes(content), "cut": bytes(content[:20]), "empty": b""}[harm])
    remote.read(BlockCache(tmp_path, 1 << 20), 0, 64)
    remote.read(BlockCache(tmp_path, 1 << 20), 0, 64)
    assert len(remote.requests) == 2


def test_it_keeps_to_its_size_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    size = 20 * (BLOCK + 4)
    cache, remote = BlockCache(tmp_path, size), Remote()
    for start in range(0, len(CONTENT) - BLOCK, BLOCK):
        remote.read(cache, start, start + BLOCK)
        # Times of files are as coarse as the clock of the kernel.
        for place, block in enumerate(sorted(tmp_path.rglob("*.block"), key=lambda file: file.stat().st_mtime_ns)):
            os.utime(block, (place, place))
        remote.read(cache, 0, BLOCK)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.block")) <= size
    assert [start for start, _ in remote.requests].count(0) == 1


def test_a_full_disk_is_told_once_and_reading_goes_on(disk_of, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 20)
    content = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8)
    cache = BlockCache(disk_of("2m"), 1 << 30)
    into = np.zeros_like(content)
    with caplog.at_level(logging.WARNING):
        cache.read("a", len(content), 0, into, lambda start, stop: content[start:stop].tobytes())
    np.testing.assert_array_equal(into, content)
    (said,) = [record.message for record in caplog.records]
    assert "cannot be written" in said
    assert "make room there" in said
    assert not list(cache.folder.rglob("*.partial"))


def test_a_choice_holds_for_the_process_and_its_children_until_it_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.FOLDER, "")
    assert the_cache() is None
    use_cache(tmp_path / "new" / "cache", "2GB")
    cache = the_cache()
    assert cache is not None
    assert (cache.folder, cache.size) == (tmp_path / "new" / "cache", 2 * 10**9)
    assert the_cache() is cache
    use_cache(None)
    assert the_cache() is None


def test_a_folder_that_cannot_be_written_and_a_size_that_holds_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache: got .*file/in, which cannot be written"):
        use_cache(tmp_path / "file" / "in")
    with pytest.raises(ValueError, match="cache_size: got 1; give at least"):
        use_cache(tmp_path, 1)
