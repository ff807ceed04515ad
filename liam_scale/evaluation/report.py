"""One HTML page that stands alone: headings, text, tables and pictures, to send to a colleague."""

from __future__ import annotations

import base64
import html
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from loaders.durable import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.88em; }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #e6e6e6; }
th { text-align: left; background: #f6f6f6; white-space: nowrap; }
td.best { font-weight: 700; background: #e8f3fa; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 0.85em; }
p.lead { font-size: 1.1em; border-left: 4px solid #0072B2; padding-left: 0.8em; }
footer { color: #777; margin-top: 3em; }
"""


def text(words: str, *, lead: bool = False) -> str:
    kind = ' class="lead"' if lead else ""
    return f"<p{kind}>{html.escape(words)}</p>"


def code(words: str) -> str:
    return f"<pre>{html.escape(words)}</pre>"


def picture(path: Path, alt: str) -> str:
    """A PNG inside the page."""
    inside = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{inside}">'


def table(frame: pd.DataFrame, *, best: Mapping[str, Sequence[int]] | None = None, digits: int = 3) -> str:
    """A table; its index is the first column.

    Parameters
    ----------
    best
        By name of the column the positions of the rows to mark.
    """
    names = "".join(f"<th>{html.escape(str(name))}</th>" for name in (frame.index.name or "", *frame.columns))
    rows = []
    for i, (key, row) in enumerate(zip(frame.index, frame.itertuples(index=False), strict=True)):
        cells = [f"<th>{html.escape(str(key))}</th>"]
        for name, value in zip(frame.columns, row, strict=True):
            shown = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
            mark = ' class="best"' if i in (best or {}).get(str(name), ()) else ""
            cells.append(f"<td{mark}>{html.escape('' if shown == 'nan' else shown)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="table"><table><tr>{names}</tr>{"".join(rows)}</table></div>'


def best_in_rows(frame: pd.DataFrame, better: Sequence[str]) -> dict[str, list[int]]:
    """For `table`: in which rows a column has the best value; `better` says of each row what is good."""
    marked: dict[str, list[int]] = {str(name): [] for name in frame.columns}
    for i, direction in enumerate(better):
        values = frame.iloc[i].astype(float)
        scores = {"higher": -values, "lower": values, "towards 1": (values - 1).abs()}[direction]
        for name in frame.columns[scores == scores.min()] if len(values) > 1 else ():
            marked[str(name)].append(i)
    return marked


def write_report(path: Path, *, title: str, sections: Mapping[str, Sequence[str]]) -> Path:
    """Write the page: under each heading its pieces (`text`, `table`, `picture`, `code`), at its end what made it."""
    headed = ((f"<h2>{html.escape(heading)}</h2>" if heading else "", pieces) for heading, pieces in sections.items())
    body = "".join(heading + "".join(pieces) for heading, pieces in headed if pieces)
    packages = ", ".join(f"{name} {version(name)}" for name in ("liam-scale", "torch", "scib-metrics", "scikit-learn"))
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {packages} · Python {platform.python_version()}"
    command = code(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f"<h1>{html.escape(title)}</h1>{body}<footer>{command}{html.escape(made)}</footer>"
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{page}</body></html>\n')
    return path
