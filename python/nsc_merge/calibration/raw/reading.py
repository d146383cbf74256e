"""Raw data made batches of a base model's inputs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nsc_merge.calibration.batch_files import Batches, read_batches
from nsc_merge.calibration.on_disk import Keep, in_memory
from nsc_merge.calibration.raw.columns import Sample, choose
from nsc_merge.calibration.raw.drawing import Row, Source, batched, batched_rows, digest, in_order, listed
from nsc_merge.calibration.raw.encoding import encode
from nsc_merge.calibration.raw.files.tables import (
    SPLIT,
    dataset,
    hub_dataset,
    in_plain_rows,
    is_dataset,
    is_saved_dataset,
    parquet,
    saved_dataset,
    split_of,
)
from nsc_merge.calibration.raw.files.text_files import READERS, TEXT, kind_of, rows_of_text
from nsc_merge.calibration.raw.files.wrong_files import refused_file, refused_folder
from nsc_merge.calibration.raw.inputs.labelled import put_labels
from nsc_merge.calibration.raw.inputs.texts import apart, labels_of_rows
from nsc_merge.calibration.raw.labels import LABELS, Labelling
from nsc_merge.calibration.raw.media import audio, images
from nsc_merge.calibration.raw.media.files import files_in, rows_of_files
from nsc_merge.calibration.raw.preprocessors import Base, base_of
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.errors import logger
from nsc_merge.utils.option_checks import check_count, did_you_mean, is_hub_id

_INPUTS, PARQUET = ".safetensors", ".parquet"
# Where repositories of datasets on the hub have their files.
_DATA = "data"
# Beside images or audio, what datasets' imagefolder and audiofolder call a table of them.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Words in names of files and folders that say of which split they are, as for datasets' load_dataset.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Rows that are looked at to tell what is in the columns.
_LOOKED_AT = 256


def is_raw(source: str | Path) -> bool:
    """Whether a source is raw data; False for safetensors files of inputs, and for folders of them."""
    place = Path(source)
    if not place.is_dir():
        return place.suffix.lower() != _INPUTS
    if (place / "adapter_config.json").is_file() or (place / "config.json").is_file():
        return True
    return not any(place.glob(f"*{_INPUTS}"))


def batches_of(
    source: Any,
    base: Any,
    settings: DataSettings,
    batch_size: int,
    argument: str,
    *,
    local: bool = True,
    base_revision: str | None = None,
    labelling: Labelling | None = None,
    keep: Keep = in_memory,
) -> Batches:
    """Batches of the inputs that the base model takes: of safetensors files of such inputs as they are, or of samples
    drawn from raw data.

    ``Batches.sha256`` holds the digest of every file that was read, by its name. Of raw data also, under ``"images"``
    or ``"audio"``, one over names and bytes of those that were opened, and, under ``"samples"``, that of the
    encoded samples in the order of the draw, which is the same for every batch size.

    Args:
        source: file, folder, or dataset; a hub id only where ``local`` is False.
        base: folder or hub id of the base model, beside which tokenizer and processor are looked for; or the model.
        settings: what is taken, and how.
        batch_size: samples of a batch.
        argument: how messages call the source, such as ``calibration.french``.
        local: whether the source is on disk. Base, tokenizer and processor are where there is such a folder; nothing
            touches the network for one that is.
        base_revision: of a base from the hub.
        labelling: what is made of the labels of raw data, as ``"labels"`` beside the inputs; None leaves them.
        keep: where what is made of raw data is held.

    Raises:
        FileNotFoundError, ValueError: naming ``argument``, what the source looks like, and what to write instead.
    """
    if local and isinstance(source, (str, Path)) and not is_raw(source):
        return read_batches(source, batch_size, argument)
    check_count("batch_size", batch_size)
    model = base_of(base, base_revision, settings, argument)
    found = open_source(source, settings, argument, local=local, of_audio=model.audio_files)
    if labelling is not None and settings.split is None and found.split == SPLIT:
        raise ValueError(
            f"{argument}: {found.name} would be measured on its split {SPLIT}, as none is named; expected split: NAME"
        )
    rows = draw(found, settings, argument, model, labelling)
    samples = rows if settings.texts is None else apart(rows)
    made, opened = encode(samples, model, settings, found.folder, argument, keep)
    compared = None
    if labelling is not None and settings.texts is not None:
        compared = {LABELS: labels_of_rows(rows, labelling)}
    elif labelling is not None:
        put_labels(made, samples, labelling, model, settings, argument)
    sha256 = {**found.sha256, "samples": digest([*made.encoded, *([compared] if compared else [])]), **opened}
    if compared is None:
        batches = batched(made.encoded, batch_size, settings.seed, made.padded, keep)
    else:
        batches = batched_rows(made.encoded, compared, batch_size, settings.seed, made.padded or {}, argument, keep)
    return Batches(batches, sha256=sha256, first=made.first)


def calibration_data(
    source: Any, base: Any, *, batch_size: int = 8, base_revision: str | None = None, **settings: Any
) -> Batches:
    """Calibration batches of raw data, for :func:`nsc_merge.merge`.

    >>> french = nsc_merge.calibration_data("french.jsonl", model, text="{question}\\n{answer}", samples=512)

    Args:
        source: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, each also packed as ``.gz``, ``.bz2`` or
            ``.xz``; ``.parquet``), a folder of them, of images or of audio files, a folder of ``save_to_disk``, an
            object of ``datasets``, a table or column of pandas, polars or pyarrow, a list of rows, texts or images, or
            the hub id ``owner/name`` of a dataset where there is no such folder; ``.safetensors`` of inputs as they
            are.
        base: the base model, its folder, or its hub id; tokenizer and processor are looked for beside it.
        batch_size: samples of a batch.
        base_revision: of a base from the hub.
        settings: fields of :class:`~nsc_merge.calibration.raw.settings.DataSettings`. Without ``text``, rows of
            question and answer give the question alone; ``nsc-merge init`` writes ``"{question}\\n{answer}"`` for them.

    Returns:
        An iterable of dictionaries, input name -> tensor on the CPU, that starts anew each time; its ``sha256`` tells
        which files and samples they are of.

    Raises:
        FileNotFoundError, ValueError: naming the argument, what was found and what was expected.
    """
    for name in settings:
        if name not in DataSettings.__dataclass_fields__:
            hint = did_you_mean(name, DataSettings.__dataclass_fields__)
            raise ValueError(f"calibration_data: {name}: no such setting{hint}")
    named = isinstance(source, str) and not Path(source).exists() and is_hub_id(source)
    local = not named or kind_of(Path(str(source))) in (*READERS, PARQUET, _INPUTS)
    return batches_of(
        source, base, DataSettings(**settings), batch_size, "source", local=local, base_revision=base_revision
    )


def open_source(
    source: Any, settings: DataSettings, argument: str, *, local: bool = True, of_audio: bool = False
) -> Source:
    """The rows of a file, a folder, a dataset, or a hub id where ``local`` is False.

    Args:
        of_audio: whether a folder's audio files are meant, or a list's, rather than images.

    Raises:
        FileNotFoundError, ValueError: naming ``argument``, what the source looks like, and what to write instead.
    """
    if is_dataset(source):
        return dataset(source, settings, argument)
    source = in_plain_rows(source)
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        is_one, column = (audio.is_audio, audio.COLUMN) if of_audio else (images.is_image, images.COLUMN)
        rows = [{TEXT: row} if isinstance(row, str) else {column: row} if is_one(row) else row for row in source]
        if not rows or not all(isinstance(row, dict) for row in rows):
            found = " ".join(repr(source).split())
            raise ValueError(f"{argument}: expected a list of texts, images, audio or dictionaries, found {found:.60}")
        return _without_splits(listed("row list", rows, {}, None), settings, argument)
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"{argument}: expected a path, a dataset or a list of rows, found {source!r:.60}")
    if not local:
        return hub_dataset(str(source), settings, argument)
    place = Path(source)
    if not place.exists():
        raise FileNotFoundError(f"{argument}: {place} is missing")
    if place.is_dir():
        return _folder(place, settings, argument, of_audio=of_audio)
    if not place.is_file():
        raise ValueError(f"{argument}: {place} is a pipe or device; expected a file or a folder")
    return _without_splits(_files([place], str(place), place.parent, argument), settings, argument)


def draw(
    source: Source, settings: DataSettings, argument: str, base: Base, labelling: Labelling | None = None
) -> list[Sample]:
    """The samples of a source for what a base takes; rows of blank text are left out.

    Raises:
        ValueError: naming the row, what was found and what was expected.
    """
    rows = in_order(source, settings.seed, settings.samples or source.count)
    looked_at = list(islice(rows, min(_LOOKED_AT, settings.samples or _LOOKED_AT)))
    some, place = [row for _, row in looked_at], f"{argument}: {source.name}"
    label = None if labelling is None else labelling.column_in(source.columns, settings, place, text=base.text)
    columns = choose(
        some, settings, place, text=base.text, images=base.images, audio=base.audio, writes=base.writes,
        words=base.words, columns=[name for name in source.columns if name != label],
    )  # fmt: skip
    if labelling is not None:
        labelling.check_read(columns.text, settings, source.columns, label, place)
    samples: list[Sample] = []
    blank = 0
    for number, row in chain(looked_at, rows):
        where = f"{argument}: {source.name}, row {number + 1}"
        sample = columns.sample(row, where)
        if sample is None:
            if labelling is not None and columns.words:
                labelling.check_blank(row, label, where)
            blank += 1
            continue
        if labelling is not None:
            sample = labelling.labelled(sample, row, label, columns.image or columns.audio, settings)
        samples.append(sample)
        if len(samples) == settings.samples:
            break
    if blank:
        logger.warning("%s: %d rows of %s are left out: their text is blank", argument, blank, source.name)
    if not samples:
        raise ValueError(f"{argument}: {source.name} holds no text in {columns.said()}")
    return samples


def _folder(folder: Path, settings: DataSettings, argument: str, *, of_audio: bool) -> Source:
    if is_saved_dataset(folder):
        return saved_dataset(folder, settings, argument)
    if (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        raise refused_folder(folder, argument)
    kind = audio if of_audio else images
    if media := files_in(folder, kind.SUFFIXES):
        # Names of photos say what is on them.
        folders = {file: file.relative_to(folder).parts[:-1] for file in media}
        split, media = _of_split(folders, folder, settings, argument)
        above = Path(os.path.commonpath([file.parent for file in media]))
        around = (place for place in (above, *above.parents) if place.is_relative_to(folder))
        table = next((table for place in around if (table := _table_in(place)) is not None), None)
        if table is None:
            found = rows_of_files(folder, media, kind.COLUMN)
        else:
            found = _files([table], str(table), table.parent, argument)
            found = _rows_of_media(found, table.parent, set(media), argument) if split else found
        if table is None and (data := _data_in(folder)):
            found = replace(found, name=f"{folder} (its {kind.SEVERAL}, {data[0].name} is not read)")
        return _named(found, split, settings, argument)
    data = _data_in(folder)
    if not data and (folder / _DATA).is_dir():
        return _folder(folder / _DATA, settings, argument, of_audio=of_audio)
    if not data:
        raise refused_folder(folder, argument)
    split, data = _of_split({file: (file.stem,) for file in data}, folder, settings, argument)
    kinds = sorted({kind_of(file) for file in data})
    if len(kinds) > 1:
        raise ValueError(f"{argument}: {folder} holds files of several kinds, {kinds}; name the one that is meant")
    return _named(_files(data, str(folder), folder, argument), split, settings, argument)


def _data_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name[0] != ".")
    return [file for file in files if kind_of(file) in (*READERS, PARQUET)]


def _rows_of_media(found: Source, folder: Path, media: Set[Path], argument: str) -> Source:
    """The rows of a table, beside folders of splits, that name some of the images or audio files."""

    def is_meant(row: Row) -> bool:
        held = chain.from_iterable(value if isinstance(value, list) else [value] for value in row.values())
        return any(isinstance(one, str) and folder / one in media for one in held)

    rows = [row for row in found.rows(range(found.count)) if is_meant(row)]
    if not rows:
        raise ValueError(f"{argument}: {found.name} names none of the {len(media)} files of the split that is taken")
    return listed(found.name, rows, found.sha256, folder)


def _table_in(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def _of_split(
    names: Mapping[Path, Sequence[str]], folder: Path, settings: DataSettings, argument: str
) -> tuple[str, list[Path]]:
    """The split whose files are taken, and these; all files, of none, where their names tell no splits apart.

    Args:
        names: file -> the names, the outermost first, of which the first that has a word for a split says its own.

    Raises:
        ValueError: if the split that is asked for is not there, or if files of none lie beside some to be held out.
    """
    splits: dict[str, list[Path]] = {}
    for file, parts in names.items():
        words = (word for part in parts for word in re.split(r"[-._\s0-9]+", part.lower()))
        splits.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), ""), []).append(file)
    others = splits.pop("", [])
    if settings.split is None and (not splits or (others and list(splits) == ["train"])):
        return "", list(names)
    if settings.split is None and others:
        raise ValueError(
            f"{argument}: {folder} holds {others[0].relative_to(folder)}, of no split, beside {' and '.join(splits)}; "
            "expected split: NAME, which takes that one alone, or the file, folder or table of rows that is meant"
        )
    return split_of(splits, settings, argument, str(folder)) if splits else ("", list(names))


def _named(found: Source, split: str, settings: DataSettings, argument: str) -> Source:
    if not split:
        return _without_splits(found, settings, argument)
    return replace(found, name=f"{found.name}, split {split}", split=split)


def _without_splits(found: Source, settings: DataSettings, argument: str) -> Source:
    if settings.split is not None:
        raise ValueError(f"{argument}: split: {found.name} has no splits, found {settings.split!r}; expected none")
    return found


def _files(files: Sequence[Path], name: str, folder: Path, argument: str) -> Source:
    """A source of files of one kind."""
    kind = kind_of(files[0])
    if kind == PARQUET:
        return parquet(files, name, folder, argument)
    if kind not in READERS:
        raise refused_file(files[0], argument)
    rows, sha256 = [], {}
    for file in files:
        raw = file.read_bytes()
        sha256[file.name] = hashlib.sha256(raw).hexdigest()
        rows += rows_of_text(file, raw, argument)
    return listed(name, rows, sha256, folder)
