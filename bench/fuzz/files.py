"""Damaged and hostile files, through the readers that a user's files go through.

Good small files are mutated: adapter folders, calibration batches, saved merges, states, recipes and packed banks. What
a reader makes of one must be what :mod:`bench.fuzz.files_oracle` makes of it, a reader of NumPy and plain Python that
follows the format's definition; where an adapter's configuration is changed, what PEFT makes of it, too.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.fuzz import file_mutations as mutations
from bench.fuzz import files_oracle as oracle
from bench.fuzz.trial import Trial
from nsc_kernels import AdapterBank
from nsc_merge.adapters import load_adapter
from nsc_merge.calibration.batch_files import read_batches
from nsc_merge.descent.checkpoint import State
from nsc_merge.recipes.merge_recipe import RecipeError, load_recipe
from nsc_merge.recipes.saved_result import read_document

REFUSALS = (ValueError, TypeError, FileNotFoundError)
SECONDS = 1.0
PROBLEM = {"lr": 0.01, "modules": ["x", "y", "z"], "tasks": ["a", "b"]}


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        good: writes a folder of good ones.
        mutated: which of them is mutated, by its path in the folder.
        difference: reads the folder, raising what the reader raises, and says how what came out differs from the
            oracle's; empty if it does not.
    """

    good: Callable[[Path], None]
    mutated: tuple[str, ...]
    difference: Callable[[Path, bool], str]


def trials(seed: int) -> Iterator[Trial]:
    """Endless; the same for the same seed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for kind, one in KINDS.items():
            (place / "good" / kind).mkdir(parents=True)
            one.good(place / "good" / kind)
        number = 0
        while True:
            yield trial(place, seed, number)
            number += 1


def trial(place: Path, seed: int, number: int) -> Trial:
    """The trial of that number: of no other one before it.

    Args:
        place: folder with a folder ``good`` of every kind's files.
    """
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choice(sorted(KINDS))
    folder = place / "tried"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "good" / kind, folder)
    file = folder / draw.choice(KINDS[kind].mutated)
    # Now and then nothing is wrong, and nothing may be refused.
    done = "nothing" if draw.random() < 0.02 else mutations.mutate(file, draw)
    case = f"files: seed {seed}, trial {number}: {kind}: {file.name}: {done}"
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference = KINDS[kind].difference(folder, file.suffix == ".json")
    except REFUSALS as error:
        return _refusal(case, error, done == "nothing", time.process_time() - started)
    except Exception as error:
        return Trial(case, "wrong", f"{type(error).__name__}: {error}"[:400])
    return Trial(case, "wrong" if difference else "right", difference[:400])


def _refusal(case: str, error: Exception, is_good: bool, seconds: float) -> Trial:
    # Of a recipe that a person writes, as the command prints it: a path may have lines.
    is_recipe = isinstance(error, RecipeError)
    text = " ".join(str(error).split()) if is_recipe else str(error)
    known = ("adapters['a']", "calibration", "result: ", "resume_from", "recipe", "bank", "tried")
    if is_good:
        return Trial(case, "wrong", f"a good file is refused: {text}")
    if "\n" in text.strip() or len(text) > 1000:
        return Trial(case, "wrong", f"not in one line: {text[:300]!r}")
    if not is_recipe and not any(word in text for word in known):
        return Trial(case, "wrong", f"{type(error).__name__} that names neither file nor argument: {text}"[:400])
    if seconds > SECONDS:
        return Trial(case, "wrong", f"refused after {seconds:.1f} s: {text}")
    return Trial(case, "refused", text)


def _save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata)


def _adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"rank_pattern": {"layers.1.q": 3}, "alpha_pattern": {"v": 5}, "lora_alpha": 6}
    peft_model = get_peft_model(oracle.Tiny(), LoraConfig(r=2, target_modules=["q", "v"], **settings))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    peft_model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def _adapter_difference(folder: Path, reconfigured: bool) -> str:
    adapter = load_adapter(folder, "a")
    found = {path: factor.delta().numpy() for path, factor in adapter.factors.items()}
    expected = oracle.deltas(folder)
    difference = oracle.differing(found, expected, 1e-12)
    if not difference and reconfigured:
        by_peft = oracle.deltas_of_peft(folder)
        difference = "" if by_peft is None else oracle.differing(found, by_peft, 1e-5)
        difference = difference and f"PEFT: {difference}"
    return difference


def _batches(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (4, 3), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weight": torch.rand(4, generator=generator)}
    inputs |= {"half": inputs["weight"].half()[:, None], "brain": inputs["weight"].bfloat16()}
    inputs |= {"small": inputs["weight"].to(torch.float8_e4m3fn), "flag": ids > 4}
    _save(inputs, folder / "batches.safetensors")


def _batches_difference(folder: Path, _: bool) -> str:
    batches = list(read_batches(folder / "batches.safetensors", 3, "calibration.a"))
    found = {name: oracle.as_numbers(torch.cat([batch[name] for batch in batches])) for name in batches[0]}
    return oracle.differing(found, oracle.tensors(folder / "batches.safetensors")[0], 0)


def _merge(folder: Path) -> None:
    rows = {f"layers.{number}.q": {"a": 0.25 * number, "b": -1.5} for number in range(3)}
    document = {"format": "nsc_merge.coefficients", "version": 1, "method": "nsc", "tasks": ["a", "b"]}
    document |= {"options": {"lr": 0.01, "steps": 5}, "dead": {"layers.2.q": ["b"]}, "coefficients": rows}
    (folder / "coefficients.json").write_text(json.dumps(document, indent=1))
    lines = [{"step": step, "objective": 0.5 / (1 + step), "omega": {"a": 0.1, "b": 0.2}} for step in range(3)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _merge_difference(folder: Path, _: bool) -> str:
    document, history = read_document(folder)
    expected = oracle.plain_json((folder / "coefficients.json").read_bytes())
    lines = [oracle.plain_json(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]
    given = {name: document[name] for name in expected}
    return oracle.unequal(given, expected) or oracle.unequal(history, lines) or oracle.misshapen(document)


def _state(folder: Path) -> None:
    values = torch.rand(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = dict(zip(("lam", "start", "optimizer.exp_avg", "optimizer.exp_avg_sq"), values.unbind(), strict=True))
    tensors |= {"dead": values[0] > 0.9, "optimizer.step": torch.tensor(1.0), "rng": torch.Generator().get_state()}
    step = {"step": 0, "objective": 0.5, "omega": {"a": 0.4, "b": 0.6}, "seconds": 0.1}
    history = [step | {"lambda_min": 0.1, "lambda_mean": 0.2, "lambda_max": 0.3}]
    State(1, tensors, history, PROBLEM, batch_tasks=True).save(folder / "state.safetensors")


def _state_difference(folder: Path, _: bool) -> str:
    file = folder / "state.safetensors"
    state = State.load(file, PROBLEM)
    tensors, metadata = oracle.tensors(file)
    document = oracle.plain_json(metadata["document"].encode())
    found = {name: oracle.as_numbers(value) for name, value in state.tensors.items()}
    given = {name: value for name, value in vars(state).items() if name != "tensors"}
    return oracle.differing(found, tensors, 0) or oracle.unequal(given, document) or oracle.misshapen_state(given)


RECIPE = """\
# What is merged.
model: someone/something
adapters:
  a: adapters/a
  b: adapters/b
calibration: {a: batches.safetensors, b: batches.safetensors}
batch_size: 4
method: nsc
options: {lr: 1e-2, steps: 5}
dtype: float32
output:
  dir: out
  formats: [lora, model]
  rank: 3
  plots: false
"""


def _recipe(folder: Path) -> None:
    for name in ("adapters/a", "adapters/b"):
        (folder / name).mkdir(parents=True)
    (folder / "batches.safetensors").write_bytes(b"")
    (folder / "recipe.yaml").write_text(RECIPE)


def _recipe_difference(folder: Path, _: bool) -> str:
    recipe = load_recipe(folder / "recipe.yaml")
    return oracle.differing_recipe(recipe, folder)


def _bank(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(rank, 6, generator=generator) for rank in (2, 1, 3)]
    B = [torch.randn(5, rank, generator=generator) for rank in (2, 1, 3)]
    AdapterBank.from_factors(A, B).save(folder / "bank.safetensors")


def _bank_difference(folder: Path, _: bool) -> str:
    file = folder / "bank.safetensors"
    bank = AdapterBank.load(file)
    tensors, metadata = oracle.tensors(file)
    found = {name: oracle.as_numbers(getattr(bank, name)) for name in ("A", "Bt")}
    offsets = oracle.plain_json(metadata["offsets"].encode())
    return oracle.differing(found, tensors, 0) or oracle.unequal(list(bank.offsets), offsets)


KINDS = {
    "adapter": Kind(_adapter, ("adapter_config.json", "adapter_model.safetensors"), _adapter_difference),
    "batches": Kind(_batches, ("batches.safetensors",), _batches_difference),
    "merge": Kind(_merge, ("coefficients.json", "history.jsonl"), _merge_difference),
    "state": Kind(_state, ("state.safetensors",), _state_difference),
    "recipe": Kind(_recipe, ("recipe.yaml",), _recipe_difference),
    "bank": Kind(_bank, ("bank.safetensors",), _bank_difference),
}
