# How Sphinx builds the documentation: `make docs`. Pages are Markdown; the reference comes from docstrings.
from __future__ import annotations

import normkern

project = "normkern"
author = "the normkern authors"
copyright = "the normkern authors"
release = version = normkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["layers/support.md"]  # included by the pages of the layers
html_theme = "furo"
html_title = "normkern"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
viewcode_line_numbers = True
suppress_warnings = ["myst.xref_missing"]  # CONTRIBUTING.md links to files of the repository
