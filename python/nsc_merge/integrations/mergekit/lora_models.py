"""mergekit's ``base+adapter`` models, read from the base's files and the adapter's factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from nsc_merge import Adapter, Factor, load_adapter

# Of transformers' models with Conv1D in place of linears, whose weights lie the other way round.
_TRANSPOSED = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")


class LoraModel:
    """Takes the place of mergekit's loader of a checkpoint that PEFT merged an adapter into.

    A tensor is what PEFT's ``merge_and_unload`` makes it: the base's, with the adapter's update computed in float32
    added, rounded to the base's dtype or another. It is made when it is asked for.

    Args:
        base: mergekit's loader of the base.
        adapter: plain LoRA; biases of its layers and modules trained in full may come with it.
        name: of the model, for messages.
        dtype: of all tensors; None keeps the base's.

    Raises:
        ValueError: naming what the adapter holds that is no update of a tensor in the base's files.
    """

    def __init__(self, base: Any, adapter: Adapter, name: str, dtype: torch.dtype | None = None) -> None:
        self.base, self.name, self.dtype = base, name, dtype
        self.index = base.index
        self.factors = {f"{path}.weight": factor for path, factor in adapter.factors.items()}
        biases = {f"{path}.bias": factor.bias_delta() for path, factor in adapter.factors.items()}
        self.biases = {key: bias for key, bias in biases.items() if bias is not None}
        self.trained = adapter.trained
        for what, found in (
            ("LoRA on parameters (target_parameters)", list(adapter.stacks)),
            ("rows of single tokens (trainable_token_indices)", list(adapter.token_rows)),
        ):
            if found:
                raise self._refusal(f"has {what}, at {found[0]}")
        missing = [key for key in (*self.factors, *self.biases, *self.trained) if key not in self.index.tensor_paths]
        if missing:
            # Densely, PEFT changes the weight that it is tied to, too, and merges no bias where the base has none.
            raise ValueError(
                f"{name}: the adapter changes {missing[0]}, which is not in the base's files; expected LoRA on modules "
                "of the base that are; nsc-merge import makes a recipe of the file that merges such an adapter, as an "
                "adapter (output.formats: [lora]) where the base has no place for what it changes"
            )
        for key, saved in adapter.base_weights.items():
            if key in self.index.tensor_paths and not torch.equal(base.get_tensor(key).to(saved.dtype), saved):
                raise self._refusal(f"holds another {key} than the base, such as one with tokens added")

    def is_update(self, key: str) -> bool:
        """Whether the adapter has an update of a tensor, or leaves it alone; it may also replace it, or a bias."""
        return key not in self.trained and key not in self.biases

    def is_on(self, key: str, tensor: Tensor) -> bool:
        """Whether the adapter's base has this tensor, of that name in its files."""
        if key not in self.index.tensor_paths:
            return False
        return torch.equal(self.base.get_tensor(key).to(tensor.device, tensor.dtype), tensor)

    def update(self, key: str) -> Factor | None:
        """The update of a tensor, None if there is none."""
        return self.factors.get(key)

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """As mergekit's loader has it."""
        if aliases and key not in self.index.tensor_paths:
            key = next((alias for alias in aliases if alias in self.index.tensor_paths), key)
        tensor = self.base.get_tensor(key, device=device, raise_on_missing=raise_on_missing)
        if tensor is None:
            return None
        dtype = tensor.dtype if self.dtype is None else self.dtype
        if key in self.trained:
            return self._fitting(key, tensor, self.trained[key]).to(device, dtype)
        delta: Tensor | None = None
        if key in self.factors:
            factor = self.factors[key]
            A, B = factor.A.to(device).float(), factor.B.to(device).float()
            delta = factor.scaling * (B @ A)
        elif key in self.biases:
            delta = self.biases[key].to(device)
        if delta is None:
            return tensor.to(dtype)
        delta = self._fitting(key, tensor, delta)
        wide = torch.promote_types(dtype, torch.float32)
        return (tensor.to(dtype).to(wide) + delta.to(wide)).to(dtype)

    def flush(self) -> None:
        """As mergekit's loader has it."""
        self.base.flush()

    def _fitting(self, key: str, tensor: Tensor, change: Tensor) -> Tensor:
        if change.shape != tensor.shape:
            raise self._refusal(f"changes {key} by {list(change.shape)}, where the base has {list(tensor.shape)}")
        return change

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"{self.name}: the adapter {what}; expected LoRA on modules of the base; mergekit-yaml "
            "--lora-merge-cache DIR merges such a model densely"
        )


@contextmanager
def from_factors() -> Iterator[None]:
    """Within it mergekit reads LoRA models as :class:`LoraModel`: nothing is written to ``--lora-merge-cache``, which
    need not be given. ``--lora-merge-dtype`` is what it is to mergekit. Where mergekit takes the tokenizer of a LoRA
    model, it is the base's.
    """
    get, merged = LoaderCache.get, ModelReference.merged

    def get_from_factors(self: Any, model: Any) -> Any:
        if model.lora is None or model in self.loaders:
            return get(self, model)
        base = ModelReference(model=model.model, override_architecture=model.override_architecture)
        kind = base.config(trust_remote_code=self.trust_remote_code).model_type
        if kind in _TRANSPOSED:
            raise ValueError(
                f"{model}: linears of {kind} lie transposed in its files; mergekit-yaml --lora-merge-cache DIR merges "
                "such a model densely"
            )
        place = {"adapter": model.lora.path, **({"revision": model.lora.revision} if model.lora.revision else {})}
        adapter = load_adapter(place, str(model), dora="refuse")
        self.loaders[model] = LoraModel(get(self, base), adapter, str(model), dtype_from_name(self.lora_merge_dtype))
        return self.loaders[model]

    def merged_from_factors(self: Any, *arguments: Any, **named: Any) -> Any:
        return self if self.lora is None else ModelReference(model=self.model)

    LoaderCache.get, ModelReference.merged = get_from_factors, merged_from_factors
    try:
        yield
    finally:
        LoaderCache.get, ModelReference.merged = get, merged
        for model in [one for one, loader in LoaderCache.loaders.items() if isinstance(loader, LoraModel)]:
            del LoaderCache.loaders[model]
