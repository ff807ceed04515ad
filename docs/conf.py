"""Sphinx configuration."""

from importlib import metadata

project = "liam-scale"
author = "the liam-scale developers"
release = version = metadata.version("liam-scale")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "liam-scale"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
napoleon_numpy_docstring = True
