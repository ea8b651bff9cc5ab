"""`doctor`: looks at this machine, or at all ranks of a job."""

from __future__ import annotations

import argparse

from experiments.distributed.doctor import command
from experiments.settings.yaml_file import read_yaml


def main(options: argparse.Namespace) -> int:
    """Prints what it found, see `experiments.distributed.doctor.command.main`."""
    return command.main(options, read_yaml)
