"""What every test of the analyses starts from."""

from __future__ import annotations

import pytest
from analysis_cases import decoder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def llama(tmp_path):
    return decoder(tmp_path)
