"""Images: found in folders, opened when they are drawn."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.drawing import Row, Source

IMAGE = "image"
# Those that Pillow opens, and HEIF, which it says it does not know, so that no photo of a telephone is passed over.
SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".heic", ".heif"),
    )
)
# 8 bits a colour: what converting keeps. Others would be cut off at 255.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def image_files(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, linked ones too, but hidden ones, in the order of their names."""
    found = []
    for at, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder around it has no end.
        folders[:] = [name for name in folders if name[0] != "." and not _is_around(Path(at, name), Path(at))]
        found += [Path(at, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def _is_around(folder: Path, inner: Path) -> bool:
    return folder.is_symlink() and inner.resolve().is_relative_to(folder.resolve())


def image_folder(folder: Path, files: Sequence[Path]) -> Source:
    """A source with one row per image; names of folders, such as those of classes, do not matter."""
    names = [file.relative_to(folder).as_posix() for file in files]

    def rows(numbers: Sequence[int]) -> list[Row]:
        return [{IMAGE: names[number]} for number in numbers]

    return Source(str(folder), len(names), (IMAGE,), rows, {}, folder)


def is_image(value: Any) -> bool:
    """Whether a value of a row is an image or says where one is."""
    from PIL import Image

    if isinstance(value, str):
        return value.startswith("data:image/") or Path(value).suffix.lower() in SUFFIXES
    if isinstance(value, dict):
        return {"bytes", "path"} == set(value)
    return isinstance(value, Image.Image) or _is_pixels(value)


def _is_pixels(value: Any) -> bool:
    """Whether it is a numpy array of an image, ``[H, W]`` or ``[H, W, C]`` of 8 bits a colour."""
    shape = getattr(value, "shape", ())
    return type(value).__module__ == "numpy" and value.dtype == "uint8" and len(shape) in (2, 3)


class ImageReader:
    """Opens images upright, and remembers the digest of what it read.

    Args:
        folder: that paths are relative to.
        grey: whether they are made grey, for models of one channel, rather than RGB.
    """

    def __init__(self, folder: Path | None, *, grey: bool = False) -> None:
        self._folder = folder
        self._mode = "L" if grey else "RGB"
        self._digest = hashlib.sha256()
        self._opened = False

    @property
    def sha256(self) -> str | None:
        """SHA-256 over names and bytes of the images, in the order in which they were opened; None if there were
        none in files.
        """
        return self._digest.hexdigest() if self._opened else None

    def open(self, value: Any, where: str) -> Any:
        """An image by what a row holds of it.

        Raises:
            ValueError: naming it, if it is missing, damaged, too large, or not here.
        """
        from PIL import Image, ImageOps

        name, raw = self._bytes(value, where)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
                image.load()
                mode = image.mode
                upright = ImageOps.exif_transpose(image)
                if mode in _MODES:
                    return upright.convert(self._mode)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"{where}: {name}: {error}; make it smaller") from None
        except Exception as error:
            # Decoders of damaged files raise errors of many kinds.
            reason = " ".join(str(error).split())
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "no image that Pillow knows"
            raise ValueError(f"{where}: {name} cannot be opened as an image: {reason:.120}") from None
        raise ValueError(f"{where}: {name} has pixels of mode {mode!r}; save it with 8 bits a colour")

    def _bytes(self, value: Any, where: str) -> tuple[str, Any]:
        """The name of an image, and its bytes, or the image itself where it is open."""
        from PIL import Image

        if isinstance(value, Image.Image):
            return "the image", value
        if _is_pixels(value):
            return "the image", Image.fromarray(value)
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return self._read(str(value.get("path") or "the image"), value["bytes"])
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str) and value.startswith("data:"):
            try:
                return self._read("the image in the row", base64.b64decode(value.partition(",")[2], validate=True))
            except binascii.Error as error:
                raise ValueError(f"{where}: the image in the row is not base64: {error}") from None
        if not isinstance(value, (str, Path)) or not str(value):
            found = " ".join(repr(value).split())
            raise ValueError(
                f"{where}: expected an image, its path, or pixels as a numpy array uint8 [H, W, 3], found {found:.60}"
            )
        if "://" in str(value):
            raise ValueError(f"{where}: {value} is not here; download it and write its path: nothing is fetched")
        file = (self._folder or Path()) / value
        if not file.is_file():
            raise FileNotFoundError(f"{where}: {file} is missing; paths of images are relative to the file they are in")
        return self._read(str(value), file.read_bytes(), str(file))

    def _read(self, name: str, raw: bytes, shown: str = "") -> tuple[str, bytes]:
        self._opened = True
        self._digest.update(f"{len(name.encode())}:{name}:{len(raw)}:".encode() + raw)
        return shown or name, raw
