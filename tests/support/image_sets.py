"""Small sets of images for tests, in folders and packed, and every kind of broken image."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def pixels(width=48, height=36, seed=0):
    """A smooth random image: what JPEG keeps."""
    coarse = np.random.RandomState(seed).randint(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(kind="JPEG", seed=0, mode="RGB", width=48, height=36, **options):
    buffer = io.BytesIO()
    pixels(width, height, seed).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG that announces 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", b"\x78\x9c"))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_rubbish_in_exif():
    """A JPEG whose EXIF block is cut short; Pillow warns of it."""
    data = encoded(seed=7)
    block = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00\x1a\x01\x05\x00\xff"
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


UNREADABLE = {
    "empty": b"",
    "truncated": encoded(seed=1, width=300, height=200, quality=95)[:3000],
    "truncated_png": encoded("PNG", seed=1)[:-200],
    "no_image": b"<html>404 Not Found</html>" * 9,
    "header_only": encoded(seed=1)[:20],
    "bomb": bomb(),
}
READABLE = {
    "cmyk": encoded(mode="CMYK"),
    "gray": encoded(mode="L"),
    "png_named_jpeg": encoded("PNG"),
    "palette": encoded("PNG", mode="P"),
    "alpha": encoded("PNG", mode="RGBA"),
    "gray_alpha": encoded("PNG", mode="LA"),
    "sixteen_bits": encoded("PNG", mode="I;16"),
    "palette_transparent": encoded("PNG", mode="P", transparency=b"\x10\x20"),
    "one_pixel": encoded(width=1, height=1),
    "one_row": encoded(width=400, height=1),
    "one_column": encoded(width=1, height=400),
    "exif_rubbish": with_rubbish_in_exif(),
    "progressive": encoded(progressive=True),
    "webp": encoded("WEBP"),
    "tiff": encoded("TIFF"),
    "bitmap": encoded("BMP"),
    "gif": encoded("GIF"),
}


def write_folders(root, train=10, validation=3, classes=("n01", "n02", "n03"), flat=False):
    """ImageFolder layout with `train` and `validation` images a class; all images differ."""
    seed = 0
    for split, count in (("train", train), ("val", validation)):
        for label, name in enumerate(classes):
            for number in range(count):
                seed += 1
                flat_name = f"ILSVRC2012_val_{1 + number * len(classes) + label:08d}.JPEG"
                path = root / split / (flat_name if flat and split == "val" else f"{name}/{name}_{number}.JPEG")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(seed=seed))
    return root


class ListedImages:
    """Images in memory."""

    def __init__(self, contents, labels=None, class_names=("a", "b")):
        self.contents = list(contents)
        self.labels = np.array(labels if labels is not None else [i % 2 for i in range(len(self.contents))], np.int64)
        self.class_names, self.digest, self.source = class_names, "memory", "memory"

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        return self.contents[index]

    def name(self, index):
        return f"image-{index}"


CONTENTS = [encoded(seed=seed) for seed in range(30)]


def listed(contents=CONTENTS):
    """A class for each image, whose label is its number."""
    return ListedImages(contents, list(range(len(contents))), tuple(f"c{each:02d}" for each in range(len(contents))))


def read_all(images, queue):
    """What a process reads of a set, for its parent."""
    queue.put([images.read(index) for index in range(len(images))] + [images.name(len(images) - 1).encode()])
