"""`doctor`: looks at this machine, or at all ranks of a job."""

from experiments.distributed.doctor.command import main

__all__ = ["main"]
