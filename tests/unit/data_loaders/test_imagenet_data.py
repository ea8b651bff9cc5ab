"""Folders, loaders, pixels: the same for any ranks and workers and from any step; exact evaluation; bad images."""

import io
import logging
import os
import shutil
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_sets import READABLE, UNREADABLE, ListedImages, encoded, pixels, write_folders
from PIL import Image
from torch.utils.data import DataLoader

from data_loaders.imagenet import decode as decoding_module
from data_loaders.imagenet.decode import (
    NUM_UNIFORM,
    Decoder,
    Decoding,
    central_crop,
    central_place,
    check_decoder,
    random_crop,
)
from data_loaders.imagenet.folder import FolderImages
from data_loaders.imagenet.loaders import EvaluationLoader, TrainLoader
from data_loaders.imagenet.packed import PackedImages
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.pictures import ImageError, quiet
from data_loaders.imagenet.sampling import epoch_order, sample_seed, uniform
from data_loaders.imagenet.sets import check_pair, open_images

SMALL = Decoding(16, 20)
CONTENTS = [encoded(seed=seed) for seed in range(30)]


def listed(contents=CONTENTS):
    return ListedImages(contents, list(range(len(contents))), tuple(f"c{each:02d}" for each in range(len(contents))))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_read_in_the_order_of_names(tmp_path):
    root = write_folders(tmp_path, train=12)
    (root / "train/n02/.hidden.JPEG").write_bytes(b"")
    (root / "train/n02/notes.txt").write_bytes(b"")
    (root / "train/n02/zebra.PnG").write_bytes(b"png")
    for suffix in ("jpe", "JFIF"):
        (root / f"train/n03/old.{suffix}").write_bytes(b"jpeg")
    (root / "train/.cache").mkdir()
    images = FolderImages(root, "train")
    assert len(images) == 39 and images.class_names == ("n01", "n02", "n03")
    assert images.labels.tolist() == [0] * 12 + [1] * 13 + [2] * 14
    assert [images.name(index) for index in (0, 1, 2, 24, 37, 38)] == [
        "n01/n01_0.JPEG",
        "n01/n01_1.JPEG",
        "n01/n01_10.JPEG",
        "n02/zebra.PnG",
        "n03/old.JFIF",
        "n03/old.jpe",
    ]
    assert images.read(24) == b"png"
    assert images.read(2) == (root / "train/n01/n01_10.JPEG").read_bytes()


def test_a_set_is_read_from_a_copy_of_its_root(tmp_path):
    root = write_folders(tmp_path / "here")
    images = FolderImages(root, "validation")
    shutil.copytree(root, tmp_path / "there")
    moved = images.at(tmp_path / "there")
    shutil.rmtree(root)
    assert moved.folder == tmp_path / "there" / "val" and len(moved.read(0)) > 100
    with pytest.raises(FileNotFoundError):
        images.read(0)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("pin", [False, True])
def test_batches_of_this_process_are_pinned_on_request(monkeypatch, pin, num_workers):
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(DataLoader, "__init__", lambda self, *_, **options: pinned.append(options["pin_memory"]))
    with TrainLoader(listed(), SMALL, batch_size=15, seed=0, num_workers=num_workers, pin_memory=pin) as loader:
        if num_workers:
            assert pinned == [pin]  # DataLoader does it
            return
        assert same(list(loader.batches(1)), list(TrainLoader(listed(), SMALL, batch_size=15, seed=0).batches(1)))
    assert pinned == pin * 2 * [(15, 3, 16, 16), (15,)]


def test_the_digest_of_folders_tells_sets_apart(tmp_path):
    root = write_folders(tmp_path)
    first = FolderImages(root, "train").digest
    assert FolderImages(root, "train").digest == first
    (root / "train/n01/n01_0.JPEG").rename(root / "train/n02/n01_0.JPEG")
    assert FolderImages(root, "train").digest != first


@pytest.mark.parametrize("name", ["val", "validation"])
def test_open_images_tells_folders_and_shards_apart(tmp_path, name):
    root = write_folders(tmp_path)
    (root / "val").rename(root / name)
    assert isinstance(open_images(root, "train"), FolderImages)
    assert len(open_images(root, "validation")) == 9
    pack(open_images(root, "train"), root, "train", Packing())
    assert isinstance(open_images(root, "train"), PackedImages)


def test_what_is_missing_or_ambiguous_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ImageNet: .*nowhere does not exist"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"neither packed images .validation-00000-of-.* nor a folder val or"):
        open_images(tmp_path, "validation")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train has no folder of a class"):
        open_images(tmp_path, "train")
    (tmp_path / "train/n01").mkdir()
    with pytest.raises(ValueError, match=r"train holds no image \([^)]*\)$"):
        open_images(tmp_path, "train")
    (tmp_path / "train/n01/images").mkdir()
    (tmp_path / "train/n01/images/1.jpg").touch()
    with pytest.raises(
        ValueError, match="images in train/n01/images lie one folder too deep, they belong into train/n01"
    ):
        open_images(tmp_path, "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="both a folder val and a folder validation"):
        open_images(tmp_path, "validation")


def test_pairs_that_do_not_fit_are_named(tmp_path):
    root = write_folders(tmp_path)
    train, validation = open_images(root, "train"), open_images(root, "validation")
    check_pair(train, validation)
    (root / "val/n02").rename(root / "val/n04")
    with pytest.raises(ValueError, match=r"1 only in train .n02.; 1 only in validation .n04."):
        check_pair(train, open_images(root, "validation"))
    (root / "val/n04").rename(root / "val/n02")
    for image in (root / "train/n03").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="train has no image of n03"):
        check_pair(open_images(root, "train"), validation)


# ---- crops and pixels ------------------------------------------------------------------------------------------------


def crops(width, height, count=2000, **options):
    numbers = uniform(sample_seed(0, 0, np.arange(count)), NUM_UNIFORM).tolist()
    return [random_crop(width, height, each, **options) for each in numbers]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1, 1), (400, 1), (3, 1000), (2, 2)])
def test_random_crops_lie_in_the_image(width, height):
    for crop in crops(width, height):
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


def test_a_decoder_that_does_not_import_is_one_sentence(monkeypatch):
    monkeypatch.setitem(decoding_module.NEEDS, "torchvision", "no_such_package.io")
    message = "decoder 'torchvision' needs no_such_package.io, which does not import here .*: install it, or choose pil"
    with pytest.raises(ValueError, match=message):
        TrainLoader(listed(), Decoding(16, 20, "torchvision"), batch_size=2, seed=0)


def test_a_temporary_folder_too_deep_for_sockets_is_refused_because_its_workers_would_hang(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    TrainLoader(listed(), SMALL, batch_size=15, seed=0)
    with pytest.raises(ValueError, match=r"path has at most 75 bytes, got .*x: export TMPDIR=/tmp"):
        TrainLoader(listed(), SMALL, batch_size=15, seed=0, num_workers=1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_count_what_the_chosen_decoder_refused(monkeypatch, num_workers):
    """Pillow reads those images."""

    def decode_image(encoded, mode):
        data = encoded.numpy().tobytes()
        if data in CONTENTS[:3]:
            raise RuntimeError("unsupported color conversion")
        width, height = Image.open(io.BytesIO(data)).size
        return torch.full((3, height, width), 7, dtype=torch.uint8)

    module = SimpleNamespace(decode_image=decode_image, ImageReadMode=SimpleNamespace(RGB="RGB"))
    monkeypatch.setitem(sys.modules, "picky", module)
    monkeypatch.setitem(decoding_module.NEEDS, "torchvision", "picky")
    images = listed([*CONTENTS[:29], b""])
    settings = {"batch_size": 5, "num_workers": num_workers, "start_method": "fork"}
    with EvaluationLoader(images, Decoding(16, 20, "torchvision"), **settings) as loader:
        read = torch.cat([each for each, _ in loader.batches()])
    assert (loader.num_fallbacks, loader.num_unreadable) == (3, 1)
    assert np.array_equal(read[2].permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[2], None))
    assert read[3].unique().tolist() == [7]


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


# ---- training --------------------------------------------------------------------------------------------------------


def global_batches(images, world_size, num_workers=0, epoch=3, decoding=SMALL, method="forkserver"):
    loaders = [
        TrainLoader(
            images,
            decoding,
            batch_size=8,
            seed=5,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            start_method=method,
        )
        for rank in range(world_size)
    ]
    passes = [list(loader.batches(epoch)) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [
        (torch.stack([x for x, _ in parts], 1).flatten(0, 1), torch.stack([y for _, y in parts], 1).flatten())
        for parts in zip(*passes, strict=True)
    ]


def test_a_batch_is_what_order_and_seeds_say():
    loader = TrainLoader(listed(), SMALL, batch_size=8, seed=5)
    assert (loader.steps_per_epoch, loader.num_left_out) == (3, 6)
    order = epoch_order(5, 3, 30)
    for step, (pixels_read, labels) in enumerate(loader.batches(3)):
        chosen = order[8 * step : 8 * step + 8]
        assert pixels_read.shape == (8, 3, 16, 16) and pixels_read.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.tolist() == chosen.tolist()
        numbers = uniform(sample_seed(5, 3, chosen), NUM_UNIFORM).tolist()
        for square, index, each in zip(pixels_read, chosen, numbers, strict=True):
            assert np.array_equal(square.permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[index], each))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_pixels_are_the_same_for_any_ranks_and_workers(world_size, num_workers):
    assert same(global_batches(listed(), world_size, num_workers, method="fork"), global_batches(listed(), 1))


def test_epochs_seeds_and_augmentation_make_a_difference():
    first = global_batches(listed(), 1)
    assert not same(first, global_batches(listed(), 1, epoch=4))
    other = TrainLoader(listed(), SMALL, batch_size=8, seed=6)
    assert not same(first, list(other.batches(3)))
    plain = list(TrainLoader(listed(), SMALL, batch_size=8, seed=5, augment=False).batches(3))
    assert [y.tolist() for _, y in plain] == [y.tolist() for _, y in first] and not same(first, plain)
    index = int(plain[0][1][0])
    assert np.array_equal(plain[0][0][0].permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[index], None))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_in_mid_epoch_is_the_tail_of_the_epoch(num_workers):
    with TrainLoader(listed(), SMALL, batch_size=4, seed=5, num_workers=num_workers, start_method="fork") as loader:
        whole = list(loader.batches(2))
        assert len(whole) == 7
        for first in (0, 1, 5, 6, 7):
            assert same(list(loader.batches(2, first)), whole[first:])


def test_nothing_before_the_first_step_is_read():
    images = listed()
    read = []
    images.read = lambda index: (read.append(index), CONTENTS[index])[1]
    batches = TrainLoader(images, SMALL, batch_size=4, seed=5).batches(2, 6)
    assert read == []
    next(batches)
    assert read == epoch_order(5, 2, 30)[24:28].tolist()


def test_torch_random_numbers_are_neither_used_nor_advanced():
    state = torch.get_rng_state()
    with TrainLoader(listed(), SMALL, batch_size=8, seed=5, num_workers=1, start_method="fork") as loader:
        list(loader.batches(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_workers_read_what_was_open_here(tmp_path, method):
    images = pack(listed(), tmp_path, "train", Packing(images_per_shard=9))
    images.read(0)
    with TrainLoader(images, SMALL, batch_size=8, seed=5, num_workers=1, start_method=method) as loader:
        assert same(list(loader.batches(3)), global_batches(listed(), 1))
        assert same(list(loader.batches(1)), global_batches(listed(), 1, epoch=1))  # the same worker


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_abandoned_pass_does_not_show_in_the_next_and_two_at_a_time_are_refused():
    with TrainLoader(listed(), SMALL, batch_size=4, seed=5, num_workers=2, start_method="fork") as loader:
        whole = list(loader.batches(2))
        abandoned = loader.batches(2)
        next(abandoned)
        assert same(list(loader.batches(2)), whole)
        with pytest.raises(RuntimeError, match="another pass over the same loader was begun"):
            next(abandoned)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("lost", [EOFError, ConnectionResetError])
def test_a_worker_that_is_lost_amid_an_answer_is_reported(monkeypatch, lost):
    def receive(*_):
        raise lost

    with TrainLoader(listed(), SMALL, batch_size=4, seed=5, num_workers=1, start_method="fork") as loader:
        batches = loader.batches(0)
        next(batches)
        monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", receive)
        with pytest.raises(RuntimeError, match="a worker that reads images ended unexpectedly"):
            list(batches)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_statistics_in_the_body_of_the_last_step_are_allowed():
    with TrainLoader(listed(), SMALL, batch_size=8, seed=5, num_workers=1, start_method="fork") as loader:
        for step, _ in enumerate(loader.batches(0)):
            if step == loader.steps_per_epoch - 1:
                assert sum(map(len, loader.statistics_batches(10, 4))) == 10


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_statistics_use_the_same_images_for_any_ranks(world_size):
    images = listed(CONTENTS * 2)
    alone = TrainLoader(images, SMALL, batch_size=42, seed=5)
    expected = list(alone.statistics_batches(22, 5))
    assert [len(batch) for batch in expected] == [5, 5, 5, 5, 2]
    list(alone.batches(1))
    assert all(map(torch.equal, expected, alone.statistics_batches(22, 5)))  # always the same
    parts = []
    for rank in range(world_size):
        loader = TrainLoader(images, SMALL, batch_size=42, seed=5, rank=rank, world_size=world_size)
        parts.append(list(loader.statistics_batches(22, 5)))
    assert sum(map(len, parts)) == 5
    assert all(torch.equal(batch, parts[b % world_size][b // world_size]) for b, batch in enumerate(expected))


def test_a_batch_that_is_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="batch_size 31 is larger than the set, which has 30 images"):
        TrainLoader(listed(), SMALL, batch_size=31, seed=0)


# ---- unreadable images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNREADABLE)
def test_skip_replaces_a_training_image_by_the_next_and_says_so_once(kind, caplog):
    contents = [*CONTENTS[:11], UNREADABLE[kind], UNREADABLE["empty"], *CONTENTS[13:]]
    with caplog.at_level(logging.WARNING):
        loader = TrainLoader(listed(contents), SMALL, batch_size=30, seed=5)
        ((pixels_read, labels),) = loader.batches(0)
        list(loader.batches(1))
    order = epoch_order(5, 0, 30)
    assert labels.tolist() == [13 if index in (11, 12) else index for index in order]
    place = order.tolist().index(11)
    numbers = uniform(sample_seed(5, 0, np.array([11])), NUM_UNIFORM).tolist()[0]
    assert np.array_equal(pixels_read[place].permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[13], numbers))
    assert set(loader.unreadable) == {11, 12} and loader.num_unreadable == 2
    assert sorted(record.message.partition(" cannot")[0] for record in caplog.records) == [
        "image 11 (image-11)",
        "image 12 (image-12)",
    ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_replacements_are_the_same_for_any_ranks_and_workers(world_size):
    contents = [data if index % 5 else b"" for index, data in enumerate(CONTENTS)]
    contents[-1] = UNREADABLE["truncated"]  # replaced by number 1: 0 is broken too
    images = listed(contents)
    assert same(global_batches(images, world_size, 2, method="fork"), global_batches(images, 1))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_stop_ends_training_with_one_sentence(kind, num_workers):
    images = listed([*CONTENTS[:11], UNREADABLE[kind], *CONTENTS[12:]])
    decoding = Decoding(16, 20, on_corrupt="stop")
    with (
        TrainLoader(images, decoding, batch_size=30, seed=5, num_workers=num_workers, start_method="fork") as loader,
        pytest.raises(ImageError, match=r"^image 11 \(image-11\) cannot be read: [^\n]+$"),
    ):
        list(loader.batches(0))


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_damaged_shard_is_met_by_the_policy(tmp_path, policy):
    (path,) = pack(listed(), tmp_path, "train", Packing()).paths
    data = bytearray(path.read_bytes())
    data[data.find(CONTENTS[7]) + 100] ^= 1
    path.write_bytes(data)
    loader = TrainLoader(open_images(tmp_path, "train"), Decoding(16, 20, on_corrupt=policy), batch_size=30, seed=5)
    if policy == "stop":
        with pytest.raises(
            ImageError, match=r"^image 7 \(image-7\) cannot be read: its checksum in train-00000-of-00001"
        ):
            list(loader.batches(0))
    else:
        ((_, labels),) = loader.batches(0)
        assert sorted(labels.tolist()) == sorted([*range(7), 8, *range(8, 30)])


def test_a_file_that_vanished_is_unreadable(tmp_path):
    images = open_images(write_folders(tmp_path), "train")
    os.unlink(tmp_path / "train/n02/n02_3.JPEG")
    loader = TrainLoader(images, SMALL, batch_size=30, seed=0)
    list(loader.batches(0))
    assert loader.unreadable == {13: "No such file or directory"}


def test_a_set_without_a_readable_image_is_an_error():
    with pytest.raises(ImageError, match=r"5 images in a row cannot be read, from image \d \(image-\d\) on: it is"):
        list(TrainLoader(listed([b""] * 5), SMALL, batch_size=5, seed=0).batches(0))
    with pytest.raises(ImageError, match="none of the 5 images can be read, the first because it is empty"):
        list(EvaluationLoader(listed([b""] * 5), SMALL, batch_size=2).batches())


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_broken", [0, 11])
def test_every_image_is_evaluated_once(world_size, num_broken):
    contents = [CONTENTS[index % 30] for index in range(97)]
    broken = sorted({(index * 37 + 5) % 97 for index in range(num_broken)})
    for index in broken:
        contents[index] = b""
    read, unreadable = [], []
    for rank in range(world_size):
        loader = EvaluationLoader(listed(contents), SMALL, batch_size=5, rank=rank, world_size=world_size)
        for _ in range(2):  # counts begin again with every pass
            batches = list(loader.batches())
        assert all(1 <= len(labels) <= 5 and len(images) == len(labels) for images, labels in batches)
        mine = [label for _, labels in batches for label in labels.tolist()]
        assert len(mine) + loader.num_unreadable == loader.num_images
        read += mine
        unreadable += loader.unreadable
    assert unreadable == broken and len(read) + len(unreadable) == 97
    assert read == [index for index in range(97) if index not in broken]


def test_evaluation_pixels_do_not_depend_on_batches_and_workers():
    def squares(**settings):
        with EvaluationLoader(listed(), SMALL, **settings) as loader:
            return torch.cat([images for images, _ in loader.batches()])

    first = squares(batch_size=30)
    assert torch.equal(first, squares(batch_size=7))
    assert torch.equal(first, squares(batch_size=4, num_workers=2, start_method="fork"))
    assert np.array_equal(first[3].permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[3], None))


def test_stop_ends_an_evaluation():
    images = listed([*CONTENTS[:11], b"", *CONTENTS[12:]])
    with pytest.raises(ImageError, match=r"^image 11 \(image-11\) cannot be read: it is empty$"):
        list(EvaluationLoader(images, Decoding(16, 20, on_corrupt="stop"), batch_size=4).batches())


def test_more_ranks_than_images_leave_some_without():
    images = listed(CONTENTS[:3])
    sizes = [
        sum(len(y) for _, y in EvaluationLoader(images, SMALL, batch_size=4, rank=rank, world_size=5).batches())
        for rank in range(5)
    ]
    assert sorted(sizes) == [0, 0, 1, 1, 1]
