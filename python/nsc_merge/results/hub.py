"""Uploads a saved merge to the hub: what the save wrote, and nothing that tells of the machine that it was made on."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from nsc_merge.adapters import CONFIG_FILE
from nsc_merge.results.layout import (
    CARD_FILE,
    COEFFICIENTS_FILE,
    RECIPE_FILE,
    RECORD,
    is_license,
    is_ours,
    is_weights,
    recorded,
)
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.yaml_text import from_yaml, read_yaml, to_yaml

# Configurations that name the folder which a model or a tokenizer was read from.
_NAMING = ("adapter_config.json", "config.json", "tokenizer_config.json", "processor_config.json")
# Keys of a recipe whose words may look like a path and are none.
_TEXTS = ("labels", "text")
# How a card's code names the folder of a format: as what is loaded, or as what is put on a model.
_CODE = re.compile(r"```python\n.*?```", re.DOTALL)
_PLACE = r'(from_pretrained\(\s*(?:[a-z_.]+, )?|load_adapter\(|model=){place}(?=[,)])'
_BESIDE = re.compile(
    r'(from_pretrained\(\s*(?:[a-z_.]+, )?|load_adapter\(|load_file\(|open\()"(heads|lora|model|tasks)[/"]'
)


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder that a save wrote to a repository of the hub, in one commit, and return its address.

    Only what the folder's ``recipe.yaml`` says was written goes up, never other files that lie there. In the copy that
    goes up, absolute paths of this machine are their last part: in ``recipe.yaml``, in ``coefficients.json``, in the
    configurations, which name where a model was read from, and on the card; the folder itself stays as it is. A format
    that lies in a folder of its own goes to the top, where hubs look for it: the model, or else the adapter. What an
    earlier push of another merge left there goes in the same commit, as in a folder that is saved to again; other files
    stay, and so does a licence that somebody put there, in whose place the base's would come.

    Args:
        folder: of the merge.
        repo: ``owner/name``; made if there is none.
        private: whether it is made private; one that there is must be so already.
        revision: branch, made if needed; the main one by default.
        token: by default that of ``HF_TOKEN``, or of ``hf auth login``.

    Raises:
        ValueError: if the folder holds no merge, if ``repo`` is no name of one, if there is no token, or if a model and
            an adapter would lie beside each other, which would be loaded together.
        OSError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: expected owner/name, found {repo!r:.80} ({error})") from None
    if "/" not in repo:
        raise ValueError(f"push_to_hub: expected owner/name, found {repo!r:.80}")
    files = pushed_files(folder, repo)
    token = token or get_token()
    if token is None:
        raise ValueError(
            "push_to_hub: expected a token that may write, found none: set HF_TOKEN, or run hf auth login"
        )
    api = HfApi(token=token)
    with _told(repo):
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not api.model_info(repo).private:
            raise ValueError(
                f"push_to_hub: expected a private repository, and {repo} is public: make it private on the hub, push "
                "to another, or push without private"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = {one.rfilename for one in api.model_info(repo, revision=revision).siblings or ()}
        merge, earlier = _earlier_push(api, repo, revision, there)
        kept = {name for name in there - earlier if is_license(PurePath(name).name)}
        files = pushed_files(folder, repo, kept)
        gone = _left_behind(there, earlier if merge != _digest(files[RECIPE_FILE]) else (), files)
        _refuse_mixture(repo, there - {*gone}, files)
        api.create_commit(
            repo,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in gone),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
            ],
            commit_message="Upload a merge",
            revision=revision,
        )
    return url if revision is None else f"{url}/tree/{revision}"


def _earlier_push(api: Any, repo: str, revision: str | None, there: Collection[str]) -> tuple[Any, set[str]]:
    """As :func:`nsc_merge.results.layout.earlier_merge`, of a repository."""
    import yaml

    if RECIPE_FILE not in there:
        return None, set()
    with tempfile.TemporaryDirectory() as scratch:
        found = api.hf_hub_download(repo, RECIPE_FILE, revision=revision, local_dir=scratch)
        try:
            record = read_yaml(Path(found))[RECORD]
            return record["merge"], {path for path in record["files"] if isinstance(path, str) and is_ours(path)}
        except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
            # Not ours, and replaced.
            return None, set()


def _left_behind(there: Collection[str], earlier: Collection[str], files: Mapping[str, Path | bytes]) -> list[str]:
    """What is in a repository of an earlier push that would be taken for a part of this one."""
    shards = {name for name in there if is_weights(PurePath(name).name) and _beside(name, "config.json") in files}
    return sorted((shards | (set(there) & set(earlier))) - files.keys())


def _digest(recipe: Path | bytes) -> Any:
    """Of the merge that goes up, as its record has it."""
    assert isinstance(recipe, bytes), "a recipe is rewritten"
    return from_yaml(recipe.decode("utf-8"))[RECORD]["merge"]


def _beside(name: str, other: str) -> str:
    return PurePath(name).with_name(other).as_posix()


def _refuse_mixture(repo: str, there: Collection[str], files: Collection[str]) -> None:
    """As :func:`nsc_merge.results.layout.refuse_mixture`, of what stays in a repository and what comes."""
    pairs = ((CONFIG_FILE, "config.json"), ("config.json", CONFIG_FILE))
    for own, other in pairs:
        mixed = [name for name in files if PurePath(name).name == own and _beside(name, other) in there]
        if mixed:
            raise ValueError(
                f"push_to_hub: {repo} would hold a model and an adapter in one place ({min(mixed)} comes, and {other} "
                "is there), which are loaded together; expected a repository without the other: push to another, or "
                "remove it there"
            )


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """What the hub, or the way to it, says against it, in one line with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise OSError(
            f"push_to_hub: {repo} cannot be reached with HF_HUB_OFFLINE set; expected it unset"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        out = {
            401: "the token is not valid: set HF_TOKEN, or run hf auth login",
            403: "the token may not write there: take one with write access, or another owner",
            404: "there is no such owner or repository for this token",
        }.get(status, " ".join(str(error.server_message or error).split())[:300])
        raise OSError(f"push_to_hub: the hub refused {repo} ({status}): {out}") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"push_to_hub: the hub cannot be reached for {repo}: {what:.200}; push again later") from None


def pushed_files(folder: Path, repo: str, kept: Collection[str] = ()) -> dict[str, Path | bytes]:
    """Path in the repository -> file that goes there as it is, or what goes there in its stead.

    Args:
        kept: of what is in the repository, what is not replaced.

    Raises:
        ValueError: if a save did not write the folder.
    """
    written = _written(folder)
    top = next((one for one in ("model", "lora") if any(path.startswith(f"{one}/") for path in written)), None)
    places = {path: path.removeprefix(f"{top}/") if top else path for path in written}
    if len(set(places.values())) < len(places):
        places, top = {path: path for path in written}, None
    places = {path: place for path, place in places.items() if place not in kept}
    recipe = read_yaml(folder / RECIPE_FILE)
    names = _names(recipe)
    found: dict[str, Path | bytes] = {}
    for path, place in sorted(places.items()):
        rewrite = _rewriting(path, recipe, names, places, repo, top or ".")
        text = rewrite(folder / path) if rewrite else None
        found[place] = folder / path if text is None else text.encode("utf-8")
    return found


def _written(folder: Path) -> list[str]:
    """What the record of a folder says was written there, and is there, and could have been."""
    import yaml

    try:
        named = recorded(folder, read_yaml(folder / RECIPE_FILE)[RECORD])
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        raise ValueError(
            f"push_to_hub: {folder} holds no merge ({RECIPE_FILE} with a record of its files): expected a folder that "
            "nsc-merge run, nsc-merge export or save wrote"
        ) from None
    inside = folder.resolve()
    # A link that somebody put in the place of a file would give away what it leads to.
    return [path for path in sorted(named) if (inside / path).is_file() and (inside / path).resolve() == inside / path]


def _names(recipe: Any) -> dict[str, str]:
    """Absolute paths in a recipe, and this machine's home -> what stands for them; the longest first."""
    found = {path: PurePath(path).name for path in _absolute(recipe)}
    home = os.path.expanduser("~")  # which stays what it is where the user has none
    if len(PurePath(home).parts) > 1:
        found.setdefault(home, "~")
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _absolute(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [one for key, one in value.items() if key not in _TEXTS]
    if isinstance(value, list):
        for one in value:
            yield from _absolute(one)
    elif isinstance(value, str) and os.path.isabs(value) and PurePath(value).name:
        yield value


def _rewriting(
    path: str, recipe: Any, names: Mapping[str, str], places: Mapping[str, str], repo: str, top: str
) -> Callable[[Path], str | None] | None:
    """What makes the text that goes up in the place of a file; None of one that goes up as it is, as does one that
    nothing is to be said of otherwise.
    """
    if path == RECIPE_FILE:
        return lambda _: _recipe(recipe, places)
    if path == CARD_FILE:
        return lambda file: _card(file.read_text(encoding="utf-8"), names, repo, top)
    if PurePath(path).name == COEFFICIENTS_FILE:
        return lambda file: _json(file, lambda _: True)
    if PurePath(path).name in _NAMING:
        return lambda file: _json(file, lambda key: key.endswith("name_or_path"))
    return None


def _recipe(recipe: Any, places: Mapping[str, str]) -> str:
    shown = _named(copy.deepcopy(recipe), lambda _: True)
    shown[RECORD]["files"] = sorted(places.values())
    if "code" in shown[RECORD]:
        code = shown[RECORD]["code"].items()
        shown[RECORD]["code"] = {places[path]: digest for path, digest in code if path in places}
    return to_yaml(shown)


def _json(file: Path, chosen: Callable[[str], bool]) -> str | None:
    value = from_json(file.read_bytes(), str(file), not_finite=True)
    shown = _named(value, chosen)
    return None if shown == value else json.dumps(shown, indent=2, ensure_ascii=False) + "\n"


def _named(value: Any, chosen: Callable[[str], bool], key: str = "") -> Any:
    """A value with the last part of every absolute path in the place of it, where ``chosen`` says so of its key."""
    if isinstance(value, dict):
        return {name: one if name in _TEXTS else _named(one, chosen, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [_named(one, chosen, key) for one in value]
    if isinstance(value, str) and os.path.isabs(value) and chosen(key):
        return PurePath(value).name
    return value


def _card(text: str, names: Mapping[str, str], repo: str, top: str) -> str:
    """The card with names in the place of paths, and code that loads from the repository what lies at its top."""
    for path, name in names.items():
        for shown in dict.fromkeys((path, json.dumps(path, ensure_ascii=False)[1:-1])):
            # Not where it is the end of something else, such as owner/name.
            text = name.join(re.split(rf"(?<![\w.~-]){re.escape(shown)}(?![\w-]|\.\w)", text))
    place = re.compile(_PLACE.format(place=re.escape(json.dumps(top))))
    text = _CODE.sub(lambda code: place.sub(rf'\1"{repo}"', code[0]), text)
    if any(_BESIDE.search(code) for code in _CODE.findall(text)):
        copied = f"Other files are those of a copy of this repository, which `hf download {repo} --local-dir .` makes."
        text = text.replace("## Loading\n", f"## Loading\n\n{copied}\n", 1)
    return text
