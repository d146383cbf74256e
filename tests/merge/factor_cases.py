"""The factor-space merge methods by name, and random adapters of one or two modules to merge by them."""

from __future__ import annotations

import torch

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.low_rank import (
    core_space,
    knots,
    lora_lego,
    robustmerge,
    spectral,
    svd_and_linear,
    svd_cur,
    wudi,
)

FUNCTIONS = {
    "svd": svd_and_linear.svd,
    "linear": svd_and_linear.linear,
    "knots_ties": knots.knots_ties,
    "knots_dare_ties": knots.knots_dare_ties,
    "core_space": core_space.core_space,
    "svd_cur": svd_cur.svd_cur,
    "lora_lego": lora_lego.lora_lego,
    "robustmerge": robustmerge.robustmerge,
    "robustmerge_alg1": robustmerge.robustmerge_alg1,
    "tsv": spectral.tsv,
    "iso_c": spectral.iso_c,
    "iso_cts": spectral.iso_cts,
    "wudi": wudi.wudi,
}
NEED_EQUAL_RANKS = ("linear", "robustmerge")
# Methods that see the updates only, and not how they are factored.
INVARIANT = ("svd", "knots_ties", "knots_dare_ties", "svd_cur", "tsv", "iso_c", "iso_cts", "wudi")
# Methods that make singular values alike, also those of one task.
FLATTENING = ("iso_c", "iso_cts")


def random_adapters(ranks=(4, 4, 4), scalings=(0.7, 2.0, 1.0), d_in=30, d_out=20, paths="xy", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        str(k): Adapter(str(k), {p: Factor(normal(r, d_in), normal(d_out, r), s) for p in paths})
        for k, (r, s) in enumerate(zip(ranks, scalings, strict=True))
    }


def merged(method, adapters, paths="xy", **options):
    chosen = METHODS[method].options(**options)
    return {path: factor.delta() for path, factor in FUNCTIONS[method](adapters, list(paths), chosen)}


def factor(method, adapters, path="x", **options):
    return dict(FUNCTIONS[method](adapters, [path], METHODS[method].options(**options)))[path]


def total(adapters, path):
    return sum(adapter.factors[path].delta() for adapter in adapters.values())


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())
