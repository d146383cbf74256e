"""Rows of Parquet files, and of datasets: in memory, on disk, on the hub."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.drawing import Row, Source, columns_of, place_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils import provenance
from nsc_merge.utils.errors import hub_problem, logger, needed
from nsc_merge.utils.json_text import from_json

# Parquet files together no larger than this are kept in memory once they are hashed; others are read again.
_KEPT = 1 << 28
# Rows of them that are read at a time.
_READ = 1024
SPLIT = "train"
# Rows after which it is said that a stream is gone through whole: some may have no end.
_LONG = 100_000

# Column -> the names of its classes.
_Classes = dict[str, list[str]]


def parquet(files: Sequence[Path], name: str, folder: Path, argument: str) -> Source:
    """A source of the rows of Parquet files, of which only those row groups are read that a row is drawn from.

    Raises:
        ValueError: naming a file that is damaged, or that changed while it was read.
    """
    pq = needed("pyarrow.parquet", argument)
    keep = sum(file.stat().st_size for file in files) <= _KEPT
    opened, sha256 = [], {}
    for file in files:
        mark = provenance.mark_of(file.stat())
        raw = file.read_bytes() if keep else None
        sha256[file.name] = hashlib.sha256(raw).hexdigest() if raw is not None else provenance.sha256(file)
        try:
            opened.append(pq.ParquetFile(_buffer(raw) if raw is not None else str(file)))
        except (ValueError, OSError) as error:
            raise _damaged(file, error, argument) from None
        if provenance.mark_of(file.stat()) != mark:
            raise ValueError(f"{argument}: {file} changed while it was read: try again once it stays")
    groups = [(table, group) for table in opened for group in range(table.num_row_groups)]
    ends = list(accumulate(table.metadata.row_group(group).num_rows for table, group in groups))

    classes = {column: names for table in opened for column, names in _classes_in(table).items()}

    def rows(numbers: Sequence[int]) -> list[Row]:
        found: dict[int, Row] = {}
        wanted = sorted(numbers)
        for (table, group), start, end in zip(groups, [0, *ends], ends, strict=False):
            some = wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]
            if some:
                try:
                    picked = list(_picked(table, group, [number - start for number in some]))
                except (ValueError, OSError) as error:
                    raise _damaged(Path(name), error, argument) from None
                found |= dict(zip(some, (_with_names(row, classes) for row in picked), strict=True))
        return [found[number] for number in numbers]

    twice = next((one for table in opened if (one := _twice(table.schema_arrow.names)) is not None), None)
    if twice is not None:
        raise ValueError(f"{argument}: {name}: expected a name of its own for every column, found {twice!r} twice")
    if not ends or not ends[-1]:
        raise ValueError(f"{argument}: {name} holds no row; expected at least one")
    columns = dict.fromkeys(column for table in opened for column in table.schema_arrow.names)
    return Source(name, ends[-1], tuple(columns), rows, sha256, folder)


def _picked(table: Any, group: int, numbers: Sequence[int]) -> Iterator[Row]:
    """The rows of some ascending numbers within a row group, which is gone through some rows at a time: whole, it may
    be larger than memory, and than the 2 GiB that a column of texts holds.
    """
    start = 0
    for batch in table.iter_batches(_READ, row_groups=[group]):
        some = numbers[bisect_left(numbers, start) : bisect_left(numbers, start + len(batch))]
        if some:
            yield from batch.take([number - start for number in some]).to_pylist()
        start += len(batch)
        if start > numbers[-1]:
            return


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def is_dataset(value: Any) -> bool:
    """Whether it is an object of ``datasets``."""
    return type(value).__module__.partition(".")[0] == "datasets"


def in_plain_rows(value: Any) -> Any:
    """The rows of a table of pandas, polars or pyarrow, the values of a column of one or of an array of texts, None
    where they hold nothing; anything else as it is.
    """
    package = type(value).__module__.partition(".")[0]
    if package == "pandas" and hasattr(value, "notna"):
        # Missing texts are NaN there.
        held = value.astype(object).where(value.notna(), None)
        return held.to_dict("records") if held.ndim == 2 else held.tolist()
    for module, rows in (("polars", "to_dicts"), ("polars", "to_list"), ("pyarrow", "to_pylist")):
        if package == module and hasattr(value, rows):
            return getattr(value, rows)()
    if package == "numpy" and getattr(value, "ndim", 0) == 1:
        return value.tolist()
    return value


def is_saved_dataset(folder: Path) -> bool:
    """Whether it is a folder that ``save_to_disk`` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_dataset(folder: Path, settings: DataSettings, argument: str) -> Source:
    """A source of a folder that ``save_to_disk`` wrote.

    Its digests are those of its ``state.json``, which holds the fingerprint of the data, not of the data themselves.
    """
    datasets = needed("datasets", argument)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        # A damaged file raises what pyarrow, json or datasets raise.
        raise _damaged(folder, error, argument) from None
    split, chosen = split_of(found, settings, argument, str(folder))
    state = folder / split / "state.json" if split else folder / "state.json"
    digest = {state.relative_to(folder.parent).as_posix(): provenance.sha256(state)}
    return replace(_mapped(chosen, str(folder), argument, digest, folder), split=split)


def dataset(value: Any, settings: DataSettings, argument: str) -> Source:
    """A source of an object of ``datasets``; one that can only be gone through is, once and whole."""
    datasets = needed("datasets", argument)
    split, chosen = split_of(value, settings, argument, type(value).__name__)
    if isinstance(chosen, datasets.IterableDataset):
        stored, features, classes = _as_stored(chosen)
        for column, kind in features.items():
            if kind != stored.features[column]:
                stored = stored.cast_column(column, kind)
        return replace(_drawn_at_once((_with_names(row, classes) for row in stored), settings, argument), split=split)
    return replace(_mapped(chosen, type(chosen).__name__, argument, {}, None), split=split)


def hub_dataset(name: str, settings: DataSettings, argument: str) -> Source:
    """A source of a dataset on the hub, which is downloaded into the cache of ``datasets``."""
    datasets = needed("datasets", argument)
    try:
        found = datasets.load_dataset(name, settings.config, revision=settings.revision)
    except Exception as error:
        # Of the hub, the network, the cache, the files: whatever it is, nothing was read.
        problem = hub_problem(error, argument, f"datasets/{name}", settings.revision)
        reason = f"{argument}: the dataset {name} cannot be loaded: {' '.join(str(error).split()):.300}"
        raise ValueError(problem or f"{reason} (split, config and revision are keys beside it)") from None
    split, chosen = split_of(found, settings, argument, name)
    return replace(_mapped(chosen, name, argument, {}, None), split=split)


def _mapped(chosen: Any, name: str, argument: str, sha256: dict[str, str], folder: Path | None) -> Source:
    if not len(chosen):
        raise ValueError(f"{argument}: {name} holds no row; expected at least one")
    if chosen.format["type"] == "custom":
        # What a function of the user's own makes of the rows, which may have other columns.
        return Source(name, len(chosen), tuple(chosen[0]), lambda some: [chosen[one] for one in some], sha256, folder)
    stored, features, classes = _as_stored(chosen)
    table = stored.with_format("arrow")

    def rows(numbers: Sequence[int]) -> list[Row]:
        held = (features.decode_example(table[number].to_pylist()[0]) for number in numbers)
        return [_with_names(row, classes) for row in held]

    return Source(name, len(stored), tuple(stored.column_names), rows, sha256, folder)


def _as_stored(chosen: Any) -> tuple[Any, Any, _Classes]:
    """A dataset whose values are as they are stored, not tensors or tables of them (``set_format``); its features, by
    which images and sounds stay what is stored of them until they are opened; and its columns of classes.
    """
    from datasets import Features

    shown = getattr(chosen, "format", {}).get("columns")
    chosen = chosen.with_format(None)
    if shown is not None and list(shown) != chosen.column_names:
        chosen = chosen.select_columns(list(shown))
    kinds = chosen.features or {}
    features = Features({column: _closed(kind) for column, kind in kinds.items()})
    return chosen, features, _named(features.to_dict())


def _closed(kind: Any) -> Any:
    """A feature of ``datasets``, by which nothing is opened that a value is of: it may be named by an address, which
    would be asked.
    """
    import datasets

    if isinstance(kind, dict):
        return {name: _closed(one) for name, one in kind.items()}
    if isinstance(kind, list | tuple):
        return [_closed(one) for one in kind]
    if hasattr(kind, "feature"):
        return replace(kind, feature=_closed(kind.feature))
    # Json has the setting, too, and is text that is read.
    opens = hasattr(kind, "decode") and not isinstance(kind, getattr(datasets, "Json", ()))
    return replace(kind, decode=False) if opens else kind


def _classes_in(table: Any) -> _Classes:
    """The columns of classes of a Parquet file that ``datasets`` wrote."""
    written = (table.schema_arrow.metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    try:
        return _named(from_json(written, "")["info"]["features"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _named(features: dict[str, Any]) -> _Classes:
    """The columns of classes, or of lists of them, among features as ``datasets`` writes them."""
    found = {}
    for column, kind in features.items():
        # As releases before 4 may write a list.
        kind = kind[0] if isinstance(kind, list) else kind.get("feature", kind)
        if kind.get("_type") == "ClassLabel" and isinstance(kind["names"], list):
            found[column] = kind["names"]
    return found


def _with_names(row: Row, classes: _Classes) -> Row:
    """A row with the names of classes in the place of their numbers, also in lists; None where the number is of none,
    as -1 is.
    """
    for column, names in classes.items():
        held = row.get(column)
        if isinstance(held, list):
            row = {**row, column: [_name(one, names) for one in held]}
        elif isinstance(held, int):
            row = {**row, column: _name(held, names)}
    return row


def _name(number: Any, names: Sequence[str]) -> str | None:
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def _drawn_at_once(rows: Iterable[Row], settings: DataSettings, argument: str) -> Source:
    """The rows that come first in the order of the draw, of rows that there is no going back to."""

    def keyed_rows() -> Iterator[tuple[bytes, int, Row]]:
        for number, row in enumerate(rows):
            if number == _LONG:
                logger.warning(
                    "%s: the dataset is gone through whole, as its samples are drawn of all rows, and goes on after "
                    "%d of them; dataset.take(%d) has the first alone", argument, _LONG, _LONG,
                )  # fmt: skip
            yield place_of(settings.seed, number), number, row

    keyed = keyed_rows()
    kept = sorted(keyed) if settings.samples is None else heapq.nsmallest(settings.samples, keyed)
    found = {number: row for _, number, row in kept}
    if not found:
        raise ValueError(f"{argument}: the dataset holds no row; expected at least one")
    columns = columns_of(found.values())
    return Source(
        "IterableDataset", len(found), columns, lambda numbers: [found[n] for n in numbers], order=tuple(found)
    )


def split_of(value: Any, settings: DataSettings, argument: str, name: str) -> tuple[str, Any]:
    """The name of a split, empty where there are none, and its rows."""
    wanted = settings.split
    if not isinstance(value, dict):
        if wanted is not None:
            raise ValueError(f"{argument}: split: {name} has no splits, found {wanted!r}; expected none")
        return "", value
    known = list(value)
    if wanted is None:
        wanted = SPLIT if SPLIT in known else known[0] if len(known) == 1 else None
    if wanted is None or wanted not in known:
        found = f"found {wanted!r}" if wanted is not None else "none is named"
        raise ValueError(f"{argument}: split: expected one of {known} of {name}, {found}")
    return wanted, value[wanted]


def _buffer(raw: bytes) -> Any:
    import pyarrow

    return pyarrow.BufferReader(raw)


def _damaged(place: Path, error: Exception, argument: str) -> ValueError:
    return ValueError(f"{argument}: {place} is damaged: {' '.join(str(error).split()):.200}")
