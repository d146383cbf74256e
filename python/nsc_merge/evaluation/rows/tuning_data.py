"""Whether the data that a scale is chosen on are others than those that are reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from nsc_merge.calibration.raw.drawing import DECODED_MASK, MASK
from nsc_merge.evaluation.suite import Labelled, Suite
from nsc_merge.utils.safetensors_checks import bytes_of


def check_tuning_data(suite: Suite, tasks: Sequence[str], log: Callable[[str], None]) -> None:
    """Compare the inputs of validation and test data, sample by sample.

    Args:
        suite: with the data.
        tasks: that are measured on them.
        log: receives a line about tasks of which some test samples are among the validation data.

    Raises:
        ValueError: if all samples of one split are in the other.
    """
    for task in tasks:
        validation = set(_digests(suite.labelled(task, "val")))
        test = list(_digests(suite.labelled(task, "test")))
        shared = sum(one in validation for one in test)
        if shared and (shared == len(test) or validation <= set(test)):
            raise ValueError(
                f"tasks.{task}.validation: tune needs data beside those that are measured, and {shared} of the "
                f"{len(test)} samples of test are the {len(validation)} of validation; expected others, or the scale "
                "as options.scale"
            )
        if shared:
            log(f"tasks.{task}: {shared} of {len(test)} test samples are in validation, too, where scales are chosen")


def _digests(batches: Labelled) -> Iterator[bytes]:
    """Of the inputs of every sample, all of its texts where it has several, without the padding that depends on others
    in its batch; images of a batch that are not one for each are part of all of its samples.
    """
    for inputs, labels in batches:
        if len(rows := {len(value) for value in inputs.values()}) == 1 and (several := rows.pop() // len(labels)) > 1:
            inputs = {name: value.unflatten(0, (len(labels), several)) for name, value in inputs.items()}
        for row in range(len(labels)):
            digest = hashlib.blake2b(digest_size=16)
            for name in sorted(inputs):
                value = inputs[name]
                value = _without_padding(name, inputs, row) if len(value) == len(labels) else value
                digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
                digest.update(bytes_of(value).numpy().data)
            yield digest.digest()


def _without_padding(name: str, inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """What a row has of an input at its tokens; of a mask how many these are."""
    value, beside = inputs[name][row], inputs.get(DECODED_MASK if name.startswith("decoder_") else MASK)
    if beside is None or beside.dim() < 2 or beside.shape != inputs[name].shape:
        return value
    real = beside[row] != 0
    return real.sum(-1) if name.endswith(MASK) else value[real]
