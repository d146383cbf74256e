"""What servers hold of an adapter, by their own loading code on the CPU; a process of its own, for its stand-ins.

    python served_by.py vllm JOBS.json

JOBS.json is a list of ``{"folder": an adapter's, "config": config.json of its base, "out": a file}``. To each file go
the updates that the server would add, float64, by the names of PEFT's modules, or ``error`` in ``out + ".txt"``.

Kernels and layers of the servers are not run: from where their code has put the factors, the product is made here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file

LINEARS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What the servers import beside their loading code, and that needs a GPU or plays no part in loading.
ABSENT = {
    "vllm": ("torchvision", "xgrammar", "llguidance", "mistral_common"),
    "sglang": ("torchvision", "triton", "sgl_kernel", "tvm_ffi"),
    "lorax": ("boto3", "botocore", "opentelemetry", "triton", "lorax_server.pb"),
}
LARGEST = 64


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name, cls.__module__)


def anything(name, module):
    return Anything(
        name, (), {
            "__module__": module,
            "__init__": lambda self, *args, **kwargs: None,
            "__getattr__": lambda self, name: lambda *args, **kwargs: None,
            "__class_getitem__": classmethod(lambda cls, item: cls),
        },
    )  # fmt: skip


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = anything(name, self.__name__)
        setattr(self, name, made)
        return made


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of the packages that are not installed; the last to be asked."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(f"{one}.") for one in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def sizes(config):
    """Linear -> ``(d_out, d_in)``."""
    hidden, wide, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    return {
        "q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide),
    }  # fmt: skip


def prefix_of(config):
    return "model.language_model.layers" if config.model_type == "llava" else "model.layers"


def of_vllm(folder, config):
    """PEFTHelper, LoRAModel, then the manager's packing and its activation, into layers of vLLM's own."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model, model_manager
    from vllm.lora.layers import column_parallel_linear as columns
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models import llama, llava, mistral, qwen2

    # There is no GPU to pin memory for.
    lora_model.PIN_MEMORY = model_manager.PIN_MEMORY = False
    text = config.get_text_config()
    model = {
        "llama": llama.LlamaForCausalLM, "mistral": mistral.MistralForCausalLM, "qwen2": qwen2.Qwen2ForCausalLM,
        "llava": llava.LlavaForConditionalGeneration,
    }[config.model_type]  # fmt: skip
    shows = config.model_type == "llava"
    embeddings = set(getattr(llama.LlamaForCausalLM if shows else model, "embedding_modules", {}))
    towers = {"fc1", "fc2", "out_proj", "linear_1", "linear_2"} if shows else set()
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    held = PEFTHelper.from_local_dir(str(folder), text.max_position_embeddings)
    held.validate_legal(LoRAConfig(max_lora_rank=LARGEST, lora_dtype=torch.float32))
    lora = lora_model.LoRAModel.from_local_checkpoint(
        str(folder), {*LINEARS, *embeddings, *towers}, held, lora_model_id=1, device="cpu", dtype=torch.float32,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )  # fmt: skip
    shapes = sizes(text)
    start = "language_model.model.layers" if config.model_type == "llava" else "model.layers"
    layers, packed = {}, {}

    def layer(kind, names):
        made = object.__new__(kind)
        torch.nn.Module.__init__(made)
        made.n_slices, made.tp_size, made.output_sizes = len(names), 1, [shapes[name][0] for name in names]
        made.lora_a_stacked = tuple(torch.zeros(1, 1, LARGEST, shapes[name][1]) for name in names)
        made.lora_b_stacked = tuple(torch.zeros(1, 1, shapes[name][0], LARGEST) for name in names)
        return made

    stacks = {
        "qkv_proj": columns.MergedQKVParallelLinearWithLoRA,
        "gate_up_proj": columns.MergedColumnParallelLinearWithLoRA,
    }
    for number in range(text.num_hidden_layers):
        for part, names in PACKED.items():
            path = f"{start}.{number}.{LINEARS[names[0]]}"
            layers[f"{path}.{part}"] = layer(stacks[part], names)
            packed[f"{path}.{part}"] = [f"{path}.{name}" for name in names]
        for name in ("o_proj", "down_proj"):
            layers[f"{start}.{number}.{LINEARS[name]}.{name}"] = layer(RowParallelLinearWithLoRA, (name,))
    manager = object.__new__(model_manager.LoRAModelManager)
    manager.__dict__.update(
        modules=layers, packed_modules=packed, is_pooling_model=False, lora_index_to_id=[None], _active_adapters={},
        _registered_adapters={1: lora},
    )  # fmt: skip
    manager._create_merged_loras_inplace(lora)
    manager.activate_adapter(1)
    found = {}
    for path, one in layers.items():
        names = PACKED.get(path.rsplit(".", 1)[-1], (path.rsplit(".", 1)[-1],))
        for at, name in enumerate(names):
            key = f"{prefix_of(config)}{path.removeprefix(start).rpartition('.')[0]}.{name}"
            found[key] = one.lora_b_stacked[at][0, 0].double() @ one.lora_a_stacked[at][0, 0].double()
    return found


def of_sglang(folder, config):
    """LoRAConfig, LoRAAdapter, then the memory pool's loading into buffers, which a first request makes it do."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool
    from sglang.srt.lora.utils import get_hidden_dim, get_stacked_multiply

    text = config.get_text_config()
    text.head_dim = text.hidden_size // text.num_attention_heads
    held = LoRAConfig(str(folder), base_vocab_size=text.vocab_size)
    manager = object.__new__(LoRAManager)
    ref = SimpleNamespace(lora_name="one", lora_path=str(folder), pinned=False)
    manager.__dict__.update(
        lora_refs={}, num_pinned_loras=0, max_loras_per_batch=2, configs={"one": held}, attn_dp_enabled=False,
        base_model=torch.nn.Module(), lora_added_tokens_size=0,
    )  # fmt: skip
    manager.validate_new_adapter(held, ref)
    manager.lora_refs["one"] = ref
    manager.init_lora_shapes()
    targets, largest = manager.target_modules, manager.max_lora_rank
    adapter = LoRAAdapter("one", held, text, LoadConfig(), None)
    # Which files it reads, its server's arguments say.
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    pool = object.__new__(LoRAMemoryPool)
    layers = range(text.num_hidden_layers)
    pool.__dict__.update(
        num_layer=len(layers), target_modules=targets, max_lora_rank=largest, base_model=None, base_hf_config=text,
        strict_loading=False, tp_rank=0, tp_size=1, experts_shared_outer_loras=False, enable_lora_overlap_loading=False,
        pin_memory_available=False, lora_added_tokens_size=0, A_buffer={}, B_buffer={}, embedding_A_buffer={},
        embedding_B_buffer={}, lm_head_A_buffer={}, lm_head_B_buffer={}, new_embeddings_buffer={},
    )  # fmt: skip
    places = [name for name in targets if name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")]
    for name in places:
        d_in, d_out = get_hidden_dim(name, text, None, 0)
        stack = get_stacked_multiply(name)
        pool.A_buffer[name] = [torch.zeros(2, largest * stack, d_in) for _ in layers]
        pool.B_buffer[name] = [torch.zeros(2, d_out, largest) for _ in layers]
    whole = SimpleNamespace(slice_lora_a_weights=lambda A: A, slice_lora_b_weights=lambda B: B, base_layer=None)
    modules = [{f"model.layers.{number}.{name}": whole for name in places} for number in layers]
    pool.load_lora_weight_to_buffer("one", 1, adapter, modules, None, None)
    found, rank = {}, held.r
    for name in places:
        names = PACKED.get(name, (name,))
        for number in layers:
            A, B = pool.A_buffer[name][number][1].double(), pool.B_buffer[name][number][1].double()
            rows = iter(B.split([sizes(text)[part][0] for part in names]))
            for at, part in enumerate(names):
                # Its kernels take as many rows of A, and columns of B, as the adapter's rank says.
                own = A[at * rank : (at + 1) * rank]
                path = f"{prefix_of(config)}.{number}.{LINEARS[part]}.{part}"
                found[path] = adapter.scaling * next(rows)[:, :rank] @ own
    return found


def of_lorax(folder, config):
    """The module map, then LoraWeights of every kind of linear, padded as on a GPU with its kernels."""
    from lorax_server.adapters.lora import LoraWeights
    from lorax_server.utils import punica
    from lorax_server.utils.adapter import load_module_map

    # pad_rank does nothing without them.
    punica.HAS_SGMV = True
    layers = range(config.num_hidden_layers)
    one = SimpleNamespace(base_layer=SimpleNamespace(linear=SimpleNamespace(weight=torch.zeros(1))))
    targets = {
        (number, f"{owner}.{name}"): (f"model.layers.{number}.{owner}.{name}", one)
        for name, owner in LINEARS.items()
        for number in layers
    }
    model = SimpleNamespace(
        target_to_layer=targets, get_num_layers_for_type=lambda kind: len(layers), dtype=torch.float32, world_size=1,
        shard_lora_weights=lambda A, B, kind: (A, B),
    )  # fmt: skip
    found = {}
    for _ in range(2):
        # The second time, the first one's configuration comes out of a cache.
        held, settings, names, _ = load_module_map(
            "base", str(folder.resolve()), "local", tuple(path for path, _ in targets.values()), None
        )
        unused = names.copy()
        for kind in dict.fromkeys(kind for _, kind in targets):
            weights = settings.load_batched_adapter_weights(model, held, kind, unused, True)
            if weights is None:
                continue
            assert isinstance(weights, LoraWeights)
            for number in layers:
                A, B = weights.weights_a[number].double(), weights.weights_b[number].double()
                # Kernels of some ranks want A the other way round.
                turned = punica.MIN_RANK_CUSTOM <= len(B) <= punica.MAX_RANK_CUSTOM
                found[f"model.layers.{number}.{kind}"] = B.T @ (A if turned else A.T)
    return found


def main(server, jobs):
    sys.meta_path.append(StandIns(ABSENT[server]))
    if server == "lorax":
        sys.path.insert(0, str(Path(os.environ["LORAX_REPO"]) / "server"))
    loads = {"vllm": of_vllm, "sglang": of_sglang, "lorax": of_lorax}[server]
    for job in json.loads(Path(jobs).read_text()):
        config = transformers.AutoConfig.from_pretrained(job["config"])
        try:
            found = loads(Path(job["folder"]), config)
        except ImportError:
            raise
        except Exception as error:
            Path(job["out"] + ".txt").write_text(f"{type(error).__name__}: {error}")
        else:
            save_file({path: delta.contiguous() for path, delta in found.items()}, job["out"])


if __name__ == "__main__":
    main(*sys.argv[1:])
