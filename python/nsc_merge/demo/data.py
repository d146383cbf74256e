"""Scenes composed from real digits and real photographs, with exact labels for every task.

Both sources ship inside scikit-learn: the 1797 handwritten 8x8 digits of ``load_digits`` and the two
photographs of ``load_sample_images``. Nothing is downloaded. A scene is a 24x24 grey canvas carrying one to
four digits of different size, rotation and depth, drawn far to near. Because the canvas is composed, depth,
normals, edges, segmentation, counts and angles are known exactly.

There are two kinds of scene: ``photo`` (bright digits on photograph crops) and ``shaded`` (dark digits on a
shaded sheet with random strokes). Digits are split once into train, validation and test sets that never share
a sample; photograph columns are split in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 24
MAX_DIGITS = 4
Scene = Literal["photo", "shaded"]
Split = Literal["train", "val", "test"]

SCENES: tuple[Scene, ...] = ("photo", "shaded")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_MEAN, _STD = 0.45, 0.27
_NOISE = 0.08
_MAX_TILT = math.pi / 4
_PHOTO_COLUMNS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}


@dataclass(frozen=True)
class SceneSet:
    """A batch of scenes and everything known about them.

    Attributes:
        pixels: ``[N, 1, 24, 24]``, noisy and normalised; what a model sees.
        clean: ``[N, 1, 24, 24]``, normalised but noiseless; a pre-training target.
        digits: ``[N, 24, 24]`` uint8, 0 for background and 1 + digit elsewhere; a pre-training target.
        primary: ``[N]``, class of the nearest digit, which is always there.
        salient: ``[N, 24, 24]`` bool, the pixels of that digit.
        labels: per task, the ground truth in the form that the task's loss takes.
    """

    pixels: Tensor
    clean: Tensor
    digits: Tensor
    primary: Tensor
    salient: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.pixels)


@lru_cache(maxsize=1)
def digit_images() -> tuple[Tensor, Tensor]:
    """Real digits: images ``[1797, 1, 8, 8]`` in [0, 1] and classes ``[1797]``."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32, device="cpu")[:, None] / 16.0
    return images, torch.tensor(bunch.target, device="cpu")


@lru_cache(maxsize=1)
def digit_split() -> dict[str, Tensor]:
    """Indices into :func:`digit_images` per split: 1000 train, 300 val, 497 test, pairwise disjoint."""
    import numpy as np

    order = torch.tensor(np.random.RandomState(0).permutation(len(digit_images()[0])), device="cpu")
    return {"train": order[:1000], "val": order[1000:1300], "test": order[1300:]}


@lru_cache(maxsize=1)
def _photographs() -> Tensor:
    from sklearn.datasets import load_sample_images

    grey = [
        torch.tensor(image, dtype=torch.float32, device="cpu").mean(-1) / 255.0 for image in load_sample_images().images
    ]
    return torch.cat([F.avg_pool2d(image[None, None], 2) for image in grey])[:, 0]


def make_scenes(count: int, split: Split, scene: Scene, seed: int) -> SceneSet:
    """Compose ``count`` scenes; equal arguments give equal tensors.

    Args:
        count: number of scenes.
        split: which digits and which photograph columns may appear.
        scene: ``photo`` or ``shaded``.
        seed: seed of the generator that draws every random choice.

    Raises:
        ValueError: for an unknown split or scene.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, found {split!r}")
    if scene not in SCENES:
        raise ValueError(f"scene: expected one of {SCENES}, found {scene!r}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device="cpu")

    shown = torch.randint(1, MAX_DIGITS + 1, (count,), generator=generator, device="cpu")
    image = (
        _photo_background(count, split, generator) if scene == "photo" else _shaded_background(count, uniform)
    )

    # Slot 0 is the primary digit: always present, always the largest and therefore the nearest.
    scale = uniform(0.9, 1.4, count, MAX_DIGITS)
    scale[:, 0] = uniform(1.5, 1.9, count)
    far_to_near = scale.argsort(1)
    present = torch.arange(MAX_DIGITS, device="cpu")[None] < shown[:, None]
    tilt = uniform(-_MAX_TILT, _MAX_TILT, count, MAX_DIGITS)
    pool = digit_split()[split]
    which = pool[torch.randint(len(pool), (count, MAX_DIGITS), generator=generator, device="cpu")]
    margin = 4 * scale * 0.85
    centre_x = margin + uniform(0, 1, count, MAX_DIGITS) * (SIZE - 2 * margin)
    centre_y = margin + uniform(0, 1, count, MAX_DIGITS) * (SIZE - 2 * margin)
    grey = uniform(0.8, 1.0, count, MAX_DIGITS) if scene == "photo" else uniform(0.0, 0.22, count, MAX_DIGITS)

    images, classes = digit_images()
    digits = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8, device="cpu")
    depth = torch.ones(count, SIZE, SIZE, device="cpu")
    rows = torch.arange(count, device="cpu")
    grid_y, grid_x = _pixel_grid()
    for layer in range(MAX_DIGITS):
        slot = far_to_near[:, layer]
        s, angle, x0, y0 = (value[rows, slot][:, None, None] for value in (scale, tilt, centre_x, centre_y))
        dx, dy = (grid_x - x0) / s, (grid_y - y0) / s
        u = dx * angle.cos() + dy * angle.sin()
        v = -dx * angle.sin() + dy * angle.cos()
        sample = which[rows, slot]
        alpha = F.grid_sample(images[sample], torch.stack([u / 4, v / 4], -1), align_corners=False)
        alpha = (alpha * 1.6).clamp(0, 1) * present[rows, slot][:, None, None, None]
        image = image * (1 - alpha) + alpha * grey[rows, slot][:, None, None, None]
        covered = alpha[:, 0] > 0.5
        digits = torch.where(covered, (classes[sample] + 1).to(torch.uint8)[:, None, None], digits)
        depth = torch.where(covered, 1.6 - 0.75 * s, depth)
    # The primary digit is drawn last, so what it covers is what is seen of it.
    salient = covered

    noisy = image + _NOISE * torch.randn(image.shape, generator=generator, device="cpu")
    # Background 0, digits 0-4 are class 1, digits 5-9 are class 2.
    segmentation = torch.where(digits == 0, 0, torch.where(digits <= 5, 1, 2))
    return SceneSet(
        pixels=(noisy - _MEAN) / _STD,
        clean=(image - _MEAN) / _STD,
        digits=digits,
        primary=classes[which[:, 0]],
        salient=salient,
        labels={
            "depth": depth,
            "normal": _normals(depth),
            "edge": _edges(image),
            "semseg": segmentation,
            "count": shown - 1,
            "angle": tilt[:, 0] / _MAX_TILT,
        },
    )


def _pixel_grid() -> tuple[Tensor, Tensor]:
    centres = torch.arange(SIZE, dtype=torch.float32, device="cpu") + 0.5
    grid_y, grid_x = torch.meshgrid(centres, centres, indexing="ij")
    return grid_y, grid_x


def _photo_background(count: int, split: str, generator: torch.Generator) -> Tensor:
    photos = _photographs()
    height, width = photos.shape[1:]
    first, last = (int(width * edge) for edge in _PHOTO_COLUMNS[split])
    which = torch.randint(len(photos), (count,), generator=generator, device="cpu")
    left = torch.randint(first, last - SIZE + 1, (count,), generator=generator, device="cpu")
    top = torch.randint(0, height - SIZE + 1, (count,), generator=generator, device="cpu")
    offsets = torch.arange(SIZE, device="cpu")
    crops = photos[
        which[:, None, None],
        (top[:, None] + offsets)[:, :, None],
        (left[:, None] + offsets)[:, None, :],
    ]
    return crops[:, None] * 0.7


def _shaded_background(count: int, uniform) -> Tensor:
    grid_y, grid_x = _pixel_grid()
    base, slope_x, slope_y = (
        uniform(low, high, count, 1, 1, 1) for low, high in ((0.55, 0.9), (-0.2, 0.2), (-0.2, 0.2))
    )
    sheet = base + slope_x * (grid_x / SIZE - 0.5) + slope_y * (grid_y / SIZE - 0.5)
    for _ in range(3):
        x0, y0 = uniform(0, SIZE, count, 1, 1), uniform(0, SIZE, count, 1, 1)
        direction, length = uniform(0, math.pi, count, 1, 1), uniform(4, 9, count, 1, 1)
        dx, dy = grid_x - x0, grid_y - y0
        along = dx * direction.cos() + dy * direction.sin()
        across = (-dx * direction.sin() + dy * direction.cos()).abs()
        stroke = ((along.abs() < length / 2) & (across < 0.7)).float()[:, None]
        sheet = sheet * (1 - stroke) + stroke * uniform(0.15, 0.5, count, 1, 1, 1)
    return sheet


_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device="cpu")[None, None] / 8
_SMOOTH = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], device="cpu")[None, None] / 16


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel)


def _normals(depth: Tensor) -> Tensor:
    """Unit normals ``[N, 3, 24, 24]`` of the twice-smoothed height field 3 (1 - depth)."""
    height = _filter(_filter(3 * (1 - depth)[:, None], _SMOOTH), _SMOOTH)
    slope_x, slope_y = _filter(height, _SOBEL), _filter(height, _SOBEL.transpose(2, 3))
    return F.normalize(torch.cat([-slope_x, -slope_y, torch.ones_like(slope_x)], 1), dim=1)


def _edges(image: Tensor) -> Tensor:
    """Sobel magnitude ``[N, 24, 24]`` of the noiseless image."""
    slope_x, slope_y = _filter(image, _SOBEL), _filter(image, _SOBEL.transpose(2, 3))
    return 4 * (slope_x.square() + slope_y.square()).sqrt()[:, 0]
