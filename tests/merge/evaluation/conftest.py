"""What every test of evaluations starts from."""

from __future__ import annotations

import pytest
from eval_cases import two_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def place(tmp_path):
    return two_tasks(tmp_path)
