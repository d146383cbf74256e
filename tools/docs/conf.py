"""Sphinx's settings. The pages are those that pages.py lays out; `make docs` does both."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The checkout's own code, whatever else is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from nsc_kernels._version import __version__ as release  # noqa: E402, F401

project = "nsc_kernels"
copyright = "the authors of nsc_kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "index"

myst_heading_anchors = 3
napoleon_numpy_docstring = False
# A list of attributes within the class, and no entry of its own for each, which autodoc would add once more.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Of a prompt and what it prints, only what is typed.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "nsc_kernels"
html_static_path = [str(Path(__file__).with_name("static"))]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "monokai"
