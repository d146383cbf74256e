"""Adapters on the hub: what is read of one is fetched into the cache of huggingface_hub, and nothing else."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nsc_merge.adapters.adapter import Adapter
from nsc_merge.adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from nsc_merge.adapters.formats.diffusers_file import FILE as DIFFUSERS_FILE
from nsc_merge.adapters.formats.foreign_files import way_from
from nsc_merge.adapters.weights_beside import CONVERTED
from nsc_merge.utils.errors import hub_problem

# What sentence-transformers puts behind a model, as patterns: each module in a folder that begins with its number. The
# model is 0. Without its modules.json it takes the mean over all tokens.
SENTENCE_MODULES = (
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("[1-9]_*/config.json", "[1-9]_*/*_config.json", "[1-9]_*/model.safetensors"),
)
# The card and the configuration tell licence and labels; a tokenizer is compared with the base's.
READ = (
    *(CONFIG_FILE, WEIGHTS_FILE, CONVERTED, DIFFUSERS_FILE),
    *("README.md", "config.json"),
    *("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"),
    *SENTENCE_MODULES,
)
_MOST_SHOWN = 5


class Fetched(NamedTuple):
    """An adapter in the cache.

    Attributes:
        folder: with those of its files that are read.
        hub: ``owner/name@commit``.
        names: of all files that lie beside each other there; None where the hub could not be asked.
    """

    folder: Path
    hub: str
    names: tuple[str, ...] | None


def fetch(repo: str, name: str, *, revision: str | None = None, subfolder: str | None = None) -> Fetched:
    """Bring an adapter into the cache, as ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` say.

    Its files are listed before, so that others, such as pickled weights, are known by name and stay where they are.
    Offline, or where the hub cannot be reached, what was fetched earlier is taken.

    Args:
        repo: ``owner/name``.
        name: of the task, for messages.
        revision: branch, tag or commit; None for the newest.
        subfolder: where in the repository it lies.

    Raises:
        FileNotFoundError: if there is no adapter.
        OSError: if the hub does not give it, with what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    argument = f"adapters[{name!r}]"
    within = "" if subfolder is None else f"{PurePosixPath(subfolder)}/"
    names: tuple[str, ...] | None = None
    commit: str | None = None
    try:
        try:
            info = HfApi().model_info(repo, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # It may be in the cache.
            pass
        else:
            commit, files = info.sha, [one.rfilename for one in info.siblings or ()]
            names = tuple(file.removeprefix(within) for file in files if file.startswith(within))
            _check_there(argument, f"{repo}@{commit}", within, files)
        wanted = [f"{glob.escape(within)}{file}" for file in READ]
        # By the name that was asked for, under which the cache knows it later, too.
        snapshot = snapshot_of(repo, revision, wanted)
    except (HTTPError, OSError) as error:
        problem = hub_problem(error, argument, repo, revision)
        if problem is None:
            raise
        raise OSError(problem) from None
    # The cache calls a snapshot by its commit.
    if commit not in (None, snapshot.name):
        raise OSError(f"{argument}: {repo} changed on the hub while it was fetched: try again")
    return Fetched(snapshot / within, f"{repo}@{snapshot.name}", names)


def snapshot_of(repo: str, revision: str | None, wanted: Iterable[str]) -> Path:
    """The folder of the hub's cache with a repository's files of those patterns; what is missing there is fetched,
    unless ``HF_HUB_OFFLINE`` forbids it.

    Raises:
        OSError, huggingface_hub.errors.HTTPError: if something is missing and cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    def found(local: bool) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted), local_files_only=local))

    try:
        return found(local=False)
    except OfflineModeIsEnabled:
        # Of a commit, huggingface_hub 1, which Python 3.10 has, does not look into the cache by itself. After any other
        # error the cache may hold a part of what is wanted.
        return found(local=True)


def source_of(adapter: Adapter) -> str | dict[str, str] | None:
    """Where an adapter came from, as a recipe names it: folder, or repository, commit and place on the hub; None of
    one in memory.
    """
    if adapter.source is None:
        return None
    if adapter.about.hub is None:
        return str(adapter.source.resolve())
    repo, _, commit = adapter.about.hub.partition("@")
    parts = adapter.source.parts
    within = "/".join(parts[parts.index(commit) + 1 :]) if commit in parts else ""
    return {"adapter": repo, "revision": commit, **({"subfolder": within} if within else {})}


def _check_there(argument: str, hub: str, within: str, files: Sequence[str]) -> None:
    missing = next((file for file in (CONFIG_FILE, WEIGHTS_FILE) if within + file not in files), None)
    if missing is None or (missing == CONFIG_FILE and within + DIFFUSERS_FILE in files):
        return
    others = [str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name == CONFIG_FILE]
    whole = [place for place in others if place != "." and f"{place}/{WEIGHTS_FILE}" in files]
    beside = sorted(file.removeprefix(within) for file in files if file.startswith(within))
    hint = f"; subfolder: {whole[0]} holds an adapter" if whole else ""
    shown = ", ".join(beside[:_MOST_SHOWN]) + (f" and {len(beside) - _MOST_SHOWN} more" * (len(beside) > _MOST_SHOWN))
    if not hint and any(file.startswith(("adapter_model.bin", "adapter_model-")) for file in beside):
        hint = (
            "; pickles are never opened, and parts not put together: "
            f"hf download {hub.partition('@')[0]} --local-dir DIR fetches it, and merging DIR names the line that "
            "converts it"
        )
    if not hint:
        hint = way_from(beside, Path("DIR"))
        hint += f", after hf download {hub.partition('@')[0]} --local-dir DIR" * (" DIR" in hint)
    found = f"(found: {shown or 'nothing'}){hint}"
    raise FileNotFoundError(f"{argument}: {hub} on the hub holds no {within}{missing} {found}")
