"""Images a second and core, by form of the data: `python -m benchmarks.input_pipeline` (`--quick`: seconds).

Makes JPEG files like those of ImageNet (500 x 375 pixels, 1/f spectrum, quality 92, about 100 KB), packs them as they
are and with a short side of 256 pixels, and measures TrainLoader (crop of 224 pixels, mirrored, uint8 batches of 32) on
each form, against reading alone and against the floor: Pillow decoding, cropping and resizing of bytes in memory.
Everything is measured in turn, a batch each; ratios are those of the same batch, images and crops. --docs puts
the tables into docs/reports/input_pipeline.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import in_fresh_process
from benchmarks.tables import REPORTS, markdown, middle, origin, put_into_page, rows_of, with_quartiles
from data_loaders.imagenet.decode import NUM_UNIFORM, Decoding, random_crop
from data_loaders.imagenet.folder import FolderImages, Images
from data_loaders.imagenet.loaders import TrainLoader
from data_loaders.imagenet.packed import PackedImages
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.sampling import epoch_order, sample_seed, uniform

WIDTH, HEIGHT, QUALITY, CONTRAST = 500, 375, 92, 27.0
SIZE, RESIZE, BATCH = 224, 256, 32
PROCESSES = 8
FORMS = {"folder": "one file an image", "packed": "packed", "resized": f"packed, short side {RESIZE}"}


# ---- data ------------------------------------------------------------------------------------------------------------


def natural_jpeg(seed: int) -> bytes:
    """A JPEG whose amplitudes fall as 1/f, as those of photographs do."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(3):
        field = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((HEIGHT, WIDTH))) / frequency, (HEIGHT, WIDTH))
        channels.append(128 + CONTRAST * field / field.std())
    buffer = io.BytesIO()
    pixels = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_forms(folder: Path, num_images: int) -> dict[str, FolderImages | PackedImages]:
    """The same images in every form."""
    files = folder / "files" / "train" / "n00000001"
    files.mkdir(parents=True)
    for number in range(num_images):
        (files / f"n00000001_{number:06d}.JPEG").write_bytes(natural_jpeg(number))
    images = FolderImages(folder / "files", "train")
    for form, resize in (("packed", None), ("resized", RESIZE)):
        pack(images, folder / form, "train", Packing(resize=resize, images_per_shard=max(1, num_images // 4)))
    return open_forms(folder)


def open_forms(folder: Path) -> dict[str, FolderImages | PackedImages]:
    """What `make_forms` made in a folder."""
    forms: dict[str, FolderImages | PackedImages] = {"folder": FolderImages(folder / "files", "train")}
    return {**forms, **{form: PackedImages(folder / form, "train") for form in ("packed", "resized")}}


# ---- measurements ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds an image, a round each: of the processor and of the clock."""

    cpu: list[float]
    wall: list[float]


def floor(contents: Sequence[bytes], numbers: Sequence[list[float]]) -> list[bytes]:
    """What no loader that decodes with Pillow can do without; the pixels of a batch must be there together."""
    squares = []
    for data, each in zip(contents, numbers, strict=True):
        image = Image.open(io.BytesIO(data))
        image.load()
        crop = random_crop(*image.size, each)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        square = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        squares.append((square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else square).tobytes())
    return squares


def read_images(images: Images, indices: Sequence[int]) -> None:
    """Reading alone."""
    for index in indices:
        images.read(index)


def load_batch(loader: TrainLoader, step: int) -> None:
    """A batch of the loader, in this process."""
    next(loader.batches(0, step))


Case = Callable[[int], object]
"""Does its work on the images of a step of epoch 0."""


def cases_of(forms: dict[str, FolderImages | PackedImages]) -> dict[str, Case]:
    """What is measured, by name; all of it on the same images, with the same crops."""
    num_images = len(forms["folder"])
    steps = np.split(epoch_order(0, 0, num_images), num_images // batch_size(num_images))
    indices = [step.tolist() for step in steps]
    numbers = [uniform(sample_seed(0, 0, step), NUM_UNIFORM).tolist() for step in steps]
    cases: dict[str, Case] = {}
    for form, images in forms.items():
        cases[f"read {form}"] = _at(partial(read_images, images), indices)
        cases[f"load {form}"] = partial(load_batch, loader_of(images))
        if form != "folder":  # whose bytes are those of "packed"
            contents = [[images.read(index) for index in step] for step in indices]
            cases[f"floor {form}"] = _at(floor, contents, numbers)
    return cases


def _at(work: Callable[..., object], *parts: Sequence[Any]) -> Case:
    """Work on the parts of a step."""
    return lambda step: work(*(part[step] for part in parts))


def batch_size(num_images: int) -> int:
    """Images of a batch."""
    return min(BATCH, num_images)


def loader_of(images: Images) -> TrainLoader:
    decoding = Decoding(SIZE, RESIZE, on_corrupt="stop")
    return TrainLoader(images, decoding, batch_size=batch_size(len(images)), seed=0)


def measure(cases: dict[str, Case], rounds: int, num_images: int) -> dict[str, Times]:
    """All cases on a batch in every round, each round beginning with another case; the first pass only warms up."""
    names, size = list(cases), batch_size(num_images)
    num_steps = num_images // size
    times = {name: Times([], []) for name in names}
    for number in range(-num_steps, rounds):
        if number % 10 == 0:
            print(f"# round {number} of {rounds}", file=sys.stderr, flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            cases[name](number % num_steps)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= 0:
                times[name].cpu.append(cpu / size)
                times[name].wall.append(wall / size)
    return times


def measure_in(folder: Path, rounds: int, num_images: int) -> dict[str, Times]:
    """The same, of the forms in a folder."""
    return measure(cases_of(open_forms(folder)), rounds, num_images)


def measure_in_processes(folder: Path, rounds: int, num_images: int) -> dict[str, Times]:
    """All rounds, divided among processes that follow each other: where memory lies differs from process to process,
    and by that shares of the floor differ by several percent."""
    number = min(PROCESSES, rounds)
    merged: dict[str, Times] = {}
    for part in range(number):
        share = rounds // number + (part < rounds % number)
        for name, times in in_fresh_process(
            measure_in, folder, share, num_images, threads=torch.get_num_threads()
        ).items():
            whole = merged.setdefault(name, Times([], []))
            whole.cpu.extend(times.cpu)
            whole.wall.extend(times.wall)
    return merged


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Everything measured."""

    num_images: int
    rounds: int
    kilobytes: dict[str, float]
    times: dict[str, Times]
    load: float


def floor_of(form: str) -> str:
    """The case whose bytes a form has."""
    return "floor resized" if form == "resized" else "floor packed"


def ratios(report: Report, form: str) -> list[float]:
    """Rate of the loader over that of the floor of its bytes, by round, in processor time."""
    below = report.times[floor_of(form)].cpu
    return [floor / case for floor, case in zip(below, report.times[f"load {form}"].cpu, strict=True)]


def loading_table(report: Report) -> str:
    """Rates of loaders and floors."""
    rows = []
    for form, name in FORMS.items():
        shares = with_quartiles(ratios(report, form), "{:.3f}".format)
        for case, label, share in (
            (floor_of(form), "floor: Pillow, bytes in memory", "1"),
            (f"load {form}", "TrainLoader", shares),
        ):
            times = report.times[case]
            rate = with_quartiles([1 / each for each in times.cpu], "{:,.0f}".format)
            wall = f"{1 / median(times.wall):,.0f}"
            rows.append([name, f"{report.kilobytes[form]:.0f}", label, rate, wall, share])
    header = ["form", "KB", "what", "images/s and core (processor)", "by the clock", "of the floor"]
    return markdown(header, rows)


def reading_table(report: Report) -> str:
    """Microseconds of reading alone."""
    rows = []
    for form, name in FORMS.items():
        what = "FolderImages.read" if form == "folder" else "PackedImages.read: one pread and CRC-32"
        seconds = report.times[f"read {form}"].cpu
        rows.append([name, what, with_quartiles(seconds, lambda each: f"{1e6 * each:,.1f}")])
    return markdown(["form", "how", "µs of the processor, cached"], rows)


def blocks_of(report: Report) -> dict[str, str]:
    """What docs/reports/input_pipeline.md has between its marks."""
    measured = (
        f"{report.num_images} files, {report.rounds} rounds divided among {min(PROCESSES, report.rounds)} processes. "
        f"Load of the machine over the last five minutes: {report.load:.1f} processes, one of them this one; where "
        "there are more than cores, others disturbed the numbers."
    )
    return {
        "origin": f"{origin('python -m benchmarks.input_pipeline --docs')}\n{measured}",
        "loading": loading_table(report),
        "reading": reading_table(report),
    }


def conclusion(page: str) -> str:
    """The first sentences of docs/reports/input_pipeline.md, from its tables."""
    loader = {row["form"]: row for row in rows_of(page, "loading") if row["what"] == "TrainLoader"}
    packed, resized = loader[FORMS["packed"]], loader[FORMS["resized"]]
    rate, share = "images/s and core (processor)", "of the floor"
    single, joined = (middle(row["µs of the processor, cached"]) for row in rows_of(page, "reading")[:2])
    return (
        f"From packed files a core loads {middle(packed[rate])} images of ImageNet's size a second, "
        f"{middle(resized[rate])} where their short side is {RESIZE} pixels: {middle(packed[share])} and "
        f"{middle(resized[share])} of what decoding alone allows. On a local disk reading takes {joined} µs an image "
        f"packed, checksum included, and {single} µs from a file of its own, both cached: packing is for parallel file "
        "systems, which open few large files well and many small ones badly, and for staging."
    )


def run(num_images: int, rounds: int, folder: Path | None) -> Report:
    """Makes the data, measures, removes the data."""
    with tempfile.TemporaryDirectory(prefix="input-pipeline-", dir=folder) as temporary:
        forms = make_forms(Path(temporary), num_images)
        sizes = {form: [len(images.read(index)) for index in range(num_images)] for form, images in forms.items()}
        kilobytes = {form: float(np.mean(each)) / 1e3 for form, each in sizes.items()}
        times = measure_in_processes(Path(temporary), rounds, num_images)
    return Report(num_images, rounds, kilobytes, times, os.getloadavg()[1])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few images and rounds: seconds")
    parser.add_argument("--images", type=int, help="default: 256")
    parser.add_argument("--rounds", type=int, help="default: 160, a batch each")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the data are made (default: the system's)")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/input_pipeline.md")
    options = parser.parse_args(arguments)
    options.images = options.images or (8 if options.quick else 256)
    options.rounds = options.rounds or (2 if options.quick else 160)
    if options.images < 1 or (options.images > BATCH and options.images % BATCH):
        parser.error(f"--images must be at most {BATCH} or a multiple of it, whole batches, got {options.images}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder: {options.folder} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None, reports: Path = REPORTS) -> None:
    """Measure, print, and with --docs write."""
    options = parse(arguments)
    blocks = blocks_of(run(options.images, options.rounds, options.folder))
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("input_pipeline", blocks, reports, conclusion)


if __name__ == "__main__":
    main()
