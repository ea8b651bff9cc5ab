"""Images a second and core, by form of the data: `python -m benchmarks.input_pipeline` (`--quick`: seconds).

Makes JPEG files like those of ImageNet (500 x 375 pixels, 1/f spectrum, quality 92, about 100 KB), packs them as they
are and with a short side of 256 pixels, and measures TrainLoader (crop of 224 pixels, mirrored, uint8 batches of 32) on
each form, against reading alone and against the floor: Pillow decoding, cropping and resizing of bytes in memory.
Everything is measured in turn, a batch each; ratios are those of the same batch, images and crops. --docs writes
docs/reports/input_pipeline.md.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import ROOT, facts
from data_loaders.imagenet.decode import NUM_UNIFORM, Decoding, check_decoder, random_crop
from data_loaders.imagenet.folder import FolderImages, Images
from data_loaders.imagenet.loaders import TrainLoader
from data_loaders.imagenet.packed import PackedImages, write_packed
from data_loaders.imagenet.packing import Packing, encode
from data_loaders.imagenet.sampling import epoch_order, sample_seed, uniform
from data_loaders.workers import num_cores

WIDTH, HEIGHT, QUALITY, CONTRAST = 500, 375, 92, 27.0
SIZE, RESIZE, BATCH = 224, 256, 32
PROCESSES = 8
TARGET = 0.95  # of the floor, from packed shards
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
    contents = [natural_jpeg(seed) for seed in range(num_images)]
    files = folder / "files" / "train" / "n00000001"
    files.mkdir(parents=True)
    for number, data in enumerate(contents):
        (files / f"n00000001_{number:06d}.JPEG").write_bytes(data)
    for form, rows in (("packed", contents), ("resized", [encode(data, Packing(resize=RESIZE)) for data in contents])):
        items = ((f"n00000001/{number}.JPEG", 0, data) for number, data in enumerate(rows))
        write_packed(folder / form, "train", items, ["n00000001"], images_per_shard=max(1, num_images // 4))
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
        cases[f"load {form}"] = partial(load_batch, _loader(images))
        if form != "folder":  # whose bytes are those of "packed"
            contents = [[images.read(index) for index in step] for step in indices]
            cases[f"floor {form}"] = _at(floor, contents, numbers)
    for decoder in importable():
        for form in ("packed", "resized"):
            cases[f"{decoder} {form}"] = partial(load_batch, _loader(forms[form], decoder))
    return cases


def _at(work: Callable[..., object], *parts: Sequence[Any]) -> Case:
    """Work on the parts of a step."""
    return lambda step: work(*(part[step] for part in parts))


def batch_size(num_images: int) -> int:
    """Images of a batch."""
    return min(BATCH, num_images)


def _loader(images: Images, decoder: str = "pillow", num_workers: int = 0) -> TrainLoader:
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
    """The same in a process of its own."""
    return measure(cases_of(open_forms(folder)), rounds, num_images)


def measure_in_processes(folder: Path, rounds: int, num_images: int) -> dict[str, Times]:
    """All rounds, divided among processes that follow each other: where memory lies differs from process to process,
    and by that shares of the floor differ by several percent."""
    number = min(PROCESSES, rounds)
    context = multiprocessing.get_context("spawn")
    merged: dict[str, Times] = {}
    for part in range(number):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            share = rounds // number + (part < rounds % number)
            for name, times in pool.submit(measure_in, folder, share, num_images).result().items():
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
    with _loader(images, num_workers=num_workers) as loader:
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

    machine: dict[str, object]
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


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Median [lower quartile .. upper quartile]."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    texts = [f"{scale * each:,.{digits}f}" for each in (median(values), low, high)]
    return f"{texts[0]} [{texts[1]} .. {texts[2]}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


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
            share = "1" if case == below else spread(ratios(report, form, case.partition(" ")[0]), 3)
            rate = [1 / each for each in times.cpu]
            wall = [1 / each for each in times.wall]
            rows.append([name, f"{report.kilobytes[form]:.0f}", label, spread(rate, 0), f"{median(wall):,.0f}", share])
    header = ["form", "KB", "what", "images/s and core (processor)", "by the clock", "of the floor"]
    return table(header, rows)


def reading_table(report: Report) -> str:
    """Microseconds of reading alone."""
    rows = [["one file an image", "open, read, close", spread(report.times["files"].cpu, 1, 1e6), "-"]]
    for form, name in FORMS.items():
        what = "FolderImages.read" if form == "folder" else "PackedImages.read: one pread and CRC-32"
        cold = spread(report.cold[form], 0, 1e6) if form in report.cold else "-"
        rows.append([name, what, spread(report.times[f"read {form}"].cpu, 1, 1e6), cold])
    return table(["form", "how", "µs of the processor, cached", "µs by the clock, not cached"], rows)


def findings(report: Report) -> list[str]:
    """The target and what was measured, as sentences."""
    lines = []
    for form in ("packed", "resized"):
        share = median(ratios(report, form))
        verdict = "reaches" if share >= TARGET else "misses"
        lines.append(
            f"- From shards ({FORMS[form]}) TrainLoader runs at {100 * share:.1f} % of the decode-bound rate: "
            f"{verdict} the target of {100 * TARGET:.0f} %."
        )
    faster = median(report.times["load packed"].cpu) / median(report.times["load resized"].cpu)
    lines.append(f"- Packing with a short side of {RESIZE} pixels makes loading {faster:.2f} times as fast.")
    files, packed = (median(report.times[f"read {form}"].cpu) for form in ("folder", "packed"))
    lines.append(
        f"- On a local disk packing does not make reading cheaper ({1e6 * packed:.0f} µs, checksum included, against "
        f"{1e6 * files:.0f} µs): it is for parallel file systems, which open few large files well and many small ones "
        "badly, and for staging."
        if packed >= files
        else f"- Reading takes {1e6 * packed:.0f} µs packed and {1e6 * files:.0f} µs from files."
    )
    for number, (rate, seconds) in report.workers.items():
        lines.append(
            f"- {number} worker{'s' if number > 1 else ''} on this machine: {rate:,.0f} images/s by the clock from "
            f"packed shards; receiving them costs the training process {1e6 * seconds:.0f} µs an image."
        )
    return lines


def page(report: Report) -> str:
    """docs/reports/input_pipeline.md."""
    machine = ", ".join(f"{name} {each}" for name, each in report.machine.items())
    absent = [name for name in DECODERS if f"{name} packed" not in report.times]
    missing = f" Not run here, because it does not import: {' and '.join(absent)}." if absent else ""
    return f"""# Input pipeline

{chr(10).join(findings(report))}

Written by `python -m benchmarks.input_pipeline --docs`: {machine}. Load of the machine over the last five minutes:
{report.load:.1f} processes, one of them this one; where there are more than cores, others disturbed the numbers.

{report.num_images} JPEG files of {WIDTH} x {HEIGHT} pixels with a 1/f spectrum, quality {QUALITY}, in the layout of
ImageNet; training crops of {SIZE} pixels (8 % to 100 % of the area, aspect 3/4 to 4/3), mirrored in half of the cases,
bilinear with antialiasing, uint8 batches of {BATCH} in channels-last memory. Median [quartiles] of {report.rounds}
rounds, divided among {min(PROCESSES, report.rounds)} processes, for shares depend on where a process has its memory; a
round measures everything on the same batch, beginning with another case each time, and shares are those of the same
round. One process at a time, so images a second of processor time are those of one core. The floor is what no loader
that decodes with Pillow avoids: decoding, cropping, resizing and mirroring bytes that are in memory, and getting at the
pixels of all images of a batch, without reading, checksums, random numbers, joining to a batch, and labels.

**Loading**

{loading_table(report)}

**Reading alone**, in random order

{reading_table(report)}

Not cached means that the system was asked to drop the files before every round; a virtual disk may cache all the same.

Batches stay uint8 until they are on the device: float32 would be four times as many bytes. Another decoder is chosen by
name in the configuration; an image that it refuses is read by Pillow and counted. Its pixels differ from Pillow's by a
few gray levels, so a run keeps to one of them.{missing}
"""


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
    return Report(facts("cpu"), num_images, rounds, kilobytes, times, cold, parallel, load)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few images and rounds, no workers: seconds")
    parser.add_argument("--images", type=int, help="default: 256")
    parser.add_argument("--rounds", type=int, help="default: 160, a batch each")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the data are made (default: the system's)")
    parser.add_argument("--docs", action="store_true", help="write docs/reports/input_pipeline.md")
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


def main(arguments: Sequence[str] | None = None, docs: Path = ROOT / "docs") -> int:
    """Measure, print, write."""
    options = parse(arguments)
    text = page(run(options.images, options.rounds, options.folder, options.workers))
    if options.docs:
        (docs / "reports").mkdir(parents=True, exist_ok=True)
        (docs / "reports" / "input_pipeline.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
