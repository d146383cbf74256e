"""Merged updates of full rank that memory would not hold are kept in a file, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import nsc_merge
from nsc_merge import Adapter, Factor
from nsc_merge.methods import full_rank

SHAPE = (24, 16)
SIZE = 4 * SHAPE[0] * SHAPE[1]


def problem():
    model = nn.Sequential(*(nn.Linear(SHAPE[1], SHAPE[0]) for _ in range(5)))
    generator = torch.Generator().manual_seed(0)

    def factor():
        A, B = (torch.randn(*shape, generator=generator) for shape in ((3, SHAPE[1]), (SHAPE[0], 3)))
        return Factor(A, B, 1.0)

    return model, {task: Adapter(task, {str(n): factor() for n in range(5)}) for task in ("a", "b")}


@pytest.mark.parametrize("method", ["ties", "dare", "fr", "emr_unified"])
def test_what_is_more_than_half_of_the_free_memory_is_in_a_file(monkeypatch, method):
    wanted = nsc_merge.merge(*problem(), method=method)
    mapped, memmap = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *given, **named: mapped.append(memmap(*given, **named)) or mapped[-1])
    monkeypatch.setattr(full_rank, "free_memory", lambda device: 2 * 2 * SIZE)
    found = nsc_merge.merge(*problem(), method=method)
    assert [(one.offset, one.nbytes) for one in mapped] == [(n * SIZE, SIZE) for n in range(3)]
    for number, path in enumerate(wanted.paths):
        dense = found.factors[path].dense
        assert torch.equal(dense, wanted.factors[path].dense)
        assert (dense.data_ptr() == mapped[number - 2].ctypes.data) == (number >= 2)
    # Whoever changes one changes its own memory.
    found.factors["4"].dense.zero_()
    assert torch.equal(found.factors["3"].dense, wanted.factors["3"].dense)


def test_where_the_disk_is_full_the_rest_is_in_memory(monkeypatch, caplog):
    wanted = nsc_merge.merge(*problem(), method="ties")
    monkeypatch.setattr(full_rank, "free_memory", lambda device: 0.0)
    monkeypatch.setattr(full_rank.tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))  # noqa: SIM115
    found = nsc_merge.merge(*problem(), method="ties")
    for path in wanted.paths:
        assert torch.equal(found.factors[path].dense, wanted.factors[path].dense)
    (said,) = caplog.messages
    assert "is held in memory ([Errno 28] No space left on device); TMPDIR" in said
