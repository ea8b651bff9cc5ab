"""Every mode that Pillow opens becomes the picture a person sees, or is named; packing and training agree on each."""

import io

import numpy as np
import pytest
from image_sets import READABLE, ListedImages, encoded, pixels
from PIL import ExifTags, Image

from data_loaders.imagenet.decode import Decoder, Decoding
from data_loaders.imagenet.loaders import EvaluationLoader
from data_loaders.imagenet.packing import Packing, encode
from data_loaders.imagenet.pictures import ImageError, open_image, orientation, quiet, to_rgb

HEIGHT, WIDTH = 40, 60
COLOR = np.asarray(pixels(WIDTH, HEIGHT, seed=3), np.int64)
GRAY = np.asarray(pixels(WIDTH, HEIGHT, seed=3).convert("L"), np.int64)
CLEAR = np.zeros((HEIGHT, WIDTH), bool)
CLEAR[10:30, 20:50] = True
ALPHA = Image.fromarray(np.where(CLEAR, 0, 255).astype(np.uint8))
RGB, L = pixels(WIDTH, HEIGHT, seed=3), pixels(WIDTH, HEIGHT, seed=3).convert("L")


def saved(image, kind, **options):
    buffer = io.BytesIO()
    if "append_images" in options:
        options["append_images"] = [each.copy() for each in options["append_images"]]
    image.copy().save(buffer, kind, **options)  # copies, because saving as JPEG leaves settings in an image
    return buffer.getvalue()


def gray(values):
    return np.repeat(values[:, :, None], 3, axis=2)


def on_white(picture):
    return np.where(CLEAR[:, :, None], 255, picture)


def integers(dtype, bits=16):
    """An image of which the highest 8 of `bits` bits are those of GRAY and all lower ones are set."""
    return Image.fromarray(((GRAY << (bits - 8)) + (1 << (bits - 8)) - 1).astype(dtype))


def big_endian():
    return Image.frombytes("I;16B", (WIDTH, HEIGHT), ((GRAY << 8) + 255).astype(">u2").tobytes())


def tiff_of_12_bits():
    """Written by hand, because Pillow reads such files and does not write them."""
    values = ((GRAY << 4) + 15).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, WIDTH), (257, HEIGHT), (258, 12), (259, 1), (262, 1), (273, 0), (277, 1), (278, HEIGHT),
            (279, len(data))]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    header = b"II*\x00" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    for tag, value in tags:
        header += tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little")
        header += (start if tag == 273 else value).to_bytes(4, "little")
    return header + bytes(4) + data


def palette(transparency=None):
    image = RGB.quantize(250)
    seen = np.asarray(image.convert("RGB"), np.int64)
    if transparency is None:
        return saved(image, "PNG"), seen
    entries = np.asarray(image).copy()
    entries[CLEAR] = 255  # an entry of the palette that nothing else has
    clear = image.copy()
    clear.putpalette([*image.getpalette(), *bytes(768)][:768])
    clear.putdata(entries.reshape(-1).tolist())
    return saved(clear, "PNG", transparency=transparency), on_white(seen)


def keyed(image):
    """An image whose transparent part is a color of its own, which the file names."""
    array = np.asarray(image).copy()
    array[CLEAR] = 7 if array.ndim == 2 else (7, 8, 9)
    key = 7 if array.ndim == 2 else (7, 8, 9)
    unique = np.asarray(image) == 7 if array.ndim == 2 else (np.asarray(image) == (7, 8, 9)).all(axis=2)
    assert not unique.any()
    return saved(Image.fromarray(array), "PNG", transparency=key)


def with_alpha(mode):
    image = (L if mode == "LA" else RGB).convert(mode)
    image.putalpha(ALPHA)
    return image


def cmyk_seen():
    return np.asarray(RGB.convert("CMYK").convert("RGB"), np.int64)


BILEVEL = RGB.convert("1")
MOVING = [RGB, RGB.transpose(Image.Transpose.ROTATE_180)]
INVERTED = {262: 0}
# name: file, the picture, how far the compression may be from it
SEEN = {
    "1": (saved(BILEVEL, "PNG"), gray(np.asarray(BILEVEL.convert("L"), np.int64)), 0),
    "1 PBM": (saved(BILEVEL, "PPM"), gray(np.asarray(BILEVEL.convert("L"), np.int64)), 0),
    "L": (saved(L, "PNG"), gray(GRAY), 0),
    "L with a clear gray": (keyed(L), on_white(gray(GRAY)), 0),
    "LA": (saved(with_alpha("LA"), "PNG"), on_white(gray(GRAY)), 0),
    "LA TIFF": (saved(with_alpha("LA"), "TIFF"), on_white(gray(GRAY)), 0),
    "P": (*palette(), 0),
    "P with a clear entry": (*palette(255), 0),
    "P with alpha": (*palette(bytes([255] * 255 + [0])), 0),
    "RGB with a clear color": (keyed(RGB), on_white(COLOR), 0),
    "RGBA": (saved(with_alpha("RGBA"), "PNG"), on_white(COLOR), 0),
    "RGBA TIFF": (saved(with_alpha("RGBA"), "TIFF"), on_white(COLOR), 0),
    "RGBA WebP": (saved(with_alpha("RGBA"), "WEBP", lossless=True), on_white(COLOR), 0),
    "I;16 PNG": (saved(integers(np.uint16), "PNG"), gray(GRAY), 0),
    "I;16 PNG with a clear gray": (saved(integers(np.uint16), "PNG", transparency=int(GRAY[0, 0]) * 256 + 255),
                                   np.where(gray(GRAY) == GRAY[0, 0], 255, gray(GRAY)), 0),
    "I;16 TIFF": (saved(integers(np.uint16), "TIFF"), gray(GRAY), 0),
    "I;16 TIFF, zero is white": (saved(integers(np.uint16), "TIFF", tiffinfo=INVERTED), gray(255 - GRAY), 0),
    "I;16B TIFF": (saved(big_endian(), "TIFF"), gray(GRAY), 0),
    "I;16B PNG": (saved(big_endian(), "PNG"), gray(GRAY), 0),
    "12 bits TIFF": (tiff_of_12_bits(), gray(GRAY), 0),
    "I PGM": (saved(integers(np.uint16), "PPM"), gray(GRAY), 0),
    "F TIFF": (saved(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), gray(GRAY), 0),
    "F TIFF, zero is white": (saved(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF", tiffinfo=INVERTED),
                              gray(255 - GRAY), 0),
    "F PFM": (saved(Image.fromarray((GRAY / 255).astype(np.float32)), "PPM"), gray(GRAY), 0),
    "CMYK TIFF": (saved(RGB.convert("CMYK"), "TIFF"), cmyk_seen(), 0),
    "CMYK JPEG": (saved(RGB.convert("CMYK"), "JPEG", quality=100), cmyk_seen(), 3),
    "YCbCr TIFF": (saved(RGB.convert("YCbCr"), "TIFF"), COLOR, 2),
    "YCbCr JPEG": (saved(RGB.convert("YCbCr"), "JPEG", quality=100, subsampling=0), COLOR, 3),
    "LAB TIFF": (saved(RGB.convert("LAB"), "TIFF"), np.asarray(RGB.convert("LAB").convert("RGB"), np.int64), 0),
    "MPO": (saved(RGB, "MPO", save_all=True, append_images=MOVING[1:], quality=100, subsampling=0), COLOR, 3),
    "animated GIF": (saved(MOVING[0].convert("L"), "GIF", save_all=True, append_images=[MOVING[1].convert("L")]),
                     gray(GRAY), 0),
    "animated PNG": (saved(RGB, "PNG", save_all=True, append_images=MOVING[1:]), COLOR, 0),
    "animated WebP": (saved(RGB, "WEBP", save_all=True, append_images=MOVING[1:], lossless=True), COLOR, 0),
    "pages of a TIFF": (saved(RGB, "TIFF", save_all=True, append_images=MOVING[1:]), COLOR, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_mode_becomes_the_picture_that_a_person_sees(name):
    data, expected, tolerance = SEEN[name]
    found = np.asarray(to_rgb(open_image(data)), np.int64)
    assert found.shape == (HEIGHT, WIDTH, 3) and np.abs(found - expected).mean() <= tolerance
    assert np.abs(found - (255 - expected)).mean() > 5 and found.min() < 100 < found.max()


@pytest.mark.parametrize("name", SEEN)
def test_packing_and_training_agree_on_every_mode(name):
    """A packed file of the same size shows the same; a smaller one differs by resampling and JPEG."""
    data, expected, _ = SEEN[name]
    assert encode(data, Packing()) == data
    again = np.asarray(to_rgb(open_image(encode(data, Packing(resize=HEIGHT - 1, quality=100)))), np.int64)
    wanted = Image.fromarray(expected.astype(np.uint8)).resize((again.shape[1], HEIGHT - 1), Image.Resampling.BICUBIC)
    assert np.abs(again - np.asarray(wanted, np.int64)).mean() < 6
    square = Decoder(Decoding(32, 36))(data, None)
    of_picture = Decoder(Decoding(32, 36))(saved(Image.fromarray(expected.astype(np.uint8)), "PNG"), None)
    assert np.abs(square.astype(int) - of_picture).mean() <= 3


FLOATS = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
NO_PICTURE = {
    "32-bit integers": (saved(Image.fromarray(GRAY.astype(np.int32) << 20), "TIFF"), "signed or 32-bit integers"),
    "floats above one": (saved(Image.fromarray(255 * FLOATS), "TIFF"), r"floating-point numbers in \[0, 255\]"),
    "negative floats": (saved(Image.fromarray(FLOATS - 0.5), "TIFF"), r"in \[-0\.5, 0\.5\] instead of \[0, 1\]"),
    "NaN": (saved(Image.fromarray(np.where(FLOATS > 0.5, np.nan, FLOATS).astype(np.float32)), "TIFF"), "nan"),
}


@pytest.mark.parametrize("name", NO_PICTURE)
def test_what_has_no_picture_is_named_by_packing_and_training_and_counted(name):
    data, message = NO_PICTURE[name]
    for read in (lambda: encode(data, Packing(resize=8)), lambda: Decoder(Decoding(8, 8))(data, None)):
        with pytest.raises(ImageError, match=message):
            read()
    loader = EvaluationLoader(ListedImages([data, encoded()]), Decoding(8, 8), batch_size=2)
    assert [len(labels) for _, labels in loader.batches()] == [1]
    assert loader.num_unreadable == 1 and list(loader.unreadable) == [0]


# ---- orientation -----------------------------------------------------------------------------------------------------

TURNED = {  # how a picture is stored that a viewer puts upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def stored(turn, kind="PNG", **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    return saved(
        Image.fromarray(np.ascontiguousarray(TURNED[turn](COLOR)).astype(np.uint8)), kind, exif=exif, **options
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("turn", TURNED)
def test_the_setting_turns_a_picture_upright(turn, kind):
    data = stored(turn, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert orientation(open_image(data)) == turn
    assert np.array_equal(np.asarray(to_rgb(open_image(data), upright=True)), COLOR)
    as_stored = np.asarray(to_rgb(open_image(data)))
    assert np.array_equal(as_stored, COLOR) == (turn == 1)


@pytest.mark.parametrize("turn", [1, 3, 6])
@pytest.mark.parametrize("packing", [Packing(), Packing(resize=20, quality=100)])
def test_a_packed_image_is_turned_by_the_setting_of_the_training(turn, packing):
    data = encode(stored(turn, "JPEG", quality=100, subsampling=0), packing)
    upright = Image.fromarray(COLOR.astype(np.uint8))
    for exif_orientation in (False, True):
        as_stored = Image.fromarray(np.ascontiguousarray(TURNED[turn](COLOR)).astype(np.uint8))
        expected = Decoder(Decoding(16, 20))(saved(upright if exif_orientation else as_stored, "PNG"), None)
        found = Decoder(Decoding(16, 20, exif_orientation=exif_orientation))(data, None)
        assert np.abs(found.astype(int) - expected).mean() < 6


def test_rubbish_in_exif_leaves_the_picture_as_it_is():
    with quiet():
        assert orientation(open_image(READABLE["exif_rubbish"])) == 1
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 77
    assert orientation(open_image(saved(RGB, "JPEG", exif=exif))) == 1


def test_a_batch_of_the_loader_is_upright_on_request():
    images = ListedImages([stored(6), stored(1)])
    [(turned, _)] = EvaluationLoader(images, Decoding(16, 20, exif_orientation=True), batch_size=2).batches()
    [(ignored, _)] = EvaluationLoader(images, Decoding(16, 20), batch_size=2).batches()
    assert (turned[0] == turned[1]).all() and not (ignored[0] == ignored[1]).all()
