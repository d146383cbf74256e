"""The ``run`` command."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsc_merge.commands.terminal import log, prepare, say
from nsc_merge.utils.errors import FoundByAll, logger

if TYPE_CHECKING:
    from nsc_merge.processes.group import Group
    from nsc_merge.recipes.merge_recipe import Recipe

_RUN = """\
Merges as a YAML recipe says:

  model: base                       # folder, or a hub id (owner/name)
  revision: main                    # of a hub id: branch, tag or commit
  trust_remote_code: false          # true runs code that comes with base, tokenizer or processor
  adapters:                         # task: PEFT folder, or owner/name or owner/name@revision on the hub,
    french: adapters/french         #   or keys and values
    legal: {adapter: owner/name, revision: main, subfolder: lora}
  calibration:                      # task: unlabelled samples. Text: .jsonl, .json, .csv, .parquet, .txt;
    french: prompts.jsonl           #   a folder of images or audio; a .jsonl of images and prompts; a folder of
    legal:                          #   datasets' save_to_disk; owner/name of a dataset on the hub; or
      source: legal.parquet         #   .safetensors of inputs made already (a folder: a file per batch)
      text: "{question}\\n{answer}"  # and any key of data
  data:                             # of all tasks; here with the defaults
    text: null                      # column, or template over columns; of a model that classifies
                                    #   tokens a column of texts or of lists of words
    text_pair: null                 # of models that compare two texts, the second
    texts: null                     # of models that embed or score, columns or templates, each read alone
    messages: null                  # column with chats, for the tokenizer's chat template
    target: null                    # text that a decoder reads behind an encoder (T5, Whisper); null begins an answer
    image: null                     # column with images, or with their paths
    audio: null                     # column with audio, or with paths of its files
    split: null                     # of a dataset, or train, validation, test by names
                                    #   of files in a folder; on the hub also revision, config
    tokenizer: null                 # folder or hub id, where it is not beside the base
    processor: null                 # the same, of processor, image processor, feature extractor
    max_length: 512                 # tokens of a sample
    max_seconds: 30                 # of audio
    truncation: true                # false refuses samples that are longer
    truncation_side: right
    padding_side: right
    samples: 1024                   # drawn at most; null for all
    seed: 0                         # of the draw, which is the same every time
  batch_size: 32                    # samples, or rows of a .safetensors file, per batch
  method: nsc                       # see nsc-merge methods
  options: {steps: 100, lr: 1e-3}   # of the method; nsc's defaults depend on the model
  shared_modules: lambda            # or mean, first: modules trained in full, the base's own
  dora: exact                       # or convert: to LoRA of the same rank; or refuse
  added_tokens: refuse              # or mean, first, base: what the base gets of tokens that adapters added
  dtype: auto                       # or float32, bfloat16, ...
  device: auto                      # or cpu, cuda, cuda:1, mps
  device_map: null                  # instead of device, over several and the disk: auto, balanced,
                                    #   balanced_low_0, sequential, or module path: 0, cpu or disk
  max_memory: null                  # of device_map: {0: 20GiB, cpu: 60GiB}
  quantization: none                # or bitsandbytes-8bit, bitsandbytes-4bit, torchao-int8,
                                    #   torchao-int4, fp8; a quantised base needs no key, or
                                    #   dequantize: its files (fp8, mxfp4) as plain numbers
  full_hash: false                  # or true, as --full-hash
  labels: {french: names.txt}       # task: names of its head's classes, a list, .txt or .json
  output: {dir: merged, formats: [lora, model], rank: null, max_shard_size: null, plots: true}
                                    # dequantize: true for a model of plain numbers from a
                                    #   quantised base; head: the task whose head is put in;
                                    #   push_to_hub: owner/name, private: true

Relative paths are relative to the recipe; those in overrides to the working folder.
An override of the method drops the options that the recipe has for its own; one such as
calibration.french.samples=64 also changes a task that is written as a path alone. Keys and
values add to those of the recipe: 'adapters={legal: FOLDER}' changes legal and leaves the
others, which adapters=null in front of it would take away.
The output folder changes only once everything is written; what an earlier merge left
there goes, other files stay. Nothing but a hub id touches the network; HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE are as in transformers.

The record of a merge tells the base's weights by SHA-256 of each file's header and by its
size (in the hub's cache, by its name there). A base of the same layout in which only
numbers changed is not noticed by a later export; --resume does notice files written to
since. --full-hash reads the files once more and records SHA-256 of all their bytes, which
resuming and exporting then compare; digests are kept in ~/.cache/nsc_merge. What came from
the hub is recorded with its commit, raw data with all settings and the hash of the samples:
the recipe.yaml beside a merge leads to the same one.

Methods that take steps (nsc, distill, match, adamerging) keep the state of a run beside the
output folder, from which --resume goes on with the same recipe and files.

Several GPUs, or machines that see the same files, share a merge and hold a part of the base
each:  torchrun --nproc-per-node 8 -m nsc_merge run recipe.yaml
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    run = commands.add_parser(
        "run",
        help="merge as a recipe says",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", type=Path, help="YAML file")
    run.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the recipe")
    run.add_argument("--dry-run", action="store_true", help="load, check, estimate; write nothing")
    run.add_argument(
        "--resume", action="store_true", help="go on from the state of an interrupted run (methods that take steps)"
    )
    run.add_argument("--full-hash", action="store_true", help="record SHA-256 of all bytes of the base")
    run.add_argument("--push-to-hub", metavar="REPO", help="upload the result to owner/name, as output.push_to_hub")
    run.add_argument("--private", action="store_true", help="make a repository that there is not yet a private one")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    run.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from nsc_merge.recipes.merge_recipe import load_recipe

    if arguments.full_hash:
        arguments.overrides = [*arguments.overrides, "full_hash=true"]
    if arguments.push_to_hub is not None:
        arguments.overrides = [*arguments.overrides, f"output.push_to_hub={json.dumps(arguments.push_to_hub)}"]
    if arguments.private:
        arguments.overrides = [*arguments.overrides, "output.private=true"]
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    prepare(local=recipe.offline)
    from nsc_merge.processes.group import Group
    from nsc_merge.processes.launch import launched_rank, started
    from nsc_merge.recipes.run import shares_work

    if shares_work(recipe):
        with started() as group:
            return _share(arguments, recipe, group)
    return _share(arguments, recipe, Group()) if launched_rank() == 0 else 0


def _share(arguments: argparse.Namespace, recipe: Recipe, group: Group) -> int:
    """This process's part; the first of a group speaks for all."""
    from nsc_merge.methods import method_of
    from nsc_merge.recipes.dry_run import plan, render_plan
    from nsc_merge.recipes.preflight import state_file
    from nsc_merge.recipes.run import run

    if not group.is_main:
        logger.setLevel(logging.ERROR)
    tell = log if group.is_main else _keep_quiet
    if arguments.dry_run:
        found = plan(recipe, tell, resume=arguments.resume)
        if group.is_main:
            say(json.dumps(found) if arguments.json else render_plan(found))
        return 0
    try:
        summary = run(recipe, resume=arguments.resume, log=tell)
    except FoundByAll as error:
        if group.is_main:
            raise
        raise SystemExit(1) from error
    except (KeyboardInterrupt, RuntimeError, OSError) as error:
        state = state_file(recipe)
        # A run that another one keeps from starting has no state of its own.
        ended = isinstance(error, (KeyboardInterrupt, OSError)) and not isinstance(error, BlockingIOError)
        ended = ended or (isinstance(error, RuntimeError) and group.size > 1)
        if ended and method_of(recipe.method).resumable and state.is_file():
            again = shlex.join(["nsc-merge", "run", str(arguments.recipe), *arguments.overrides, "--resume"])
            tell(f"the state is in {state}; go on with: {again}" + _by_the_launcher(group))
        raise
    if summary is None:
        return 0
    if arguments.json:
        print(json.dumps(summary))
        return 0
    by = f" by {group.size} processes" if group.size > 1 else ""
    say(f"written to {summary['out']}{by}: {', '.join(summary['files'])}")
    for note in summary.get("serving", ()):
        say(note)
    if "truncation" in summary:
        print(
            f"relative error of the truncation: {summary['truncation']['mean']:.3g} on average, "
            f"{summary['truncation']['max']:.3g} at most"
        )
    if "pushed" in summary:
        say(f"uploaded to {summary['pushed']}")
    for command in summary["next"]:
        say(f"next: {command}")
    return 0


def _by_the_launcher(group: Group) -> str:
    return ", started like this run, in any number of processes" if group.size > 1 else ""


def _keep_quiet(_: str) -> None:
    """In place of a log, in a process that another speaks for."""
