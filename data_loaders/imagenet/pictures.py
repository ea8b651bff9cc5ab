"""From encoded bytes to the picture that a person sees, in RGB, or the reason why there is none.

Packing and training both read images through this module, so that they agree on every file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

POLICIES = ("skip", "stop")  # what an unreadable image does
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "WEBP", "TIFF")  # of Pillow; others may start programs
PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # imported to be known; Pillow loads the others itself
INTEGERS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
# What an EXIF orientation asks of the viewer (EXIF 2.32, tag 274). ImageOps.exif_transpose finds it in images as they
# were opened only, and not in converted ones.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """An image that cannot be read; the message is the reason, or a whole sentence that names the image."""


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which warnings about rubbish in headers are ignored and images beyond the size limit are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def open_image(data: bytes) -> Image.Image:
    """Reads the header of an image; raises ImageError."""
    if not data:
        raise ImageError("it is empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise ImageError(_reason(error)) from None


def to_rgb(image: Image.Image, upright: bool = False) -> Image.Image:
    """Decodes an image into the picture that a person sees: 8-bit RGB, transparent parts on white, the first frame.

    - 1, L, P, RGB, CMYK, YCbCr, LAB: Pillow's conversion.
    - Alpha, and a transparent color or palette entry: the picture lies on white.
    - Integers of 9 to 16 bits: the highest 8 bits; TIFFs in which zero is white are inverted.
    - Floating-point numbers in [0, 1]: 0 is black and 1 is white.
    - Other floating-point numbers, signed integers and integers of 32 bits have no white, so they are unreadable.

    An `upright` picture is turned as its EXIF orientation says; Pillow turns TIFFs in any case. ImageError where the
    image has no picture, or its file is truncated or damaged.
    """
    try:
        image.load()
        picture = image if image.mode == "RGB" and "transparency" not in image.info else _eight_bits(image)
        turn = orientation(image) if upright else 1
        return picture if turn == 1 else picture.transpose(TURNS[turn])
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 is upright, and stands for a missing or damaged one."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # rubbish in the header, which must not cost the image
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB of 8 bits a channel."""
    if image.mode in INTEGERS:
        image = _from_integers(image)
    elif image.mode == "F":
        image = _from_floats(image)
    if image.has_transparency_data or image.mode == "La":
        if image.mode == "La":  # Pillow knows no direct way from here
            image = image.convert("LA")
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Gray of 8 bits, with alpha where the file names a transparent gray."""
    bits = _bits(image)
    values: NDArray[np.int64] = np.asarray(image).astype(np.int64)
    gray = (values >> (bits - 8)).astype(np.uint8)
    if _white_is_zero(image):
        gray = 255 - gray
    clear = image.info.get("transparency")
    if clear is None:
        return Image.fromarray(gray)
    alpha = np.where(values == clear, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])


def _bits(image: Image.Image) -> int:
    """How many bits of an integer its picture has; raises ImageError where white is not known."""
    if image.mode != "I":
        return _tag(image, BITS_PER_SAMPLE, 16)
    if image.format in ("PPM", "PNG"):  # Pillow scales PPM to 16 bits; its older versions read PNG of 16 bits so
        return 16
    raise ImageError("its pixels are signed or 32-bit integers, of which no value is known to be white")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # NaN is refused too
        raise ImageError(f"its pixels are floating-point numbers in [{low:g}, {high:g}] instead of [0, 1]")
    gray = np.rint(255 * values).astype(np.uint8)
    return Image.fromarray(255 - gray if _white_is_zero(image) else gray)


def _white_is_zero(image: Image.Image) -> bool:
    return _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """An integer of a TIFF's header, the first one of several; `default` for other formats."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return default
    found = image.tag_v2.get(tag, default)
    return int(found[0] if isinstance(found, tuple) else found)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it announces more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    return str(error).partition("\n")[0] or type(error).__name__
