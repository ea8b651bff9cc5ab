"""The commands of `python -m data_loaders.imagenet`: pack, verify, info."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_loaders.imagenet import packed
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.pictures import POLICIES, ImageError
from data_loaders.imagenet.sets import check_pair, open_images
from data_loaders.imagenet.shards import IMAGES_PER_SHARD, SPLITS
from data_loaders.workers import num_cores


def _pack_command(options: argparse.Namespace) -> int:
    packing = Packing(options.resize, options.quality, options.images_per_shard, options.on_corrupt)
    sets = {split: open_images(options.source, split) for split in options.split or SPLITS}
    if len(sets) == len(SPLITS):
        check_pair(sets["train"], sets["validation"])
    try:
        for split, images in sets.items():
            result = pack(
                images, options.target, split, packing, num_workers=options.workers, progress=not options.quiet
            )
            for name in result.left_out:
                print(f"{split}: left out {name}", file=sys.stderr)
            print(
                f"{split}: {len(result):,} images of {len(result.class_names):,} classes in {len(result.paths)} "
                f"shards, {result.num_bytes / 1e9:,.3f} GB; {len(result.left_out)} unreadable images left out"
            )
    except KeyboardInterrupt:
        print("interrupted: finished shards stay, and the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def _verify_command(options: argparse.Namespace) -> int:
    damages = packed.verify(options.target, progress=not options.quiet)
    for damage in damages:
        print(damage)
    print(f"{len(damages)} damages" if damages else f"{options.target} is sound")
    return 1 if damages else 0


def _info_command(options: argparse.Namespace) -> int:
    print(packed.info(options.target))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_loaders.imagenet", description="Pack ImageNet, or any set in its layout, into HDF5 shards."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("pack", _pack_command, "pack folders of images; an interrupted packing goes on where it was")
    command.add_argument("source", type=Path, metavar="SRC", help="folder with train/ and val/, or a packed set")
    command.add_argument("target", type=Path, metavar="DST", help="folder for the shards")
    command.add_argument("--resize", type=int, metavar="N", help="shrink the short side to N pixels (encodes it again)")
    command.add_argument("--quality", type=int, default=90, metavar="Q", help="of images encoded again (default: 90)")
    command.add_argument("--images-per-shard", type=int, default=IMAGES_PER_SHARD, metavar="N")
    command.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (default: cores)")
    command.add_argument("--split", action="append", choices=SPLITS, help="only this one")
    command.add_argument("--on-corrupt", choices=POLICIES, default="skip", help="unreadable images (default: skip)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command = add("verify", _verify_command, "check every byte of a packed set; exit status 1 where one is wrong")
    command.add_argument("target", type=Path, metavar="DST")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command = add("info", _info_command, "say what a packed set holds")
    command.add_argument("target", type=Path, metavar="DST")
    return parser.parse_args(arguments)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 0, 1 for damages, 2 for an error, 130 after an interruption."""
    options = parse(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = options.run(options)
        return status
    except BrokenProcessPool:
        print("error: a worker was killed, perhaps for want of memory: try fewer --workers", file=sys.stderr)
    except OSError as error:
        place = f" ({error.filename})" if error.filename and error.strerror else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
    except (ImageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
