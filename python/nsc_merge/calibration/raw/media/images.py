"""Images, opened when they are drawn."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.media.files import MediaReader

# Of a folder of images, or a list.
COLUMN, SEVERAL = "image", "images"
# Those that Pillow opens, and HEIF, which it says it does not know, so that no photo of a telephone is passed over.
SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".heic", ".heif"),
    )
)
# 8 bits a colour: what converting keeps. Others would be cut off at 255.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


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


class ImageReader(MediaReader):
    """Opens images upright.

    Args:
        folder: that paths are relative to.
        grey: whether they are made grey, for models of one channel, rather than RGB.
    """

    one, several = "image", SEVERAL
    expected = "an image, its path, or pixels as a numpy array uint8 [H, W, 3]"

    def __init__(self, folder: Path | None, *, grey: bool = False) -> None:
        super().__init__(folder)
        self._mode = "L" if grey else "RGB"

    def open(self, value: Any, where: str) -> Any:
        """An image by what a row holds of it.

        Raises:
            ValueError: naming it, if it is missing, damaged, too large, or not here.
        """
        from PIL import Image, ImageOps

        name, raw = self._image_or_bytes(value, where)
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

    def _image_or_bytes(self, value: Any, where: str) -> tuple[str, Any]:
        """The name of an image, and its bytes, or the image itself where it is open."""
        from PIL import Image

        if isinstance(value, Image.Image):
            return "the image", value
        if _is_pixels(value):
            return "the image", Image.fromarray(value)
        return self.bytes_of(value, where)
