"""Batch jobs of the suite: job scripts for Slurm, LSF and workstations, and scaling studies made of them."""
