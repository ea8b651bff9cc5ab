"""The command `python -m data_loaders.fractals`: makes a set of fractals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_loaders.fractals.sets import Settings, ensure


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a set; returns 0, or 2 after a mistake that one sentence on stderr explains, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.fractals", description="Make a set of fractals.")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make, or to take up")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="classes (10)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="training images a class (100)")
    parser.add_argument("--validation", type=int, default=20, metavar="N", help="validation images a class (20)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of an image (64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other classes (0)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files, 1 to 100 (90)")
    parser.add_argument("--variation", type=float, default=1.0, help="between images of a class, up to 2 (1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(
            num_classes=options.classes,
            images_per_class=options.images,
            validation_per_class=options.validation,
            size=options.size,
            seed=options.seed,
            quality=options.quality,
            variation=options.variation,
        )
        ensure(options.target, settings, num_workers=options.workers)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command takes it up again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
