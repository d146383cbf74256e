"""This library's methods for configurations of mergekit, and mergekit's LoRA models without a checkpoint each.

    import nsc_merge.integrations.mergekit      # from here on: merge_method: nsc_knots_ties, and all the others

    python -m nsc_merge.integrations.mergekit mergekit.yaml merged --copy-tokenizer

The first registers ``nsc_<method>`` for every method that needs no data and gives one update for all tasks; it is for
programs that call mergekit themselves. The second does so and runs mergekit's own ``mergekit-yaml``, with its options,
any method and any configuration; there ``model: base+adapter`` is read from the base's files and the adapter's factors
(:mod:`nsc_merge.integrations.mergekit.lora_models`), where mergekit writes a dense checkpoint for each.

A method in mergekit is given one tensor at a time. Trimming therefore counts within a tensor, whatever the method's
preset says, and ``trim_scope: global`` is refused; ``nsc-merge import mergekit.yaml`` makes a recipe for
``nsc-merge run``, which merges the whole model at once.
"""

from __future__ import annotations

from nsc_merge.integrations.mergekit.lora_models import from_factors
from nsc_merge.integrations.mergekit.registration import register_methods

__all__ = ["from_factors", "register_methods"]

register_methods()
