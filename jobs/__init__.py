"""Batch jobs of the suite: job scripts for Slurm, LSF and workstations, and scaling studies made of them."""

import sys


def check_versions() -> None:
    """Call before the imports of a module that is started: one sentence and exit code 2 where pydantic is too old."""
    try:
        import experiments.settings  # noqa: F401
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
