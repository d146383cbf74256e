"""How much memory is said to be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from nsc_merge.utils.memory import peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux says is what is compared with")
def test_the_peak_is_in_bytes_on_either_system(monkeypatch):
    status = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    found = peak_bytes(nn.Linear(2, 2))
    # Linux counts a few pages late.
    assert found / 1024 == pytest.approx(kibibytes, rel=0.05)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes(nn.Linear(2, 2)) * 1024 == pytest.approx(found, rel=0.05)
