"""What a merge method of mergekit with its parameters is among ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nsc_merge.methods import METHODS
from nsc_merge.recipes.yaml_keys import RecipeError, numbers
from nsc_merge.utils.option_checks import did_you_mean

PREFIX = "nsc_"
IN_MERGEKIT = "python -m nsc_merge.integrations.mergekit merges the file as it is, in mergekit, from the factors"


@dataclass(frozen=True)
class Family:
    """One of mergekit's methods that add differences to a base.

    Attributes:
        drops: which entries of a difference go where its density is below 1; None for none.
        elects: whether a sign is elected in every position, and what disagrees left out.
        normalize: default of the parameter, whether the sum is divided by the weights.
        rescale: default of the parameter, whether what is left gets the sum of magnitudes that there was.
    """

    drops: str | None = None
    elects: bool = False
    normalize: bool = False
    rescale: bool = False


FAMILIES = {
    "task_arithmetic": Family(),
    "ties": Family("smallest", elects=True, normalize=True),
    "dare_ties": Family("random", elects=True, rescale=True),
    "dare_linear": Family("random", rescale=True),
    "breadcrumbs": Family("outliers"),
    "breadcrumbs_ties": Family("outliers", elects=True),
    "della": Family("by chance and magnitude", elects=True, normalize=True, rescale=True),
    "della_linear": Family("by chance and magnitude", rescale=True),
}


@dataclass(frozen=True)
class Masks:
    """A method of ours for what a :class:`Family` drops.

    Attributes:
        method: its name.
        option: of it, the number that says so beside the density.
        parameter: the same of mergekit's.
        default: of that.
    """

    method: str
    option: str
    parameter: str
    default: float


MASKS = {
    "outliers": Masks("breadcrumbs", "outliers", "gamma", 0.01),
    "by chance and magnitude": Masks("della", "epsilon", "epsilon", 0.15),
}
# mergekit's other methods, most of which mix the weights of whole models.
WITHOUT_COUNTERPART = (
    *("arcee_fusion", "karcher", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram"),
    *("ramplus_tl", "sce", "slerp"),
)


@dataclass
class Translation:
    """A method of ours.

    Attributes:
        method: its name.
        options: of it.
        notes: what is not the same, or was left out.
    """

    method: str
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Parameters:
    """The numbers of a configuration.

    Attributes:
        shared: parameter -> value, of those that hold for all models.
        of_tasks: task -> parameter -> value.
        of_base: the same of the base where it stands among the models, or None.
    """

    shared: Mapping[str, Any]
    of_tasks: Mapping[str, Mapping[str, Any]]
    of_base: Mapping[str, Any] | None

    def number(self, name: str, task: str, default: float | None = None) -> float:
        value = self.of_tasks[task].get(name, default)
        if value is None:
            raise RecipeError(f"parameters.{name}: expected a number for every model, found none for {task}")
        return _number(name, value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.shared.get(name, default)
        if value not in (True, False):
            raise RecipeError(f"parameters.{name}: expected true or false, found {value!r:.60}")
        return bool(value)


def translated(method: str, parameters: Parameters) -> Translation:
    """The method of ours that computes the same, with its options.

    Raises:
        RecipeError: naming the method or the parameter that has no counterpart, with why and what there is instead.
    """
    if method in FAMILIES:
        found = _of_differences(FAMILIES[method], parameters)
        masks = MASKS.get(FAMILIES[method].drops or "")
        own = ("weight", "density", *((masks.parameter,) if masks else ()))
        return _with_unknown(method, found, parameters, own, ("int8_mask", "normalize", "rescale", "lambda"))
    if method == "linear":
        return _with_unknown(method, _linear(parameters), parameters, ("weight",), ("normalize",))
    if method.startswith(PREFIX):
        return _own(method.removeprefix(PREFIX), parameters)
    if method in WITHOUT_COUNTERPART:
        raise RecipeError(
            f"merge_method: {method} has no counterpart among the methods here; expected one of {_known()}; "
            f"{IN_MERGEKIT}"
        )
    known = [*FAMILIES, "linear", *WITHOUT_COUNTERPART]
    raise RecipeError(
        f"merge_method: expected one of {_known()}, found {method!r:.60}{did_you_mean(method, known)}; {IN_MERGEKIT}"
    )


def _with_unknown(
    method: str, found: Translation, parameters: Parameters, own: Sequence[str], shared: Sequence[str]
) -> Translation:
    """With a note on every parameter that the method does not have, or not for one model; mergekit looks over both."""
    unknown = {name: "" for name in parameters.shared if name not in (*own, *shared)}
    for values in parameters.of_tasks.values():
        for name, value in values.items():
            if name not in own and (name not in parameters.shared or parameters.shared[name] != value):
                unknown.setdefault(name, " for one model" if name in shared else "")
    found.notes += [
        f"mergekit has no parameter {name}{of} in {method}, either: left out." for name, of in unknown.items()
    ]
    return found


def _known() -> str:
    return f"{', '.join([*FAMILIES, 'linear'])} or {PREFIX} with a method of ours"


def _of_differences(family: Family, parameters: Parameters) -> Translation:
    tasks = list(parameters.of_tasks)
    weights = {task: parameters.number("weight", task) for task in tasks}
    density = _one_density(parameters, tasks) if family.drops else 1.0
    factor = _number("lambda", parameters.shared.get("lambda", 1.0))
    normalize = parameters.flag("normalize", family.normalize)
    rescale = parameters.flag("rescale", family.rescale)
    notes = []
    if parameters.flag("int8_mask", False):
        notes.append("int8_mask: left out, it only makes mergekit's masks smaller.")
    drops = family.drops if density < 1 else None
    if drops in ("random", "by chance and magnitude"):
        notes.append("mergekit draws what is dropped in another order: the same chances, other entries.")
    elif family.drops == "random":
        notes.append("At a density of 1 nothing is dropped.")
    if drops in MASKS:
        masks = MASKS[drops]
        beside = _one_number(parameters, masks.parameter, masks.default)
        masked: dict[str, Any] = {"density": density, masks.option: beside}
        masked |= {"rescale": "l1" if rescale else "none", "elect": family.elects}
        masked |= {"aggregate": "weight" if normalize else "sum", "scale": factor, "weights": weights}
        if normalize and not family.elects:
            masked |= {"aggregate": "sum", "weights": {task: w / _divisor(weights) for task, w in weights.items()}}
        return Translation(masks.method, masked, notes)
    if not family.elects:
        total = _divisor(weights) if normalize else 1.0
        shares = {task: factor * weight / total for task, weight in weights.items()}
        if drops is None:
            return Translation("task_arithmetic", {"scale": shares}, notes)
        rescaled = "l1" if rescale else "none"
        return Translation("dare", {"drop": _left(density), "rescale": rescaled, "weights": shares}, notes)
    options: dict[str, Any] = {"preset": "mergekit", "aggregate": "weight" if normalize else "sum"}
    if drops == "random":
        options |= {"drop": _left(density), "rescale": "l1" if rescale else "none"}
    else:
        if drops and rescale:
            _refuse("rescale", "no method here scales up what trimming leaves")
        options["density"] = density
    options |= {"scale": factor, "weights": weights}
    return Translation("dare_ties" if drops == "random" else "ties", options, notes)


def _divisor(weights: Mapping[str, float]) -> float:
    total = sum(weights.values())
    # As mergekit: weights that add up to nothing divide by 1.
    return total if abs(total) >= 1e-8 else 1.0


def _one_number(parameters: Parameters, name: str, default: float) -> float:
    found = {task: parameters.number(name, task, default) for task in parameters.of_tasks}
    if len(set(found.values())) > 1:
        _refuse(name, f"a method here has one {name} for all models, found {found}")
    return next(iter(found.values()))


def _one_density(parameters: Parameters, tasks: Sequence[str]) -> float:
    found = {task: parameters.number("density", task, 1.0) for task in tasks}
    least = min(found.values())
    if least <= 0:
        raise RecipeError(f"parameters.density: expected more than 0, found {found}: nothing would be left")
    # More than all is all.
    if len({min(density, 1.0) for density in found.values()}) > 1:
        _refuse("density", f"a method here has one density for all models, found {found}")
    return min(least, 1.0)


def _left(density: float) -> float:
    """The share that is dropped, without the digits that the subtraction adds."""
    return round(1 - density, 12)


def _linear(parameters: Parameters) -> Translation:
    weights = {task: parameters.number("weight", task) for task in parameters.of_tasks}
    base = 0.0
    if parameters.of_base is not None:
        if "weight" not in parameters.of_base:
            raise RecipeError(
                "parameters.weight: linear takes base_model for one of the models, and asks for its weight, too; leave "
                "base_model out, or put it among the models with a weight (0 leaves the others as they are)"
            )
        base = _number("weight", parameters.of_base["weight"])
    total = base + sum(weights.values())
    if not parameters.flag("normalize", True):
        if abs(total - 1) > 1e-6:
            _refuse("normalize", f"false multiplies the base by the sum of the weights, {total:g}, expected 1")
        total = 1.0
    if abs(total) < 1e-8:
        raise RecipeError("parameters.weight: expected weights with a sum other than 0, which linear divides by")
    return Translation("task_arithmetic", {"scale": {task: weight / total for task, weight in weights.items()}})


def _own(name: str, parameters: Parameters) -> Translation:
    method = METHODS.get(name)
    own = [one.name for one in METHODS.values() if one.updates is not None]
    if method is None or method.updates is None:
        raise RecipeError(
            f"merge_method: expected {PREFIX} and one of {own}, found {PREFIX + name!r:.60}{did_you_mean(name, own)}"
        )
    for task, values in parameters.of_tasks.items():
        # The plug-in has one value of each for all models, and mergekit looks over others.
        for key, value in values.items():
            if key != "weight" and parameters.shared.get(key) != value:
                raise RecipeError(f"parameters.{key}: {PREFIX}{name} has one for all, found {value!r:.60} for {task}")
    options = numbers({key: value for key, value in parameters.shared.items() if key not in ("weight", "tolerance")})
    notes = []
    if "trim_scope" in method.option_names:
        options.setdefault("trim_scope", "tensor")
        notes.append("trim_scope: tensor is what a method in mergekit does; global counts over all modules.")
    weights = {task: parameters.number("weight", task, 1.0) for task in parameters.of_tasks}
    if method.weighted == "scale":
        scale = _number("scale", options.pop("scale", method.resolved({}, list(weights)).scale))
        options["scale"] = {task: scale * weight for task, weight in weights.items()}
    elif "weights" in method.option_names:
        options["weights"] = weights
    elif any(weight != 1 for weight in weights.values()):
        raise RecipeError(f"parameters.weight: {PREFIX}{name} has no weights; expected 1 or none, found {weights}")
    return Translation(name, options, notes)


def _number(name: str, value: Any) -> float:
    # YAML 1.1 takes 1e-3 for text, and mergekit reads it as the number.
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise RecipeError(f"parameters.{name}: expected a number, found {value!r:.60}")


def _refuse(name: str, why: str) -> NoReturn:
    raise RecipeError(f"parameters.{name}: {why}; {IN_MERGEKIT}")
