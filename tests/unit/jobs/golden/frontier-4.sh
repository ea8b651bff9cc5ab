#!/bin/bash
#SBATCH --job-name=graduate_admissions-laptop
#SBATCH --output='/scratch/my results/jobs/%x-%j.out'
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --time=2:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --account=ABC123
#SBATCH --partition=batch
#SBATCH --network=disable_rdzv_get
#
# Frontier (Oak Ridge): nodes with a 64-core EPYC and 4 MI250X, which are 8 GPUs; Slurm
# Written by: python -m jobs.submit config.yaml --site frontier --results '/scratch/my results' --account ABC123 --time 2:00:00 --nodes 4 --set training.epochs=7 --set seeds=0,1
# By hand: sbatch '/scratch/my results/jobs/job.sh'

# What a step or another launcher left in the shell that submitted would change the step of this job.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_STEP@}" "${!SRUN_@}" "${!PMI@}"
cd /home/me/aadl || exit 1
module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 craype-accel-amd-gfx90a miniforge3 rccl-net-plugin
export OMP_NUM_THREADS="7"
export LD_LIBRARY_PATH="$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH"
export NCCL_SOCKET_IFNAME="hsn0,hsn1,hsn2,hsn3"
export GLOO_SOCKET_IFNAME="hsn0"
export FI_CXI_RDZV_PROTO="alt_read"
export MIOPEN_USER_DB_PATH="${TMPDIR:-/tmp}/$USER-miopen-$SLURM_JOB_ID"
export MIOPEN_CUSTOM_CACHE_DIR="${TMPDIR:-/tmp}/$USER-miopen-$SLURM_JOB_ID"
export HDF5_USE_FILE_LOCKING="FALSE"
# The ranks save and stop by themselves before this time, in seconds since 1970.
export AADL_END_TIME=${SLURM_JOB_END_TIME:-$(($(date +%s) + 7200))}
# Made by rank 0 when the ranks stopped early, to be resumed.
export AADL_STOPPED_FILE='/scratch/my results/jobs'/.stopped-$SLURM_JOB_ID
job=$SLURM_JOB_ID
rm -f "$AADL_STOPPED_FILE"
restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=20

# A signal to this shell alone (--signal=B:) goes on to the ranks: they stop at the same step, save, and exit.
step=
forward() {
    trapped=yes
    [ -z "$step" ] || kill -s "$1" "$step"
}
trap 'forward USR1' USR1
trap 'forward USR2' USR2
trap 'forward TERM' TERM

# A controller that is busy or restarts answers a little later.
patiently() {
    local pause
    for pause in 1 2 4 8; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}

echo "job $SLURM_JOB_ID, start $((restarts + 1)), nodes $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=7 --export=ALL --kill-on-bad-exit=1 --unbuffered --gpus-per-task=1 --gpu-bind=closest \
    bash jobs/templates/rank.sh /home/me/aadl/.venv/bin/python -m experiments run /home/me/aadl/config.yaml --results '/scratch/my results' --set training.epochs=7 --set seeds=0,1 &
step=$!
trapped=yes
while [ -n "$trapped" ]; do # a trap ends wait early
    trapped=
    wait "$step"
    code=$?
done

if [ -e "$AADL_STOPPED_FILE" ]; then
    rm -f "$AADL_STOPPED_FILE"
    code=75
    # Not RUNNING: canceled, or out of time; requeueing would undo an scancel. Without an answer the job goes on.
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING
    if [ "$restarts" -lt "$max_restarts" ] && [ "$state" = RUNNING ]; then
        echo "stopped early, state saved: requeued (start $((restarts + 1)) of at most $((max_restarts + 1)))"
        patiently scontrol requeue "$job" && exit "$code"
        echo "error: scontrol requeue was refused" >&2
    fi
    echo "stopped early, state saved: the next job of the chain, or sbatch with this script, goes on" >&2
fi
exit "$code"
