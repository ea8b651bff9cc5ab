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
from collections import deque
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
from data_loaders.imagenet.decode import NUM_UNIFORM, Decoding, check_decoder, random_crop
from data_loaders.imagenet.folder import FolderImages, Images
from data_loaders.imagenet.loaders import TrainLoader
from data_loaders.imagenet.packed import PackedImages
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.sampling import epoch_order, sample_seed, uniform
from data_loaders.workers import num_cores

WIDTH, HEIGHT, QUALITY, CONTRAST = 500, 375, 92, 27.0
SIZE, RESIZE, BATCH = 224, 256, 32
PROCESSES = 8
FORMS = {"folder": "one file an image", "packed": "packed", "resized": f"packed, short side {RESIZE}"}
DECODERS = ("torchvision",)


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


def read_files(paths: Sequence[str], indices: Sequence[int]) -> None:
    """The plain way to read files."""
    for index in indices:
        with open(paths[index], "rb") as file:
            file.read()


def load_batch(loader: TrainLoader, step: int) -> None:
    """A batch of the loader, in this process."""
    next(loader.batches(0, step))


Case = Callable[[int], object]
"""Does its work on the images of a step of epoch 0."""


def cases_of(forms: dict[str, FolderImages | PackedImages]) -> dict[str, Case]:
    """What is measured, by name; all of it on the same images, with the same crops."""
    folder = forms["folder"]
    assert isinstance(folder, FolderImages)
    steps = np.split(epoch_order(0, 0, len(folder)), len(folder) // batch_size(len(folder)))
    indices = [step.tolist() for step in steps]
    numbers = [uniform(sample_seed(0, 0, step), NUM_UNIFORM).tolist() for step in steps]
    paths = [os.path.join(folder.folder, folder.name(index)) for index in range(len(folder))]
    cases: dict[str, Case] = {"files": _at(partial(read_files, paths), indices)}
    for form, images in forms.items():
        cases[f"read {form}"] = _at(partial(read_images, images), indices)
        cases[f"load {form}"] = partial(load_batch, loader_of(images))
        if form != "folder":  # whose bytes are those of "packed"
            contents = [[images.read(index) for index in step] for step in indices]
            cases[f"floor {form}"] = _at(floor, contents, numbers)
    for decoder in importable():
        for form in ("packed", "resized"):
            cases[f"{decoder} {form}"] = partial(load_batch, loader_of(forms[form], decoder))
    return cases


def _at(work: Callable[..., object], *parts: Sequence[Any]) -> Case:
    """Work on the parts of a step."""
    return lambda step: work(*(part[step] for part in parts))


def batch_size(num_images: int) -> int:
    """Images of a batch."""
    return min(BATCH, num_images)


def loader_of(images: Images, decoder: str = "pillow", num_workers: int = 0) -> TrainLoader:
    decoding = Decoding(SIZE, RESIZE, decoder, on_corrupt="stop")
    return TrainLoader(images, decoding, batch_size=batch_size(len(images)), seed=0, num_workers=num_workers)


def importable() -> list[str]:
    """Decoders other than Pillow that are here."""
    found = []
    for name in DECODERS:
        try:
            check_decoder(name)
            found.append(name)
        except ValueError:
            continue
    return found


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


def forget(paths: Sequence[Path]) -> None:
    """Asks the system to drop files from its cache, so that the next read goes to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cold_seconds(images: FolderImages | PackedImages, rounds: int) -> list[float]:
    """Seconds of the clock an image of reading in random order what is not in the system's cache."""
    if isinstance(images, PackedImages):
        paths = list(images.paths)
    else:
        paths = [images.folder / images.name(index) for index in range(len(images))]
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    seconds = []
    for _ in range(rounds):
        forget(paths)
        start = time.perf_counter()
        read_images(images, order)
        seconds.append((time.perf_counter() - start) / len(images))
    return seconds


def with_workers(images: Images, num_workers: int, passes: int) -> tuple[float, float]:
    """Images a second by the clock, and processor seconds an image of this process, which only receives them."""
    with loader_of(images, num_workers=num_workers) as loader:
        deque(loader.batches(0), maxlen=0)  # the workers start
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(passes):
            deque(loader.batches(0), maxlen=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        count = passes * loader.steps_per_epoch * loader.batch_size
    return count / wall, cpu / count


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Everything measured."""

    num_images: int
    rounds: int
    kilobytes: dict[str, float]
    times: dict[str, Times]
    cold: dict[str, list[float]]
    workers: dict[int, tuple[float, float]]
    load: float


def ratios(report: Report, form: str, name: str = "load") -> list[float]:
    """Rate of a case over that of the floor of its bytes, by round, in processor time."""
    below = report.times["floor resized" if form == "resized" else "floor packed"].cpu
    return [floor / case for floor, case in zip(below, report.times[f"{name} {form}"].cpu, strict=True)]


def loading_table(report: Report) -> str:
    """Rates of loaders and floors."""
    rows = []
    for form, name in FORMS.items():
        below = "floor resized" if form == "resized" else "floor packed"
        for case, label in (
            (below, "floor: Pillow, bytes in memory"),
            (f"load {form}", "TrainLoader"),
            *((f"{decoder} {form}", f"TrainLoader, {decoder}") for decoder in DECODERS),
        ):
            if case not in report.times:
                continue
            times = report.times[case]
            share = "1"
            if case != below:
                share = with_quartiles(ratios(report, form, case.partition(" ")[0]), "{:.3f}".format)
            rate = with_quartiles([1 / each for each in times.cpu], "{:,.0f}".format)
            wall = f"{1 / median(times.wall):,.0f}"
            rows.append([name, f"{report.kilobytes[form]:.0f}", label, rate, wall, share])
    header = ["form", "KB", "what", "images/s and core (processor)", "by the clock", "of the floor"]
    return markdown(header, rows)


def microseconds(seconds: Sequence[float], digits: int = 1) -> str:
    """Median and quartiles."""
    return with_quartiles(seconds, lambda each: f"{1e6 * each:,.{digits}f}")


def reading_table(report: Report) -> str:
    """Microseconds of reading alone."""
    rows = [["one file an image", "open, read, close", microseconds(report.times["files"].cpu), "-"]]
    for form, name in FORMS.items():
        what = "FolderImages.read" if form == "folder" else "PackedImages.read: one pread and CRC-32"
        cold = microseconds(report.cold[form], 0) if form in report.cold else "-"
        rows.append([name, what, microseconds(report.times[f"read {form}"].cpu), cold])
    return markdown(["form", "how", "µs of the processor, cached", "µs by the clock, not cached"], rows)


def workers_table(report: Report) -> str:
    """Rates with worker processes, and what receiving costs."""
    rows = [[str(n), f"{rate:,.0f}", f"{1e6 * seconds:.0f}"] for n, (rate, seconds) in report.workers.items()]
    return markdown(["workers", "images/s by the clock, packed", "µs an image to receive"], rows)


def blocks_of(report: Report) -> dict[str, str]:
    """What docs/reports/input_pipeline.md has between its marks."""
    absent = [name for name in DECODERS if f"{name} packed" not in report.times]
    missing = f" Not run here, because it does not import: {' and '.join(absent)}." if absent else ""
    measured = (
        f"{report.num_images} files, {report.rounds} rounds divided among {min(PROCESSES, report.rounds)} processes. "
        f"Load of the machine over the last five minutes: {report.load:.1f} processes, one of them this one; where "
        f"there are more than cores, others disturbed the numbers.{missing}"
    )
    return {
        "origin": f"{origin('python -m benchmarks.input_pipeline --docs')}\n{measured}",
        "loading": loading_table(report),
        "reading": reading_table(report),
        "workers": workers_table(report),
    }


def conclusion(page: str) -> str:
    """The first sentences of docs/reports/input_pipeline.md, from its tables."""
    loader = {row["form"]: row for row in rows_of(page, "loading") if row["what"] == "TrainLoader"}
    packed, resized = loader[FORMS["packed"]], loader[FORMS["resized"]]
    rate, share = "images/s and core (processor)", "of the floor"
    single, joined = (middle(row["µs of the processor, cached"]) for row in rows_of(page, "reading")[1:3])
    return (
        f"From packed files a core loads {middle(packed[rate])} images of ImageNet's size a second, "
        f"{middle(resized[rate])} where their short side is {RESIZE} pixels: {middle(packed[share])} and "
        f"{middle(resized[share])} of what decoding alone allows. On a local disk reading takes {joined} µs an image "
        f"packed, checksum included, and {single} µs from a file of its own, both cached: packing is for parallel file "
        "systems, which open few large files well and many small ones badly, and for staging."
    )


def run(num_images: int, rounds: int, folder: Path | None, workers: Sequence[int]) -> Report:
    """Makes the data, measures, removes the data."""
    with tempfile.TemporaryDirectory(prefix="input-pipeline-", dir=folder) as temporary:
        forms = make_forms(Path(temporary), num_images)
        sizes = {form: [len(images.read(index)) for index in range(num_images)] for form, images in forms.items()}
        kilobytes = {form: float(np.mean(each)) / 1e3 for form, each in sizes.items()}
        times = measure_in_processes(Path(temporary), rounds, num_images)
        load = os.getloadavg()[1]
        cold = {form: cold_seconds(forms[form], min(rounds, 15)) for form in ("folder", "packed", "resized")}
        parallel = {number: with_workers(forms["packed"], number, 3) for number in workers}
    return Report(num_images, rounds, kilobytes, times, cold, parallel, load)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few images and rounds, no workers: seconds")
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
    options.workers = [] if options.quick else sorted({1, num_cores()})
    return options


def main(arguments: Sequence[str] | None = None, reports: Path = REPORTS) -> None:
    """Measure, print, and with --docs write."""
    options = parse(arguments)
    blocks = blocks_of(run(options.images, options.rounds, options.folder, options.workers))
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("input_pipeline", blocks, reports, conclusion)


if __name__ == "__main__":
    main()
