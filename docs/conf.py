"""Sphinx configuration."""

from importlib import metadata, util

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
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "liam-scale"
exclude_patterns = ["_build", *([] if has_jupyter else ["first-integration.md"])]
suppress_warnings = [] if has_jupyter else ["toc.excluded", "toc.not_readable"]
nb_execution_mode = "force"
nb_execution_timeout = 240
nb_execution_raise_on_error = True
autodoc_typehints = "description"
napoleon_numpy_docstring = True
