"""The ``eval`` command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nsc_merge.commands.terminal import log, prepare, say

_EVAL = """\
Measures merges side by side as a YAML recipe says, beside the base model (zero_shot) and every task's own adapter
(finetuned), which the others are normalised by:

  model: base                          # folder, or a hub id (owner/name)
  tasks:
    count:
      adapter: adapters/count          # PEFT folder
      test: data/count-test.safetensors        # inputs and labels, stacked by name, or a folder of batches; or raw
      #                                # data: a folder for each class, rows.csv, {source: rows.jsonl, text: question}
      validation: data/count-val.safetensors   # for tune, and for methods that need data
      labels: labels                   # which tensor, or which column, holds the labels
      metric: accuracy                 # or miou, f1, f1_binary, matthews, multilabel_f1, entity_f1, perplexity,
      #                                # pearson, spearman, rmse, l1, mean_angle, edge_f, exact_match, cider, rouge1,
      #                                # rouge2, rougeL, bleu, wer, cer, vqa, relaxed_accuracy (ChartQA), anls
      #                                # (DocVQA); or {name: cider, program: pycocoevalcap};
      #                                # of embeddings, test {source: ..., texts: [query, positive]}: ndcg, mrr, recall;
      #                                # of scores, texts: [chosen, rejected]: pairwise_accuracy
      head: adapter                    # what the PEFT folder brought; or model; or a safetensors file
      # pool: mean                     # for weight and bias of a linear layer on the model's features: mean, first,
      #                                # last, patches, tokens or image
      # generate: true                 # generate as many tokens as labels have (exact_match, cider and behind it), or
      #                                # max_new_tokens: 128 beside it; greedily, or by num_beams: 4
      # calibration: prompts.jsonl     # unlabelled inputs instead of those of validation: raw data, or safetensors, as
      #                                # in nsc-merge run --help, with defaults for all tasks under data
    depth: {adapter: ..., test: ..., metric: rmse, head: heads/depth.safetensors, pool: image}
    arc:                               # by the lm-evaluation-harness, on a language model with its tokenizer
      {adapter: adapters/arc, lm_eval: arc_easy, metric: acc_norm, limit: 500, num_fewshot: 0}
  methods:
    - ties                             # with its defaults
    - {method: task_arithmetic, name: TA 0.4, options: {scale: 0.4}}
    - {method: task_arithmetic, name: TA, tune: metric}   # scale by the normalised average on validation; or loss
    - {method: nsc, options: {steps: 100}}
    - ensemble                         # outputs averaged over all adapters' models
    - {folder: merged, name: mine}     # written by nsc-merge run; or any adapter or model
  seeds: [0, 1, 2]                     # {seed} in a path stands for each; also orders data and seeds methods
  joint: logits                        # Hits@1/3/5 over the classes of all accuracy tasks; or probabilities
  batch_size: 32
  lm_eval: {include_path: my_tasks, batch_size: 8, apply_chat_template: false, system_instruction: null}   # your own
  #                                      task files; how it measures
  output: {dir: evaluation, plots: true}

Of a task with lm_eval, metric, limit and num_fewshot may be left out; the harness says which figures there are, and
whether higher is better. Its own tasks have their data on the hub; tasks of files under include_path with data on disk
touch no network. pip install 'nsc-kernels[eval]' brings the harness and pycocoevalcap.

revision, trust_remote_code, shared_modules, dora, dtype, device, device_map, max_memory and quantization are as in
nsc-merge run --help; relative paths likewise. Writes results.md, results.csv, results.json, pictures, and rows.jsonl,
from which an interrupted or extended evaluation goes on: rows whose settings and files are unchanged are not measured
again. A row that fails is left out, and the exit status is then 1.

examples:
  nsc-merge eval evaluation.yaml seeds=[0,1,2] output.dir=three-seeds
  nsc-merge eval evaluation.yaml tasks.arc.limit=100 output.dir=quick      a hundred questions of a harness task
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "eval",
        help="measure merges on labelled data, beside the base and every task's own adapter",
        description=_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the recipe")
    parser.add_argument("--redo", action="store_true", help="measure rows again that are there already")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
    from nsc_merge.evaluation.tables import as_text

    recipe = load_eval_recipe(arguments.recipe, arguments.overrides)
    prepare(local=recipe.offline)
    from nsc_merge.evaluation.run import run

    document, failed = run(recipe, redo=arguments.redo, progress=None, log=log)
    say(json.dumps(document) if arguments.json else f"{as_text(document)}\n\nwritten to {recipe.out}")
    return 1 if failed else 0
