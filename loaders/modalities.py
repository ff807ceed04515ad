"""What a modality is: a name, a likelihood, a transform. The known ones are presets; a user or a store says others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Likelihood = Literal["NB", "NM"]
"""Negative binomial, as of RNA and proteins; negative multinomial, as of peaks."""

Transform = Literal["none", "log1p", "clr"]
"""What encoders read: counts as they are; log(1 + counts); centred log-ratios, which are then modelled too."""

_TRANSFORMS: Mapping[Likelihood, Transform] = {"NB": "log1p", "NM": "none"}
"""The transform that goes with a likelihood where none is named."""


@dataclass(frozen=True)
class Kind:
    """What a model takes a modality for."""

    likelihood: Likelihood
    transform: Transform

    def __post_init__(self) -> None:
        if self.likelihood not in get_args(Likelihood) or self.transform not in get_args(Transform):
            raise ValueError(f"likelihood {self.likelihood!r} or transform {self.transform!r} is not known")

    def __str__(self) -> str:
        is_usual = self.transform == _TRANSFORMS[self.likelihood]
        return self.likelihood if is_usual else f"{self.likelihood}:{self.transform}"


Kinds: TypeAlias = Mapping[str, Kind]
"""Modalities by name."""

PRESETS: Kinds = {"rna": Kind("NB", "log1p"), "atac": Kind("NM", "none"), "adt": Kind("NB", "clr")}
"""The modalities that need not be explained."""

MODALITIES = tuple(PRESETS)

ALIASES = {
    "rna": ("rna", "gex", "gene_expression", "genes", "mrna", "scrna"),
    "atac": ("atac", "peaks", "peak", "chromatin_accessibility", "scatac"),
    "adt": ("adt", "prot", "protein", "proteins", "antibody_capture", "cite", "ab"),
}
"""Names of the same thing in muon ("prot"), 10x Genomics ("Gene Expression", "Peaks") and TileDB-SOMA ("RNA")."""

Declared: TypeAlias = str | Sequence[str] | Mapping[str, str]
"""What a user says of modalities: "h3k27ac=NM", or several such texts, or {"h3k27ac": "NM", "hto": "NB:clr"}."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._+-]{0,62}[A-Za-z0-9+])?")


def folded(name: str) -> str:
    """A name as names are compared: "Multiplexing Capture" is multiplexing_capture."""
    return name.strip().lower().replace(" ", "_")


def is_name(name: str) -> bool:
    """Whether a modality can have this name.

    It is a folder of a store, a column of a history, a part of the names of parameters, and stands before `=` and `:`
    in options; `X_...` are embeddings, beside which MuData keeps which cells have a modality.
    """
    return _NAME.fullmatch(name) is not None and not folded(name).startswith(("x_", "none", "zarr.json"))


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order in which every list of modalities stands: the known ones first, others by name."""
    found = set(names)
    return *(name for name in MODALITIES if name in found), *sorted(found.difference(MODALITIES))


def modality_of(name: str, kinds: Kinds = PRESETS) -> str | None:
    """The modality among `kinds` that a name of another package means, or None; its own name goes before an alias."""
    own = next((known for known in kinds if folded(known) == folded(name)), None)
    return own or next((known for known, names in ALIASES.items() if folded(name) in names), None)


def check_modality(name: str, kinds: Kinds = PRESETS) -> str:
    """The modality a user named, under any alias; ValueError where nothing says what it is."""
    modality = modality_of(name, kinds)
    if modality is None:
        raise ValueError(
            f"modality: got {name!r}; give one of {', '.join(ordered({**PRESETS, **kinds}))}, or {saying(name)}"
        )
    return modality


def saying(name: str) -> str:
    """How a user says what a modality is, for messages."""
    shown = re.sub(r"[^A-Za-z0-9._+-]", "_", name.strip()) or "NAME"
    return (
        f"say by the option modality what it is: {shown}=NM (negative multinomial, as peaks) or {shown}=NB (negative"
        f" binomial, as RNA)"
    )


def declared(given: Declared | None) -> dict[str, Kind]:
    """Modalities as a user says what they are; None: nothing is said.

    Raises
    ------
    ValueError
        A likelihood or a transform that is not known, a name that cannot be one, stands there twice, or is that of a
        known modality which is something else.
    """
    if isinstance(given, Mapping):
        given = [f"{name}={kind}" for name, kind in given.items()]
    found: dict[str, Kind] = {}
    for text in [given] if isinstance(given, str) else given or ():
        name, kind = _parsed(text)
        if any(folded(name) == folded(other) for other in found):
            raise ValueError(f"modality: got {name!r} twice; name each once")
        found[name] = kind
    return found


def _parsed(text: str) -> tuple[str, Kind]:
    before, equals, after = text.partition("=")
    name = folded(before) if folded(before) in PRESETS else before.strip()
    if equals and not is_name(name):
        raise ValueError(
            f"modality: got the name {name!r}; give letters, digits, '.', '_', '+' or '-', at most 64, that begin and"
            f" end with a letter or a digit, and neither none nor X_..., as embeddings are called"
        )
    likelihood, colon, transform = after.partition(":")
    likelihood, transform = likelihood.strip().upper(), transform.strip().lower()
    is_known = likelihood in _TRANSFORMS and (transform in get_args(Transform) if colon else True)
    if not equals or not is_known:
        raise ValueError(
            f"modality: got {text!r}; write NAME=NM (negative multinomial, as peaks) or NAME=NB (negative binomial, as"
            f" RNA), and where the encoders are not to read log1p of NB and counts of NM, a transform:"
            f" {', '.join(f'NAME=NB:{known}' for known in get_args(Transform))}"
        )
    preset = PRESETS.get(name)
    usual = preset.transform if preset is not None else _TRANSFORMS[likelihood]  # type: ignore[index]
    kind = Kind(likelihood, transform or usual)  # type: ignore[arg-type]
    if preset is not None and kind != preset:
        raise ValueError(
            f"modality: got {text!r}, but {name} is always {preset.likelihood}:{preset.transform}; leave it out, or"
            f" give the modality another name"
        )
    return name, kind


def check_found(asked: Kinds, held: Iterable[str], where: str) -> None:
    """Refuse what a user says of a modality that is not there."""
    there = ordered(held)
    lacking = [name for name in asked if name not in there]
    if lacking:
        raise ValueError(
            f"modality: got {lacking[0]}, which {where} has (there is {', '.join(there) or 'none'}); correct"
            f" the name, or call it so in the file: a modality of a MuData, or var['feature_types'] of an AnnData"
        )


def agreed(named: Iterable[tuple[str, Kinds]]) -> dict[str, Kind]:
    """What all say of modalities, each with its name for messages.

    Raises
    ------
    ValueError
        Two say something else of one, or call it by names that differ in small and capital letters alone.
    """
    found: dict[str, tuple[str, str, Kind]] = {}
    for where, kinds in named:
        for name, kind in kinds.items():
            other, before, held = found.setdefault(folded(name), (name, where, kind))
            if other != name:
                raise ValueError(
                    f"modality: got {other} in {before} and {name} in {where}; ingest one of them again under the name"
                    f" of the other"
                )
            if held != kind:
                raise ValueError(
                    f"modality: {name} is {held.likelihood}:{held.transform} in {before} and"
                    f" {kind.likelihood}:{kind.transform} in {where}; give one of them, or ingest again what is wrong"
                )
    return {name: kind for name, _, kind in found.values()}
