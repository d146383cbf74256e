"""The heads that tasks brought: what their outputs are called, and a merged model with one of them in place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nsc_merge.models.bases.sharded import class_name
from nsc_merge.models.merged.matrices import matrix_at
from nsc_merge.results.layout import HEADS_FOLDER, file_names
from nsc_merge.results.merged_update import MergedUpdate

Update = TypeVar("Update", bound=MergedUpdate)

# Where transformers lists the classes that put a classifier on a model: tables of model type -> class.
_CLASSIFIERS = (
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
)
# What transformers notes on a model about how its weights are held.
_HELD = (
    "hf_device_map",
    "hf_quantizer",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
)


@dataclass(frozen=True)
class Head:
    """One task's head.

    Attributes:
        tensors: path of a parameter or buffer in a model of class ``kind`` -> value.
        kind: class of transformers that has a place for it; None if there is none.
        layer: the weight with one output per class, if it is a classifier.
        beside: how many outputs it has beside those: one where a detector says that there is nothing.
        labels: names of the classes in order; empty if it is no classifier.
        named: whether somebody gave these names, and they are not just numbered.
        problem_type: as in a configuration of transformers, where the base says it.
    """

    tensors: Mapping[str, Tensor]
    kind: str | None
    layer: str | None = None
    beside: int = 0
    labels: tuple[str, ...] = ()
    named: bool = False
    problem_type: str | None = None

    def modules(self, model: nn.Module) -> list[str]:
        """Paths of what PEFT keeps in full: a head is the module right below the model; within its trunk, as timm has
        it, or where something in it ends with its name, which PEFT would keep as well, what owns the tensors.
        """
        trunk = f"{getattr(model, 'base_model_prefix', '')}."
        inner = [path for path, _ in model.named_modules() if "." in path]

        def owner(name: str) -> str:
            top = name.partition(".")[0]
            nested = any(path.startswith(f"{top}.") and path.endswith(top) for path in inner)
            return name.rpartition(".")[0] if nested or name.startswith(trunk) else top

        return list(dict.fromkeys(map(owner, self.tensors)))

    def document(self) -> dict[str, Any]:
        """What a configuration of transformers says of the head, and the class that it is of."""
        return {
            "architecture": self.kind,
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        }


def heads_of(result: MergedUpdate, labels: Mapping[str, Sequence[str]] | None = None) -> dict[str, Head]:
    """Task -> its head, of the tasks that brought one.

    Args:
        labels: task -> names of the classes in order. Of other tasks they are those of the adapter's folder, or the
            base's own where these are as many; else they are numbered, as in transformers.

    Raises:
        ValueError: naming the task, if it brought no classifier, or one of another number of classes.
    """
    brought = {task: adapter.trained for task, adapter in result.adapters.items() if adapter.trained}
    given = dict(labels or {})
    for task in given:
        if task not in brought:
            raise ValueError(
                f"labels[{task!r}]: expected a task that brought a head, of {list(brought)}, found one without: leave "
                "it out"
            )
    found = {task: _placed(result.model, tensors) for task, tensors in brought.items()}
    return {task: _labelled(result, task, head, given.get(task)) for task, head in found.items()}


def _placed(model: nn.Module, tensors: Mapping[str, Tensor]) -> Head:
    """A head, with the class that has a place for it and its last layer there."""
    config = getattr(model, "config", None)
    held = _state(model, remove_duplicate=False)
    if held.keys() >= tensors.keys():
        count = getattr(config, "num_labels", None)
        layer, beside = _last_layer(tensors, held, count) if hasattr(model, "save_pretrained") and count else (None, 0)
        problem = getattr(config, "problem_type", None)
        return Head(tensors, class_name(model), layer, beside, problem_type=problem)
    for kind in _classifiers_of(model):
        for count in sorted({value.shape[0] for value in tensors.values() if value.dim() > 1}):
            try:
                twin = _empty(kind, model, {"num_labels": count})
            except Exception:
                # A class may want more of a configuration than the base's says, in any way that it likes.
                break
            prefix = f"{twin.base_model_prefix}."
            places = {name: value for name, value in _state(twin).items() if not name.startswith(prefix)}
            if {name: value.shape for name, value in places.items()} == {n: v.shape for n, v in tensors.items()}:
                layer = [name for name, value in places.items() if value.dim() > 1 and value.shape[0] == count][-1]
                return Head(tensors, kind.__name__, layer)
    return Head(tensors, None)


def _last_layer(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor], count: int) -> tuple[str | None, int]:
    """The weight among a head's with one output per class of the base, and how many outputs it has beside those."""
    many = [name for name, value in held.items() if name in tensors and value.dim() > 1]
    found = {beside: [name for name in many if held[name].shape[0] == count + beside] for beside in (0, 1)}
    # A detector's boxes have four outputs, however many classes there are.
    for beside, names in found.items():
        if named := [name for name in names if "class" in name]:
            return named[-1], beside
    return (found[0][-1] if found[0] else None), 0


def _classifiers_of(model: nn.Module) -> Iterator[Any]:
    """Classes of transformers that put a classifier on the trunk of a model."""
    import transformers
    from transformers.models.auto import modeling_auto

    if not isinstance(model, transformers.PreTrainedModel):
        return
    for table in _CLASSIFIERS:
        names = getattr(modeling_auto, table).get(model.config.model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            yield getattr(transformers, name)


def _labelled(result: MergedUpdate, task: str, head: Head, given: Sequence[str] | None) -> Head:
    if head.layer is None:
        if given is not None:
            raise ValueError(
                f"labels[{task!r}]: expected none, as the head that the task brought is no classifier that is known; "
                f"found {len(given)}"
            )
        return head
    count = head.tensors[head.layer].shape[0] - head.beside
    if head.problem_type == "single_label_classification" and count == 1:
        head = replace(head, problem_type="regression")
    if given is not None:
        _check(task, given, count)
        return replace(head, labels=tuple(given), named=True)
    own: Mapping[int, str] = getattr(getattr(result.model, "config", None), "id2label", None) or {}
    for names in (result.adapters[task].about.id2label, own):
        if set(names) == set(range(count)):
            labels = tuple(str(names[number]) for number in range(count))
            numbered = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
            return replace(head, labels=labels, named=not numbered)
    return replace(head, labels=tuple(f"LABEL_{number}" for number in range(count)))


def _check(task: str, given: Sequence[str], count: int) -> None:
    if isinstance(given, str) or not all(isinstance(label, str) and label for label in given):
        raise ValueError(f"labels[{task!r}]: expected a list of names, found {given!r:.60}")
    if len(given) != count:
        raise ValueError(f"labels[{task!r}]: expected {count} names, one per output of its head, found {len(given)}")
    twice = next((label for label in given if list(given).count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"labels[{task!r}]: expected different names, found {twice!r} more than once")


def write_heads(result: MergedUpdate, heads: Mapping[str, Head], folder: Path) -> None:
    """Write ``heads/<task>.safetensors``, and of a classifier ``heads/<task>.json`` with its classes."""
    from safetensors.torch import save_file

    names = file_names(result.adapters)
    for task, head in heads.items():
        file = folder / HEADS_FOLDER / f"{names[task]}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in head.tensors.items()}, file)
        if head.labels:
            text = json.dumps(head.document(), indent=2, ensure_ascii=False) + "\n"
            file.with_name(f"{names[task]}.json").write_text(text, encoding="utf-8")


def with_head(result: Update, task: str, head: Head) -> Update:
    """The result with a model that has a task's head in place, in the class that it is for and with its labels: a model
    of its own that shares all other weights with the base.

    Raises:
        ValueError: naming what the class needs beside the head and the base lacks, or an adapted module that it lacks.
    """
    import transformers

    model: Any = result.model
    if head.kind is None or not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"head: {class_name(model)} has no place for {next(iter(head.tensors))!r} of task {task!r}, and no "
            "classifier that transformers puts on it has; expected a head that the base has, or none"
        )
    same = head.kind == class_name(model)
    twin = _twin(model, head)
    prefix = twin.base_model_prefix
    trunk = getattr(model, model.base_model_prefix, model)
    own = {name for name, _ in model.named_children()}
    for name, child in list(twin.named_children()):
        if name == prefix:
            _share(child, trunk, [path[len(prefix) + 1 :] for path in head.tensors if path.startswith(f"{prefix}.")])
        elif name in own and not any(path.startswith(f"{name}.") for path in head.tensors):
            setattr(twin, name, model.get_submodule(name))
    held = _state(model, remove_duplicate=False)
    shared = {id(value) for value in held.values()}
    for path, value in _state(twin, remove_duplicate=False).items():
        if id(value) in shared:
            continue
        number = head.tensors.get(path, held.get(path))
        if number is None or number.shape != value.shape:
            raise ValueError(
                f"head: {head.kind} has {path} {list(value.shape)}, and task {task!r} and the base bring no such "
                f"tensor; expected a head with all that belongs to it, or a base that was saved as {head.kind}"
            )
        owner, _, name = path.rpartition(".")
        if path in head.tensors:
            number = number.to(model.dtype if number.is_floating_point() else number.dtype).contiguous()
            number = nn.Parameter(number, requires_grad=False) if isinstance(value, nn.Parameter) else number
        setattr(twin.get_submodule(owner), name, number)
    for name in _HELD:
        if name in vars(model):
            setattr(twin, name, getattr(model, name))
    moved = trunk is model and not same
    return _renamed(result, twin.eval(), f"{prefix}." if moved else "")


def lacked(model: nn.Module, head: Head) -> list[str]:
    """What the class of a head has beside it, and the base lacks: transformers would draw that at random."""
    twin = _twin(model, head)
    front = f"{twin.base_model_prefix}." if getattr(model, "base_model", None) is model else ""
    held = {f"{front}{name}" for name in _state(model, remove_duplicate=False)} | set(head.tensors)
    return [name for name in _state(twin, remove_duplicate=False) if name not in held]


def _twin(model: Any, head: Head) -> Any:
    """A model of the class that a head is for, with its labels, without numbers."""
    import transformers

    named = {name: value for name, value in head.document().items() if name in ("id2label", "label2id")}
    settings = {**named, "problem_type": head.problem_type} if head.labels else {}
    if head.labels and hasattr(model.config, "label_names"):
        # Where a configuration of timm's models keeps them.
        settings["label_names"] = list(head.labels)
    return _empty(getattr(transformers, str(head.kind), type(model)), model, settings)


def _state(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Parameters, and the buffers that are saved with them, such as the statistics of a BatchNorm."""
    buffers = dict(model.named_buffers(remove_duplicate=remove_duplicate))
    saved = model.state_dict(keep_vars=True).keys() if buffers else ()
    kept = {name: value for name, value in buffers.items() if name in saved}
    return {**dict(model.named_parameters(remove_duplicate=remove_duplicate)), **kept}


def _empty(kind: Any, model: Any, settings: Mapping[str, Any]) -> Any:
    """A model of a class, without numbers, by the base's configuration with other settings."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return kind(config)


def _share(place: nn.Module, trunk: nn.Module, apart: Sequence[str]) -> None:
    """Put all that is in a trunk into another of its class, which may lack a part of it, such as a pooler; but for what
    holds the tensors ``apart``.
    """
    for name, _ in list(place.named_children()):
        if any(path.startswith(f"{name}.") for path in apart):
            continue
        if (child := getattr(trunk, name, None)) is not None:
            setattr(place, name, child)
    for held in ("_parameters", "_buffers"):
        for name in getattr(place, held):
            if getattr(trunk, name, None) is not None:
                getattr(place, held)[name] = getattr(trunk, name)


def _renamed(result: Update, model: nn.Module, prefix: str) -> Update:
    """The result on another model, in which every linear, and every expert, lies behind a prefix."""
    there = {path for path, _ in model.named_modules()}
    behind = ((path, f"{prefix}{path}") for path in result.paths)
    lost = next((path for path, name in behind if name not in there and matrix_at(model, name) is None), None)
    if lost is not None:
        raise ValueError(
            f"head: {lost} is adapted, and {class_name(model)} has no such module; expected a head of "
            f"{class_name(result.model)}, or none"
        )
    if not prefix:
        return replace(result, model=model)

    def moved(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{prefix}{path}": value for path, value in mapping.items()}

    return replace(
        result,
        model=model,
        adapters={task: replace(one, factors=moved(one.factors)) for task, one in result.adapters.items()},
        coefficients=moved(result.coefficients),
        factors=moved(result.factors),
    )
