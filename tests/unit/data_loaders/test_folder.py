"""Sets of images in folders: their order, their digest, what is missing, and pairs that do not fit."""

import shutil

import pytest
from image_sets import write_folders

from data_loaders.imagenet.folder import FolderImages
from data_loaders.imagenet.packed import PackedImages
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.sets import check_pair, open_images


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
    names = "n01/n01_0.JPEG n01/n01_1.JPEG n01/n01_10.JPEG n02/zebra.PnG n03/old.JFIF n03/old.jpe"
    assert [images.name(index) for index in (0, 1, 2, 24, 37, 38)] == names.split()
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
    with pytest.raises(ValueError, match=r"images in train/n01/images lie one folder too deep, .* into train/n01"):
        open_images(tmp_path, "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="both a folder val and a folder validation"):
        open_images(tmp_path, "validation")


def test_a_split_that_there_is_not_is_refused_and_nothing_is_written(tmp_path):
    root, target = write_folders(tmp_path / "images"), tmp_path / "set"
    images = open_images(root, "train")
    for call in (open_images, FolderImages, PackedImages, lambda *_: pack(images, target, "val", Packing())):
        with pytest.raises(ValueError, match=r"^split must be train or validation, got 'val'$"):
            call(root, "val")
    assert not target.exists()


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
