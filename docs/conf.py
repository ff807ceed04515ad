"""Sphinx configuration."""

import contextlib
import io
import os
from importlib import metadata, util
from pathlib import Path

project = "liam-scale"
author = "the liam-scale developers"
release = version = metadata.version("liam-scale")
# Without Jupyter the pages build too, but for those whose code is run.
has_jupyter = util.find_spec("myst_nb") is not None
extensions = [
    "myst_nb" if has_jupyter else "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "liam-scale"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
executed = [page.name for page in Path(__file__).parent.glob("*.md") if "file_format: mystnb" in page.read_text()[:99]]
exclude_patterns = ["_build", *([] if has_jupyter else executed)]
suppress_warnings = [] if has_jupyter else ["toc.excluded", "toc.not_readable"]
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = True


def write_commands(app: object) -> None:
    """A page for each command: what its --help prints."""
    from liam_scale.cli import COMMANDS, command

    folder = Path(__file__).with_name("commands")
    folder.mkdir(exist_ok=True)
    os.environ["COLUMNS"] = "90"
    for name, what in COMMANDS.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            command(name)(["--help"])
        text = f"# {name}\n\n{what}\n\n```text\n{said.getvalue().strip()}\n```\n"
        page = folder / f"{name}.md"
        # Sphinx reads again what is newer.
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def setup(app: object) -> None:
    app.connect("builder-inited", write_commands)  # type: ignore[attr-defined]
