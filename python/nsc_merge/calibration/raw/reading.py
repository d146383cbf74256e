"""Raw data made batches of a base model's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsc_merge.calibration.batch_files import Batches
from nsc_merge.calibration.raw.settings import DataSettings


def is_raw(source: str | Path) -> bool:
    """Whether a source is raw data; False for safetensors files of inputs, and for folders of them."""
    raise NotImplementedError


def raw_batches(
    source: Any,
    base: str,
    settings: DataSettings,
    batch_size: int,
    argument: str,
    *,
    local: bool = True,
    base_revision: str | None = None,
) -> Batches:
    """Batches of the inputs that the base model takes, of samples drawn from raw data.

    Args:
        source: file, folder, or dataset; a hub id only where ``local`` is False.
        base: folder or hub id of the base model, beside which tokenizer and processor are looked for.
        settings: what is taken, and how.
        batch_size: samples of a batch.
        argument: how messages call the source, such as ``calibration.french``.
        local: whether source, tokenizer and processor are on disk, so that nothing may touch the network.
        base_revision: of a base from the hub.

    Raises:
        FileNotFoundError, ValueError: naming ``argument``, what the source looks like, and what to write instead.
    """
    raise NotImplementedError
