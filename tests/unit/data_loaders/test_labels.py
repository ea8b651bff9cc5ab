"""Labels of a flat validation folder: which entry of a list belongs to which image, and to which class."""

import numpy as np
import pytest
import scipy.io
from image_sets import encoded, write_folders

from data_loaders.imagenet.folder import FolderImages

TRUTH = [3, 1, 2] * 3  # the kit's numbers of the images in the order of names: n01, n02, n03 in turn
KIT_NAMES = {1: "n02", 2: "n03", 3: "n01"}


def write_truth(root, truth=TRUTH, folder="devkit/data"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{each}\n" for each in truth))


def write_meta(root, folder="devkit/data"):
    rows = [(number, name, "words", 0) for number, name in KIT_NAMES.items()] + [(1001, "n00", "parent", 3)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    scipy.io.savemat(root / folder / "meta.mat", {"synsets": np.array(rows, dtype=kind)})


def write_kaggle(root):
    lines = [f"ILSVRC2012_val_{number + 1:08d},n0{number % 3 + 1} 1 2 3 4" for number in range(9)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")


def write_text(root, numbers):
    names = [str(number % 3) if numbers else f"n0{number % 3 + 1}" for number in range(9)]
    lines = [f"val/ILSVRC2012_val_{number + 1:08d}.JPEG {name}\n" for number, name in enumerate(names)]
    (root / "val.txt").write_text("".join(lines))


def write_map(root):
    write_truth(root)
    (root / "map_clsloc.txt").write_text("".join(f"{name} {number} words\n" for number, name in KIT_NAMES.items()))


LISTS = {
    "kaggle": write_kaggle,
    "names": lambda root: write_text(root, numbers=False),
    "numbers": lambda root: write_text(root, numbers=True),
    "truth and meta.mat": lambda root: (write_truth(root), write_meta(root)),
    "truth and map": write_map,
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_flat_folder_with_a_list_is_the_one_with_folders(tmp_path, kind):
    folders = FolderImages(write_folders(tmp_path / "folders"), "validation")
    root = write_folders(tmp_path / "flat", flat=True)
    LISTS[kind](root)
    flat = FolderImages(root, "validation")
    assert flat.class_names == folders.class_names and np.array_equal(flat.labels, folders.labels)
    assert [flat.read(index) for index in range(9)] == [folders.read(index) for index in range(9)]
    assert flat.name(1) == "ILSVRC2012_val_00000004.JPEG"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "no list says what they show: put LOC_val_solution.csv"),
        (write_truth, "counts classes as the development kit does: put its map_clsloc.txt or meta.mat into"),
        (lambda root: (write_map(root), write_truth(root, TRUTH[1:])), "has 8 lines for 9 images"),
        (lambda root: (write_map(root), write_truth(root, [7, *TRUTH[1:]])), "class number '7', which the development"),
        (lambda root: (root / "val.txt").write_text("a b c\n"), "val.txt, line 1: expected a name and a class"),
        (lambda root: (root / "val.txt").write_text("a 3\n"), "val.txt, line 1: class 3 where train has 3 folders"),
        (lambda root: (root / "val.txt").write_text("a n01\n"), "does not list 9 images of .*00000001.JPEG"),
        (lambda root: (write_kaggle(root), next((root / "val").iterdir()).unlink()), "lacks 1 images that .* lists"),
        (lambda root: (write_kaggle(root), (root / "train/n02").rename(root / "n02")), "class n02, for which"),
        (lambda root: (write_truth(root), (root / "meta.mat").write_bytes(b"x" * 200)), "meta.mat cannot be read"),
    ],
)
def test_a_list_that_does_not_fit_is_one_sentence(tmp_path, prepare, message):
    root = write_folders(tmp_path, flat=True)
    prepare(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderImages(root, "validation")


# ---- names -----------------------------------------------------------------------------------------------------------


def labeled(root, lines, images, classes=("cat", "dog")):
    """Classes by image of a flat folder of `images` with a val.txt of `lines`."""
    for name in classes:
        (root / "train" / name).mkdir(parents=True)
    (root / "val").mkdir()
    for image in images:
        (root / "val" / image).write_bytes(encoded())
    (root / "val.txt").write_text("\n".join(lines), encoding="utf-8")
    found = FolderImages(root, "validation")
    return {found.name(index): found.class_names[label] for index, label in enumerate(found.labels)}


@pytest.mark.parametrize(
    "entries",
    [
        {"a.1.jpg": "cat", "a.2.jpg": "dog", "b.1.jpg": "dog", "b.2.jpg": "cat"},
        {"1.jpg": "cat", "1.png": "dog"},  # whole names
        {"my cat.jpg": "cat", "x y  z.png": "dog"},
        {"photo.jpg.png": "cat", "photo.jpg": "dog"},
        {"\N{LATIN SMALL LETTER E WITH ACUTE}.jpg": "cat", "B.JPG": "dog"},
    ],
)
def test_whole_names_are_labeled_as_the_list_says(tmp_path, entries):
    lines = [f"{name.replace('  ', ' ')} {label}" for name, label in entries.items()]
    if any("  " in name for name in entries):
        lines = [f"{name}\t{label}" for name, label in entries.items()]
    assert labeled(tmp_path, lines, entries) == entries


@pytest.mark.parametrize("prefix", ["", "val/", "images\\"])
def test_a_stem_means_the_only_image_that_has_it(tmp_path, prefix):
    lines = [f"{prefix}a.1 cat", f"{prefix}a.2.JPEG dog", f"{prefix}photo.jpg cat"]
    expected = {"a.1.png": "cat", "a.2.jpg": "dog", "photo.jpg.webp": "cat"}
    assert labeled(tmp_path, lines, expected) == expected


def test_another_label_makes_another_set(tmp_path):
    root, digests = write_folders(tmp_path, flat=True), set()
    for classes in ([1, 1, 1, 2, 2, 2, 3, 3, 3], [1, 1, 1, 2, 2, 3, 3, 3, 3]):  # the order of the images stays
        lines = [f"ILSVRC2012_val_{number:08d}.JPEG n0{name}\n" for number, name in enumerate(classes, start=1)]
        (root / "val.txt").write_text("".join(lines))
        digests.add(FolderImages(root, "validation").digest)
    assert len(digests) == 2


def test_a_list_with_the_mark_of_windows_is_read(tmp_path):
    assert labeled(tmp_path, ["\ufeffa.jpg cat", "b.jpg dog"], ["a.jpg", "b.jpg"]) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_classes_whose_names_hold_spaces(tmp_path):
    entries = {"a.jpg": "black cat", "b.jpg": "dog"}
    assert labeled(tmp_path, [f"{a} {b}" for a, b in entries.items()], entries, ("black cat", "dog")) == entries


@pytest.mark.parametrize(
    ("lines", "images", "message"),
    [
        (["1 cat"], ["1.jpg", "1.png"], r"lists 1, which may be 1\.jpg or 1\.png of .*val: write whole names"),
        (["1.bmp cat"], ["1.jpg", "1.png"], r"lists 1\.bmp, which may be 1\.jpg or 1\.png"),
        (["a.jpg cat", "a.jpg dog"], ["a.jpg"], r"lists a\.jpg with two classes, cat and dog"),
        (["a cat", "a.jpg dog"], ["a.jpg"], r"lists a\.jpg with two classes, cat and dog"),
        (["a.1 cat"], ["a.1.jpg", "a.2.jpg"], r"does not list 1 images of .*, the first is a\.2\.jpg"),
        (["a.jpg cat", "b.jpg cat"], ["a.jpg"], r"lacks 1 images that .* lists, the first is b\.jpg"),
    ],
)
def test_what_is_ambiguous_or_missing_is_named(tmp_path, lines, images, message):
    with pytest.raises(ValueError, match=message):
        labeled(tmp_path, lines, images)


def test_numbers_that_are_folder_names_are_folder_names(tmp_path):
    classes = [str(number) for number in range(12)]
    entries = {f"{number}.jpg": str(number) for number in (2, 10, 11)}
    assert labeled(tmp_path, [f"{image} {name}" for image, name in entries.items()], entries, classes) == entries


def test_a_number_that_is_no_folder_among_folders_of_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"into class 0, for which .*train has no folder"):
        labeled(tmp_path, ["a.jpg 0"], ["a.jpg"], ["1", "2", "10"])


def test_a_list_that_is_no_text_is_one_sentence(tmp_path):
    root = write_folders(tmp_path, flat=True)
    (root / "val.txt").write_bytes(b"a.jpg caf\xe9\n")
    with pytest.raises(ValueError, match=r"val\.txt is not text in UTF-8"):
        FolderImages(root, "validation")
