"""FusionBench: our methods as an algorithm over its model pools, pools that keep adapters, and its layer-wise
AdaMerging on LoRA factors.

    fusion_bench method._target_=nsc_merge.integrations.fusion_bench.NSCMerging +method.method=ties modelpool=...

or, in Python,

    model = NSCMerging("knots_ties", {"scale": 0.3}).run(modelpool)

Where this is imported, FusionBench is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from fusion_bench.compat.method import load_algorithm_from_config
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins.serialization import auto_register_config
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool, Seq2SeqLMPool
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel as TheirLayerWiseMergedModel
from fusion_bench.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import nsc_merge
from nsc_merge.adapters import Adapter
from nsc_merge.integrations.fusion_bench_layerwise import LayerWiseFactors
from nsc_merge.integrations.fusion_bench_sources import as_factors, batches_of, is_dense, merged_into, updates_of
from nsc_merge.methods import Method, method_of
from nsc_merge.results.result import MergeResult

PRETRAINED = "_pretrained_"
# FusionBench's functions that load a model with an adapter, and their argument that says where the adapter is.
_LOADERS = {"load_lora_model": "peft_model_path", "load_lora_vision_model_hf": "peft_name"}


@auto_register_config
class NSCMerging(BaseAlgorithm):
    """Any merge method of :func:`nsc_merge.merge` over a model pool.

    Adapters are taken as factors from a :class:`LoRAPool`, from a pool whose configuration says where they are
    (``load_lora_model``, ``load_lora_vision_model_hf``, ``PeftModelForSeq2SeqLMPool``), in which case no model is
    loaded per task, or from the ``PeftModel`` that a pool loads. Of other models, the differences from
    ``_pretrained_`` are merged, factored where they are of low rank.

    Args:
        method: as ``nsc-merge methods`` lists them.
        options: of the method.
        dataset: where methods that need data take unlabelled inputs from: ``"train"``, ``"val"`` or ``"test"`` of the
            pool's datasets; None is ``"val"``, or ``"test"`` where the pool has no other, as AdaMerging does.
        samples: per task, drawn at random with a fixed seed.
        batch_size: of them.
        tolerance: relative error (Frobenius) up to which a difference of models counts as of low rank; None is
            rounding.
        adapter_save_path: folder to which the merge is also written as a PEFT adapter.
        adapter_rank: to which that is truncated; None writes the whole update, which methods of full rank have no
            adapter for.

    Attributes:
        result: the last merge; None where models were compared instead of adapters.
    """

    result: MergeResult | None = None

    def __init__(
        self,
        method: str = "nsc",
        options: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        samples: int = 128,
        batch_size: int = 16,
        tolerance: float | None = None,
        adapter_save_path: str | None = None,
        adapter_rank: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module | dict[str, nn.Module]:
        """Merge the pool.

        Returns:
            The model ``_pretrained_`` with the merge in its weights; of methods that give every task an update of its
            own, task -> model, of which FusionBench evaluates each.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        given: Any = self
        chosen, options = method_of(given.method), _plain(given.options) or {}
        chosen.check_names(options)
        for name in ("samples", "batch_size", "adapter_rank"):
            _check_count(name, getattr(given, name))
        _check_adapter(chosen, options, given.adapter_save_path, given.adapter_rank)
        modelpool = BaseModelPool(modelpool) if isinstance(modelpool, Mapping) else modelpool
        if not modelpool.has_pretrained:
            raise ValueError(f"modelpool: expected a model called {PRETRAINED!r}, found {list(modelpool.model_names)}")
        names = list(modelpool.model_names)
        base = modelpool.load_model(PRETRAINED)
        sources = {name: source_of(modelpool, name) for name in names}
        dense = [name for name, source in sources.items() if is_dense(source)]
        adapters = dict(sources)
        if dense:
            tasks = {name: updates_of(base, source, name, given.tolerance) for name, source in sources.items()}
            if not chosen.needs and chosen.updates is not None:
                if given.adapter_save_path is not None:
                    raise ValueError(f"adapter_save_path: expected adapters in the pool, found whole models: {dense}")
                return merged_into(base, tasks, chosen.name, options)
            adapters |= {name: Adapter(name, as_factors(tasks[name], base, name)) for name in dense}
        data = (
            {
                name: batches_of(modelpool, name, base, given.dataset, given.samples, given.batch_size)
                for name in names
            }
            if "data" in chosen.needs
            else None
        )
        self.result = result = nsc_merge.merge(base, adapters, data, method=chosen.name, **options)
        if given.adapter_save_path is not None:
            result.save(given.adapter_save_path, format="lora", rank=given.adapter_rank)
        if result.per_task:
            return {name: result.for_task(name).apply(deepcopy(base)) for name in names}
        return result.apply(base)


class _Adapters:
    """What makes a pool of FusionBench one of adapters: ``models`` holds the base under ``_pretrained_``, and for each
    task a PEFT folder, a hub id, or what else :func:`nsc_merge.load_adapter` takes.

    Args:
        merged: what ``load_model`` gives for a task: True, the base with the adapter in its weights, for algorithms
            that know nothing of adapters; False, the adapter itself, for :class:`LayerWiseMergedModel`.
        further arguments: of the pool it is made of.
    """

    _models: Any

    def __init__(self, models: Any, *, merged: bool = True, **kwargs: Any):
        super().__init__(models, **kwargs)  # type: ignore[call-arg]
        self.merged = merged

    def load_adapter(self, name: str) -> Adapter:
        """The adapter of a task."""
        return nsc_merge.load_adapter(_plain(self._models[name]), name, dora="exact")

    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        held: Any = super()
        name = model_name_or_config
        if not isinstance(name, str) or name not in self._models or BaseModelPool.is_special_model(name):
            return held.load_model(name, *args, **kwargs)
        adapter = self.load_adapter(name)
        if not self.merged:
            return adapter
        base = held.load_model(PRETRAINED, *args, **kwargs)
        base = deepcopy(base) if isinstance(self._models[PRETRAINED], nn.Module) else base
        return nsc_merge.merge(base, {name: adapter}, method="task_arithmetic", scale=1.0).apply(base)


class LoRAPool(_Adapters, BaseModelPool):
    """A pool of adapters on any base; see :class:`_Adapters`."""

    _config_mapping = BaseModelPool._config_mapping | {"merged": "merged"}


class CLIPVisionLoRAPool(_Adapters, CLIPVisionModelPool):
    """A pool of adapters on a CLIP vision model, with processor and datasets as ``CLIPVisionModelPool``."""

    _config_mapping = CLIPVisionModelPool._config_mapping | {"merged": "merged"}


class Seq2SeqLoRAPool(_Adapters, Seq2SeqLMPool):
    """A pool of adapters on a sequence-to-sequence model, with datasets as ``Seq2SeqLMPool``."""

    _config_mapping = Seq2SeqLMPool._config_mapping | {"merged": "merged"}


class LayerWiseMergedModel(LayerWiseFactors, TheirLayerWiseMergedModel):
    """:class:`LayerWiseFactors` under FusionBench's name, which FusionBench takes for its own."""


@contextmanager
def on_factors() -> Iterator[None]:
    """Let FusionBench's layer-wise algorithms use factors inside a ``with`` block: whatever of it makes a
    ``LayerWiseMergedModel`` makes ours.
    """

    def swap(old: type, new: type) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("fusion_bench.") and vars(module).get("LayerWiseMergedModel") is old:
                vars(module)["LayerWiseMergedModel"] = new

    swap(TheirLayerWiseMergedModel, LayerWiseMergedModel)
    try:
        yield
    finally:
        # Also of what was first imported meanwhile.
        swap(LayerWiseMergedModel, TheirLayerWiseMergedModel)


@auto_register_config
class OnFactors(BaseAlgorithm):
    """One of FusionBench's layer-wise algorithms, run inside :func:`on_factors`.

    Args:
        algorithm: its configuration, with ``_target_`` or, as older ones have it, ``name``.
    """

    _fabric_instance: Any = None

    def __init__(self, algorithm: Any, **kwargs: Any):
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> Any:
        config = OmegaConf.create(_plain(self.algorithm))
        if "_target_" in config:
            inner = instantiate(config, _recursive_=config.get("_recursive_", False))
        elif "name" in config:
            inner = load_algorithm_from_config(config)
        else:
            raise ValueError(f"algorithm: expected a configuration with _target_ or name, found {list(config)}")
        for name in ("_program", "_fabric_instance"):
            if hasattr(inner, name):
                setattr(inner, name, getattr(self, name))
        with on_factors():
            return inner.run(modelpool)


def _check_count(name: str, value: Any) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
    if wrong and not (value is None and name == "adapter_rank"):
        raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r:.60}")


def _check_adapter(method: Method, options: Mapping[str, Any], path: str | None, rank: int | None) -> None:
    """Refuse what could not be written once everything is merged."""
    if path is None and rank is not None:
        raise ValueError(f"adapter_rank: expected it with adapter_save_path, found {rank} and no path")
    if path is not None and rank is None and method.gives_with(options) == "full rank":
        raise ValueError(
            f"adapter_save_path: the update of method {method.name!r} is of full rank, so that no small adapter holds "
            "it exactly; expected an adapter_rank to truncate to, or no adapter_save_path"
        )


def source_of(modelpool: Any, name: str) -> Any:
    """An adapter of a pool, or where it is, or the model where the pool says of none."""
    if hasattr(modelpool, "load_adapter"):
        return modelpool.load_adapter(name)
    models = getattr(modelpool, "_models", None)
    if models is not None:
        config = models[name]
        if isinstance(config, DictConfig | dict):
            loader = str(config.get("_target_", "")).rpartition(".")[2]
            if loader in _LOADERS:
                return config[_LOADERS[loader]]
    elif type(modelpool).__name__ == "PeftModelForSeq2SeqLMPool":
        return modelpool.get_model_config(name)["path"]
    return modelpool.load_model(name)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
