# How Sphinx builds the documentation: `make docs`. Pages are Markdown; the reference comes from docstrings.
from __future__ import annotations

from typing import Any

import normkern

project = "normkern"
author = "the normkern authors"
copyright = "the normkern authors"
release = version = normkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["layers/support.md", "layers/evolved_support.md"]  # included by the pages of the layers
default_role = "code"  # `x` in a docstring
html_theme = "furo"
html_title = "normkern"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
viewcode_line_numbers = True
suppress_warnings = ["myst.xref_missing"]  # CONTRIBUTING.md links to files of the repository


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: what reStructuredText would take for markup is escaped, and what stands indented by
    itself, or between ``` and ```, is code."""
    found: list[str] = []
    code: int | None = None  # how far the block of code is indented
    fenced = False
    last = 0  # indentation of the last line of text
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() == "```":
            fenced = not fenced
            found += [" " * last + "::", ""] if fenced else [""]
        elif fenced:
            found.append("    " + line)
        elif not line.strip():
            found.append("")
        else:
            alone = number > 0 and not lines[number - 1].strip()
            if code is None and alone and indent >= last + 4:
                code = indent
                found += [" " * last + "::", ""]
            if code is not None and indent >= code:
                found.append(line)
                continue
            code = None
            found.append(line.replace("|", r"\|").replace("*", r"\*"))
            last = indent
    lines[:] = found


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon reads the sections
