"""What the arguments of PEFT's ``add_weighted_adapter`` stand for: a method, its options, the form of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nsc_merge.adapters.adapter import Factor

_IN_FACTORS = {"trim_scope": "factors"}


class Combination(NamedTuple):
    """One of PEFT's ``combination_type``.

    Attributes:
        method: ours.
        output: ``"cat"`` keeps the factors that the method gives, ``"svd"`` truncates its update.
        options: of the method.
        density: the option that PEFT's ``density`` stands for, "" if there is none.
        elects: whether signs are elected, by PEFT's ``majority_sign_method``.
    """

    method: str
    output: str
    options: dict[str, Any]
    density: str = ""
    elects: bool = False


COMBINATIONS = {
    "cat": Combination("task_arithmetic", "cat", {}),
    "svd": Combination("task_arithmetic", "svd", {}),
    "linear": Combination("linear", "cat", {"preset": "peft"}),
    "ties": Combination("ties", "cat", {"preset": "peft", **_IN_FACTORS}, "density", elects=True),
    "ties_svd": Combination("ties", "svd", {"preset": "peft"}, "density", elects=True),
    "dare_ties": Combination("dare_ties", "cat", {"preset": "peft", **_IN_FACTORS}, "drop", elects=True),
    "dare_linear": Combination("dare", "cat", {"drop_scope": "factors"}, "drop"),
    "dare_ties_svd": Combination("dare_ties", "svd", {"preset": "peft"}, "drop", elects=True),
    "dare_linear_svd": Combination("dare", "svd", {}, "drop"),
    "magnitude_prune": Combination("magnitude_prune", "cat", _IN_FACTORS, "density"),
    "magnitude_prune_svd": Combination("magnitude_prune", "svd", {}, "density"),
}
_SIGNS = {"total": "sum", "frequency": "count"}


def translated(
    combination_type: str, method: str | None, output: str | None, options: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Method, output and options that ``add_weighted_adapter``'s arguments stand for.

    Args:
        combination_type: PEFT's name.
        method, output: which it stands for, and which are not given beside it therefore.
        options: ``add_weighted_adapter``'s others, and options of the method.

    Raises:
        ValueError: naming the argument, if it is none of PEFT's, or has no meaning with this ``combination_type``.
    """
    if method is not None or output is not None:
        raise ValueError(
            "combination_type: expected it, or method and output, which it stands for; found "
            f"combination_type={combination_type!r}, method={method!r}, output={output!r}"
        )
    if not isinstance(combination_type, str) or combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type: expected one of {list(COMBINATIONS)}, found {combination_type!r}; for other ways "
            "choose a method, as nsc-merge methods lists them"
        )
    found = COMBINATIONS[combination_type]
    own = {**found.options, **options}
    _without_svd_options(own)
    if "majority_sign_method" in own:
        given = own.pop("majority_sign_method")
        if given not in _SIGNS:
            raise ValueError(f"majority_sign_method: expected one of {list(_SIGNS)}, found {given!r}")
        _check_meant("majority_sign_method", combination_type, found.elects)
        own["sign"] = _SIGNS[given]
    density = own.pop("density", None)
    if density is not None:
        _check_meant("density", combination_type, bool(found.density))
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
            raise ValueError(
                f"density: expected the share of entries to keep, above 0 and at most 1, found {density!r}"
            )
        # PEFT's density is what DARE keeps, and there is no trimming after it.
        own[found.density] = density if found.density == "density" else 1 - density
    return found.method, found.output, own


def check_ranks(combination_type: str, factors: Mapping[str, Mapping[str, Factor]]) -> None:
    """Refuse unequal ranks where factors are added, in PEFT's words: the method would name options that are ours.

    Raises:
        ValueError: naming the module and the ranks.
    """
    merges_updates = {"linear": "svd"}.get(combination_type, f"{combination_type}_svd")
    if merges_updates not in COMBINATIONS:
        return
    for path in dict.fromkeys(path for held in factors.values() for path in held):
        ranks = {name: held[path].rank for name, held in factors.items() if path in held}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"combination_type: {combination_type!r} adds factors and needs equal ranks in a module, found {ranks} "
                f"at {path}; {merges_updates!r} merges updates, of any ranks"
            )


def _check_meant(name: str, combination_type: str, meant: bool) -> None:
    """Refuse an argument that PEFT would ignore."""
    if not meant:
        having = [
            other for other, one in COMBINATIONS.items() if (one.density if name == "density" else one.elects)
        ]
        raise ValueError(f"{name}: combination_type {combination_type!r} has none; expected it with one of {having}")


def _without_svd_options(options: dict[str, Any]) -> None:
    """Take out what tells PEFT how to decompose, or refuse it."""
    if options.pop("svd_clamp", None) is not None:
        raise ValueError(
            "svd_clamp: expected None: it bounds the entries of singular vectors by a quantile that depends on their "
            "signs, which no decomposition defines, so that the same merge gives other adapters elsewhere"
        )
    if options.pop("svd_driver", None) is not None:
        raise ValueError(
            "svd_driver: expected None: it chooses among cuSOLVER's, and merging is done on the CPU, wherever the "
            "model is"
        )
    whole = options.pop("svd_full_matrices", True)
    # Both give the same leading singular vectors.
    if not isinstance(whole, bool):
        raise ValueError(f"svd_full_matrices: expected True or False, found {whole!r}")
