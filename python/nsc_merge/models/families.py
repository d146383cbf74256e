"""What NSC needs to know about a model architecture: found from the model, corrected by a table of families."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from nsc_merge.adapters.adapter import name_of
from nsc_merge.models.block_finding import described
from nsc_merge.models.traits import type_of
from nsc_merge.utils.option_checks import check_names


@dataclass(frozen=True)
class Family:
    r"""One architecture family: what NSC, match and distillation know of a model.

    It is found from the model, or listed in :data:`FAMILIES`; the option ``family`` overrules either, with a family or
    with some of its fields by name:

    >>> family = nsc_merge.Family(
    ...     name="two heads", model_types=(), block=r"^trunk\.(\d+)\.", score_modules=("attn.value",), recipe="llm",
    ...     tokens="input_ids", mask="attention_mask",
    ... )
    >>> nsc_merge.merge(model, adapters, calibration, family=family)
    >>> nsc_merge.merge(model, adapters, calibration, family={"score_modules": ["mlp.down_proj"]})

    Attributes:
        name: for messages.
        model_types: values of ``model.config.model_type`` that belong to it.
        block: regular expression that finds the block number, as group 1, in a module path. Only the blocks
            that carry adapters may match: in LLaVA those of the language model, not of the vision tower.
        score_modules: names of linears, or ends of their paths, in order of preference; by default the input of the
            first one that an adapter touches is measured.
        recipe: default settings of the optimisation, a key of :data:`nsc_merge.methods.gradient.nsc_options.RECIPES`.
        prefill: attribute of the model that runs the blocks without a head; a model without it has no head.
            transformers' ``base_model``, but for classes where some releases take that for the whole model.
        frozen_prefix: path, below the ``prefill`` module, of a tower without adapters that comes before the
            blocks and whose output depends on the inputs alone; see :func:`frozen_tower`.
        tokens: name of the model input that holds token numbers ``[rows, tokens]``, if the family has it. Padding
            after the last token changes nothing before it: the model is causal, or heeds the mask.
        mask: name of the model input that is 0 at padding, if the family pads.
        images: names of the model inputs that hold images, where the tokens stand for text and images.
        legacy: pairs of regular expression and replacement that bring module paths of adapters saved by other
            releases of transformers to this one's names; applied in order, and only where a path is not found.
        unmasked: path of a tower beside the one that reads the tokens, whose positions no mask speaks of.
        causal: whether the model answers from the last token, and not from all or the first.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    score_modules: tuple[str, ...]
    recipe: str
    prefill: str = "base_model"
    frozen_prefix: str | None = None
    tokens: str | None = None
    mask: str | None = None
    images: tuple[str, ...] = ()
    legacy: tuple[tuple[str, str], ...] = ()
    unmasked: str | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("model_types", "score_modules", "images"):
            if getattr(self, name):
                check_names(name, getattr(self, name))
            # As a recipe lists them.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        try:
            groups = re.compile(self.block).groups
        except (re.error, TypeError):
            groups = 0
        if groups != 1:
            raise ValueError(
                f"family: expected block to be a regular expression with one group, the block's number, found "
                rf"{self.block!r}; for example '^model\.layers\.(\d+)\.'"
            )


_OLD_VIT = (
    (r"(^|\.)encoder\.layer\.(?=\d+\.)", r"\1layers."),
    (r"\.attention\.attention\.(query|key|value)$", r".attention.\1"),
    (r"\.attention\.query$", ".attention.q_proj"),
    (r"\.attention\.key$", ".attention.k_proj"),
    (r"\.attention\.value$", ".attention.v_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"\.output\.dense$", ".mlp.fc2"),
)

_NEW_DINOV2 = (
    (r"\.attention\.q_proj$", ".attention.attention.query"),
    (r"\.attention\.k_proj$", ".attention.attention.key"),
    (r"\.attention\.v_proj$", ".attention.attention.value"),
    (r"\.attention\.o_proj$", ".attention.output.dense"),
)

# To add a family: name its model types, say where the block number stands in a path, which linear the paper
# measures for that kind of model, and the recipe. The rest only matters if the family pads (tokens, mask), has a
# tower in front (frozen_prefix, images) or was once laid out otherwise (legacy).
FAMILIES = (
    Family(
        name="ViT",
        model_types=("vit",),
        block=r"(?:^|\.)layers\.(\d+)\.",
        score_modules=("o_proj", "v_proj", "k_proj", "q_proj"),
        recipe="vision",
        legacy=_OLD_VIT,
    ),
    Family(
        name="CLIP or SigLIP vision",
        model_types=("clip_vision_model", "siglip_vision_model"),
        block=r"(?:^|\.)layers\.(\d+)\.",
        score_modules=("out_proj", "v_proj", "k_proj", "q_proj"),
        recipe="vision",
        # In transformers 5.17 the base_model of CLIPVisionModelWithProjection is the model with its projection.
        prefill="vision_model",
        legacy=((r"^vision_model\.", ""),),
    ),
    Family(
        name="DINOv2",
        model_types=("dinov2",),
        block=r"(?:^|\.)layer\.(\d+)\.",
        # Either naming, as the release of transformers has it: 5.17 (docs/gpu.md) has the older.
        score_modules=("o_proj", "dense", "v_proj", "value", "k_proj", "key", "q_proj", "query"),
        recipe="vision",
        # Its blocks are still called encoder.layer, so the first of ViT's rules does not apply.
        legacy=(*_OLD_VIT[1:], *_NEW_DINOV2),
    ),
    Family(
        name="decoder",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        block=r"(?:^|\.)layers\.(\d+)\.",
        score_modules=("v_proj", "o_proj", "k_proj", "q_proj"),
        recipe="llm",
        tokens="input_ids",
        mask="attention_mask",
    ),
    Family(
        name="LLaVA",
        model_types=("llava",),
        block=r"(?:^|\.)language_model\.layers\.(\d+)\.",
        score_modules=("v_proj", "o_proj", "k_proj", "q_proj"),
        recipe="vlm",
        frozen_prefix="vision_tower",
        tokens="input_ids",
        mask="attention_mask",
        images=("pixel_values", "image_sizes"),
        legacy=(
            (r"^language_model\.lm_head$", "lm_head"),
            (r"^(model\.)?language_model\.model\.", "model.language_model."),
            # Saved by the authors' own repository rather than by transformers.
            (r"^model\.layers\.", "model.language_model.layers."),
            (r"^(?=vision_tower\.|multi_modal_projector\.|language_model\.)", "model."),
            (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
            (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
            # A sequence of linear, activation and linear there.
            (r"^model\.mm_projector\.0$", "model.multi_modal_projector.linear_1"),
            (r"^model\.mm_projector\.2$", "model.multi_modal_projector.linear_2"),
        ),
    ),
)


def frozen_tower(family: Family, model: nn.Module, adapted: Iterable[str]) -> str | None:
    """Full path in ``model`` of the family's adapter-free tower, None if there is none or it is adapted.

    Args:
        adapted: paths of all linears that carry an adapter.
    """
    if family.frozen_prefix is None:
        return None
    trunk = getattr(model, family.prefill, model)
    tower = getattr(trunk, family.frozen_prefix, None)
    path = next((name for name, module in model.named_modules() if module is tower), None)
    if path is None or any(name.startswith(f"{path}.") for name in adapted):
        return None
    return path


def find_family(model: nn.Module, adapted: Collection[str] | None = None) -> Family | None:
    """The family that lists the model's ``config.model_type``, or what is found from the model itself; None if there
    are no blocks in it.

    Args:
        adapted: paths of the linears that carry an adapter, which must be in the blocks; all linears when None.
    """
    listed = next((family for family in FAMILIES if type_of(model) in family.model_types), None)
    if listed is not None:
        return listed
    found = described(model, adapted)
    return None if found is None else Family(**found)


def family_of(
    model: nn.Module, adapted: Collection[str] | None = None, given: Family | Mapping[str, Any] | None = None
) -> Family:
    """The family of a model, as :func:`find_family`, unless it is ``given``, or some of its fields are.

    Raises:
        ValueError: if nothing is given and no list of blocks holds an adapted linear, or if what is given is no family.
    """
    if isinstance(given, Family):
        return given
    check_family(given)
    family = find_family(model, adapted)
    if family is None:
        if given is not None and {"block", "score_modules"} <= set(given):
            return Family(**{"name": "given", "model_types": (), "recipe": "llm", **given})
        raise ValueError(
            f"model: {type(model).__name__} (config.model_type {type_of(model) or None!r}) has no nn.ModuleList "
            "or nn.Sequential of blocks of one class that holds an adapted linear; say where its blocks are by family, "
            r"for example family={'block': r'^trunk\.(\d+)\.', 'score_modules': ['value']}"
        )
    return family if given is None else replace(family, **given)


def check_family(given: Any) -> None:
    """Refuse an option ``family`` that is neither a family nor some of its fields by name.

    Raises:
        TypeError, ValueError: naming what was found and what was expected.
    """
    if given is None or isinstance(given, Family):
        return
    names = [field.name for field in fields(Family)]
    if not isinstance(given, Mapping):
        raise TypeError(f"family: expected a Family or a mapping of its fields, found {given!r:.60}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"family: {unknown[0]!r} is no field of a Family; expected some of {names}")


def plain_family(given: Any) -> Any:
    """An option ``family`` as values that JSON and YAML can hold."""
    if isinstance(given, Family):
        given = {field.name: getattr(given, field.name) for field in fields(Family)}
    return given and {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def family_said(family: Family) -> str:
    """What is known of a model, in a line."""
    reads = [name for name in (family.tokens, family.mask, *family.images) if name]
    return (
        f"{family.name}: blocks {family.block}, measured {family.score_modules[0]}, "
        f"inputs {', '.join(reads) or 'without tokens'}; the option family overrules it"
    )


def _is_called(model: nn.Module, path: str, names: Iterable[str]) -> bool:
    """Whether a path ends in one of these names, or makes the values there: a projection of keys beside which that of
    values is None, as in the global attention of Gemma 4, which takes its keys for values.
    """
    ends = tuple(f".{name}" for name in names)
    above, _, last = path.rpartition(".")
    keys = last == "k_proj" and getattr(model.get_submodule(above), "v_proj", model) is None
    return path.endswith(ends) or (keys and f".{above}.v_proj".endswith(ends))


def scored_paths(
    family: Family,
    model: nn.Module,
    adapted: Iterable[str],
    score_modules: Sequence[str] | None,
    score_blocks: str | int | Sequence[int],
) -> list[str]:
    """Paths of the adapted linears whose input enters the objective, the set J_tgt of Eq. 4.

    Args:
        adapted: paths of all linears that carry an adapter.
        score_modules: last components or ends of the paths; the first of the family's that occurs in a list of blocks
            when None. ``v_proj`` is also the ``k_proj`` of a layer whose keys are its values.
        score_blocks: ``"last_quarter"`` (rounded up), how many last blocks, or block numbers.

    Raises:
        ValueError: naming the option, if it selects nothing or a block that does not exist.
    """
    if score_modules is not None:
        check_names("score_modules", score_modules)
    pattern = re.compile(family.block)
    # Where there are several lists of blocks, as in two towers, each has its own depth.
    depths: dict[str, int] = {}
    for path, _ in model.named_modules():
        if match := pattern.search(f"{path}."):
            if not (match[1] or "").isdecimal():
                raise ValueError(
                    f"family: expected the group of block to be a number, found {match[1]!r} in {path!r} by "
                    f"{family.block!r}"
                )
            begin = path[: match.start(1)]
            depths[begin] = max(depths.get(begin, 0), int(match[1]) + 1)
    count = max(depths.values(), default=0)
    if score_blocks == "last_quarter":
        blocks = {begin: set(range(depth - math.ceil(depth / 4), depth)) for begin, depth in depths.items()}
    elif isinstance(score_blocks, int) and not isinstance(score_blocks, bool):
        if not 1 <= score_blocks <= count:
            raise ValueError(f"score_blocks: expected 1 to {count} last blocks, found {score_blocks}")
        blocks = {begin: set(range(max(depth - score_blocks, 0), depth)) for begin, depth in depths.items()}
    elif isinstance(score_blocks, Sequence) and not isinstance(score_blocks, str):
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in score_blocks)
        if not whole or not score_blocks or not set(score_blocks) <= set(range(count)):
            raise ValueError(
                f"score_blocks: expected block numbers from 0 to {count - 1}, found {list(score_blocks)}"
            )
        blocks = {begin: set(score_blocks) for begin in depths}
    else:
        raise ValueError(f"score_blocks: expected 'last_quarter', a number or a list, found {score_blocks!r}")

    adapted = list(adapted)
    inside = [
        path
        for path in adapted
        if (match := pattern.search(f"{path}.")) and int(match[1]) in blocks[path[: match.start(1)]]
    ]
    choices = (
        [tuple(score_modules)] if score_modules is not None else [(name,) for name in family.score_modules]
    )
    chosen: set[str] = set()
    # Two towers may call the same thing by other names, as Chinese CLIP's do.
    for begin in blocks:
        here = [path for path in inside if path.startswith(begin)]
        picks = ([path for path in here if _is_called(model, path, names)] for names in choices)
        chosen.update(next((pick for pick in picks if pick), []))
    if chosen:
        return [path for path in inside if path in chosen]
    wanted = [name for names in choices for name in names]
    carried, tried = sorted({name_of(path) for path in adapted}), sorted(set().union(*blocks.values()))
    raise ValueError(
        f"score_modules: no adapter touches {wanted} in blocks {tried}; adapted modules: {carried}; expected some of "
        "these, or other blocks by score_blocks"
    )
