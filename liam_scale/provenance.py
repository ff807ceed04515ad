"""Which run made an embedding: its id stands among the attributes of the array in obsm."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)

RUN_ATTRIBUTE = "liam_scale_run"


def attributes_of(run: str | None) -> dict[str, str]:
    """What an embedding of a run of this id carries; nothing for a run made before runs had ids."""
    return {} if run is None else {RUN_ATTRIBUTE: run}


def check_maker(held: Sequence[Mapping[str, Any]], run: str | None, *, what: str, cure: str) -> None:
    """Refuse an embedding that another run made; remark where nothing says whether it did.

    Parameters
    ----------
    held
        Attributes of the embedding, one entry for each store that holds it; none: there is no embedding yet.
    run
        Id of the run that is to read or to replace it; None where an older version made that run.
    what, cure
        How the message begins and ends.

    Raises
    ------
    ValueError
        Another run made it.
    """
    makers = {entry.get(RUN_ATTRIBUTE) for entry in held}
    others = sorted(str(maker) for maker in makers - {run, None})
    if others and run is not None:
        raise ValueError(f"{what}: got an embedding that run {' and '.join(others)} made, not run {run}; {cure}")
    if makers and (None in makers or run is None):
        _log.info("%s: it or the run has no id, so that nothing says whether this run made it", what)
