"""The manual: ``sphinx-build -W -b html docs OUT``, without network."""

import importlib.metadata

project = "cronos_flax"
author = "The cronos_flax developers"
release = importlib.metadata.version("cronos_flax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings give shapes and units in words; annotations of jaxtyping would only repeat them.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

nitpicky = False
html_theme = "furo"
html_title = "cronos_flax"
html_copy_source = False
html_show_sourcelink = False
