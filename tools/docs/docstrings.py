"""Docstrings as Markdown: their markup is Sphinx's."""

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc|obj):`~?([^`]+)`")


def markdown_of(text: str) -> str:
    """Names and code of a paragraph, as Markdown has them."""
    return re.sub(r"``([^`]+)``", r"`\1`", _ROLE.sub(r"`\1`", text))
