"""That the emulator would notice: every barrier of the CUDA kernel taken out in turn."""

from __future__ import annotations

import shutil
from pathlib import Path

import harness
import pytest
import torch
from harness import Emulator, How, Variant

from nsc_kernels import reference

problems = pytest.importorskip("problems", reason="triton is not installed", exc_type=ImportError)

VARIANT = Variant(96, 64)

BARRIERS = {
    "before the partials are read": "  sync_cluster();  // every partial is there\n",
    "before c is read": "  sync_cluster();  // every c is there, and no block reads another's memory from here on\n",
    "after the stages of the shrink": "  wait_copies<0>();\n  sync_block();\n}\n\n// This block's partial",
    "before the output is copied out": "    sync_block();\n    copier.store",
    "before the products of a row are added": "    sync_warp();\n    if (products)",
    "before the warps' dlam is added": "  sync_block();\n  const float* warp_sums",
    "between the steps of the expand": "    sync_block();\n    load(step + S - 1);\n    unsigned char* w_tile",
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_the_emulator_notices_a_missing_barrier(tmp_path: Path, barrier: str) -> None:
    """Each barrier taken out in turn, in a build of one variant: the results change in some order of the threads."""
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    line = BARRIERS[barrier]
    removed = line.replace("sync_cluster();", "").replace("sync_block();", "").replace("sync_warp();", "")
    for path in harness.CSRC.glob("*.*"):
        shutil.copy(path, tmp_path)
    kernel = (tmp_path / "kernel.inl").read_text()
    assert kernel.count(line) == 1
    (tmp_path / "kernel.inl").write_text(kernel.replace(line, removed))
    geometry = (tmp_path / "geometry.h").read_text()
    start, end = geometry.index("#define NSC_VARIANTS(X)"), geometry.index("#define NSC_VARIANT_ENTRY")
    (tmp_path / "geometry.h").write_text(geometry[:start] + "#define NSC_VARIANTS(X) X(96, 64)\n" + geometry[end:])
    broken = Emulator(harness.build(tmp_path, csrc=tmp_path))
    p = problems.problem(70, 328, 392, (16,) * 6, torch.bfloat16, torch.device("cpu"))
    u = reference.forward(p.z, p.A, p.Bt, p.offsets, p.lam, None, False)[3]
    inputs = (p.A, p.Bt, p.offsets, p.lam)

    def results(how: How) -> list[torch.Tensor]:
        return [
            *broken.forward(how, p.z, *inputs, p.base),
            *broken.backward(how, p.dy, p.dquad, p.dsqnorm, u, p.z, *inputs, None),
        ]

    right = results(How(VARIANT, 4, mirror=True))
    settings = [How(VARIANT, 4, order, copies) for order in harness.ORDERS for copies in harness.COPIES]
    assert any(not all(map(torch.equal, results(how), right)) for how in settings)
