"""What others than PEFT and diffusers call the files of an adapter, and the way from there to one that is read."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Collection
from pathlib import Path

from nsc_merge.adapters.formats.diffusers_file import CURE

_EXTRACT = "makes a whole model of it, of which mergekit-extract-lora takes the difference from the base as LoRA"
# mlx-lm multiplies x A B by its scale, with A [d_in, r] and B [r, d_out].
_FROM_MLX = (
    "import json, pathlib, sys; from safetensors.torch import load_file, save_file; "
    "old, new = map(pathlib.Path, sys.argv[1:]); w = load_file(old / 'adapters.safetensors'); "
    "p = json.loads((old / 'adapter_config.json').read_text())['lora_parameters']; "
    "c = {'peft_type': 'LORA', 'r': p['rank'], 'lora_alpha': p['rank'] * p['scale']}; "
    "c['target_modules'] = sorted({k.rpartition('.')[0] for k in w}); "
    "parts = {'lora_a': 'lora_A.weight', 'lora_b': 'lora_B.weight'}; name = lambda k: k.rpartition('.'); "
    "w = {f'base_model.model.{name(k)[0]}.{parts[name(k)[2]]}': v.t().contiguous() for k, v in w.items()}; "
    "new.mkdir(); save_file(w, new / 'adapter_model.safetensors'); "
    "(new / 'adapter_config.json').write_text(json.dumps(c))"
)
# A pattern of a file's name -> whose it is, and what to do.
_OTHERS = {
    "adapter.safetensors": ("the library adapters (AdapterHub)", f"model.merge_adapter(NAME) there {_EXTRACT}"),
    "pytorch_adapter.bin": ("the library adapters (AdapterHub)", f"model.merge_adapter(NAME) there {_EXTRACT}"),
    "lora_config.json": ("PaddleNLP", f"llm/tools/merge_lora_params.py there {_EXTRACT}"),
    "lit_model.pth.lora": ("LitGPT", f"litgpt merge_lora, and litgpt convert_from_litgpt after it, {_EXTRACT}"),
    "*.gguf": ("llama.cpp", "its convert_lora_to_gguf.py made it of a folder of PEFT's: give that one"),
    "[!.]*.safetensors": ("kohya, ComfyUI, LyCORIS or OneTrainer, if it is LoRA of a diffusion model", CURE),
}


def way_from(names: Collection[str], folder: Path) -> str:
    """Of a folder without PEFT's and diffusers' files, whose its files are and how they are converted; nothing where
    that is not known.

    Args:
        names: of the files in it.
        folder: for the command.
    """
    if "adapters.safetensors" in names:
        command = f"python -c {shlex.quote(_FROM_MLX)} {shlex.quote(str(folder))} NEW_FOLDER"
        return f"; adapters.safetensors is of MLX, with both factors transposed; to convert: {command}"
    for pattern, (whose, what) in _OTHERS.items():
        # PEFT's own without their configuration, and whole models, are of no other.
        found = [name for name in fnmatch.filter(sorted(names), pattern) if not name.startswith(("adapter_", "model"))]
        if found:
            return f"; {found[0]} is of {whose}: {what}"
    return ""
