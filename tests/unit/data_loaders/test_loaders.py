"""Loaders: the same for any ranks and workers and from any step; exact evaluation; bad images."""

import io
import logging
import os
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_sets import CONTENTS, UNREADABLE, listed, write_folders
from PIL import Image
from torch.utils.data import DataLoader

from data_loaders.imagenet import decode as decoding_module
from data_loaders.imagenet import reading
from data_loaders.imagenet.decode import NUM_UNIFORM, Decoder, Decoding
from data_loaders.imagenet.loaders import EvaluationLoader, TrainLoader
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.pictures import ImageError
from data_loaders.imagenet.sampling import epoch_order, sample_seed, uniform
from data_loaders.imagenet.sets import open_images

SMALL = Decoding(16, 20)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


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
def test_loaders_count_what_the_chosen_decoder_refused(monkeypatch, caplog, num_workers):
    """Pillow reads those images, and one line says so."""

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
    assert caplog.text.count("decoder torchvision refuses some images, which Pillow reads") == 1
    assert np.array_equal(read[2].permute(1, 2, 0).numpy(), Decoder(SMALL)(CONTENTS[2], None))
    assert read[3].unique().tolist() == [7]


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
    assert loader.steps_per_epoch == 3
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "must be a multiple of their number, 2, got 5"),
        ({"batch_size": 31}, "batch_size 31 is larger than the set, which has 30 images"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0 to 1, got 2"),
        ({"num_workers": -1}, "num_workers option should be non-negative"),
        ({"num_workers": 1, "start_method": "thread"}, "cannot find context for 'thread'"),
    ],
)
def test_loaders_refuse_arguments_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(listed(), SMALL, **{"batch_size": 4, "seed": 0, **settings})


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_evaluation_takes_batches_of_any_size_from_one_on(batch_size):
    EvaluationLoader(listed(), SMALL, batch_size=1, world_size=2)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        EvaluationLoader(listed(), SMALL, batch_size=batch_size)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (31, 4), (10, 0)])
def test_statistics_refuse_arguments_outside_their_range(count, batch_size):
    message = f"statistics take 1 to 30 images, .* at least 1, got {count} in batches of {batch_size}$"
    with pytest.raises(ValueError, match=message):
        TrainLoader(listed(), SMALL, batch_size=4, seed=0).statistics_batches(count, batch_size)


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
    named = sorted(record.message.partition(" cannot")[0] for record in caplog.records)
    assert named == ["image 11 (image-11)", "image 12 (image-12)"]


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
        with pytest.raises(ImageError, match=r"^image 7 \(image-7\) cannot be read: its checksum in train-00000-of"):
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


def test_too_many_unreadable_images_in_a_row_are_an_error(monkeypatch):
    """A storage that fails is not searched to its end."""
    monkeypatch.setattr(reading, "MAX_REPLACED", 3)
    contents = [*CONTENTS[:11], b"", b"", *CONTENTS[13:]]
    assert len(list(TrainLoader(listed(contents), SMALL, batch_size=30, seed=5).batches(0))) == 1
    contents[13] = b""
    with pytest.raises(ImageError, match=r"^3 images in a row cannot be read, from image 1\d .* on: it is empty"):
        list(TrainLoader(listed(contents), SMALL, batch_size=30, seed=5).batches(0))


def test_a_set_without_a_readable_image_is_an_error():
    with pytest.raises(ImageError, match=r"5 images in a row cannot be read, from image \d \(image-\d\) on: it is"):
        list(TrainLoader(listed([b""] * 5), SMALL, batch_size=5, seed=0).batches(0))
    with pytest.raises(ImageError, match="none of the 5 images can be read, the first because it is empty"):
        list(EvaluationLoader(listed([b""] * 5), SMALL, batch_size=2).batches())


def test_a_batch_without_a_readable_image_is_left_out():
    loader = EvaluationLoader(listed([b"", b"", *CONTENTS[2:5]]), SMALL, batch_size=2)
    assert [labels.tolist() for _, labels in loader.batches()] == [[2, 3], [4]]


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


def test_more_ranks_than_images_leave_some_without():
    images = listed(CONTENTS[:3])
    sizes = [
        sum(len(y) for _, y in EvaluationLoader(images, SMALL, batch_size=4, rank=rank, world_size=5).batches())
        for rank in range(5)
    ]
    assert sorted(sizes) == [0, 0, 1, 1, 1]
