"""Places that first recipes are written in."""

from __future__ import annotations

import pytest
from init_cases import go, make_places


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory)


@pytest.fixture
def at(places, monkeypatch):
    return lambda kind: go(places, monkeypatch, kind)
