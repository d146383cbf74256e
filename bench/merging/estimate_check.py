"""What a step of NSC takes by formula and what it takes, on models of the CPU's size: the second table of
docs/large_models.md. Bytes and operations are counted, not timed, so that a busy machine changes nothing.

    python -m bench.merging.estimate_check
"""

from __future__ import annotations

from typing import Any

import torch

from bench import from_tests


def main() -> None:
    cases: Any = from_tests.module("merge/step_cases.py")
    decoder, encoder = cases.decoder(512, 6), cases.encoder(384, 6)
    narrow = cases.decoder(512, 6, torch.bfloat16)
    rows: list[tuple[str, Any, Any, tuple[str, ...], dict[str, Any]]] = [
        ("decoder, float32", decoder, cases.texts(2, 128), cases.QV, {}),
        ("decoder, bfloat16", narrow, cases.texts(2, 128), cases.QV, {}),
        ("decoder, padded, all linears", decoder, cases.texts(2, 128, padded=True), cases.ALL, {}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"checkpointing": True}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"batch_tasks": True}),
        ("decoder", decoder, cases.texts(6, 128), cases.QV, {"batch_tasks": True, "checkpointing": True}),
        ("encoder", encoder, cases.images(2), cases.ALL, {}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"checkpointing": True}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"batch_tasks": True}),
        ("encoder", encoder, cases.images(6), cases.ALL, {"batch_tasks": True, "checkpointing": True}),
    ]
    print("| model | tasks | options | MB by formula | measured | ratio | GFLOP by formula | counted | ratio |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: |")
    for name, model, batches, names, given in rows:
        found = cases.costs(model, batches, names, **given)
        options = ", ".join(f"`{option}`" for option in given)
        numbers = [
            f"{found.bytes / 1e6:.1f}",
            f"{found.bytes_measured / 1e6:.1f}",
            f"{found.bytes / found.bytes_measured:.2f}",
            f"{found.operations / 1e9:.1f}",
            f"{found.operations_measured / 1e9:.1f}",
            f"{found.operations / found.operations_measured:.3f}",
        ]
        print("| " + " | ".join([name, str(len(batches)), options, *numbers]) + " |", flush=True)


if __name__ == "__main__":
    main()
