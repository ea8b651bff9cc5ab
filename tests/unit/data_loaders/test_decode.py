"""Crops and pixels: random and central ones, unusual and broken images, other decoders."""

import numpy as np
import pytest
from image_sets import READABLE, UNREADABLE, encoded, pixels
from PIL import Image

from data_loaders.imagenet.decode import (
    NUM_UNIFORM,
    Decoder,
    Decoding,
    central_crop,
    central_place,
    check_decoder,
    random_crop,
)
from data_loaders.imagenet.pictures import ImageError, quiet
from data_loaders.imagenet.sampling import sample_seed, uniform

SMALL = Decoding(16, 20)


def crops(width, height, count=2000, **options):
    numbers = uniform(sample_seed(0, 0, np.arange(count)), NUM_UNIFORM).tolist()
    return [random_crop(width, height, each, **options) for each in numbers]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1, 1), (400, 1), (3, 1000), (2, 2)])
def test_random_crops_lie_in_the_image(width, height):
    made = crops(width, height)
    assert {crop.flip for crop in made} == {False, True}  # also where no attempt fits
    for crop in made:
        assert crop.left >= 0 and crop.left + crop.width <= width and crop.width >= 1
        assert crop.top >= 0 and crop.top + crop.height <= height and crop.height >= 1


def test_random_crops_follow_their_laws():
    made = crops(500, 375)
    area = np.array([crop.width * crop.height / (500 * 375) for crop in made])
    aspect = np.array([crop.width / crop.height for crop in made])
    assert area.min() < 0.09 and area.max() > 0.97
    assert np.quantile(area[area < 0.5], 0.5) == pytest.approx(0.29, abs=0.02)  # uniform where nearly all fit
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(np.log(aspect[area < 0.3]).mean()) < 0.02
    assert np.mean([crop.flip for crop in made]) == pytest.approx(0.5, abs=0.04)
    x = np.array([crop.left / max(1, 500 - crop.width) for crop in made])
    assert x.mean() == pytest.approx(0.5, abs=0.03) and x.min() == 0 and x.max() == 1


@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_random_crops_have_at_least_the_smallest_area(smallest):
    area = [crop.width * crop.height / 400**2 for crop in crops(400, 400, smallest=smallest)]
    assert min(area) == pytest.approx(smallest, abs=0.01) and max(area) > 0.97


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_a_decoding_passes_its_smallest_crop_on(decoder):
    if decoder == "torchvision":
        pytest.importorskip("torchvision.io")
    data = encoded(seed=3, width=90, height=60)
    numbers = uniform(sample_seed(0, 0, np.arange(20)), NUM_UNIFORM).tolist()
    default, same, large = (
        [Decoder(Decoding(16, 20, decoder, **options))(data, each) for each in numbers]
        for options in ({}, {"smallest_crop": 0.08}, {"smallest_crop": 0.9})
    )
    assert np.array_equal(default, same) and not np.array_equal(default, large)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (256, 256), (77, 41), (1, 1), (300, 2)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 36), (16, 16)])
def test_the_central_crop_is_resize_then_crop(width, height, size, resize):
    image = pixels(width, height, 5)
    new_width, new_height, left, top = central_place(width, height, size, resize)
    assert min(new_width, new_height) == resize
    whole = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), np.int64)
    data = encoded("PNG", 5, width=width, height=height)
    assert np.abs(Decoder(Decoding(size, resize))(data, None) - expected).max() <= 1
    crop = central_crop(width, height, size, resize)
    assert crop.left >= 0 and crop.left + crop.width <= width and crop.top >= 0 and crop.top + crop.height <= height


@pytest.mark.parametrize(("short", "start"), [(225, 0), (227, 2), (229, 2), (231, 4)])
def test_halves_of_a_central_place_are_rounded_to_the_even_neighbor(short, start):
    """As in torchvision's CenterCrop."""
    assert central_place(short, 400, 224, short) == (short, 400, start, 88)
    assert central_place(400, short, 224, short) == (400, short, 88, start)


def test_a_random_crop_shows_its_part_of_the_image_and_is_mirrored():
    image = np.asarray(pixels(90, 60, 3), np.int64)
    decode, data = Decoder(Decoding(24, 24)), encoded("PNG", 3, width=90, height=60)
    numbers = [0.5] * NUM_UNIFORM
    crop = random_crop(90, 60, numbers)
    part = image[int(crop.top) : int(crop.top + crop.height), int(crop.left) : int(crop.left + crop.width)]
    expected = np.asarray(Image.fromarray(part.astype(np.uint8)).resize((24, 24), Image.Resampling.BILINEAR), np.int64)
    straight = decode(data, numbers)
    inner = slice(2, -2)  # at its edges, resizing also sees the pixels around the crop
    assert not crop.flip and np.abs(straight - expected)[inner, inner].max() <= 1
    mirrored = decode(data, [*numbers[:-1], 0.0])
    assert np.array_equal(mirrored, straight[:, ::-1]) and not np.array_equal(mirrored, straight)


@pytest.mark.parametrize("kind", READABLE)
def test_unusual_images_are_read(kind):
    with quiet():
        square = Decoder(SMALL)(READABLE[kind], None)
    assert square.shape == (16, 16, 3) and square.dtype == np.uint8
    if kind in ("cmyk", "png_named_jpeg", "alpha", "exif_rubbish", "progressive", "palette"):
        seed = 7 if kind == "exif_rubbish" else 0
        assert np.abs(square.astype(int) - Decoder(SMALL)(encoded("PNG", seed), None)).mean() < 12  # colors are right


@pytest.mark.parametrize("kind", UNREADABLE)
def test_broken_images_have_a_reason(kind):
    reasons = {
        "empty": "it is empty",
        "truncated": "image file is truncated",
        "truncated_png": "truncated",
        "no_image": "it is no image of a known format",
        "header_only": "",
        "bomb": "it announces more than 89,478,485 pixels",
    }
    with quiet(), pytest.raises(ImageError, match=reasons[kind]):
        Decoder(SMALL)(UNREADABLE[kind], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1 and at most resize, 20 pixels, got 0"),
        ({"resize": 15}, "size must be at least 1 and at most resize, 15 pixels, got 16"),
        ({"decoder": "opencv"}, "decoder must be pillow or torchvision, got 'opencv'"),
        ({"on_corrupt": "warn"}, "on_corrupt must be skip or stop, got 'warn'"),
        ({"smallest_crop": 1.5}, r"smallest_crop must be a share in \(0, 1\], got 1\.5"),
    ],
)
def test_decodings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**{"size": 16, "resize": 20, **settings})


def importable(name):
    try:
        check_decoder(name)
    except ValueError as error:
        return pytest.mark.skip(reason=str(error))
    return ()


@pytest.mark.parametrize("name", [pytest.param("torchvision", marks=importable("torchvision"))])
def test_another_decoder_sees_what_pillow_sees(name):
    size, resize = 64, 72
    ours, theirs = Decoder(Decoding(size, resize)), Decoder(Decoding(size, resize, name))
    data = encoded(seed=4, width=300, height=200)
    numbers = uniform(sample_seed(0, 0, np.arange(12)), NUM_UNIFORM).tolist()
    for each in [None, *numbers]:
        with quiet():
            difference = np.abs(theirs(data, each).astype(int) - ours(data, each))[2:-2, 2:-2]
        assert difference.mean() < 2 and np.quantile(difference, 0.99) < 12
    assert theirs.num_fallbacks == 0
    with quiet():
        for kind, broken in UNREADABLE.items():
            with pytest.raises(ImageError):
                raise AssertionError(f"{kind}: {theirs(broken, None).mean()}")
        for kind, good in READABLE.items():
            assert np.abs(theirs(good, None).astype(int) - ours(good, None)).mean() < 6, kind
        assert np.array_equal(theirs(data, numbers[0]), Decoder(Decoding(size, resize, name))(data, numbers[0]))
