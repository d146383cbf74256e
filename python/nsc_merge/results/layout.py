"""What a saved merge looks like on disk: formats, and names of its files."""

from __future__ import annotations

import re

FORMATS = ("coefficients", "lora", "model")
# What a finished merge keeps of its circumstances; ignored when the file is run again.
RECORD = "record"
COEFFICIENTS_FILE = "coefficients.json"
HISTORY_FILE = "history.jsonl"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
TRUNCATION_FILE = "truncation.json"
HEADS_FOLDER = "heads"
TASKS_FOLDER = "tasks"
COEFFICIENTS_FORMAT = "nsc_merge.coefficients"

# Options that the command sets, and all options of one run, not of the merge: no recipe keeps them.
OPTIONS_OF_RUN = ("state_to", "state_of", "resume_from")
PASSING_OPTIONS = ("progress", *OPTIONS_OF_RUN, "state_every", "scored")


def file_name(task: str) -> str:
    """The task as a file name: whatever could leave the folder is replaced."""
    return re.sub(r"[^\w.-]", "_", task).lstrip(".") or "task"
