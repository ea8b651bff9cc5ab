"""Batch jobs of the suite: job scripts for Slurm, LSF and workstations, and scaling studies made of them."""

import sys

try:
    import experiments.settings  # noqa: F401
except ImportError as error:
    if sys.argv[:1] != [
        "-m"
    ]:  # Python looks for the module of `python -m jobs.submit`, and nobody has caught errors yet
        raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
