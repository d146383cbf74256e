"""A batch of pictures, videos, sound, series, or of text with some of these, for any model of transformers.

By what its ``forward`` takes and the sizes that its configuration names. How many tokens stand for a picture or a
recording is what the model says when there are too few.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bench.sweeps.own_batches import BATCHES
from bench.sweeps.small_configs import WIDTH

_COUNTS = (
    r"tokens: \d+,? (?:and )?(?:number of )?features:? (\d+)",
    r"features:? (\d+),? (?:and )?(?:number of )?tokens:? \d+",
    r"tokens (?:\()?\d+(?:\))?.*?features (?:\()?(\d+)",
)
_SEEN = ("image_token_id", "image_token_index", "img_token_id", "image_patch_id", "image_soft_token_id")
_HEARD = ("audio_token_id", "audio_token_index", "audio_soft_token_id")
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", "input_size")
_MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
_TRIES = 6


def inputs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """The first batch that the model computes, of one row where there is text beside pictures or sound."""
    takes = inspect.signature(model.forward).parameters
    places, mends = 4, dict[str, int]()
    error: Exception = ValueError("no batch was tried")
    for _ in range(_TRIES):
        batch = _batch(takes, config, places)
        for name, mend in mends.items():
            batch[name] = _MENDS[mend][1](batch[name])
        if config.model_type in BATCHES:
            batch = BATCHES[config.model_type](batch, config)
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except (ValueError, RuntimeError, IndexError) as found:
            error = found
            told = next((match for one in _COUNTS if (match := re.search(one, str(found)))), None)
            if told is not None:
                wanted = int(told[1])
                # Some count features, some their numbers.
                places = wanted // WIDTH if wanted == places or wanted > 4096 else wanted
                continue
            fits = next((number for number, (said, _) in enumerate(_MENDS) if re.search(said, str(found))), None)
            medium = next((one for one in _MEDIA if one in batch), None)
            if fits is None or medium is None or mends.get(medium) == fits:
                break
            mends[medium] = fits
    raise error


# What a model says of the shape, and the shape that it then gets: several pictures a row, one channel, bins first,
# those of several frames in one.
_MENDS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    (r"expected 5, got 4", lambda value: value[:, None]),
    (r"split_sizes to sum exactly to 1 .*split_sizes=\[5\]", lambda value: value[:, None].repeat(1, 5, 1, 1, 1)),
    (r"split_sizes to sum exactly to 1 .*split_sizes=\[7\]", lambda value: value[:, None].repeat(1, 7, 1, 1, 1)),
    (r"1, \d+\], expected input\[\d+, 2, \d+\] to have 1 channels", lambda value: value[:, None]),
    (r"Audio must be mono", lambda value: value[:, None]),
    (r"expected input\[\d+, \d+, \d+\] to have \d+ channels", lambda value: value.transpose(1, 2)),
    (r"cannot be multiplied \(\d+x80 and 320x", lambda value: value.repeat(1, 1, 4)),
    (r"cannot be multiplied \(\d+x80 and 128x", lambda value: value.repeat(1, 1, 2)[..., :128]),
    (r"16x588 and 1176x", lambda value: value.repeat(1, 2)),
    (r"selected index k out of range", lambda value: interpolate(value, (256, 256))),
)


def _batch(takes: Any, config: Any, places: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    text = "input_ids" in takes and "image" not in config.model_type
    rows = 1 if text else 2
    found.update(_pictures(takes, config, rows, generator))
    if "pixel_values" not in found:
        found.update(_sound(takes, config, rows, generator))
    found.update(_series(takes, config, generator))
    if text:
        found.update(_text(takes, config, rows if found else 2, places if found else 0, found, generator))
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.randint(3, 80, (len(next(iter(found.values()))), 5), generator=generator)
    return found


def _text(
    takes: Any, config: Any, rows: int, places: int, seen: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (rows, 7 + places), generator=generator)
    kinds = torch.zeros_like(ids)
    names = _HEARD if any("feature" in name or name == "input_values" for name in seen) else _SEEN
    parts = (config, *(part for _, part in _parts(config)))
    token = next((found for part in parts if (found := _number(part, names, None)) is not None), None)
    if token is not None and places:
        ids[:, 2 : 2 + places] = token
        kinds[:, 2 : 2 + places] = 1
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in takes:
        found["mm_token_type_ids"] = kinds
    if "token_type_ids" in takes and places:
        found["token_type_ids"] = kinds
    if "bbox" in takes:
        found["bbox"] = torch.randint(0, 500, (*ids.shape, 2), generator=generator).repeat(1, 1, 2)
        found["bbox"][..., 2:] += 20
    if "qformer_input_ids" in takes:
        found["qformer_input_ids"] = torch.randint(3, 80, (rows, 6), generator=generator)
    if "image_embeds_position_mask" in takes and seen:
        found["input_ids"] = torch.randint(3, 80, (rows, 7 + config.latent_query_num), generator=generator)
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        found["image_embeds_position_mask"] = torch.zeros_like(found["input_ids"]).bool()
        found["image_embeds_position_mask"][:, 2 : 2 + config.latent_query_num] = True
    return {name: value for name, value in found.items() if name in takes}


def _pictures(takes: Any, config: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    eye = _eye(config)
    size, channels, patch = _size(eye), _number(eye, ("num_channels", "in_channels", "in_chans"), 3), _patch(eye)
    frames = _number(eye, ("num_frames", "tubelet_num_frames"), None)
    depth = _number(eye, ("temporal_patch_size",), 1)
    patches = torch.randn(16, channels * depth * patch * patch, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    if "grid_thw" in takes and "hidden_states" in takes:
        return {"hidden_states": patches, "grid_thw": grid}
    if "grid_thw" in takes:
        return {"pixel_values": patches, "grid_thw": grid}
    if "spatial_shapes" in takes:
        return {
            "pixel_values": torch.randn(rows, 16, channels * patch * patch, generator=generator),
            "pixel_attention_mask": torch.ones(rows, 16).long(),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
        }
    if "pixel_values" in takes and "image_grid_thw" in takes:
        return {"pixel_values": patches, "image_grid_thw": grid}
    found: dict[str, Tensor] = {}
    if "pixel_values" in takes:
        shape: tuple[int, ...] = (rows, channels, *size)
        if frames is not None and "pixel_values_videos" not in takes:
            shape = (rows, frames, channels, *size)
        found["pixel_values"] = torch.randn(shape, generator=generator)
    elif "pixel_values_videos" in takes:
        shape = (rows, frames or 4, channels, *size)
        found["pixel_values_videos"] = torch.randn(shape, generator=generator)
    elif "flattened_patches" in takes:
        found["flattened_patches"] = torch.rand(rows, 9, channels * patch * patch + 2, generator=generator)
    if "image_sizes" in takes and found and config.model_type not in ("llava", "vipllava"):
        found["image_sizes"] = torch.tensor([size] * rows)
    return found


def _sound(takes: Any, config: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    parts = [part for name, part in _parts(config) if re.search(r"audio|speech|encoder", name)]
    ear = next((part for part in parts if any(hasattr(part, name) for name in _BINS)), config)
    found: dict[str, Tensor] = {}
    if "input_features" in takes:
        bins = _number(ear, _BINS, 80)
        positions = _number(ear, ("max_source_positions",), 0)
        if positions and config.model_type != "speech_to_text":
            found["input_features"] = torch.randn(rows, bins, 2 * positions, generator=generator)
        else:
            found["input_features"] = torch.randn(rows, 64, bins, generator=generator)
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in takes:
                found[name] = torch.ones(rows, 2 * positions or 64).long()
        return found
    if "input_values" in takes:
        bins = _number(ear, ("num_mel_bins",), 0)
        if bins and "max_length" in vars(ear):
            return {"input_values": torch.randn(rows, ear.max_length, bins, generator=generator)}
        channels = _number(ear, ("audio_channels",), 0)
        shape = (rows, channels, 4000) if channels else (rows, 4000)
        return {"input_values": 0.1 * torch.randn(shape, generator=generator)}
    return {}


def _series(takes: Any, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if "past_values" not in takes:
        return {}
    length = _number(config, ("context_length",), 32)
    if config.model_type in ("autoformer", "informer", "time_series_transformer"):
        length += max(config.lags_sequence)
        ahead = config.prediction_length or 4
        features = max(config.num_time_features, 1)
        return {
            "past_values": torch.rand(2, length, generator=generator),
            "past_time_features": torch.rand(2, length, features, generator=generator),
            "past_observed_mask": torch.ones(2, length),
            "future_values": torch.rand(2, ahead, generator=generator),
            "future_time_features": torch.rand(2, ahead, features, generator=generator),
        }
    channels = _number(config, ("num_input_channels",), 1)
    return {"past_values": torch.randn(2, length, channels, generator=generator)}


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield name, part
            yield from _parts(part)


def _eye(config: Any) -> Any:
    """The part of a configuration that is of pictures."""
    parts = [part for name, part in _parts(config) if re.search(r"vision|image|visual|backbone", name)]
    return next((part for part in parts if hasattr(part, "patch_size") or hasattr(part, "image_size")), config)


def _number(config: Any, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, int) and found:
            return found
    return default


def _size(config: Any) -> tuple[int, int]:
    found = getattr(config, "image_size", None) or getattr(config, "img_size", None) or 64
    return (found, found) if isinstance(found, int) else tuple(found)[:2]


def _patch(config: Any) -> int:
    found = getattr(config, "patch_size", 16)
    return found if isinstance(found, int) else found[0]
