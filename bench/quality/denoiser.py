"""Three adapters of a small denoiser, merged by every method that a pipeline of diffusers takes, and measured.

    python -m bench.quality.denoiser --seeds 0 1 2      # some twenty minutes of a core and seed
    python -m bench.quality.denoiser --table            # the table of docs/pipelines.md

A UNet learns to draw scikit-learn's digits 0 to 7, told by two tokens which digit and in what style. Adapters (LoRA on
attention and MLP) are trained for the digits 8 and 9, for inverted ones and for ones that lie on their side, each with
a token of its own. Measured is the mean squared error of the predicted noise on images that no training saw, at fixed
times and noise: as the share of what the task's own adapter gains over the base, and on plain digits relative to the
base. Calibration data are what the pipeline calls its UNet with while it draws by each adapter alone: no image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from sklearn.datasets import load_digits
from torch import Tensor

from nsc_merge.integrations.diffusers import calibration_data, merge

from .records import RESULTS, WORK, versions

TASKS = {"digits": "8 and 9", "inverted": "inverted", "sideways": "on their side"}
# Tokens: ten digits, a style for each task, plain, and nothing, which guidance compares with.
PLAIN, NOTHING, TOKENS, WIDTH = 13, 14, 15, 32
BATCH, STEPS, STEPS_OF_ADAPTER = 32, 4000, 800
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum (`set_adapters`, 1 each)": ("task_arithmetic", {"scale": 1.0}),
    "mean": ("task_arithmetic", {"scale": 1 / 3}),
    "TIES": ("ties", {"rank": 24}),
    "DARE-TIES": ("dare_ties", {"rank": 24}),
    "KnOTS-TIES": ("knots_ties", {}),
    "Core Space": ("core_space", {}),
    "RegMean": ("regmean", {}),
    "Fisher": ("fisher", {"rank": 24}),
    "NSC": ("nsc", {"progress": False}),
    "match": ("match", {"progress": False}),
    "distill": ("distill", {"progress": False}),
    "distill, with RegMean's terms": ("distill", {"progress": False, "regmean": True}),
}
BEST = "one weight, best on images of every task"
SCALES = [0.1 * number for number in range(2, 16)]


class Images:
    """Digits as the tasks show them, in three parts, with the tokens that tell of them."""

    def __init__(self) -> None:
        found = load_digits()
        self._images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        self._labels = torch.tensor(found.target)
        self._part = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(0)) % 10
        self.embedding = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def of(self, task: str | None, part: str) -> tuple[Tensor, Tensor]:
        """Images ``[N, 1, 8, 8]`` from -1 to 1 and tokens ``[N, 2]``; the base's own for None."""
        parts = {"train": self._part < 7, "validation": self._part == 7, "test": self._part > 7}[part]
        new = self._labels > 7
        rows = parts & (new if task == "digits" else ~new)
        images, labels = self._images[rows], self._labels[rows]
        if task == "inverted":
            images = -images
        elif task == "sideways":
            images = images.rot90(1, (2, 3))
        style = PLAIN if task is None else 10 + list(TASKS).index(task)
        return images, torch.stack([labels, torch.full_like(labels, style)], 1)


def denoiser() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, attention_head_dim=8, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(pipe: Any, data: Images, task: str | None, seed: int, steps: int, lr: float) -> None:
    """Train what requires gradients on the images of a task."""
    images, tokens = data.of(task, "train")
    generator = torch.Generator().manual_seed(seed)
    values = [one for one in pipe.unet.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pipe.unet.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        told = tokens[rows].clone()
        told[torch.rand(BATCH, generator=generator) < 0.1] = NOTHING
        noise = torch.randn(BATCH, 1, 8, 8, generator=generator)
        times = torch.randint(1000, (BATCH,), generator=generator)
        noisy = pipe.scheduler.add_noise(images[rows], noise, times)
        F.mse_loss(pipe.unet(noisy, times, data.embedding[told]).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    pipe.unet.eval()


def error(pipe: Any, data: Images, task: str | None, part: str) -> float:
    """Mean squared error of the noise, at times and with noise that are the same for every model."""
    images, tokens = data.of(task, part)
    generator = torch.Generator().manual_seed(99)
    total = []
    with torch.no_grad():
        for time_ in range(50, 1000, 100):
            noise = torch.randn(images.shape, generator=generator)
            times = torch.full((len(images),), time_)
            noisy = pipe.scheduler.add_noise(images, noise, times)
            total.append(F.mse_loss(pipe.unet(noisy, times, data.embedding[tokens]).sample, noise))
    return float(torch.stack(total).mean())


def with_adapters(work: Path, data: Images, seed: int) -> Any:
    """The pipeline with a trained base and its three adapters, from files where there are some."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    pipe, base = denoiser(), work / "base.safetensors"
    if not base.exists():
        trained(pipe, data, None, 0, STEPS, 2e-3)
        work.mkdir(parents=True, exist_ok=True)
        save_file(pipe.unet.state_dict(), base)
    pipe.unet.load_state_dict(load_file(base))
    pipe.unet.requires_grad_(False)
    for number, task in enumerate(TASKS):
        folder = work / f"{task}-{seed}"
        if not folder.exists():
            torch.manual_seed(10 * seed + number)
            # On the base alone.
            alone = denoiser()
            alone.unet.load_state_dict(load_file(base))
            alone.unet.requires_grad_(False)
            alone.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS), adapter_name=task)
            trained(alone, data, task, 10 * seed + number, STEPS_OF_ADAPTER, 2e-3)
            alone.unet.save_lora_adapter(folder, adapter_name=task)
        pipe.unet.load_lora_adapter(folder, prefix=None, adapter_name=task, use_safetensors=True)
    pipe.unet.eval()
    return pipe


def prompts(data: Images) -> dict[str, list[dict[str, Any]]]:
    """Which digits each adapter draws for the calibration."""
    nothing = data.embedding[[NOTHING, NOTHING]][None]
    drawn: dict[str, list[dict[str, Any]]] = {}
    for number, task in enumerate(TASKS):
        digits = [8, 9] * 4 if task == "digits" else range(8)
        told = [data.embedding[[digit, 10 + number]][None] for digit in digits]
        drawn[task] = [{"prompt_embeds": one, "negative_prompt_embeds": nothing} for one in told]
    return drawn


def measured(pipe: Any, data: Images, part: str, bounds: dict[str, tuple[float, float]], base: float) -> dict[str, Any]:
    """Shares of the gain of each task's own adapter, and the error on plain digits over the base's."""
    shares = {}
    for task, (without, own) in bounds.items():
        shares[task] = (without - error(pipe, data, task, part)) / (without - own)
    return {"shares": shares, "plain": error(pipe, data, None, part) / base}


def rows(seed: int, work: Path, chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is measured, in turn: the errors of base and adapters, and the ``chosen`` rows."""
    data = Images()
    pipe = with_adapters(work, data, seed)
    bounds: dict[str, dict[str, tuple[float, float]]] = {"validation": {}, "test": {}}
    base = {}
    for part, found in bounds.items():
        pipe.unet.disable_adapters()
        base[part] = error(pipe, data, None, part)
        without = {task: error(pipe, data, task, part) for task in TASKS}
        pipe.unet.enable_adapters()
        for task in TASKS:
            pipe.set_adapters(task)
            found[task] = without[task], error(pipe, data, task, part)
    yield {"row": "errors", "base": base["test"], "tasks": bounds["test"]}
    calls = calibration_data(
        pipe, prompts(data), num_inference_steps=25, guidance_scale=2.0, height=64, width=64, seed=seed
    )
    for title in [one for one in METHODS if one in chosen]:
        method, options = METHODS[title]
        begin = time.perf_counter()
        merge(pipe, list(TASKS), adapter_name="merged", method=method, data=calls, **options)
        seconds = time.perf_counter() - begin
        pipe.set_adapters("merged")
        yield {"row": title, "seconds": seconds, **measured(pipe, data, "test", bounds["test"], base["test"])}
        pipe.delete_adapters("merged")
    if BEST not in chosen:
        return
    tuned = []
    for scale in SCALES:
        pipe.set_adapters(list(TASKS), [scale] * len(TASKS))
        found = measured(pipe, data, "validation", bounds["validation"], base["validation"])["shares"]
        tuned.append((sum(found.values()), scale))
    best = max(tuned)[1]
    pipe.set_adapters(list(TASKS), [best] * len(TASKS))
    row = {"row": BEST, "scale": best}
    yield {**row, **measured(pipe, data, "test", bounds["test"], base["test"])}


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(TASKS.values()) + " | mean | plain digits |", "|---|" + "---|" * (len(TASKS) + 2)]
    for title in dict.fromkeys(row["row"] for row in found if row["row"] != "errors"):
        own = [row for row in found if row["row"] == title]
        shares = [sum(row["shares"][task] for row in own) / len(own) for task in TASKS]
        plain = sum(row["plain"] for row in own) / len(own)
        means = [sum(row["shares"].values()) / len(TASKS) for row in own]
        spread = f"{100 * sum(means) / len(means):.0f} % ({100 * min(means):.0f} to {100 * max(means):.0f})"
        lines.append(
            f"| {title} | " + " | ".join(f"{100 * one:.0f} %" for one in shares) + f" | {spread} | {plain:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rows", nargs="*", default=[*METHODS, BEST], help="of the table (default: all)")
    parser.add_argument("--work", type=Path, default=WORK / "denoiser", help="trained parts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "denoiser.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, and nothing else")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            for row in rows(seed, arguments.work, arguments.rows):
                with arguments.out.open("a") as file:
                    file.write(json.dumps({"seed": seed, **row, "versions": versions()}) + "\n")
                print(json.dumps(row), flush=True)
    print(table([json.loads(line) for line in arguments.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
