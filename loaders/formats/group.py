"""Opening a source of cells, told apart by what it contains and not by its name: the one place that names formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import anndata
import mudata

from loaders.formats.foreign import check_foreign, reading
from loaders.formats.root import not_a_store
from loaders.formats.scverse import HeldGroup, open_anndata, open_mudata
from loaders.formats.source import Say, Source
from loaders.formats.tenx import is_tenx, open_tenx
from loaders.schema import check_modality

Held: TypeAlias = anndata.AnnData | mudata.MuData
"""Data in memory."""


def open_held(data: Held, *, modality: str | None, layer: str | None, say: Say) -> Source:
    """The cells and modalities of an AnnData or MuData in memory."""
    kind = type(data).__name__
    return open_group(HeldGroup(data), f"{kind} in memory", Path(kind), modality=modality, layer=layer, say=say)


def open_group(root: Any, label: str, path: Path, *, modality: str | None, layer: str | None, say: Say) -> Source:
    """The cells and modalities that an open group holds.

    Parameters
    ----------
    label, path
        What messages call it, and the path whose end names it.
    modality
        Modality to take; it also names the features of an AnnData that does not.
    layer
        Layer that holds the counts ("raw" also means `.raw`); None: X.
    say
        Takes remarks on what was assumed.

    Raises
    ------
    ValueError
        It is neither AnnData nor MuData nor a 10x matrix, or says contradictory things.
    """
    modality = None if modality is None else check_modality(modality)
    with reading(label):
        check_foreign(root, label)
        return _open(root, label, path, modality=modality, layer=layer, say=say)


def _open(root: Any, label: str, path: Path, *, modality: str | None, layer: str | None, say: Say) -> Source:
    if "obs" in root and "var" in root and "mod" not in root:
        return open_anndata(label, path, root, modality=modality, layer=layer, say=say)
    if "mod" in root:
        source = open_mudata(label, path, root, layer=layer, say=say)
    elif is_tenx(root):
        if layer is not None:
            raise ValueError(f"layer: got {layer!r} for {label}, a 10x file, which has no layers; leave it out")
        source = open_tenx(label, path, root, say=say)
    else:
        kind = root.attrs.get("encoding-type")
        inside = ", ".join(sorted(root)) or "nothing"
        raise not_a_store(label, f"a group of encoding {kind!r}" if kind else f"a group that holds {inside} at its top")
    return source if modality is None else source.only(modality)
