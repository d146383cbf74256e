"""The record of a merge that lies beside it: a recipe that leads to it, versions, and digests of the inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc_merge.adapters.adapter import factors_digest
from nsc_merge.adapters.hub import source_of
from nsc_merge.models.bases.loading import base_name, commit_of, files_of
from nsc_merge.results.layout import PASSING_OPTIONS, RECORD
from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.utils.json_text import plain
from nsc_merge.utils.provenance import Digest, digests, quick, versions


def recipe_of(result: MergedUpdate, digest: str, files: Sequence[str], code: Mapping[str, str]) -> dict[str, Any]:
    """The recipe that leads to ``result``, with a record of versions and of the inputs: ``sha256`` is of the bytes that
    were read when they were read. Of a base's weights it holds, unless SHA-256 was asked for or is known,
    ``headers``: SHA-256 of each file's header, and its size, which stay the same where only numbers change.
    ``sha256_when_saved`` and ``headers_when_saved`` are of a base that was handed over, at this moment.

    It can be run again if all adapters came from folders or the hub and the calibration from files. What came from the
    hub is told by its commit.

    Args:
        digest: :func:`merge_digest` of the result.
        files: that were written beside it, for whoever writes another merge to their place.
        code: SHA-256 of those among them that are code which came with the base.
    """
    name = base_name(result.model)
    model = str(Path(name).resolve()) if name and Path(name).is_dir() else name or None
    commit = commit_of(result.model)
    adapters = {task: source_of(adapter) for task, adapter in result.adapters.items()}
    fetched = {task: adapter.about.hub for task, adapter in result.adapters.items() if adapter.about.hub}
    options = {key: value for key, value in result.options.items() if key not in PASSING_OPTIONS}
    base = files_of(result.model)
    sha256, headers = _by_kind(base)
    told = result.inputs.get(RECORD, {})
    hashed = {
        **({"model": sha256} if sha256 else {}),
        "adapters": {task: adapter.sha256 for task, adapter in result.adapters.items() if adapter.sha256},
        # Whoever read the batches says of what bytes.
        "calibration": told.get("sha256", {}).get("calibration", {}),
    }
    record: dict[str, Any] = {"versions": versions(), "sha256": hashed, "merge": digest, "files": list(files)}
    if code:
        record["code"] = dict(code)
    if headers:
        record["headers"] = {"model": headers}
    if commit or fetched:
        hub = {"model": f"{model}@{commit}"} if commit else {}
        record["hub"] = {**hub, **({"adapters": fetched} if fetched else {})}
    for key in ("samples", "processes"):
        if told.get(key):
            record[key] = told[key]
    if not base and model and Path(model).is_dir():
        # Loaded by the caller, who knows when.
        sha256, headers = _by_kind(digests(Path(model), quick))
        record["sha256_when_saved"] = {"model": sha256}
        record["headers_when_saved"] = {"model": headers}
    if "scored" in result.options:
        record["scored"] = list(result.options["scored"])
    head = {
        "model": model,
        **({"revision": commit} if commit else {}),
        "adapters": adapters,
        "method": result.method,
        "options": options,
    }
    return plain({**head, **result.inputs, RECORD: record})


def digests_in(record: Mapping[str, Any]) -> dict[str, Digest]:
    """File name -> digest of the base in a record of :func:`recipe_of`; of an earlier release, SHA-256 of all files.

    Raises:
        ValueError: naming the key that holds something else.
    """
    found: dict[str, Digest] = {}
    for when in ("", "_when_saved"):
        for key in (f"sha256{when}", f"headers{when}"):
            kind = record.get(key) or {}
            known = (kind.get("model") or {}) if isinstance(kind, dict) else None
            if not isinstance(known, dict):
                raise ValueError(f"{RECORD}.{key}: expected digests by file name under model, found {kind!r:.60}")
            found |= known
        if found:
            break
    return found


def _by_kind(found: Mapping[str, Digest]) -> tuple[dict[str, str], dict[str, Digest]]:
    """Digests of whole files, and those of headers."""
    whole = {name: digest for name, digest in found.items() if isinstance(digest, str)}
    return whole, {name: digest for name, digest in found.items() if name not in whole}


def merge_digest(result: MergedUpdate) -> str:
    """SHA-256 of all that the merged update follows from."""
    parts = {
        "method": result.method,
        "adapters": {task: factors_digest(adapter.factors) for task, adapter in result.adapters.items()},
        "coefficients": result.coefficients,
        "factors": factors_digest(result.factors),
        # Updates per task may be computed when asked for, each time; options and adapters say what they are.
        "per_task": plain(result.options) if result.per_task else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
