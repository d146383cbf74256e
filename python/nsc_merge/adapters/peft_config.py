"""What an adapter's configuration means: refused where it is no plain LoRA; modules, rank and scaling."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nsc_merge.adapters.adapter import parameters_of, unwrapped
from nsc_merge.adapters.module_patterns import ModulePatterns
from nsc_merge.utils.errors import naming

# Settings under which an adapter is no longer the plain update s B A of one nn.Linear.
_REFUSED = {
    "use_dora": "DoRA rescales each row of the whole weight; dora='exact' merges it as it is where a merge is made, "
    "dora='convert' approximates what it changes by LoRA of the same rank, and notes the error",
    "use_qalora": "QALoRA pools the input of lora_A, which is then not the layer's own input",
    "use_bdlora": "block-diagonal factors are not supported",
    "arrow_config": "Arrow routes every token to adapters of its own choice and has no merge coefficient",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "alora_invocation_tokens": "activated LoRA is switched on by tokens and cannot be folded into weights",
    "layer_replication": "replicated layers are not in the base model",
}
# Initialisations that move a part of the base weights into the factors.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Other kinds of adapters: tokens in front of the input, those that weigh adapters anew for every input, and those that
# PEFT's save_as_lora takes.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE")
_BY_INPUT = ("XLORA", "POLY", "SHADOW")
_CONVERTED = (
    *("C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA"),
    *("VBLORA", "VERA", "WAVEFT"),
)
# What LoraConfig of PEFT 0.21 and earlier ones holds beside, of which none changes what trained factors mean.
_HARMLESS = frozenset(
    (
        *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
        *("target_parameters", "trainable_token_indices", "init_lora_weights", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "megatron_config", "megatron_core", "runtime_config"),
        *("qalora_group_size", "merge_weights", "enable_lora"),
    )
)
_SWITCHES = ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")


def check_config(name: str, config: Mapping[str, Any], dora: str) -> None:
    """Refuse a configuration that is not of plain LoRA, or whose values are none that PEFT writes.

    Args:
        name: of the task, for messages.
        config: as in ``adapter_config.json``.
        dora: ``"refuse"`` lets no DoRA pass.

    Raises:
        ValueError: naming the setting, what was found and what was expected.
    """
    _check_types(name, config)
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise ValueError(f"adapters[{name!r}]: peft_type: expected 'LORA', found {kind!r:.60}{_cure(kind)}")
    for setting, reason in _REFUSED.items():
        if config.get(setting) and not (setting == "use_dora" and dora != "refuse"):
            raise ValueError(
                f"adapters[{name!r}]: {setting}={config[setting]!r:.60} is refused: {reason}; expected plain LoRA on "
                "modules (target_modules); leave this task out of the merge, and serve its adapter by itself"
            )
    known = {*_SWITCHES, *_REFUSED}
    unknown = [key for key, value in config.items() if str(key).startswith("use_") and value and key not in known]
    if unknown:
        raise ValueError(
            f"adapters[{name!r}]: {unknown[0]}={config[unknown[0]]!r:.60} is refused: a kind of LoRA that this "
            "release does not know; expected plain LoRA"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"adapters[{name!r}]: init_lora_weights={start!r:.60} is refused: training started by changing the "
            "base weights. PEFT writes an equivalent plain adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"adapters[{name!r}]: bias: expected 'none', found {config['bias']!r:.60}: the base's biases were "
            "trained; train with bias='none' (lora_bias=True gives LoRA its own), or leave this task out of the merge"
        )


def _cure(kind: Any) -> str:
    """The way from an adapter of another kind to LoRA."""
    if not isinstance(kind, str):
        return ""
    if kind.endswith(_PROMPTS):
        return ", which changes what the model reads and no weight; leave this task out of the merge"
    if kind in _BY_INPUT:
        own = "; the adapters that it weighs have folders of their own: give one of them" if kind == "XLORA" else ""
        return f", which is something else for every input and no update of weights{own or '; leave this task out'}"
    if kind in _CONVERTED:
        return "; PEFT makes LoRA of it: peft.save_as_lora(FOLDER, peft_model, rank=RANK)"
    return (
        ", of which PEFT makes no LoRA; peft_model.merge_and_unload() makes a whole model of it, of which "
        "mergekit-extract-lora takes the difference from the base as LoRA"
    )


def unknown_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on settings that have a value and are none that this release knows, as of a newer PEFT; none if there is
    nothing to note.
    """
    known = {*_HARMLESS, *_SWITCHES, *_REFUSED}
    unknown = sorted(str(key) for key, value in config.items() if value and key not in known)
    found = [key if key.isidentifier() else repr(key) for key in unknown]
    if not found:
        return ()
    made = config.get("peft_version")
    by = f", which PEFT {' '.join(str(made).split()):.20} wrote" if made else ""
    return (
        f"{', '.join(found):.200} of the configuration{by}: not known here and without effect; where that is another "
        "kind of LoRA than A and B by alpha / r, the merge is of something else",
    )


def _check_types(name: str, config: Mapping[str, Any]) -> None:
    def refuse(setting: str, expected: str) -> None:
        raise ValueError(f"adapters[{name!r}]: {setting}: expected {expected}, found {config[setting]!r:.60}")

    for setting in _SWITCHES:
        if not isinstance(config.get(setting), bool | None):
            refuse(setting, "true or false")
    for setting in ("rank_pattern", "alpha_pattern"):
        held = config.get(setting) or {}
        if not isinstance(held, Mapping) or not all(isinstance(pattern, str) for pattern in held):
            refuse(setting, "patterns and numbers")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list | tuple | set) or not all(isinstance(one, str) and one for one in whole):
        refuse("modules_to_save", "names")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list | tuple | set) or not all(isinstance(one, str) and one for one in parameters):
        refuse("target_parameters", "names")
    for setting in ("target_modules", "exclude_modules", "layers_pattern"):
        held = config.get(setting)
        names = isinstance(held, list | tuple | set) and all(isinstance(one, str) for one in held)
        if not names and not isinstance(held, str | None):
            refuse(setting, "a name or names")
    layers = config.get("layers_to_transform")
    whole_numbers = layers if isinstance(layers, list | tuple | set) else [layers]
    if layers is not None and not all(type(one) is int for one in whole_numbers):
        refuse("layers_to_transform", "whole numbers")
    rows = config.get("trainable_token_indices")
    lists = list(rows.values()) if isinstance(rows, Mapping) else [] if rows is None else [rows]
    if not all(isinstance(one, list | tuple) and all(type(at) is int and at >= 0 for at in one) for one in lists):
        refuse("trainable_token_indices", "whole numbers, or lists of them by module")
    for setting in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(config.get(setting), str | None):
            refuse(setting, "text")
    if not isinstance(config.get("init_lora_weights"), str | bool | None):
        refuse("init_lora_weights", "true, false or a name")


def check_targets(name: str, config: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuse tensors of modules that the configuration does not select: PEFT would leave them out with a warning.

    PEFT's rule: a name selects what ends with it, in ``layers_to_transform`` where these are given; a regular
    expression what it matches in whole; ``exclude_modules`` takes away. An expression with look-around or
    back-references, and a ``layers_pattern`` that is no name, are not followed: they are taken to select everything.

    Raises:
        ValueError: naming a module and the setting.
    """
    selects, excludes = _selection(config.get("target_modules")), _selection(config.get("exclude_modules"))
    for path in paths:
        left_out = excludes is not None and excludes(path)
        if not left_out and (selects is None or (selects(path) and _is_of_layers(path, config))):
            continue
        setting = "exclude_modules" if left_out else "target_modules"
        raise ValueError(
            f"adapters[{name!r}]: {path} has tensors, but is left out by {setting}={config[setting]!r:.60}, so that "
            "PEFT would not load them; expected the configuration of these weights, by the names that they have"
        )


def token_indices(config: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """The tokens whose rows an adapter trained in an embedding or head; none if its configuration names none there."""
    held = config.get("trainable_token_indices")
    if not isinstance(held, Mapping):
        return tuple(held or ())
    return next((tuple(indices) for end, indices in held.items() if path.endswith(end)), ())


def is_within(path: str, modules: tuple[str, ...]) -> bool:
    """PEFT's rule for ``modules_to_save``: a module counts if its path ends with one of the names."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(modules) for end in range(1, len(parts)))


def is_announced(part: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration announces this kind of tensor; another would be ignored by PEFT too."""
    needs = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
    return part not in needs or bool(config.get(needs[part]))


def owns_parameter(config: Mapping[str, Any], path: str) -> bool:
    """Whether LoRA at a path is on a parameter of the module there (``target_parameters``), and not on the module."""
    module, targets = unwrapped(path), config.get("target_parameters") or ()
    if parameters_of(module, [target for target in targets if "." in target]):
        return True
    # A name alone may be of any module that is none of target_modules.
    selects = _selection(config.get("target_modules"))
    return bool(parameters_of(module, targets)) and not (selects and selects(module))


def _selection(setting: Any) -> Callable[[str], bool] | None:
    """Whether ``target_modules`` or ``exclude_modules`` selects a path; None if that is not said, or not followed."""
    if not setting or (isinstance(setting, str) and setting.lower() == "all-linear"):
        return None
    if not isinstance(setting, str):
        names = frozenset(setting)
        return lambda path: path in names or any(end in names for end in _ends(path))
    return _matching(setting)


# Asked for every module, where large expressions take a second to read.
@functools.lru_cache(maxsize=8)
def _matching(expression: str) -> Callable[[str], bool] | None:
    try:
        pattern = ModulePatterns({f"^(?:{expression})": True})
        pattern.value("", False)
    except ValueError:
        return None
    return lambda path: pattern.value(path, False)


def _ends(path: str) -> Iterator[str]:
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def _is_of_layers(path: str, config: Mapping[str, Any]) -> bool:
    """Whether the first number in a path is one of ``layers_to_transform``, where names are chosen by these."""
    chosen, under = config.get("layers_to_transform"), config.get("layers_pattern") or []
    targets = config.get("target_modules")
    if chosen in (None, []) or isinstance(targets, str) or path in (targets or ()):
        return True
    names = [under] if isinstance(under, str) else under
    if not all(re.fullmatch(r"[\w-]+", one) for one in names):
        return True
    parts = path.split(".")
    for number in range(1 if names else 2, len(parts) - 1):
        if parts[number].isdecimal() and (not names or parts[number - 1] in names):
            return int(parts[number]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False


class Scalings:
    """Rank and scaling of every module, by ``r``, ``lora_alpha``, their patterns and ``use_rslora``.

    Args:
        name: of the task, for messages.
        config: that :func:`check_config` let pass.

    Raises:
        ValueError: naming a pattern that cannot be matched, or its value.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name, self._config = name, config
        self._patterns = {}
        for setting in ("rank_pattern", "alpha_pattern"):
            held = config.get(setting) or {}
            for pattern, value in held.items():
                self._check(setting.replace("_pattern", ""), f"{setting}[{pattern!r:.60}]", value)
            with naming(f"adapters[{name!r}]: {setting}"):
                self._patterns[setting] = ModulePatterns(held)

    def of(self, path: str) -> tuple[int, float]:
        """Rank and scaling of one module: alpha / r, or alpha / sqrt(r) for rsLoRA.

        Raises:
            ValueError: naming the setting, if it is no positive number.
        """
        rank = self._value("rank_pattern", path, "r")
        alpha = self._value("alpha_pattern", path, "lora_alpha")
        return rank, alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _value(self, setting: str, path: str, default: str) -> Any:
        with naming(f"adapters[{self._name!r}]: {setting}"):
            value = self._patterns[setting].value(path, self._config.get(default))
        self._check(setting.replace("_pattern", ""), f"{default} of {path}", value)
        return value

    def _check(self, kind: str, what: str, value: Any) -> None:
        whole = kind == "rank"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        # Not further than sizes of tensors go, or float64, in which scalings are computed.
        if not number or not 0 < value <= (sys.maxsize if whole else sys.float_info.max):
            expected = "a positive whole number" if whole else "a positive number"
            raise ValueError(f"adapters[{self._name!r}]: {what}: expected {expected}, found {value!r:.60}")
