"""Packed sets: what was written is read, every damage has a name, a broken packing goes on, processes read at once."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from image_sets import UNREADABLE, ListedImages, encoded, read_all, write_folders
from paths import ROOT

from data_loaders.files import locked
from data_loaders.imagenet import shards
from data_loaders.imagenet.__main__ import main
from data_loaders.imagenet.packed import PackedImages, info, verify
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.pictures import ImageError, open_image
from data_loaders.imagenet.sets import open_images

CONTENTS = [encoded(seed=seed) for seed in range(25)]
OTHERS = ListedImages(CONTENTS[::-1])
OTHERS.digest = "another"


@pytest.fixture
def folder(tmp_path):
    packed(tmp_path / "set")
    return tmp_path / "set"


def packed(folder, contents=CONTENTS, split="train", class_names=("a", "b"), per_shard=10):
    return pack(ListedImages(contents, class_names=class_names), folder, split, Packing(images_per_shard=per_shard))


def shard(folder, number=1, split="train"):
    return sorted(folder.glob(f"{split}-*.h5"))[number]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def place_of(path, number):
    header = shards.read_header(path)
    return header.start + int(header.offsets[number]) + 5


def change(path, **attributes):
    with h5py.File(path, "r+") as file:
        for name, value in attributes.items():
            if value is None:
                del file.attrs[name]
            else:
                file.attrs[name] = value


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_what_was_written_is_read(folder):
    images = PackedImages(folder, "train")
    assert [path.name for path in images.paths] == [f"train-0000{number}-of-00003.h5" for number in range(3)]
    assert [images.read(index) for index in range(25)] == CONTENTS
    assert images.labels.tolist() == [index % 2 for index in range(25)] and images.labels.dtype == np.int64
    assert [images.name(index) for index in (0, 9, 10, 24)] == ["image-0", "image-9", "image-10", "image-24"]
    assert (images.class_names, images.source, len(images), images.left_out) == (("a", "b"), "packed memory", 25, ())


def test_a_shard_is_plain_hdf5(folder):
    with h5py.File(shard(folder), "r") as file:
        start, stop = file["offsets"][3:5]
        assert file["data"][start:stop].tobytes() == CONTENTS[13]
        assert file["data"].chunks is None
        assert bool(file.attrs["complete"])
        assert file.attrs["version"] == 1


def test_the_digest_is_that_of_contents_and_labels_not_of_shards(tmp_path):
    first = packed(tmp_path / "1").digest
    assert packed(tmp_path / "2", per_shard=7).digest == first
    assert packed(tmp_path / "3", CONTENTS[::-1]).digest != first
    assert packed(tmp_path / "4", class_names=("a", "c")).digest != first


def test_many_classes_and_strange_names_fit(tmp_path):
    names = [f"class-{number:06d}-é\udcff" if number == 3 else f"class-{number:06d}" for number in range(21_841)]
    given = ListedImages(CONTENTS[:2], [21_840, 0], names)
    given.name = ["x/\udcff é.JPEG", ""].__getitem__
    images = pack(given, tmp_path, "validation", Packing())
    assert images.class_names == tuple(names) and images.labels.tolist() == [21_840, 0]
    assert [images.name(0), images.name(1)] == ["x/\udcff é.JPEG", ""]


def test_labels_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image-1 has label 2, outside the 2 classes"):
        pack(ListedImages(CONTENTS[:2], [0, 2]), tmp_path, "train", Packing())
    assert not list(tmp_path.glob("*.h5")) and not list(tmp_path.glob(".*.tmp"))


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_two_processes_read_a_set_that_is_open_here(folder, method):
    images = PackedImages(folder, "train")
    for index in range(25):
        images.read(index)
    images.name(3)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_all, args=(images, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert answers == [[*CONTENTS, b"image-24"]] * 2
    assert images.read(7) == CONTENTS[7]


def opened(folder):
    """The descriptors of this process for files of a folder."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return {int(link.name) for link in links if str(link.readlink()).startswith(str(folder))}


def test_a_pickle_carries_no_open_file(folder):
    images = PackedImages(folder, "train")
    images.read(0)
    mine = opened(folder)
    copied = pickle.loads(pickle.dumps(images))
    copied.close()
    assert len(mine) == 1 and opened(folder) == mine
    images.close()
    assert not opened(folder)
    assert images.read(24) == CONTENTS[24]
    images.close()


def test_a_set_is_read_from_a_copy_of_its_folder(folder, tmp_path):
    images = PackedImages(folder, "train")
    images.read(0)
    shutil.copytree(folder, tmp_path / "copy")
    moved = images.at(tmp_path / "copy")
    shutil.rmtree(folder)
    assert [moved.read(index) for index in range(25)] == CONTENTS and moved.name(24) == "image-24"
    with pytest.raises(FileNotFoundError):
        images.read(24)


# ---- damages ---------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_named_by_verify_and_by_reading(folder):
    assert verify(folder) == []
    for number in (1, 2):
        flip(shard(folder, number), place_of(shard(folder, number), 4))
    assert verify(folder) == [
        "train-00001-of-00003.h5: image 4 (image-14, index 14) is damaged",
        "train-00002-of-00003.h5: image 4 (image-24, index 24) is damaged",
    ]
    images = PackedImages(folder, "train")
    with pytest.raises(ImageError, match=r"its checksum in train-00001-of-00003.h5 is wrong"):
        images.read(14)
    assert images.read(13) == CONTENTS[13]


@pytest.mark.parametrize("name", ["names", "name_offsets"])
def test_a_flipped_byte_in_the_names_is_found_by_verify(folder, name):
    with h5py.File(shard(folder), "r") as file:
        place = file[name].id.get_offset()
    flip(shard(folder), place)
    assert verify(folder) == [f"the names in {shard(folder)} have the wrong checksum"]
    assert PackedImages(folder, "train").name(12) == "number 2 of train-00001-of-00003.h5"


def test_a_shard_that_shrinks_while_it_is_read_makes_its_images_unreadable(folder):
    images = PackedImages(folder, "train")
    header = shards.read_header(shard(folder))
    os.truncate(shard(folder), header.start + int(header.offsets[5]) + 10)
    assert images.read(14) == CONTENTS[14]
    with pytest.raises(ImageError, match="ends after 10 of its"):
        images.read(15)


def flip_in_table(path, name):
    with h5py.File(path, "r") as file:
        place = file[name].id.get_offset()
    flip(path, place)


def rename_a_class(path):
    data = path.read_bytes()
    place = data.index(b'["a", "b"]') + 2
    path.write_bytes(data[:place] + b"c" + data[place + 1 :])


def take_from(path, images, split="train"):
    """A shard of other images, or of the other split, takes the place of one."""
    place = path.parent.parent / "other"
    pack(images, place, split, Packing(images_per_shard=10))
    shutil.copy(place / path.name.replace("train", split), path)


def write_foreign(path):
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)


TABLE = "00001-of-00003.h5 is damaged: its table of images has the wrong checksum"
NO_SHARD = "00001-of-00003.h5 (cannot be read as|is not) a shard of packed images"
DAMAGES = {  # what happens to the second of three shards, and what is said when the set is opened
    "offsets": (lambda path: flip_in_table(path, "offsets"), TABLE),
    "labels": (lambda path: flip_in_table(path, "labels"), TABLE),
    "crc32": (lambda path: flip_in_table(path, "crc32"), TABLE),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 4000), "00001-of-00003.h5 (cannot|is damaged)"),
    "another version": (lambda path: change(path, version=2), "has shard version 2 where this code reads 1: pack"),
    "class name": (rename_a_class, "00001-of-00003.h5 is damaged: its attributes have the wrong checksum"),
    "incomplete": (lambda path: change(path, complete=None), "00001-of-00003.h5 is incomplete"),
    "other split": (lambda path: take_from(path, ListedImages(CONTENTS), "validation"),
                    "train-00001-of-00003.h5 is a validation shard by its contents"),
    "missing": (Path.unlink, "lacks 1 of 3 train shards: train-00001-of-00003.h5"),
    "of four shards": (lambda path: shutil.copy(path, path.with_name("train-00001-of-00004.h5")),
                       "mixes train shards of sets with 3 and 4 shards"),
    "another set": (lambda path: take_from(path, OTHERS), "belongs to another set than train-00000-of-00003.h5"),
    "exchanged": (lambda path: shutil.copy(shard(path.parent, 0), path), "00003.h5 is shard 0 of 3 by its contents"),
    "empty": (lambda path: path.write_bytes(b""), NO_SHARD),
    "no HDF5": (lambda path: path.write_bytes(b"no HDF5"), NO_SHARD),
    "another HDF5 file": (write_foreign, NO_SHARD),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_shard_is_refused_and_found_by_verify(folder, damage, message):
    damage(shard(folder))
    with pytest.raises(ValueError, match=message):
        open_images(folder, "train")
    assert re.search(message.removeprefix("train-"), verify(folder)[0])


def test_missing_folders_are_named(tmp_path):
    for call in (verify, info):
        with pytest.raises(FileNotFoundError, match="missing is not a folder"):
            call(tmp_path / "missing")
        with pytest.raises(FileNotFoundError, match="holds no packed images"):
            call(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no shard train-00000-of"):
        PackedImages(tmp_path, "train")


# ---- pack ------------------------------------------------------------------------------------------------------------


def test_packing_keeps_bytes_and_names(tmp_path):
    images = open_images(write_folders(tmp_path / "images"), "train")
    result = pack(images, tmp_path / "set", "train", Packing(images_per_shard=7))
    assert [result.read(index) for index in range(30)] == [images.read(index) for index in range(30)]
    assert [result.name(index) for index in range(30)] == [images.name(index) for index in range(30)]
    assert np.array_equal(result.labels, images.labels) and result.class_names == images.class_names
    assert len(result.paths) == 5 and not verify(tmp_path / "set")


def test_resizing_shrinks_the_short_side_and_never_enlarges(tmp_path):
    contents = [encoded(width=90, height=60), encoded(width=60, height=90), encoded(width=20, height=40)]
    result = pack(ListedImages(contents, [0, 1, 1]), tmp_path, "train", Packing(resize=30, quality=85))
    assert [open_image(result.read(index)).size for index in range(3)] == [(45, 30), (30, 45), (20, 40)]
    assert result.read(2) == contents[2]
    assert result.source == "packed memory, short side 30, quality 85"


def test_unreadable_images_are_left_out_and_named(tmp_path):
    contents = [*CONTENTS[:4], *UNREADABLE.values(), CONTENTS[4]]
    result = pack(ListedImages(contents), tmp_path, "train", Packing(images_per_shard=4))
    assert len(result) == 5 and len(result.left_out) == len(UNREADABLE)
    assert result.left_out[0] == "image 4 (image-4): it is empty"
    assert [result.read(index) for index in range(5)] == CONTENTS[:5]
    assert "6 unreadable images left out" in info(tmp_path) and "image 5 (image-5): " in info(tmp_path)
    assert not verify(tmp_path)  # a shard without an image is sound


@pytest.mark.parametrize("kind", UNREADABLE)
def test_under_stop_the_first_unreadable_image_ends_the_packing(tmp_path, kind):
    images = ListedImages([CONTENTS[0], UNREADABLE[kind], CONTENTS[1]])
    with pytest.raises(ImageError, match=r"^image 1 \(image-1\) cannot be read: "):
        pack(images, tmp_path, "train", Packing(on_corrupt="stop"))
    assert [path.name for path in tmp_path.iterdir()] == [".packing-train.lock"]


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="none of the 2 images can be read; the first is image 0"):
        pack(ListedImages([b"", b""]), tmp_path, "train", Packing())


def test_a_class_that_loses_all_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="no image of b in train can be read"):
        pack(ListedImages([CONTENTS[0], b""]), tmp_path, "train", Packing())


def test_a_broken_packing_goes_on(tmp_path):
    images = ListedImages(CONTENTS)
    settings = Packing(images_per_shard=10)
    before = pack(images, tmp_path, "train", settings)
    first, second, third = before.paths
    second.unlink()
    os.truncate(third, 5000)
    inode = first.stat().st_ino
    after = pack(images, tmp_path, "train", settings)
    assert first.stat().st_ino == inode  # kept
    assert [after.read(index) for index in range(25)] == CONTENTS and after.digest == before.digest


@pytest.mark.parametrize("settings", [Packing(images_per_shard=9), Packing(resize=20, images_per_shard=10)])
def test_shards_of_other_settings_or_images_are_not_touched(tmp_path, settings):
    pack(ListedImages(CONTENTS), tmp_path, "train", Packing(images_per_shard=10))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds train-00000-of-00003.h5 of other images or settings"):
        pack(ListedImages(CONTENTS), tmp_path, "train", settings)
    with pytest.raises(ValueError, match="of other images or settings"):
        pack(OTHERS, tmp_path, "train", Packing(images_per_shard=10))
    pack(ListedImages(CONTENTS), tmp_path, "train", Packing(images_per_shard=10, quality=50))  # nothing is encoded
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_leftovers_of_a_killed_packing_go_and_two_at_a_time_are_refused(tmp_path):
    (tmp_path / ".train-00000-of-00001-x.tmp").write_bytes(b"half a shard")
    (tmp_path / ".validation-00000-of-00001-x.tmp").write_bytes(b"of another split")
    for leftover in tmp_path.glob(".*.tmp"):
        os.utime(leftover, (0, 0))
    of_another_node = tmp_path / ".train-00000-of-00001-y.tmp"  # where flock does not reach from there to here
    of_another_node.write_bytes(b"half a shard")
    with locked(tmp_path / ".packing-validation.lock", wait=False):
        pack(ListedImages(CONTENTS), tmp_path, "train", Packing())
        with pytest.raises(ValueError, match="another process is packing validation into"):
            pack(ListedImages(CONTENTS), tmp_path, "validation", Packing())
    pack(ListedImages(CONTENTS), tmp_path, "validation", Packing())
    assert list(tmp_path.glob(".*.tmp")) == [of_another_node]


def test_a_folder_that_cannot_be_locked_is_packed_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert len(pack(ListedImages(CONTENTS), tmp_path, "train", Packing())) == 25


def test_a_full_disk_is_one_sentence_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_folders(tmp_path / "images")
    monkeypatch.setattr(shards.shutil, "copyfileobj", full)
    assert main(["pack", str(tmp_path / "images"), str(tmp_path / "set"), "--quiet"]) == 2
    path = tmp_path / "set" / "train-00000-of-00001.h5"
    assert capsys.readouterr().err == f"error: No space left on device ({path})\n"
    assert [path.name for path in (tmp_path / "set").iterdir()] == [".packing-train.lock"]


def test_a_failing_file_system_leaves_out_no_image_and_the_packing_goes_on_later(tmp_path, monkeypatch):
    images = ListedImages(CONTENTS)
    read, fails = ListedImages.read, OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(self, index):
        if index == 12:
            raise fails
        return read(self, index)

    monkeypatch.setattr(ListedImages, "read", failing)
    with pytest.raises(OSError, match=r"image 12 \(image-12\) cannot be read: Input/output error\. It may be whole"):
        pack(images, tmp_path, "train", Packing(images_per_shard=10))
    assert [path.name for path in tmp_path.glob("*.h5")] == ["train-00000-of-00003.h5"]
    monkeypatch.setattr(ListedImages, "read", read)
    assert pack(images, tmp_path, "train", Packing(images_per_shard=10)).left_out == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 0}, "resize must be at least 1 pixel, got 0"),
        ({"quality": 0}, "quality must be in 1 to 100, got 0"),
        ({"quality": 101}, "quality must be in 1 to 100, got 101"),
        ({"images_per_shard": 0}, "images_per_shard must be at least 1, got 0"),
        ({"on_corrupt": "ignore"}, "on_corrupt must be skip or stop, got 'ignore'"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Packing(**settings)


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*.h5")}


# ---- commands --------------------------------------------------------------------------------------------------------


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "data_loaders.imagenet", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_pack_info_verify_from_the_command_line(tmp_path, capsys):
    root = write_folders(tmp_path / "images")
    (root / "train/n02/n02_4.JPEG").write_bytes(UNREADABLE["truncated"])
    target = tmp_path / "set"
    assert main(["pack", str(root), str(target), "--images-per-shard", "8", "--quiet"]) == 0
    output, errors = capsys.readouterr()
    assert "train: 29 images of 3 classes in 4 shards" in output and "validation: 9 images of 3" in output
    assert "train: left out image 14 (n02/n02_4.JPEG): image file is truncated" in errors
    assert main(["info", str(target)]) == 0
    assert "29 images of 3 classes in 4 shards" in capsys.readouterr().out
    assert main(["verify", str(target), "--quiet"]) == 0
    flip(shard(target), place_of(shard(target), 2))
    capsys.readouterr()
    assert main(["verify", str(target), "--quiet"]) == 1
    assert "train-00001-of-00004.h5: image 2 (n02/n02_0.JPEG, index 10) is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{}/missing", "{}/set"], "ImageNet: {}/missing does not exist"),
        (["pack", "{}/images", "{}/set", "--workers", "0"], "workers must be at least 1, got 0"),
        (["info", "{}/missing"], "{}/missing is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, message):
    write_folders(tmp_path / "images", 1, 1)
    assert main([each.format(tmp_path) for each in arguments]) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"


@pytest.mark.slow
def test_workers_pack_what_one_process_packs(tmp_path):
    root, target = write_folders(tmp_path / "images"), tmp_path / "set"
    (root / "train/n02/n02_4.JPEG").write_bytes(UNREADABLE["truncated"])
    process = command("pack", root, target, "--workers", 2, "--images-per-shard", 8)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "train: 29 images of 3 classes in 4 shards" in output and "left out image 14" in errors
    assert "30/30" in errors and "9/9" in errors  # the bars
    alone = pack(open_images(root, "train"), tmp_path / "alone", "train", Packing(images_per_shard=8))
    assert alone.digest == PackedImages(target, "train").digest
    strict = command("pack", root, tmp_path / "strict", "--workers", 2, "--on-corrupt", "stop")
    _, errors = strict.communicate(timeout=600)
    assert strict.returncode == 2 and "error: image 14 (n02/n02_4.JPEG) cannot be read: image file is" in errors


@pytest.mark.slow
def test_an_interrupted_packing_says_so_and_goes_on(tmp_path):
    images = write_folders(tmp_path / "images", train=100)
    target = tmp_path / "set"
    arguments = ("pack", images, target, "--workers", 2, "--images-per-shard", 3, "--split", "train")
    first = command(*arguments, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(target.glob("train-*.h5")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)  # as the terminal does: to all processes
    _, errors = first.communicate(timeout=600)
    assert first.returncode == 130, errors
    assert "interrupted: finished shards stay" in errors and "Traceback" not in errors
    finished = inodes(target)
    assert 0 < len(finished) < 100 and not list(target.glob(".*.tmp"))
    second = command(*arguments)
    assert second.wait(timeout=600) == 0, second.communicate()
    second.communicate()
    assert finished.items() <= inodes(target).items() and not verify(target)
    assert len(PackedImages(target, "train")) == 300
