#!/bin/bash
# A workstation or laptop without a batch system
# Written by: python -m jobs.submit config.yaml --site workstation --results '/scratch/my results' --ranks-per-node 2
# By hand: bash '/scratch/my results/jobs/job.sh'

cd /home/me/aadl || exit 1
export OMP_NUM_THREADS="1"

exec /home/me/aadl/.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 -m experiments run /home/me/aadl/config.yaml --results '/scratch/my results'
