"""Every byte of a store that is read is guarded: flipped bits and lost chunks never give other numbers or names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import mudata
import numpy as np
import pytest
import zarr

from loaders.ecosystem import plain_mudata
from loaders.stores import open_store, read_store
from loaders.synthetic import simulate

MOSAIC = [("rna", "atac", "adt"), ("rna", "adt"), ("atac",)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    sizes = {"num_genes": 30, "num_peaks": 50, "num_proteins": 6, "genes_per_cell": 10, "peaks_per_cell": 12}
    simulate(path, num_cells=200, num_samples=3, num_types=3, mosaic=MOSAIC, **sizes)
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    open_store(path).write_embedding("X_liam", values, {"liam_scale_run": "a-1"})
    return path


def all_that_is_read(path: Path) -> list[bytes]:
    """Whatever training, embedding and decoding may ask a store for."""
    store = open_store(path)
    held = [repr(store.schema.num_cells).encode(), "\n".join(store.cell_ids(0, store.schema.num_cells)).encode()]
    for name in store.schema.obs_columns:
        try:
            column = store.obs_column(name)
        except ValueError as error:
            if "got values of type float" not in str(error):
                raise
            continue
        held += [column.codes.tobytes(), "\n".join(column.categories).encode()]
    held.append(store.obs_frame().to_csv().encode())
    for name in store.schema.modalities:
        rows, matrix = store.modality_rows(name), store.matrix(name)
        part = matrix.read(0, matrix.num_rows)
        held += [name.encode(), b"" if rows is None else rows.tobytes(), store.totals(name).tobytes()]
        held += [array.tobytes() for array in (part.indptr, part.indices, part.values)]
        held.append("\n".join(store.feature_names(name)).encode())
    held.append(store.read_embedding("X_liam", 0, store.schema.num_cells).tobytes())
    held.append(repr(store.embedding_attributes("X_liam")).encode())
    store.close()
    return held


def judge(path: Path, expected: list[bytes]) -> str:
    try:
        found = all_that_is_read(path)
    except (ValueError, RuntimeError) as error:
        return "named" if path.name in str(error) else f"unnamed: {type(error).__name__}: {error}"
    except Exception as error:
        return f"unexplained: {type(error).__name__}: {error}"
    return "harmless" if found == expected else "silent"


def flip(path: Path, expected: list[bytes], number: int, seed: int) -> dict[str, str]:
    """What became of so many flipped bits, one at a time, in files drawn alike."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    draw = np.random.default_rng(seed)
    outcomes = {}
    for _ in range(number):
        file = files[int(draw.integers(len(files)))]
        whole = file.read_bytes()
        place, bit = int(draw.integers(len(whole))), int(draw.integers(8))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        outcomes[f"{file.relative_to(path)} byte {place} bit {bit}"] = judge(path, expected)
        file.write_bytes(whole)
    return outcomes


@pytest.mark.parametrize("number", [90, pytest.param(1200, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_silent_and_every_refusal_names_the_store(
    store: Path, tmp_path: Path, number: int, record_property: Callable[[str, object], None]
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    outcomes = flip(copy, all_that_is_read(store), number, seed=number)
    record_property("flips", number)
    for what in ("named", "harmless", "silent"):
        record_property(what, sum(found == what for found in outcomes.values()))
    assert not {where: what for where, what in outcomes.items() if what not in ("named", "harmless")}
    assert sum(what == "named" for what in outcomes.values()) > number / 4


def test_every_lost_chunk_is_an_error(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    expected = all_that_is_read(store)
    chunks = [file for file in copy.rglob("*") if file.is_file() and "/c" in str(file.relative_to(copy))]
    outcomes = {}
    for file in chunks:
        hidden = file.rename(tmp_path / "hidden")
        outcomes[str(file.relative_to(copy))] = judge(copy, expected)
        hidden.rename(file)
    assert set(outcomes.values()) <= {"named", "harmless"}, outcomes
    for part in ("indptr", "obsmap/atac", "obs/sample/codes", "obs/total_counts", "var/_index", "obs/_index"):
        used = {where: what for where, what in outcomes.items() if part in where and not where.startswith("var")}
        assert "named" in used.values(), part


def test_a_flipped_bit_in_the_metadata_of_an_embedding_is_found(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    file, opened = copy / "obsm/X_liam/zarr.json", open_store(copy)
    whole, outcomes = file.read_bytes(), {}

    def read() -> tuple[bytes, dict[str, str]]:
        values = opened.read_embedding("X_liam", 0, 200).tobytes()
        (made,) = opened.embedding_attributes("X_liam")
        return values, {key: made[key] for key in ("liam_scale_run", "encoding-type")}

    expected = read()
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            outcomes[place] = read() == expected
        except (RuntimeError, ValueError) as error:
            outcomes[place] = "copy.zarr" in str(error)
    assert [place for place, is_right in outcomes.items() if not is_right] == []


@pytest.mark.parametrize(
    "file", ["mod/rna/X/data/c/0", "mod/adt/X/indptr/c/0", "obs/sample/codes/c/0", "obsm/X_liam/c/0/0"]
)
@pytest.mark.parametrize("is_lost", [True, False])
def test_read_store_gives_no_damaged_number(store: Path, tmp_path: Path, file: str, is_lost: bool) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    whole = (copy / file).read_bytes()
    if is_lost:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(RuntimeError, match=r"copy\.zarr/.*got damaged data: .*a check of the store"):
        read_store(copy)


def test_every_array_carries_a_checksum_and_others_read_them(store: Path) -> None:
    for file in store.rglob("zarr.json"):
        assert '"node_type": "group"' in file.read_text() or "crc32c" in file.read_text(), file
    with plain_mudata():
        data = mudata.read_zarr(store)
    assert data.n_obs == 200
    assert anndata.io.read_elem(zarr.open_group(store, mode="r")["mod/adt/obs"]).shape[0] == data["adt"].n_obs


def test_a_store_replaced_after_it_was_opened_gives_no_row_of_the_new_one(store: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    shutil.copytree(store, path)
    shutil.copytree(store, other)
    opened = open_store(path)
    path.rename(tmp_path / "old.zarr")
    other.rename(path)
    shutil.rmtree(tmp_path / "old.zarr")
    with pytest.raises(RuntimeError, match=r"s\.zarr/mod/rna/X"):
        opened.matrix("rna").read(0, 5)
    with pytest.raises(RuntimeError, match="got another store at its path"):
        opened.obs_column("sample")
