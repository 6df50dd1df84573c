"""The manual: ``sphinx-build -W -b html docs OUT``, without network."""

import importlib.metadata

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

project = "cronos_flax"
author = "The cronos_flax developers"
release = importlib.metadata.version("cronos_flax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings give shapes and units in words; annotations of jaxtyping would only repeat them.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "replace"}  # which flax.struct adds
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = "cronos_flax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def setup(app):
    """Draw formulas as MathML, by the browser itself: MathJax would be loaded from the network."""

    def inline(writer, node):
        writer.body.append(tex2mathml(node.astext()))
        raise SkipNode

    def block(writer, node):
        writer.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
