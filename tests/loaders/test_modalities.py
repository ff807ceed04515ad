"""What a modality is: names that can be one, what a user says of them, and what stores agree on."""

from __future__ import annotations

import pytest

from loaders.modalities import PRESETS, Kind, agreed, declared, is_name, modality_of, ordered
from loaders.options import LoaderConfig
from loaders.schema import ModalitySchema, Schema


def schema_of(name: str, **kind: str) -> Schema:
    held = ModalitySchema(name, 3, 4, 5, "uint8", "f", "c", **kind)
    return Schema(3, {name: held}, (), True, "cells")


def test_a_text_or_a_mapping_says_likelihood_and_transform() -> None:
    expected = {"h3k27ac": Kind("NM", "none"), "dogma.adt": Kind("NB", "log1p"), "hto": Kind("NB", "clr")}
    assert declared(["h3k27ac=NM", "dogma.adt=nb", "hto=NB:clr"]) == expected
    assert declared({"h3k27ac": "NM", "dogma.adt": "NB", "hto": "NB:clr"}) == expected
    assert declared("hto=NB:clr") == {"hto": Kind("NB", "clr")}
    assert declared(None) == declared(()) == {}
    assert [f"{name}={kind}" for name, kind in expected.items()] == ["h3k27ac=NM", "dogma.adt=NB", "hto=NB:clr"]


def test_the_known_modalities_are_presets_of_that() -> None:
    assert declared(["RNA=NB", "atac=NM", "adt=NB"]) == PRESETS
    assert declared(f"{name}={kind}" for name, kind in PRESETS.items()) == PRESETS  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h3k27ac=Poisson", r"modality: got 'h3k27ac=Poisson'; write NAME=NM .* or NAME=NB .*NAME=NB:clr"),
        ("h3k27ac", "got 'h3k27ac'; write NAME=NM"),
        ("hto=NB:sqrt", "got 'hto=NB:sqrt'; write"),
        ("hto=NB:", "got 'hto=NB:'; write"),
        ("atac=NB", "got 'atac=NB', but atac is always NM:none; leave it out, or give the modality another name"),
        ("ADT=NB:none", "but adt is always NB:clr"),
        ("a/b=NM", "got the name 'a/b'; give letters, digits"),
        ("=NM", "got the name ''"),
        (".hidden=NM", "got the name '.hidden'"),
        ("X_marks=NM", "neither none nor X_"),
        (["hto=NB", "HTO=NM"], "got 'HTO' twice; name each once"),
    ],
)
def test_what_cannot_be_said_is_refused(given: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declared(given)


def test_a_name_is_a_folder_a_column_and_a_part_of_other_names() -> None:
    assert all(map(is_name, ["rna", "h3k27ac", "dogma.adt", "5mC+hmC", "a_b-c", "x" * 64]))
    wrong = ["", ".", "..", "a.", "a/b", "a b", "a:b", "a=b", "a,b", "ä", "x" * 65, "none", "X_liam", "zarr.json"]
    assert not any(map(is_name, wrong))


def test_known_modalities_come_first_and_others_by_name() -> None:
    assert ordered(["hto", "adt", "cite", "rna"]) == ("rna", "adt", "cite", "hto")


def test_a_name_that_was_given_goes_before_an_alias() -> None:
    assert (modality_of("Gene Expression"), modality_of("CITE"), modality_of("h3k27ac")) == ("rna", "adt", None)
    kinds = {**PRESETS, **declared(["cite=NB", "multiplexing_capture=NB"])}
    assert (modality_of("CITE", kinds), modality_of("prot", kinds)) == ("cite", "adt")
    assert modality_of("Multiplexing Capture", kinds) == "multiplexing_capture"


def test_what_is_said_differently_is_refused_with_both_places() -> None:
    one, other = declared("hto=NB"), declared("hto=NM")
    assert agreed([("a.zarr", one), ("b.zarr", one)]) == one
    with pytest.raises(ValueError, match=r"hto is NB:log1p in a\.zarr and NM:none in b\.zarr; give one of them"):
        agreed([("a.zarr", one), ("b.zarr", other)])
    with pytest.raises(ValueError, match=r"modality: got hto in a\.zarr and HTO in b\.zarr; ingest one of them"):
        agreed([("a.zarr", one), ("b.zarr", declared("HTO=NB"))])


def test_a_schema_without_other_names_is_written_as_before() -> None:
    entry = schema_of("adt").to_json()
    assert entry["format"] == 1
    assert list(entry["modalities"]["adt"])[-1] == "counts_crc32c"
    assert Schema.from_json(entry).modalities["adt"].kind == Kind("NB", "clr")


def test_a_schema_keeps_what_a_modality_of_another_name_is() -> None:
    schema = schema_of("hto", likelihood="NB", transform="clr")
    entry = schema.to_json()
    assert entry["format"] == 3
    assert Schema.from_json(entry) == schema
    assert schema.fingerprint != schema_of("hto", likelihood="NB", transform="log1p").fingerprint


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hto", {}), ("hto", {"likelihood": "NB"}), ("../x", {"likelihood": "NB", "transform": "clr"}),
     ("hto", {"likelihood": "P", "transform": "clr"}), ("rna", {"likelihood": "NM", "transform": "none"})],
)  # fmt: skip
def test_a_schema_that_does_not_say_what_a_modality_is_is_refused(name: str, kind: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"modality|likelihood"):
        schema_of(name, **kind)


def test_reading_makes_centred_log_ratios_of_all_that_are_taken_as_such() -> None:
    kinds = {**PRESETS, **declared(["hto=NB:clr", "marks=NM"])}
    assert LoaderConfig().transforms(kinds) == {"adt": "clr", "hto": "clr"}
    assert LoaderConfig(adt_transform="none").transforms(kinds) == {"hto": "clr"}
