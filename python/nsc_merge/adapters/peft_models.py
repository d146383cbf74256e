"""An adapter in a model in memory: what PEFT's layers run, whatever their configuration says."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from nsc_merge.adapters.adapter import Stack, TokenRows, unwrapped
from nsc_merge.adapters.adapter_files import widened

# Variants of PEFT that change how an adapter is trained, and not what it computes.
_PLAIN_VARIANTS = ("MiCALinearVariant", "VeloraLinearVariant")


class Held(NamedTuple):
    """What a model holds of one adapter.

    Attributes:
        parts: module path in the base model -> PEFT's name of a tensor -> the tensor.
        scalings: module path -> what the layer multiplies ``B @ A`` by.
        trained: parameter path -> value, of the modules in ``modules_to_save``.
        token_rows: path of an embedding or head -> rows of tokens that were trained alone.
        stacks: module path, with a ``base_layer`` for each wrapper inside of others -> LoRA on one of its parameters.
        embeddings: paths among ``parts`` of which PEFT has the factors transposed.
    """

    parts: dict[str, dict[str, Tensor]]
    scalings: dict[str, float]
    trained: dict[str, Tensor]
    token_rows: dict[str, TokenRows]
    stacks: dict[str, Stack]
    embeddings: set[str]


def config_of(model: nn.Module, name: str) -> tuple[str, dict[str, Any]]:
    """What a model calls the adapter of that name, or its only one, and the adapter's configuration.

    Raises:
        ValueError: if it holds several, and none of that name.
    """
    held: Any = model.peft_config
    if name not in held and len(held) != 1:
        raise ValueError(f"adapters[{name!r}]: the PeftModel holds {sorted(held)}, expected one of that name")
    held_as = name if name in held else next(iter(held))
    return held_as, held[held_as].to_dict()


def read_layers(model: nn.Module, held_as: str, name: str) -> Held:
    """An adapter as the layers hold it.

    ``hotswap_adapter``, ``set_scale``, ``scale_layer`` and ``prepare_model_for_compiled_hotswap`` change scaling and
    rank in the layers alone. Which adapters are active, disabled or merged into weights plays no role. The tensors are
    copies, that swapping or training the adapter later does not change what was read.

    Args:
        model: a ``PeftModel``, or a model into which PEFT or transformers put adapters.
        held_as: the adapter's name in the model.
        name: of the task, for messages.

    Raises:
        ValueError: naming the layer, if it is no linear one or runs something else than plain LoRA.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    refuse_on_disk(base, f"adapters[{name!r}]")
    held = Held({}, {}, {}, {}, {}, set())
    for at, module in base.named_modules():
        path = at.replace("_orig_mod.", "")
        if isinstance(module, ModulesToSaveWrapper) and held_as in module.modules_to_save:
            own: Any = module.modules_to_save[held_as]
            held.trained.update({f"{path}.{key}": copied(value) for key, value in own.state_dict().items()})
        elif isinstance(module, TrainableTokensWrapper) and held_as in module.token_adapter.token_indices:
            rows: Any = module.token_adapter
            # One that follows another has none of its own.
            if rows.tied_adapter is None:
                values = copied(rows.trainable_tokens_delta[held_as])
                held.token_rows[path] = TokenRows(tuple(rows.token_indices[held_as]), values)
        elif isinstance(module, ParamWrapper) and held_as in module.lora_A:
            held.stacks[path] = _stack(module, held_as, path, f"adapters[{name!r}]: {path}")
        elif isinstance(module, LoraLayer) and (held_as in module.lora_A or held_as in module.lora_embedding_A):
            what = f"adapters[{name!r}]: {path}"
            held.parts[path] = _parts(module, held_as, what)
            held.scalings[path] = _scaling_of(module, held_as, what)
            if held_as in module.lora_embedding_A:
                held.embeddings.add(path)
    return held


def refuse_on_disk(model: nn.Module, what: str) -> None:
    """Refuse a model that diffusers offloads to disk in groups: its tensors are on a device, with no numbers in them.

    Raises:
        ValueError: saying what to do.
    """
    for module in model.modules():
        hook = getattr(vars(module).get("_diffusers_hook"), "hooks", {}).get("group_offloading")
        if getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None:
            raise ValueError(
                f"{what}: expected weights in memory, found diffusers' group offloading to disk, between whose calls "
                "tensors hold no numbers; merge before enable_group_offload, or offload without offload_to_disk_path"
            )


def _parts(layer: Any, held_as: str, what: str) -> dict[str, Tensor]:
    if hasattr(layer, "lora_E"):
        # AdaLoRA, with its singular values apart.
        scaled = layer.lora_A[held_as] * layer.lora_E[held_as]
        return {"lora_A.weight": copied(scaled), "lora_B.weight": copied(layer.lora_B[held_as])}
    if held_as in layer.lora_embedding_A and held_as not in layer.lora_variant:
        # The update of the weight [V, d] is their product, transposed.
        embedded = {"lora_A.weight": layer.lora_embedding_B, "lora_B.weight": layer.lora_embedding_A}
        return {part: copied(factors[held_as]).t().contiguous() for part, factors in embedded.items()}
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        refuse_attention(what)
    both = [factors[held_as] for factors in (layer.lora_A, layer.lora_B) if held_as in factors]
    if len(both) < 2 or not all(isinstance(factor, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for factor in both):
        kind = type(layer)
        found = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"{what}: expected LoRA on a linear, embedding or convolution, found {found}")
    down, up = both
    if down.bias is not None:
        raise ValueError(f"{what}: expected lora_A without a bias, as PEFT makes it, found one, which no update holds")
    parts = {"lora_A.weight": down.weight.flatten(1), "lora_B.weight": up.weight.flatten(1)}
    if up.bias is not None:
        parts["lora_B.bias"] = up.bias
    variant = layer.lora_variant.get(held_as)
    if variant is not None and held_as in layer.lora_magnitude_vector:
        parts["lora_magnitude_vector"] = layer.lora_magnitude_vector[held_as].weight
    elif variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        raise ValueError(f"{what}: expected plain LoRA, found PEFT's {type(variant).__name__}")
    return {part: copied(value) for part, value in parts.items()}


def refuse_attention(what: str) -> NoReturn:
    raise ValueError(
        f"{what}: LoRA on nn.MultiheadAttention is not merged, where PEFT 0.21 adds the update of out_proj twice; "
        "expected an adapter of the parameter alone (target_parameters=['in_proj_weight']), or without it "
        "(exclude_modules), or use PEFT's merge_and_unload"
    )


def _stack(layer: Any, held_as: str, path: str, what: str) -> Stack:
    parameter = f"{unwrapped(path)}.{layer.parameter_name}"
    own = int(layer.r[held_as]), _scaling_of(layer, held_as, what)
    A, B = (copied(factors[held_as].weight) for factors in (layer.lora_A, layer.lora_B))
    return Stack(A, B, (parameter,), lambda _: own)


def _scaling_of(layer: Any, held_as: str, what: str) -> float:
    scaling = _number(layer.scaling[held_as], what)
    # AdaLoRA's is over the rank that training began with, by this sum.
    return scaling / (_number(layer.ranknum[held_as], what) + 1e-5) if hasattr(layer, "ranknum") else scaling


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        raise ValueError(f"{what}: expected a scaling of one number, found one of shape {list(value.shape)}")
    return float(value.detach() if isinstance(value, Tensor) else value)


def copied(value: Tensor) -> Tensor:
    """A tensor of its own on the CPU, where merging is done wherever the model is; attaching moves factors again."""
    return value.detach() if value.is_meta else widened(value.detach().cpu()).clone()
